"""The proof of a model type at the start of a run, and planted faults that it must catch."""

import json

import pytest
import torch

import model.proof
from common.errors import UserError
from model import language_model, mixers
from model.architectures import is_proved, read_model_config
from model.loss import HeadSettings
from model.proof import prove, shrink
from tests.tiny import AT_START, tiny_config, write_tiny_model

CPU = torch.device("cpu")
PACKED = [kind for kind in AT_START if kind not in ("bloom", "llama4_text")]


@pytest.mark.parametrize("kind", PACKED)
def test_proof_finds_that_documents_can_be_packed(tmp_path, kind) -> None:
    proof = prove(tiny_config(kind, tied=False), CPU, tmp_path)
    assert (proof.packed, proof.failed) == (True, "")
    assert proof.size and proof.loss_error < 1e-6 and 0 < proof.gradient_error < 2e-4


@pytest.mark.parametrize("kind, words", [("bloom", "the loss differs"), ("llama4_text", "the loss differs")])
def test_type_that_cannot_be_packed_is_alone(tmp_path, kind, words) -> None:
    """ALiBi counts tokens of the whole row, and Llama 4 its chunks."""
    proof = prove(tiny_config(kind, tied=False), CPU, tmp_path)
    assert not proof.packed and words in proof.failed
    assert proof.loss_error < 1e-6 and proof.gradient_error < 2e-4


def test_proof_is_found_once(tmp_path, monkeypatch) -> None:
    config = tiny_config("gpt2", tied=False)
    first = prove(config, CPU, tmp_path)
    monkeypatch.setattr(model.proof, "_prove", lambda *_: pytest.fail("proved again"))
    assert prove(config, CPU, tmp_path) == first
    config.activation_function = "relu"
    with pytest.raises(pytest.fail.Exception):
        prove(config, CPU, tmp_path)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2", "granitemoehybrid", "falcon_h1"])
def test_mixer_without_boundaries_is_not_packed(tmp_path, monkeypatch, kind) -> None:
    monkeypatch.setattr(
        mixers, "_document_by_document", lambda boundaries, forward, *a, **options: forward(*a, **options)
    )
    proof = prove(tiny_config(kind, tied=False), CPU, tmp_path)
    assert not proof.packed and "differs from transformers'" in proof.failed


def test_attention_across_documents_is_not_packed(tmp_path, monkeypatch) -> None:
    lengths = language_model.packed_attention.DocumentLengths

    def one_document(parts: tuple[int, ...], ends: torch.Tensor, **options: object) -> object:
        return lengths((sum(parts),), ends[[0, -1]], **options)

    monkeypatch.setattr(language_model.packed_attention, "DocumentLengths", one_document)
    proof = prove(tiny_config("gpt2", tied=False), CPU, tmp_path)
    assert not proof.packed and "the loss differs" in proof.failed


def test_persistent_buffer_of_initialisation_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(language_model, "persistent_buffers", lambda packed: {})
    with pytest.raises(UserError, match="deepseek_v3 cannot be trained here: the loss differs"):
        prove(tiny_config("deepseek_v3", tied=False), CPU, tmp_path)


def test_cap_of_the_logits_is_not_overlooked(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(language_model, "head_settings", lambda config, tokens: HeadSettings(num_tokens=tokens))
    with pytest.raises(UserError, match="gemma4_text cannot be trained here: the loss differs"):
        prove(tiny_config("gemma4_text", tied=False, final_logit_softcapping=30.0), CPU, tmp_path)


def test_random_numbers_of_train_mode_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(model.proof, "switch_off_randomness", lambda config: None)
    config = tiny_config("gpt2", tied=False, resid_pdrop=0.5)
    with pytest.raises(UserError, match="two forwards of one batch differ in train mode"):
        prove(config, CPU, tmp_path)


def test_small_model_keeps_each_kind_of_layer(tmp_path) -> None:
    kinds = ["linear_attention", "linear_attention", "full_attention"] * 8
    large = tiny_config(
        "qwen3_5_text", hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, layer_types=kinds
    )
    small = shrink(large)
    assert small.layer_types == kinds[:3] and small.num_hidden_layers == 3
    assert small.head_dim == large.head_dim and small.linear_key_head_dim == large.linear_key_head_dim
    assert small.hidden_size <= 128 and small.intermediate_size == 128
    shared = tiny_config(
        "gemma4_text",
        num_hidden_layers=8,
        num_kv_shared_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 4,
    )
    small = shrink(shared)
    assert small.layer_types == ["sliding_attention", "full_attention"] * 2 and small.num_kv_shared_layers == 2


def test_dropout_is_off_and_kept_in_the_export(tmp_path) -> None:
    path = write_tiny_model(tmp_path / "model")
    settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.1}))
    config = read_model_config(str(path))
    assert config.attention_dropout == 0.0 and is_proved(config)
