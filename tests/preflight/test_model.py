"""The checks of the model pass on what is right, and name what is wrong."""

import dataclasses

import pytest
import torch
from transformers import AttentionInterface

import preflight.reference as reference_module
from data.batches import collate
from model import packed_attention
from model.packed_attention import DocumentLengths
from preflight.model import check_leak, compare_losses, describe_gradient, load_packed, packed_losses
from preflight.reference import Reference, compute, load_reference
from preflight.result import FAILS, OK, SKIPPED
from tests.preflight.tiny_run import read, tiny_config, with_mix, write_examples
from tests.tiny import write_tiny_model


def reference_of(run, documents, seconds: float = 60.0) -> Reference:
    reference = load_reference(run, documents)
    assert reference is not None
    compute(reference, seconds)
    return reference


@pytest.fixture
def leaky(monkeypatch):
    """Attention over the whole row, as if it were a single document."""
    exact = packed_attention.packed_attention

    def attention(module, query, key, value, mask, scaling, documents, **kwargs):
        total = sum(documents.lengths)
        whole = DocumentLengths((total,), documents.cu_seq_lens[[0, -1]])
        return exact(module, query, key, value, mask, scaling, whole, **kwargs)

    AttentionInterface.register(packed_attention.NAME, attention)
    yield
    AttentionInterface.register(packed_attention.NAME, exact)


@pytest.mark.parametrize(
    "family, dtype", [("llama", "fp32"), ("gemma2", "fp32"), ("granite", "fp32"), ("llama", "bf16")]
)
def test_a_sound_model_passes(tmp_path, family, dtype) -> None:
    write_tiny_model(tmp_path / "model", family=family)
    run = read(tiny_config(tmp_path, compute_dtype=dtype))
    packed = load_packed(run)
    leak = check_leak(run, packed)
    assert (leak.status, leak.figures["leak"], leak.figures["later"]) == (OK, 0, 0), leak.text
    assert leak.figures["moved"] > 0
    documents, losses = packed_losses(run, packed)
    result = compare_losses(run, losses, reference_of(run, documents))
    assert result.status == OK, result.text
    assert result.figures["documents"] == 6 and result.figures["largest_relative"] < (1e-5 if dtype == "fp32" else 0.02)


def test_leaky_attention_is_found_by_the_edit_and_by_the_loss(tmp_path, leaky) -> None:
    run = read(tiny_config(tmp_path))
    packed = load_packed(run)
    leak = check_leak(run, packed)
    assert leak.status == FAILS and "documents see each other" in leak.text and leak.figures["leak"] > 0.01
    documents, losses = packed_losses(run, packed)
    result = compare_losses(run, losses, reference_of(run, documents))
    assert result.status == FAILS and result.figures["largest_relative"] > 0.001, result.text


def test_attention_to_later_tokens_is_found(tmp_path, monkeypatch) -> None:
    def both_ways(module, query, key, value, mask, scaling, documents, **kwargs):
        parts = (x.split(documents.lengths, dim=2) for x in (query, key, value))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        out = [sdpa(q, k, v, scale=scaling, enable_gqa=True) for q, k, v in zip(*parts, strict=True)]
        return torch.cat(out, dim=2).transpose(1, 2), None

    AttentionInterface.register(packed_attention.NAME, both_ways)
    try:
        run = read(tiny_config(tmp_path))
        result = check_leak(run, load_packed(run))
    finally:
        AttentionInterface.register(packed_attention.NAME, packed_attention.packed_attention)
    assert result.status == FAILS and "sees later ones" in result.text and result.figures["leak"] == 0


def test_wrong_weights_are_found_by_the_loss(tmp_path) -> None:
    run = read(tiny_config(tmp_path))
    packed = load_packed(run)
    with torch.no_grad():
        packed.causal_lm.base_model.layers[0].mlp.down_proj.weight.mul_(1.1)
    documents, losses = packed_losses(run, packed)
    assert compare_losses(run, losses, reference_of(run, documents)).status == FAILS


