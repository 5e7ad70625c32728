"""Losses and gradients of our packed model on a device against fp32 on the CPU, and the isolation of documents.

With a GPU the device is CUDA, and bf16 runs the varlen kernel. On the CPU the same comparison runs for two families, to test that
it passes, and that it fails if attention leaks. The error of a gradient is the norm of the difference divided by the norm of the
gradient, over all parameters. bf16 passes if its error is about the error of transformers' eager attention in bf16 with one
document at a time.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import model.packed_attention
from data.batches import collate
from model.architectures import read_model_config
from model.language_model import PackedLanguageModel, load_for_evaluation, parameter_names
from tests.in_memory import InMemory
from tests.losses import eager, loss_of
from tests.tiny import FAMILIES, write_tiny_model

SMOLLM2 = Path(__file__).resolve().parents[2] / "artifacts" / "models" / "SmolLM2-135M-Instruct"
LENGTHS = [37, 5, 90, 64]
Gradients = dict[str, torch.Tensor]
cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
CASES = [("cpu", "llama"), ("cpu", "gemma2")]
CASES += [pytest.param("cuda", family, marks=cuda) for family in [*FAMILIES, "SmolLM2, or a random model of 135M"]]


def load(path: str, dtype: torch.dtype, device: str) -> PackedLanguageModel:
    return load_for_evaluation(read_model_config(path), path, dtype, torch.device(device))


def packed(model: PackedLanguageModel, documents: InMemory, device: str) -> tuple[float, Gradients]:
    """Return the mean loss and the gradients of all documents in a single micro-batch."""
    batch = collate(tuple(range(len(documents))), documents).to(torch.device(device))
    loss = loss_of(model, batch) / batch.target_ids.numel()
    loss.backward()
    return loss.item(), {name: p.grad.float().cpu() for name, p in parameter_names(model).items()}


def eager_gradients(path: str, documents: InMemory, device: str, names: Gradients) -> Gradients:
    """Return the gradients of transformers' eager attention in bf16, each document alone."""
    model, total = eager(path, documents.ids, documents.weights, torch.bfloat16, device)
    (total / sum(len(ids) - 1 for ids in documents.ids)).backward()
    return {name: p.grad.float().cpu() for name, p in model.named_parameters() if name in names}


def error(gradients: Gradients, expected: Gradients) -> float:
    """Return the relative error of all gradients together."""
    assert gradients.keys() == expected.keys()
    squares = sum((gradients[name] - expected[name]).double().square().sum() for name in expected)
    return float((squares / sum(g.double().square().sum() for g in expected.values())).sqrt())


def is_isolated(model: PackedLanguageModel, documents: InMemory, vocabulary: int, device: str) -> bool:
    """Return whether the states of the second document stay bitwise equal if the first document changes."""
    edited = InMemory([(documents.ids[0] + 1) % vocabulary, *documents.ids[1:]], documents.weights)
    states = []
    with torch.no_grad():
        for source in (documents, edited):
            batch = collate((0, 1), source).to(torch.device(device))
            states.append(model(batch)[batch.target_positions >= len(documents.ids[0])])
    return torch.equal(*states)


def compare(path: str, lengths: list[int], device: str) -> dict[str, float | bool]:
    """Return relative errors against fp32 on the CPU, and whether documents are isolated."""
    vocabulary, rng = min(259, read_model_config(path).vocab_size), np.random.default_rng(0)
    documents = InMemory([rng.integers(3, vocabulary, n) for n in lengths], [np.arange(n) > 0 for n in lengths])
    expected, reference = packed(load(path, torch.float32, "cpu"), documents, "cpu")
    row: dict[str, float | bool] = {"eager": error(eager_gradients(path, documents, device, reference), reference)}
    for dtype, key in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        model = load(path, dtype, device)
        loss, gradients = packed(model, documents, device)
        row[f"{key} loss"], row[f"{key} gradient"] = abs(loss / expected - 1), error(gradients, reference)
        row[f"{key} isolated"] = is_isolated(model, documents, vocabulary, device)
    return row


def is_good(row: dict[str, float | bool]) -> bool:
    fp32 = row["fp32 loss"] < 1e-5 and row["fp32 gradient"] < 1e-3 and row["fp32 isolated"]
    bf16 = row["bf16 loss"] < 2e-2 and row["bf16 gradient"] < 1.5 * row["eager"] + 1e-3 and row["bf16 isolated"]
    return bool(fp32 and bf16)


@pytest.mark.parametrize(("device", "family"), CASES)
def test_losses_and_gradients_match_fp32_on_cpu(tmp_path, device, family) -> None:
    if family in FAMILIES:
        row = compare(str(write_tiny_model(tmp_path, family)), LENGTHS, device)
    elif SMOLLM2.is_dir():
        row = compare(str(SMOLLM2), [300, 512, 64, 148], device)
    else:
        path = write_tiny_model(tmp_path, vocab_size=32768, hidden=768, layers=12)
        row = compare(str(path), [300, 512, 64, 148], device)
    assert is_good(row), json.dumps(row, indent=1)


def test_the_comparison_fails_where_attention_leaks(tmp_path, monkeypatch) -> None:
    products = model.packed_attention.product_attention
    monkeypatch.setattr(
        model.packed_attention,
        "product_attention",
        lambda q, k, v, lengths, scale: products(q, k, v, (sum(lengths),), scale),
    )
    row = compare(str(write_tiny_model(tmp_path)), LENGTHS, "cpu")
    assert not is_good(row) and not row["bf16 isolated"] and row["bf16 gradient"] > 2 * row["eager"]
