"""The checks of the model pass sound models, and name planted faults of attention, weights, memory and precision."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from common.errors import UserError
from data.batches import collate
from data.tokens import load_tokenizer
from model import packed_attention
from model.architectures import read_model_config
from model.language_model import build_on_meta, check_weights
from model.packed_attention import DocumentLengths
from scripts.check import reference
from scripts.check.command import cut_model
from scripts.check.reference import compute_reference, documents_of_step, load_reference
from scripts.check.step import LINES, check, load_packed
from scripts.check.step import isolation as check_isolation
from tests.losses import loss_of
from tests.processes import ROOT
from tests.scripts.check.tiny_run import read, tiny_config, with_mix, write_examples
from tests.tiny import write_tiny_model
from training.check_result import FAILS, OK, SKIPPED


@pytest.fixture
def attention():
    """Return a function that registers another packed attention. The real one is registered again at the end."""
    yield lambda function: AttentionInterface.register(packed_attention.NAME, function)
    AttentionInterface.register(packed_attention.NAME, packed_attention.packed_attention)


@pytest.mark.parametrize(
    "family, dtype",
    [("gemma2", "fp32"), ("llama", "bf16"), ("cohere2", "bf16")],
)
def test_a_sound_model_passes(tmp_path, family, dtype) -> None:
    write_tiny_model(tmp_path / "model", family=family)
    run = read(tiny_config(tmp_path, compute_dtype=dtype))
    isolation = check_isolation(run, load_packed(run))
    assert isolation.status == OK, isolation.text
    assert isolation.text.startswith("4 documents of a row changed in turn: the logits of all others keep their bits")


def test_experts_may_round_but_not_leak(tmp_path, attention) -> None:
    write_tiny_model(tmp_path / "model", family="qwen2_moe")
    run = read(tiny_config(tmp_path))
    isolation = check_isolation(run, load_packed(run))
    assert isolation.status == OK and "as experts round" in isolation.text, isolation.text
    attention(merged)
    assert check_isolation(run, load_packed(run)).status == FAILS


def test_the_reference_avoids_the_kernel_of_experts(tmp_path, monkeypatch) -> None:
    """A B200 gave gradients to experts without tokens (pytorch#172439). The reference does not use that kernel."""
    write_tiny_model(tmp_path / "model", family="qwen2_moe")
    run = read(tiny_config(tmp_path))

    def wrong(experts, *arguments):
        nothing = experts.down_proj.sum() - experts.down_proj.sum().detach()
        return grouped_mm_experts_forward(experts, *arguments) + nothing

    monkeypatch.setitem(ExpertsInterface._global_mapping, "grouped_mm", wrong)
    with_wrong_kernel = compute_reference(run)
    monkeypatch.undo()
    assert torch.equal(with_wrong_kernel.rounding, compute_reference(run).rounding)


def merged(module, query, key, value, mask, scaling, documents, **kwargs):
    """Compute attention that takes documents 3 and 4 of a row as one document."""
    lengths = list(documents.lengths)
    if len(lengths) >= 4:
        lengths[2:4] = [sum(lengths[2:4])]
    whole = DocumentLengths(tuple(lengths), torch.tensor([0, *lengths]).cumsum(0).int())
    return packed_attention.packed_attention(module, query, key, value, mask, scaling, whole, **kwargs)


def both_ways(module, query, key, value, mask, scaling, documents, **kwargs):
    """Compute attention in which a token sees later tokens of its document."""
    parts = (x.split(documents.lengths, dim=2) for x in (query, key, value))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    out = [sdpa(q, k, v, scale=scaling, enable_gqa=True) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(out, dim=2).transpose(1, 2), None


def spoiled():
    """Return attention that gives NaN in the last document as soon as the first document is edited."""
    seen: list[torch.Tensor] = []

    def attention(module, query, key, value, mask, scaling, documents, **kwargs):
        out, weights = packed_attention.packed_attention(module, query, key, value, mask, scaling, documents, **kwargs)
        if module.layer_idx == 0:
            seen.append(query[:, :, : documents.lengths[0]].clone())
            if not torch.equal(seen[0], seen[-1]):
                out = out.index_fill(1, torch.tensor([out.shape[1] - 1]), math.nan)
        return out, weights

    return attention


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (merged, "changing document 3 of 4 moves the logits of document 4"),
        (both_ways, "sees later ones"),
        (spoiled(), "changing document 1 of 4 moves the logits of document 4 by up to inf"),
    ],
)
def test_a_leak_of_attention_fails(tmp_path, attention, fault, words) -> None:
    run = read(tiny_config(tmp_path))
    attention(fault)
    result = check_isolation(run, load_packed(run))
    assert result.status == FAILS and words in result.text, result.text


def test_weights_that_are_not_finite_fail(tmp_path) -> None:
    run = read(tiny_config(tmp_path))
    packed = load_packed(run)
    with torch.no_grad():
        packed.causal_lm.base_model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    assert "not finite" in check_isolation(run, packed).text