def test_the_reference_is_the_loss_and_gradient_of_the_whole_step(tmp_path) -> None:
    """With a mixed-in source and with weights: the same as one backward through all micro-batches of the step."""
    other = write_examples(
        tmp_path / "other.jsonl", [(f"why {i}", "the bank shall " * 3) for i in range(8)], weight=0.5
    )
    run = read(with_mix(tiny_config(tmp_path), other), ranks=2)
    packed = load_packed(run)
    documents, losses = packed_losses(run, packed)
    reference = reference_of(run, documents)
    batch = run.inputs.plan.batch(0)
    assert len(documents) == batch.num_examples > 6
    assert sum(document.divisor for document in documents) == pytest.approx(batch.num_target_tokens)
    assert batch.num_target_tokens != sum((document.weights > 0).sum() for document in documents)
    packed.train()
    for micro_batch in run.inputs.deal(0).items:
        for items in filter(None, micro_batch):
            (packed(collate(items, run.inputs.train)) / batch.num_target_tokens).backward()
    norm = torch.stack([p.grad.square().sum() for p in packed.parameters()]).sum().sqrt().item()
    found = reference.as_json()
    assert found["complete"] and found["documents"] == batch.num_examples
    assert found["loss"] == pytest.approx(sum(losses) / batch.num_target_tokens, rel=1e-5)
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert describe_gradient(reference).status == OK


def test_what_is_left_out_for_time_is_said(tmp_path) -> None:
    run = read(tiny_config(tmp_path))
    documents, losses = packed_losses(run, load_packed(run))
    reference = reference_of(run, documents, seconds=-1.0)
    result = compare_losses(run, losses, reference)
    assert (result.status, result.figures["documents"], result.figures["of_documents"]) == (OK, 1, 6)
    assert reference.as_json()["complete"] is False and describe_gradient(reference).status == SKIPPED


def test_without_memory_for_the_gradient_the_loss_is_still_compared(tmp_path, monkeypatch) -> None:
    run = read(tiny_config(tmp_path, compute_dtype="bf16"))
    run = dataclasses.replace(run, compute_dtype=torch.bfloat16)
    documents, losses = packed_losses(run, load_packed(run))
    count = sum(p.numel() for p in load_packed(run).parameters())
    monkeypatch.setattr("preflight.reference._working_bytes", lambda config, longest: 0)
    for room, dtype, gradient in ((8, "float32", True), (4, "bfloat16", True), (2, "bfloat16", False)):
        monkeypatch.setattr("preflight.reference.free_bytes", lambda device, ranks, room=room: count * room / 0.8 + 1)
        reference = reference_of(run, documents)
        assert (reference.as_json()["dtype"], reference.has_gradient) == (dtype, gradient)
        assert compare_losses(run, losses, reference).status == OK
    assert reference.as_json()["grad_norm"] is None and describe_gradient(reference).status == SKIPPED
    monkeypatch.setattr("preflight.reference.free_bytes", lambda device, ranks: count)
    assert load_reference(run, documents) is None


def test_a_gradient_that_memory_does_not_hold_is_given_up_and_the_losses_are_kept(tmp_path, monkeypatch) -> None:
    run = read(tiny_config(tmp_path))
    documents, losses = packed_losses(run, load_packed(run))
    exact, calls = reference_module.document_loss, []

    def full(model, document):
        calls.append(torch.is_grad_enabled())
        if len(calls) == 3:
            raise torch.OutOfMemoryError("full")
        return exact(model, document)

    monkeypatch.setattr(reference_module, "document_loss", full)
    reference = reference_of(run, documents)
    assert calls == [True, True, True, False, False, False, False]
    assert reference.complete and reference.gradient_norm() is None
    assert compare_losses(run, losses, reference).status == OK


def test_the_reference_has_the_bf16_weights_of_a_run_that_trains_them(tmp_path) -> None:
    run = read(tiny_config(tmp_path, optimizer={"memory": "12N"}))
    documents, _ = packed_losses(run, load_packed(run))
    reference = load_reference(run, documents)
    assert all(torch.equal(p, p.bfloat16().float()) for p in reference.model.parameters())
    assert not all(torch.equal(p, p.bfloat16().float()) for p in load_packed(run).parameters())
