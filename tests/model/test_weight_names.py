"""Files of today's model types: names and forms as in save_pretrained, persistent buffers, quantised weights, ignored tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from common.errors import UserError
from distributed.checkpoint import Saver
from distributed.export import export_model
from model.architectures import read_model_config
from model.language_model import (
    BUFFERS,
    PackedLanguageModel,
    PersistentBuffers,
    check_weights,
    load_weights,
    materialize,
    persistent_buffers,
    tensors_in_files,
    trained_parameters,
    untrained_tensors,
)
from model.quantized_files import dequantized
from model.weight_files import stored_tensors
from model.weight_names import StoredForm, StoredParts
from model.weights import weights_of_directory, write_weights

SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 16, "num_local_experts": 4, "num_experts": 4},
    **{
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_num_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
    },
    **{
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    **{
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
    },
    **{"ssm_state_size": 8, "n_groups": 1, "moe_shared_expert_intermediate_size": 16, "shared_intermediate_size": 32},
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "global_head_dim": 8, "block_size": 8},
    **{
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
    },
}
LAYERS = {
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "deepseek_v3": {"num_key_value_heads": 4},
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 64},
}
KINDS = (
    "mixtral",
    "minimax",
    "minimax_m2",
    "phimoe",
    "granitemoehybrid",
    "gpt_neox",
    "nemotron_h",
    "kimi_linear",
    "olmo_hybrid",
)
WITH_BUFFERS = ("deepseek_v3", "glm4_moe", "gemma4_text")


def build(kind: str, device: str = "cpu") -> PreTrainedModel:
    """Build a tiny model with random weights and random persistent buffers, in fp32."""
    keys = AutoConfig.for_model(kind).to_dict()
    config = AutoConfig.for_model(kind, **{k: v for k, v in SIZES.items() if k in keys} | LAYERS.get(kind, {}))
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for tensor in (*model.parameters(), *persistent_buffers(model).values()):
            tensor.data.add_(torch.rand_like(tensor))
    return model


def packed(kind: str) -> PackedLanguageModel:
    return PackedLanguageModel(build(kind, "meta"))


def same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return tensors.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in tensors.items())


def read_in_parts(sources: dict[str, StoredParts], tensors: dict[str, torch.Tensor]) -> None:
    """Check that a rank reads its part of each tensor, whichever dimension is sharded."""
    for name, source in sources.items():
        for dimension in range(min(2, tensors[name].dim())):
            start = tensors[name].shape[dimension] // 3
            part = tensors[name].detach().narrow(dimension, start, start)
            read = torch.zeros_like(part)
            source.read_into(read, dimension, start)
            assert torch.equal(read, part), name


@pytest.mark.parametrize("kind", [*KINDS, *WITH_BUFFERS])
def test_files_are_read_and_written_as_by_save_pretrained(tmp_path, ranks, kind) -> None:
    expected, model = build(kind), packed(kind)
    expected.save_pretrained(tmp_path / "saved")
    load_weights(model, str(tmp_path / "saved"), torch.device("cpu"))
    tensors = tensors_in_files(model)
    assert same(tensors, {**dict(expected.named_parameters()), **persistent_buffers(expected)})
    read_in_parts(check_weights(model, str(tmp_path / "saved")), tensors)
    form = StoredForm(model.causal_lm)
    export_model(tmp_path / "export", tensors, torch.float32, ranks, lambda folder: None, form=form)
    assert same(*(load_file(tmp_path / folder / "model.safetensors") for folder in ("export", "saved")))


@pytest.mark.parametrize("kind", WITH_BUFFERS)
def test_persistent_buffers_survive_a_checkpoint(tmp_path, ranks, kind) -> None:
    models = [PackedLanguageModel(build(kind)), packed(kind)]
    materialize(models[1], torch.device("cpu"))
    before, after = (persistent_buffers(model.causal_lm) for model in models)
    assert before and not same(before, after)
    savers = []
    for model in models:
        parameters = trained_parameters(model)
        savers.append(Saver(tmp_path, parameters, torch.optim.SGD(parameters.values()), ranks))
        savers[-1].register(BUFFERS, PersistentBuffers(model.causal_lm))
    savers[0].save({"step": 1})
    savers[1].load(tmp_path / "step-000001")
    assert same(before, after)


def test_missing_persistent_buffer_is_named(tmp_path) -> None:
    build("glm4_moe").save_pretrained(tmp_path)
    tensors = load_file(file := tmp_path / "model.safetensors")
    del tensors[name := "model.layers.1.mlp.gate.e_score_correction_bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"has no tensor {name}; the files do not match its config.json"):
        check_weights(packed("glm4_moe"), str(tmp_path))


def quantise_fp8(folder: Path, block: int = 8) -> dict[str, torch.Tensor]:
    """Quantise the matrices of a saved model's layers in blocks, as published files do. Return all tensors dequantised."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    dense, dequantise = dict(tensors), Fp8Dequantize(None)._dequantize_one
    for name, tensor in dense.items():
        if name.endswith("proj.weight"):
            scale = torch.rand(*(-(-size // block) for size in tensor.shape)) + 0.5
            tensors |= {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
            dense[name] = dequantise(tensors[name], scale, torch.float32)
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block], "fmt": "e4m3"}
    return write(folder, tensors, config, dense)


def quantise_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Replace a saved model's experts by random ones in gpt-oss' published format. Return all tensors dequantised."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    dense = dict(tensors)
    for name in [name for name in dense if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj")]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 128, blocks.shape[:-1], dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dense[name] = convert_moe_packed_tensors(blocks, scales).float().contiguous()
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return write(folder, tensors, config, dense)


def write(folder: Path, tensors: dict, config: dict, dense: dict) -> dict[str, torch.Tensor]:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return dense


@pytest.mark.parametrize(
    ("kind", "quantise"), [("deepseek_v3", quantise_fp8), ("qwen3", quantise_fp8), ("gpt_oss", quantise_mxfp4)]
)
def test_quantised_files_are_read_as_transformers_dequantises_them(tmp_path, ranks, kind, quantise) -> None:
    expected, model = build(kind), packed(kind)
    expected.save_pretrained(tmp_path / "quantised")
    expected.save_pretrained(tmp_path / "dense")
    dense = quantise(tmp_path / "quantised")
    save_file(dense, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    load_weights(model, str(tmp_path / "quantised"), torch.device("cpu"))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    tensors = tensors_in_files(model)
    assert same(tensors, {**dict(expected.named_parameters()), **persistent_buffers(expected)})
    read_in_parts(check_weights(model, str(tmp_path / "quantised")), tensors)
    weights = weights_of_directory(tmp_path / "quantised", model)
    write_weights(tmp_path, weights, torch.float32, form=StoredForm(model.causal_lm))
    assert same(load_file(tmp_path / "model.safetensors"), dense)
    if kind in ("qwen3", "gpt_oss"):
        assert not hasattr(read_model_config(str(tmp_path / "quantised")), "quantization_config")


def test_last_block_may_be_smaller(tmp_path) -> None:
    weight, scale = torch.randn(5, 7).to(torch.float8_e4m3fn), torch.rand(2, 2)
    save_file({"weight": weight, "weight_scale_inv": scale}, tmp_path / "model.safetensors")
    settings = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    tensor = dequantized(stored_tensors(tmp_path), tmp_path)["weight"]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        values = tensor.read({tensor.file: file})
    assert torch.equal(values, weight.float() * scale.repeat_interleave(4, 0)[:5].repeat_interleave(4, 1)[:, :7])
    save_file({"weight": weight, "weight_scale_inv": scale[:1]}, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"weight_scale_inv has shape \(1, 2\), which does not fit \(5, 7\) in blocks of"
    ):
        dequantized(stored_tensors(tmp_path), tmp_path)


def test_tensors_that_transformers_ignores_are_copied(tmp_path, ranks) -> None:
    build("deepseek_v3").save_pretrained(tmp_path / "base")
    quantise_fp8(tmp_path / "base")
    tensors, mtp = load_file(file := tmp_path / "base" / "model.safetensors"), "model.layers.61"
    quantised, scale, norm = torch.randn(8, 16).to(torch.float8_e4m3fn), torch.rand(1, 2), torch.randn(8).bfloat16()
    tensors |= {f"{mtp}.eh_proj.weight": quantised, f"{mtp}.eh_proj.weight_scale_inv": scale}
    save_file(tensors | {f"{mtp}.enorm.weight": norm, "model.unknown": norm.clone()}, file, metadata={"format": "pt"})
    model, path = packed("deepseek_v3"), str(tmp_path / "base")
    load_weights(model, path, torch.device("cpu"))
    copied = untrained_tensors(model, path, with_ignored=True)
    expected = (quantised.float() * scale.repeat_interleave(8, 1)).bfloat16()
    options = {"form": StoredForm(model.causal_lm), "copied": copied, "max_file_bytes": 10_000}
    export_model(tmp_path / "export", tensors_in_files(model), torch.bfloat16, ranks, lambda folder: None, **options)
    (tmp_path / "again").mkdir()
    write_weights(tmp_path / "again", weights_of_directory(path, model), torch.bfloat16, **options)
    for folder in ("export", "again"):
        stored = stored_tensors(tmp_path / folder)
        names = {name for name in stored if name.startswith(mtp)}
        assert (
            names == copied.keys() == {f"{mtp}.eh_proj.weight", f"{mtp}.enorm.weight"} and "model.unknown" not in stored
        )
        assert torch.equal(stored[f"{mtp}.eh_proj.weight"].copy(), expected)
        assert torch.equal(stored[f"{mtp}.enorm.weight"].copy(), norm)
        files = {tensor.file for tensor in stored.values()}
        index = json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
        size = sum(tensor.num_bytes for tensor in stored.values())
        assert len(files) > 2 and index["metadata"]["total_size"] == size