def test_the_reference_equals_the_whole_step(tmp_path) -> None:
    """With a mixed-in source and with weights, it equals a backward through all micro-batches of the step."""
    other_file = write_examples(
        tmp_path / "other.jsonl", [(f"why {i}", "the bank shall " * 3) for i in range(8)], weight=0.5
    )
    run = read(with_mix(tiny_config(tmp_path), other_file), ranks=2)
    packed, documents, reference = load_packed(run), documents_of_step(run), compute_reference(run)
    batch, loss = run.inputs.plan.batch(0), 0.0
    assert len(documents) == len(batch.items) > 6
    assert sum(document.weights.sum() for document in documents) == pytest.approx(batch.num_target_tokens)
    assert batch.num_target_tokens != sum((document.weights > 0).sum() for document in documents)
    packed.train()
    for micro_batch in run.inputs.deal(0).items:
        for items in filter(None, micro_batch):
            part = loss_of(packed, collate(items, run.inputs.train)) / batch.num_target_tokens
            part.backward()
            loss += part.item()
    norm = torch.stack([p.grad.square().sum() for p in packed.parameters()]).sum().sqrt().item()
    assert reference.loss == pytest.approx(loss, rel=1e-5)
    assert reference.grad_norm == pytest.approx(norm, rel=1e-5)


def test_a_model_that_does_not_fit_is_skipped(tmp_path, monkeypatch) -> None:
    run = read(tiny_config(tmp_path))
    monkeypatch.setattr(reference, "free_bytes", lambda device, ranks: 0)
    check(run, tmp_path)
    lines = {result["name"]: result for result in json.loads((tmp_path / LINES).read_text())}
    assert (lines["isolation"]["status"], lines["reference"]["status"]) == (OK, SKIPPED)
    assert "--layers 2" in lines["reference"]["text"]


def test_the_reference_rounds_weights_like_the_run(tmp_path) -> None:
    run = read(tiny_config(tmp_path, optimizer={"memory": "12N"}))
    assert all(torch.equal(p, p.bfloat16().float()) for p in load_reference(run, 100).parameters())


def test_the_reference_uses_the_runs_token_losses(tmp_path) -> None:
    run = read(tiny_config(tmp_path))
    plain = compute_reference(run).loss

    def token_losses(logits, targets):
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.5)

    run = dataclasses.replace(run, code=SimpleNamespace(token_losses=token_losses))
    assert abs(compute_reference(run).loss - plain) > 1e-3


IDS = torch.arange(3, 43)[None]


def logits(path, layers: int | None = None) -> torch.Tensor:
    """Return the logits of transformers' model, or of its first `layers` layers."""
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
    if layers is not None:
        model.base_model.layers = model.base_model.layers[:layers]
        model.config.num_hidden_layers = layers
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


# Families with and without a list of values by layer in their config.
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2_sliding", "smollm3"])
def test_a_cut_model_equals_its_first_layers(tmp_path, family) -> None:
    whole = write_tiny_model(tmp_path / "whole", family=family, tied=family != "llama")
    assert cut_model(whole, 1, tmp_path / "cut") == "the first 1 of 2 decoder layers at full width"
    config = read_model_config(str(tmp_path / "cut"))
    assert config.num_hidden_layers == 1 and len(getattr(config, "layer_types", None) or [0]) == 1
    check_weights(build_on_meta(config), str(tmp_path / "cut"))
    assert torch.equal(logits(tmp_path / "cut"), logits(whole, 1))
    assert load_tokenizer(str(tmp_path / "cut")).eos_token == "<|im_end|>"


def test_a_damaged_model_cannot_be_cut(tmp_path, capfd) -> None:
    """A missing tensor is missing in the cut model too. A file that was cut off is named."""
    whole = write_tiny_model(tmp_path / "whole")
    file = whole / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    capfd.readouterr()
    cut_model(whole, 1, tmp_path / "cut")
    with pytest.raises(UserError, match="model.layers.0.mlp.up_proj.weight"):
        check_weights(build_on_meta(read_model_config(str(tmp_path / "cut"))), str(tmp_path / "cut"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="model.safetensors is cut off"):
        cut_model(whole, 1, tmp_path / "again")
    assert capfd.readouterr() == ("", "")


def test_train_check_runs_the_check_script(monkeypatch) -> None:
    """`train.py --check` becomes scripts/check.py in the same process, with the same arguments and this train.py."""
    called = []
    monkeypatch.setattr("os.execv", lambda *command: called.append(command) or sys.exit())
    monkeypatch.setattr(sys, "argv", ["train.py", "configs/quickstart.py", "--check", "run.seed=1"])
    train = str(ROOT / "train.py")
    source = Path(train).read_text()
    with pytest.raises(SystemExit):
        exec(compile(source, "train.py", "exec"), {"__name__": "__main__", "__file__": train})
    options = ["--train", train, "configs/quickstart.py", "run.seed=1"]
    assert called == [(sys.executable, [sys.executable, str(ROOT / "scripts/check.py"), *options])]
    assert source.index("before_imports(") < source.index("import torch")
