"""RoPE scaling: the config, transformers' frequencies for it, isolation of documents, and errors."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from common.errors import UserError
from data.batches import collate
from model.architectures import read_model_config
from model.language_model import PackedLanguageModel, build_on_meta, load_weights
from model.loss import visit_logits
from model.rope import STRETCHING, check_length, full_attention_parameters, scaled_config, trained_length
from tests.in_memory import InMemory
from tests.tiny import tiny_config, write_tiny_model

CPU = torch.device("cpu")
ORIGINAL = 512  # positions of the tiny models
FACTORS = {"short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6], "long_factor": [1.0, 1.2, 2.0, 3, 4, 5, 6, 8]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64} | FACTORS


def llama(rope: dict | None = None, **settings) -> PretrainedConfig:
    rope = rope or {"rope_type": "default", "rope_theta": 10000.0}
    return AutoConfig.for_model(
        "llama",
        hidden_size=64,
        num_attention_heads=4,
        **{"max_position_embeddings": ORIGINAL, "rope_parameters": dict(rope)} | settings,
    )


def write_scaled(tmp_path: Path, kind: str, family: str = "llama") -> tuple[Path, PretrainedConfig]:
    """Write a tiny model of 64 positions, scaled to 256 positions. Return its directory and train.py's config of it.

    With kind `longrope` the original model already has longrope.
    """
    path = write_tiny_model(tmp_path / "model", family=family)
    config = AutoConfig.from_pretrained(path)
    config.max_position_embeddings = 64
    if kind == "longrope":
        config.max_position_embeddings, config.rope_parameters = 256, config.rope_parameters | LONGROPE
        config.original_max_position_embeddings = 64  # Phi-3 stores it here
    config.save_pretrained(path)
    config = read_model_config(str(path), kind, *(() if kind == "longrope" else (4.0,)))
    assert config.max_position_embeddings == 256
    export = tmp_path / "export"
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(export)
    config.save_pretrained(export)
    return export, config


def load(path, config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PackedLanguageModel:
    packed = build_on_meta(config).to(dtype)
    load_weights(packed, str(path), CPU)
    return packed


def documents(*ids: np.ndarray) -> InMemory:
    return InMemory(list(ids), [np.arange(len(i)) > 0 for i in ids])


def tokens(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 259, length)


def scores(packed: PackedLanguageModel, source: InMemory) -> torch.Tensor:
    with torch.no_grad():
        batch = collate(tuple(range(len(source))), source)
        hidden = packed(dataclasses.replace(batch, target_positions=torch.arange(batch.input_ids.shape[1])))
        chunks = []
        visit_logits(packed.head, hidden, lambda logits, start: chunks.append(logits))
        return torch.cat(chunks)


def test_scaled_config() -> None:
    config = llama()
    expected = {
        "linear": {"rope_type": "linear", "factor": 2.0},
        "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512},
        "llama3": {
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": 512,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    }
    assert expected.keys() == STRETCHING.keys()
    for kind, parameters in expected.items():
        scaled = scaled_config(config, kind, 2)
        assert scaled.rope_parameters == parameters | {"rope_theta": 10000.0}
        assert scaled.max_position_embeddings == 1024 and trained_length(scaled) == (None if kind == "linear" else 512)
    assert config.max_position_embeddings == 512 and config.rope_parameters["rope_type"] == "default"
    assert scaled_config(config, None) is config


def test_scaled_model_is_rescaled_from_original_window() -> None:
    """Llama 3.1 has 8,192 positions, extended to 131,072. In files with `linear`, the window may be scaled or not."""
    own = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = llama(own | STRETCHING["llama3"], max_position_embeddings=131072)
    yarn = scaled_config(config, "yarn", 32.0)
    assert yarn.max_position_embeddings == 262144
    assert yarn.rope_parameters == own | {"rope_type": "yarn", "factor": 32.0}
    plain = scaled_config(config, "default")
    assert plain.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}
    assert plain.max_position_embeddings == 8192
    gpt_oss = AutoConfig.for_model("gpt_oss")  # its `truncate` is not YaRN's default
    assert scaled_config(gpt_oss, "yarn", 64.0).rope_parameters == gpt_oss.rope_parameters | {"factor": 64.0}
    own = {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.07, "original_max_position_embeddings": 256}
    again = scaled_config(llama(own | {"rope_theta": 10000.0}), "yarn", 4.0).rope_parameters
    assert "attention_factor" not in again and again["factor"] == 4.0  # transformers computes it from the factor
    assert scaled_config(llama(), "yarn", 4.0, 256).rope_parameters["original_max_position_embeddings"] == 256
    linear = llama({"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}, max_position_embeddings=16384)
    with pytest.raises(UserError, match="does not state the context length"):
        scaled_config(linear, "yarn", 8.0)
    assert scaled_config(linear, "yarn", 8.0, 4096).max_position_embeddings == 32768


def test_only_full_attention_layers_are_scaled(tmp_path) -> None:
    family = "gemma3_text"
    before = read_model_config(str(write_tiny_model(tmp_path / "model", family=family)))
    export, config = write_scaled(tmp_path, "yarn", family)
    assert config.rope_parameters["sliding_attention"] == before.rope_parameters["sliding_attention"]
    assert full_attention_parameters(config) == config.rope_parameters["full_attention"]
    assert full_attention_parameters(config)["rope_theta"] == full_attention_parameters(before)["rope_theta"]
    rotary, plain = (load(export, c).causal_lm.model.rotary_emb for c in (config, before))
    assert torch.equal(rotary.sliding_attention_inv_freq, plain.sliding_attention_inv_freq)
    ratio = plain.full_attention_inv_freq / rotary.full_attention_inv_freq
    assert ratio[0] == 1.0 and ratio[-1] == pytest.approx(4.0)
    assert rotary.full_attention_attention_scaling == pytest.approx(1 + 0.1 * math.log(4))
    assert rotary.sliding_attention_attention_scaling == 1.0


@pytest.mark.parametrize(
    "family, kind",
    [*[("llama", kind) for kind in STRETCHING], ("glm", "yarn"), ("gemma3_text", "llama3"), ("smollm3", "linear")],
)
def test_transformers_computes_the_same_from_the_export(tmp_path, family, kind) -> None:
    """Frequencies and attention scaling are bitwise equal, and fp32 even with bf16 weights. Logits agree beyond the old window."""
    transformers_logging.set_verbosity_error()
    export, config = write_scaled(tmp_path, kind, family)
    again = read_model_config(str(export))  # as in another run or scripts/measure.py positions
    assert again.rope_parameters == config.rope_parameters and again.max_position_embeddings == 256
    theirs = AutoModelForCausalLM.from_pretrained(export, attn_implementation="eager")
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_rotary(load(export, config, dtype), theirs)
    source = documents(tokens(200, 1), tokens(30, 2))
    expected = torch.cat([theirs(torch.from_numpy(ids)[None]).logits[0] for ids in source.ids])
    assert torch.allclose(scores(load(export, config), source), expected, atol=1e-4)


def assert_same_rotary(packed: PackedLanguageModel, theirs: torch.nn.Module) -> None:
    ours, expected = packed.causal_lm.model.rotary_emb, theirs.model.rotary_emb
    assert dict(ours.named_buffers()).keys() == dict(expected.named_buffers()).keys()
    for name, buffer in expected.named_buffers():
        assert getattr(ours, name).dtype == torch.float32 and torch.equal(getattr(ours, name), buffer), name
    scales = [name for name in vars(expected) if name.endswith("attention_scaling")]
    assert scales and all(getattr(ours, name) == getattr(expected, name) for name in scales)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_longrope_always_uses_its_long_factors(tmp_path, family) -> None:
    """Also for short documents. In the export both sets are equal, so transformers cannot choose by length."""
    short = scaled_config(llama(LONGROPE | {"original_max_position_embeddings": ORIGINAL}), "longrope")
    assert short.rope_parameters["long_factor"] == FACTORS["short_factor"]  # the window is not extended
    transformers_logging.set_verbosity_error()
    export, config = write_scaled(tmp_path, "longrope", family)
    assert full_attention_parameters(config)["short_factor"] == FACTORS["long_factor"]
    packed = load(export, config)
    rotary = packed.causal_lm.model.rotary_emb
    factors = torch.tensor(FACTORS["long_factor"], dtype=torch.float32)
    assert torch.allclose(rotary.inv_freq, 10000.0 ** -(torch.arange(8) / 8) / factors)
    original = full_attention_parameters(config)["original_max_position_embeddings"]
    assert original == 64
    assert rotary.attention_scaling == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))
    theirs = AutoModelForCausalLM.from_pretrained(export, attn_implementation="eager")
    assert_same_rotary(packed, theirs)
    for length in (20, 200, 20):
        source = documents(tokens(length, length))
        assert torch.allclose(
            scores(packed, source), theirs(torch.from_numpy(source.ids[0])[None]).logits[0], atol=1e-4
        ), length


@pytest.mark.parametrize(
    "kind, dtype",
    [("linear", torch.float32), ("yarn", torch.bfloat16), ("longrope", torch.float32), ("longrope", torch.bfloat16)],
)
def test_document_is_independent_of_other_documents_length(tmp_path, kind, dtype) -> None:
    """The original window has 64 tokens. Both documents are tested shorter and longer than the window."""
    export, config = write_scaled(tmp_path, kind)
    packed = load(export, config, dtype)
    for length in (40, 150):
        second = tokens(length, 9)
        results = [scores(packed, documents(tokens(n, n), second))[n:] for n in (3, 240, 3)]
        assert all(torch.equal(results[0], result) for result in results[1:])
        assert results[0].std() > 0.01


REFUSED = [
    ("yarn", None, None, "needs a rope_factor above 1, not None"),
    ("linear", float("nan"), None, "above 1"),
    ("yarn", 2.0, 513, "rope_original_length=513 is not between 1 and the 512"),
    ("yarn", 2.0, 256, "is 512 positions, not more than the 512"),
    ("default", 2.0, None, "rope_type=default does not scale; remove rope_factor=2"),
    ("dynamic", 2.0, None, "rope_type must be one of .*, not 'dynamic'"),
    ("longrope", None, None, "only for models that already have it"),
    (None, 2.0, None, "need a rope_type"),
]


@pytest.mark.parametrize("kind, factor, original, words", REFUSED)
def test_invalid_values_are_reported_in_one_sentence(kind, factor, original, words) -> None:
    with pytest.raises(UserError, match=words):
        scaled_config(llama(), kind, factor, original)


def test_models_that_cannot_be_scaled_are_refused(tmp_path) -> None:
    transformers_logging.set_verbosity_error()
    for family in ("cohere2", "exaone4"):
        config = read_model_config(str(write_tiny_model(tmp_path / family, family=family)))
        with pytest.raises(UserError, match=f"{family} uses RoPE only in its sliding-window layers"):
            scaled_config(config, "yarn", 2.0)
    for family in ("hunyuan_v1_dense", "ministral3"):
        with pytest.raises(UserError, match=f"{family} has settings of RoPE"):
            scaled_config(AutoConfig.for_model(family), "yarn", 2.0)
    config = read_model_config(str(write_tiny_model(tmp_path / "phi3", family="phi3")))
    with pytest.raises(UserError, match="transformers does not support rope_type=yarn for phi3"):
        scaled_config(config, "yarn", 2.0)
    with pytest.raises(UserError, match="keeps the model's own window"):
        scaled_config(llama(LONGROPE), "longrope", 2.0)


def test_frequencies_that_depend_on_the_batch_are_refused(tmp_path) -> None:
    path = write_tiny_model(tmp_path / "model")
    llama(LONGROPE).save_pretrained(path)
    with pytest.raises(UserError, match="set model.rope_type=longrope"):
        read_model_config(str(path))
    read_model_config(str(path), "longrope")
    llama({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}).save_pretrained(path)
    with pytest.raises(UserError, match="choose yarn"):
        read_model_config(str(path))
    read_model_config(str(path), "yarn", 2.0, 512)


def test_sequence_length_beyond_the_scaled_window_is_refused() -> None:
    scaled = scaled_config(llama(), "yarn", 2.0)
    check_length(1024, scaled, "DIR")
    with pytest.raises(UserError, match="sequence_length=1025 exceeds the 1024 positions of DIR, as scaled by yarn"):
        check_length(1025, scaled, "DIR")
    with pytest.raises(UserError, match="exceeds the 512 positions of DIR; shorten it, or extend"):
        check_length(513, llama(), "DIR")
    for family in ("cohere2", "hunyuan_v1_dense"):  # models that cannot be scaled get no advice to scale
        with pytest.raises(UserError, match="shorten it; .*(nothing to scale|no rope_type keeps)$"):
            check_length(513, tiny_config(family), "DIR")
        with pytest.raises(UserError, match="remove rope_type$"):
            scaled_config(tiny_config(family), "yarn", 2.0)
