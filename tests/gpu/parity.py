"""Losses and gradients of our model on a device against the CPU in fp32: python -m tests.gpu.parity families|model OUT DEVICE tiny|full

For each model: packed documents in fp32, packed documents in bf16 (on CUDA the varlen kernel), and transformers' own eager
attention in bf16, one document after the other. A gradient error is the norm of the difference over the norm of the gradient,
over all parameters. bf16 passes if its gradient is about as near to the fp32 gradient as eager's, and editing one document
leaves the states of the next one equal to the bit.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from data.batches import collate
from model.architectures import read_model_config
from model.language_model import PackedLanguageModel, load_for_evaluation, num_parameters, parameter_names
from tests.in_memory import InMemory
from tests.tiny import FAMILIES, write_tiny_model

SMOLLM2 = Path("artifacts/models/SmolLM2-135M-Instruct")
CPU = torch.device("cpu")
Gradients = dict[str, torch.Tensor]


def make_documents(lengths: list[int], vocabulary: int, seed: int = 0) -> InMemory:
    """Random documents; all tokens but the first are targets."""
    rng = np.random.default_rng(seed)
    return InMemory([rng.integers(3, vocabulary, n) for n in lengths], [np.arange(n) > 0 for n in lengths])


def load(path: str, dtype: torch.dtype, device: torch.device) -> PackedLanguageModel:
    return load_for_evaluation(read_model_config(path), path, dtype, device)


def packed(model: PackedLanguageModel, documents: InMemory, device: torch.device) -> tuple[float, Gradients]:
    """Mean loss and gradients of all documents in one micro-batch."""
    batch = collate(tuple(range(len(documents))), documents).to(device)
    loss = model(batch) / batch.target_ids.numel()
    loss.backward()
    return loss.item(), {name: p.grad.float().cpu() for name, p in parameter_names(model).items()}


def eager(path: str, documents: InMemory, device: torch.device, names: Gradients) -> tuple[float, Gradients]:
    """The same with transformers' eager attention in bf16, each document alone."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager").to(device)
    targets, total = sum(len(ids) - 1 for ids in documents.ids), 0.0
    for tokens in documents.ids:
        ids = torch.from_numpy(tokens)[None].to(device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = F.cross_entropy(logits, ids[0, 1:], reduction="sum") / targets
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.float().cpu() for name, p in model.named_parameters() if name in names}


def difference(found: Gradients, expected: Gradients) -> float:
    """Relative error of all gradients together."""
    assert found.keys() == expected.keys()
    error = sum((found[name] - expected[name]).double().square().sum() for name in expected)
    return float((error / sum(g.double().square().sum() for g in expected.values())).sqrt())


def is_isolated(model: PackedLanguageModel, documents: InMemory, vocabulary: int, device: torch.device) -> bool:
    """Whether the states of the second document keep their bits when the first one changes."""
    edited = InMemory([(documents.ids[0] + 1) % vocabulary, *documents.ids[1:]], documents.weights)
    states = []
    with torch.no_grad():
        for source in (documents, edited):
            states.append(model.hidden_states(collate((0, 1), source).to(device))[0, len(documents.ids[0]) :])
    return torch.equal(*states)


def compare(name: str, path: str, lengths: list[int], device: torch.device) -> dict:
    """One row: relative errors of losses and gradients against fp32 on the CPU, and whether all of them are small enough."""
    vocabulary = min(259, read_model_config(path).vocab_size)
    documents = make_documents(lengths, vocabulary)
    expected, reference = packed(load(path, torch.float32, CPU), documents, CPU)
    row: dict = {"model": name, "loss": expected}
    for dtype, key in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        model = load(path, dtype, device)
        loss, gradients = packed(model, documents, device)
        row[f"{key}_loss"], row[f"{key}_gradient"] = abs(loss / expected - 1), difference(gradients, reference)
        row[f"{key}_isolated"] = is_isolated(model, documents, vocabulary, device)
        row["parameters"] = num_parameters(model)
    loss, gradients = eager(path, documents, device, reference)
    row["eager_loss"], row["eager_gradient"] = abs(loss / expected - 1), difference(gradients, reference)
    row["ok"] = (
        row["fp32_loss"] < 1e-5
        and row["fp32_gradient"] < 1e-3
        and row["bf16_loss"] < 2e-2
        and row["bf16_gradient"] < 1.5 * row["eager_gradient"] + 1e-3
        and row["fp32_isolated"]
        and row["bf16_isolated"]
    )
    return row


def main() -> None:
    what, out, place, size = sys.argv[1:]
    device = torch.device(place)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if what == "families":
            for family in list(FAMILIES) if size == "full" else ["llama", "gemma2"]:
                path = write_tiny_model(Path(folder, family), family)
                rows.append(compare(family, str(path), [37, 5, 90, 64], device))
        elif SMOLLM2.is_dir() and size == "full":
            rows.append(compare("SmolLM2-135M-Instruct", str(SMOLLM2), [300, 512, 64, 148], device))
        else:
            shape = {"vocab_size": 32768, "hidden": 768, "layers": 12} if size == "full" else {"layers": 1}
            path = write_tiny_model(Path(folder, "random"), **shape)
            rows.append(compare("random llama", str(path), [300, 512, 64, 148], device))
    wrong = [row["model"] for row in rows if not row["ok"]]
    worst = {key: max(row[key] for row in rows) for key in ("fp32_loss", "fp32_gradient", "bf16_loss", "bf16_gradient")}
    text = f"{len(rows)} models, largest relative errors: " + ", ".join(
        f"{k.replace('_', ' ')} {v:.1e}" for k, v in worst.items()
    )
    text += f"; not equal enough: {', '.join(wrong)}" if wrong else ""
    Path(out).write_text(json.dumps({"ok": not wrong, "text": text, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
