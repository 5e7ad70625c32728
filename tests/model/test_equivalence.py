"""The packed model against transformers' eager attention on each document, and the isolation of packed documents."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

import model.loss
from common.errors import UserError
from data.batches import collate
from model import packed_attention
from model.architectures import PROVED, check_supported, has_experts, read_model_config
from model.language_model import build_on_meta, load_weights
from model.loss import HeadSettings, visit_logits
from model.rope import check_document_isolation
from tests.in_memory import InMemory
from tests.losses import assert_same_gradients, eager, loss_of, loss_sum
from tests.operators import OperatorHook
from tests.tiny import FAMILIES, OTHER_FAMILIES, write_tiny_model

ALL = FAMILIES | OTHER_FAMILIES
# (family, form): FAMILIES with both forms, OTHER_FAMILIES with one form each, because the forms run the same code in all families.
BOTH = [(family, i) for family in FAMILIES for i in (0, 1)] + [(f, n % 2) for n, f in enumerate(OTHER_FAMILIES)]


def recording(sizes: list[int]) -> OperatorHook:
    """Record the number of elements of each tensor that any operation returns."""
    return OperatorHook(
        lambda _, __, out: sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
    )


def documents(lengths: list[int], seed: int = 0, vocabulary: int = 259) -> InMemory:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, vocabulary, n) for n in lengths]
    is_target = [rng.random(n) < 0.6 for n in lengths]
    for flags in is_target:
        flags[0], flags[-1] = False, True
    return InMemory(ids, is_target)


def load(path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    packed = build_on_meta(read_model_config(str(path)))
    load_weights(packed, str(path), torch.device("cpu"))
    return packed.to(dtype) if dtype != torch.float32 else packed


def test_supported_model_types_are_those_tested_here() -> None:
    assert sorted({model_type for model_type, _ in ALL.values()}) == sorted(PROVED)


@pytest.mark.parametrize("family, form", BOTH)
def test_loss_and_gradients_equal_eager_document_by_document(tmp_path, monkeypatch, family, form) -> None:
    """Sliding windows have 8 tokens, documents up to 90. Targets are in a single chunk or in several chunks."""
    tied, chunk, queries = [(True, 7, 16), (False, 1024, 512)][form]
    monkeypatch.setattr(model.loss, "CHUNK_TOKENS", chunk)
    monkeypatch.setattr(packed_attention, "CHUNK_QUERIES", queries)
    path = write_tiny_model(tmp_path / "model", family=family, tied=tied)
    source = documents([37, 5, 90, 2, 61])
    packed = load(path)
    loss = loss_of(packed, collate((0, 1, 2, 3, 4), source))
    loss.backward()

    theirs, total = eager(path, source.ids, source.weights)
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    assert len(packed.extra_fsdp_units()) == (0 if tied else 2)
    assert_same_gradients(packed.causal_lm, theirs)


@pytest.mark.parametrize("family, form", BOTH)
def test_document_never_attends_to_previous_document(tmp_path, family, form) -> None:
    """If document 1 and its length change, the logits of document 2 stay bitwise equal.

    With experts they stay equal up to rounding, because the rounding of a product over an expert's tokens depends on their number.
    """
    dtype = (torch.float32, torch.bfloat16)[form]
    packed = load(write_tiny_model(tmp_path / "model", family=family), dtype)
    second = documents([50], seed=9).ids[0]
    results = []
    for seed, length in [(1, 40), (2, 40), (3, 77), (4, 3)]:
        first = documents([length], seed=seed).ids[0]
        source = documents([length, 50])
        source.ids[0], source.ids[1] = first, second
        with torch.no_grad():
            positions = torch.arange(length, length + 50)  # all states of document 2
            hidden = packed(dataclasses.replace(collate((0, 1), source), target_positions=positions))
            visit_logits(packed.head, hidden, lambda logits, start: results.append(logits))
    if has_experts(packed.causal_lm.config):
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        assert all((results[0] - result).abs().max() < tolerance * results[0].abs().max() for result in results[1:])
    else:
        assert all(torch.equal(results[0], result) for result in results[1:])
    assert hidden.dtype == dtype and results[0].std() > 0.01


def test_gradient_of_frequent_token_is_rounded_once(tmp_path) -> None:
    """A sum over 2,000 occurrences in bf16 would lose half of the gradient."""
    packed = load(write_tiny_model(tmp_path / "model", tied=False), torch.bfloat16)
    occurrences = []
    packed.causal_lm.model.layers[0].register_full_backward_hook(lambda _, grads, __: occurrences.append(grads[0][0]))
    source = documents([250] * 10)
    for ids in source.ids:
        ids[50:] = 7
    batch = collate(range(10), source)
    packed(batch).sum().backward()
    gradient = packed.embedding.weight.grad.double()
    exact = torch.zeros_like(gradient).index_add_(0, batch.input_ids[0], occurrences[0].double())
    exact[2] = 0  # transformers gives no gradient to the padding token
    assert occurrences[0].dtype == torch.bfloat16 and exact[7].norm() > 0
    assert ((gradient - exact).norm(dim=1) <= 2**-8 * exact.norm(dim=1)).all()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_without_targets_loss_and_gradients_are_zero(tmp_path, family) -> None:
    packed = load(write_tiny_model(tmp_path / "model", family=family, tied=False))
    loss = loss_of(packed, collate((), documents([3])))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in packed.parameters())


def test_loss_memory_does_not_grow_with_targets(monkeypatch) -> None:
    """In forward and backward, no tensor is larger than the logits of a chunk or the gradient of the weight."""
    monkeypatch.setattr(model.loss, "CHUNK_TOKENS", 16)
    for targets in (64, 512):
        hidden = torch.randn(targets, 8, requires_grad=True)
        weight = torch.randn(1000, 8, requires_grad=True)
        with recording(sizes := []):
            settings = HeadSettings(0.5, 3.0)
            loss_sum(hidden, weight, torch.arange(targets), settings).backward()
        assert max(sizes) == 16 * 1000


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_no_score_matrix_of_a_row_is_created(tmp_path, monkeypatch, family) -> None:
    """In forward and backward, no operation creates a 500 x 500 tensor for a document of 500 tokens."""
    monkeypatch.setattr(packed_attention, "CHUNK_QUERIES", 16)
    packed = load(write_tiny_model(tmp_path / "model", family=family))
    batch = collate((0, 1), documents([500, 100]))
    with recording(sizes := []):
        packed(batch).sum().backward()
    assert max(sizes) <= 600 * 128


def test_softcap_saves_no_scores_for_backward(monkeypatch) -> None:
    """Autograd saves queries, keys and values only; a score matrix would have 4 x 500 x 500 elements."""
    monkeypatch.setattr(packed_attention, "CHUNK_QUERIES", 16)
    query, key, value = (torch.randn(1, heads, 500, 16, requires_grad=True) for heads in (4, 2, 2))
    saved = {}
    lengths = packed_attention.DocumentLengths((500,), torch.tensor([0, 500], dtype=torch.int32))

    def record(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        out, _ = packed_attention.packed_attention(None, query, key, value, None, 0.25, lengths, softcap=2.0)
    assert sum(saved.values()) <= sum(tensor.nbytes for tensor in (query, key, value))
    out.sum().backward()
    assert query.grad.abs().max() > 0


ROPE = {"rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    "kind, settings, words",
    [
        ("t5", {}, "t5 is no causal language model"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attention to later tokens"),
        ("llava", {}, "llava has more parts than text, and its text part, llama, is not supported by itself"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "weights quantised by gptq .*original weights"),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": ROPE | {"rope_type": "dynamic"},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                }
            },
            "RoPE type dynamic",
        ),
    ],
)
def test_unsupported_models_are_refused_by_name(kind, settings, words) -> None:
    with pytest.raises(UserError, match=words):
        config = AutoConfig.for_model(kind, **settings)
        check_supported(config)
        check_document_isolation(config)


def test_weights_that_do_not_fit_are_one_sentence(tmp_path) -> None:
    path = write_tiny_model(tmp_path / "model")
    config = read_model_config(str(path))
    config.intermediate_size = 130
    with pytest.raises(UserError, match="has shape"):
        load_weights(build_on_meta(config), str(path), torch.device("cpu"))
    config = read_model_config(str(path))
    config.num_hidden_layers = 3
    config.layer_types = None
    with pytest.raises(UserError, match="has no tensor model.layers.2"):
        load_weights(build_on_meta(config), str(path), torch.device("cpu"))
    settings = (path / "config.json").read_text(encoding="utf-8")
    (path / "config.json").write_text(settings.replace('"attention_dropout": 0.0', '"attention_dropout": "0.0"'))
    with pytest.raises(UserError, match="no valid model configuration: .*'attention_dropout' with value '0.0'"):
        read_model_config(str(path))
