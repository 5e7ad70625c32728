"""Files of today's model types: names and forms as in save_pretrained, persistent buffers, quantised weights, ignored tensors."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from common.errors import UserError
from distributed.checkpoint import Saver
from distributed.export import export_model
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
)
from model.weight_names import StoredForm

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


@pytest.mark.parametrize("kind", [*KINDS, *WITH_BUFFERS])
def test_files_are_read_and_written_as_by_save_pretrained(tmp_path, ranks, kind) -> None:
    expected, model = build(kind), packed(kind)
    expected.save_pretrained(tmp_path / "saved")
    load_weights(model, str(tmp_path / "saved"), torch.device("cpu"))
    tensors = tensors_in_files(model)
    assert same(tensors, {**dict(expected.named_parameters()), **persistent_buffers(expected)})
    for name, source in check_weights(model, str(tmp_path / "saved")).items():  # as ranks read their parts
        for dimension in range(min(2, tensors[name].dim())):
            start = tensors[name].shape[dimension] // 3
            part = tensors[name].detach().narrow(dimension, start, start)
            read = torch.zeros_like(part)
            source.read_into(read, dimension, start)
            assert torch.equal(read, part), name
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
