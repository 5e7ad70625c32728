"""Names and shapes that vLLM and llama.cpp expect are those of transformers' models, and a wrong tensor is named."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model.serving_names import GGUF, VLLM, gguf_line, vllm_line
from tests.tiny import FAMILIES, OTHER_FAMILIES

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2}


def config_and_shapes(family: str, **settings):
    kind, extra = (FAMILIES | OTHER_FAMILIES)[family]
    config = AutoConfig.for_model(kind, **(SIZES | extra | settings))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return config, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "llama_biased", "mistral", "qwen2", "qwen3"])
def test_the_tensors_of_the_families_are_what_vllm_and_llama_cpp_expect(family, tied) -> None:
    config, shapes = config_and_shapes(family, tie_word_embeddings=tied)
    assert config.model_type in VLLM and config.model_type in GGUF
    good, line = vllm_line(config, shapes)
    assert good, line
    parameters = 2 * 6 + 2 + (not tied)  # qkv, o, gate_up, down and two norms; embedding, norm and head
    parameters += 2 * {"qwen3": 2, "qwen2": 1, "llama_biased": 4}.get(family, 0)
    assert f"{len(shapes)} tensors fit the {parameters} parameters" in line
    good, line = gguf_line(config, shapes)
    assert good, line


@pytest.mark.parametrize("family", ["gemma2", "granite", "olmo2", "smollm3"])
def test_other_families_have_names_in_gguf(family) -> None:
    config, shapes = config_and_shapes(family, pad_token_id=0)
    good, line = gguf_line(config, shapes)
    assert good, line
    assert vllm_line(config, shapes)[1].startswith("vLLM: not checked")


def test_a_wrong_tensor_is_named() -> None:
    config, shapes = config_and_shapes("llama")
    assert vllm_line(config, shapes | {"model.layers.0.self_attn.k_proj.weight": (32, 32)}) == (
        False,
        "vLLM: 1 tensors do not fit: model.layers.0.self_attn.k_proj.weight has shape (32, 32) instead of (16, 32)",
    )
    extra = shapes | {"model.layers.0.extra.weight": (1,)}
    assert "model.layers.0.extra.weight belongs to no parameter" in vllm_line(config, extra)[1]
    assert "model.layers.0.extra.weight has no name" in gguf_line(config, extra)[1]
    del shapes["model.norm.weight"]
    assert not vllm_line(config, shapes)[0] and "model.norm.weight is missing" in vllm_line(config, shapes)[1]
