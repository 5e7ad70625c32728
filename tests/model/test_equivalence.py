"""The packed model against transformers' eager attention, document by document; and documents against each other."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import model.loss
from data.batches import MicroBatch, collate
from data.examples import Documents
from errors import UserError
from model.language_model import build_on_meta, check_supported, load_weights, num_parameters, read_model_config
from model.loss import cross_entropy_sum
from tests.tiny import write_tiny_model


def documents(lengths: list[int], seed: int = 0, vocabulary: int = 259) -> Documents:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, vocabulary, n) for n in lengths]
    is_target = [rng.random(n) < 0.6 for n in lengths]
    for flags in is_target:
        flags[0], flags[-1] = False, True
    counts = np.array([flags.sum() for flags in is_target])
    return Documents(ids, is_target, np.array(lengths), counts, "", "")


def load(path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    packed = build_on_meta(read_model_config(str(path)))
    load_weights(packed, str(path), torch.device("cpu"))
    return packed.to(dtype) if dtype != torch.float32 else packed


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("chunk", [512, 7])
def test_loss_and_gradients_equal_eager_document_by_document(tmp_path, monkeypatch, family, tied, chunk) -> None:
    monkeypatch.setattr(model.loss.cross_entropy_sum, "__defaults__", (chunk,))
    path = write_tiny_model(tmp_path / "model", family=family, tied=tied)
    made = documents([37, 5, 90, 2, 61])
    packed = load(path)
    loss = packed(collate((0, 1, 2, 3, 4), made))
    loss.backward()

    eager = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    total = torch.zeros(())
    for ids, flags in zip(made.ids, made.is_target, strict=True):
        logits = eager(torch.from_numpy(ids)[None]).logits[0]
        where = torch.from_numpy(np.flatnonzero(flags))
        total = total + torch.nn.functional.cross_entropy(
            logits[where - 1], torch.from_numpy(ids)[where], reduction="sum"
        )
    total.backward()

    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    expected = dict(eager.named_parameters())
    ours = dict(packed.causal_lm.named_parameters())
    assert ours.keys() == expected.keys()
    for name, parameter in ours.items():
        scale = expected[name].grad.abs().max().item()
        assert (parameter.grad - expected[name].grad).abs().max().item() < 1e-5 * max(1.0, scale), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_document_never_sees_the_one_before(tmp_path, family, dtype) -> None:
    """Document 1 changes, its length too: document 2's hidden states and logits stay the same to the last bit."""
    packed = load(write_tiny_model(tmp_path / "model", family=family), dtype)
    head = packed.causal_lm.get_output_embeddings()
    second = documents([50], seed=9).ids[0]
    seen = []
    for seed, length in [(1, 40), (2, 40), (3, 77), (4, 3)]:
        first = documents([length], seed=seed).ids[0]
        made = documents([length, 50])
        made.ids[0], made.ids[1] = first, second
        with torch.no_grad():
            seen.append(head(packed.hidden_states(collate((0, 1), made))[0, length:]))
    assert all(torch.equal(seen[0], other) for other in seen[1:])
    assert seen[0].dtype == dtype and seen[0].float().std() > 0.01


def test_without_a_target_loss_and_gradients_are_zero(tmp_path) -> None:
    packed = load(write_tiny_model(tmp_path / "model", tied=False))
    loss = packed(collate((), documents([3])))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in packed.parameters())


def test_chunks_add_up_in_bf16_as_in_one() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50, 16, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(0, 50, (300,))
    whole = torch.autograd.grad(cross_entropy_sum(hidden, weight, ids, 1000), (hidden, weight))
    chunked = torch.autograd.grad(cross_entropy_sum(hidden, weight, ids, 3), (hidden, weight))
    assert torch.equal(whole[0], chunked[0])
    assert (whole[1].float() - chunked[1].float()).abs().max() <= 2**-7 * whole[1].float().abs().max()


def test_inv_freq_is_fp32_and_right_after_meta(tmp_path) -> None:
    path = write_tiny_model(tmp_path / "model")
    rotary = load(path).causal_lm.model.rotary_emb
    expected = AutoModelForCausalLM.from_pretrained(path).model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, expected.inv_freq)
    assert torch.equal(rotary.original_inv_freq, expected.inv_freq)


def test_tied_stays_tied_and_is_counted_once(tmp_path) -> None:
    tied, untied = (load(write_tiny_model(tmp_path / str(t), tied=t)) for t in (True, False))
    assert tied.causal_lm.lm_head.weight is tied.causal_lm.model.embed_tokens.weight
    assert untied.causal_lm.lm_head.weight is not untied.causal_lm.model.embed_tokens.weight
    assert num_parameters(untied) - num_parameters(tied) == 384 * 64


@pytest.mark.parametrize(
    "family, words",
    [("mistral_sliding", "sliding window of 8"), ("gemma2", "logit softcapping"), ("granite", "logit scaling")],
)
def test_what_needs_more_than_plain_causal_attention_is_refused_by_name(tmp_path, family, words) -> None:
    with pytest.raises(UserError, match=words):
        read_model_config(str(write_tiny_model(tmp_path / "model", family=family)))


def test_an_unchecked_architecture_and_dynamic_rope_are_refused() -> None:
    with pytest.raises(UserError, match="model type gpt2 has not been checked"):
        check_supported(AutoConfig.for_model("gpt2"))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UserError, match="RoPE type dynamic"):
        check_supported(AutoConfig.for_model("llama", rope_parameters=rope))


def test_a_missing_tensor_and_a_wrong_shape_are_one_sentence(tmp_path) -> None:
    path = write_tiny_model(tmp_path / "model")
    config = read_model_config(str(path))
    config.intermediate_size = 130
    with pytest.raises(UserError, match="has shape"):
        load_weights(build_on_meta(config), str(path), torch.device("cpu"))
    config = read_model_config(str(path))
    config.num_hidden_layers = 3
    config.layer_types = None
    with pytest.raises(UserError, match="holds no tensor model.layers.2"):
        load_weights(build_on_meta(config), str(path), torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_varlen_kernel_agrees_with_attention_per_document(tmp_path, family) -> None:
    """bf16 on CUDA against fp32 on the CPU; and isolation on CUDA, to the last bit."""
    path = write_tiny_model(tmp_path / "model", family=family)
    made = documents([37, 5, 90, 64])
    batch: MicroBatch = collate((0, 1, 2, 3), made)
    expected = load(path)(batch).item()
    cuda = load(path, torch.bfloat16).to("cuda")
    assert cuda(batch.to(torch.device("cuda"))).item() == pytest.approx(expected, rel=2e-2)
    second = []
    for first in (0, 2):
        moved = collate((first, 3), made).to(torch.device("cuda"))
        second.append(cuda.hidden_states(moved)[0, made.lengths[first] :])
    assert torch.equal(*second)
