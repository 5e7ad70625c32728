"""The pretrained model as it is trained: built on `meta`, filled slice by slice, returning the sum of losses.

Order (DESIGN): build on meta -> activation checkpointing -> shard -> materialise -> load each rank's own slices ->
recompute `inv_freq` in fp32. Anything that changes shapes comes before sharding.
"""

import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from errors import UserError
from model import packed_attention
from model.loss import cross_entropy_sum

# Architectures whose attention is plain causal softmax and whose head is one matrix, checked document by document
# against transformers' eager attention in tests/model/test_equivalence.py.
SUPPORTED = ("llama", "qwen2", "qwen3", "mistral")


class Batch(Protocol):
    """What the model reads of a micro-batch (data.batches.MicroBatch: model and data do not know each other)."""

    input_ids: torch.Tensor  # (1, tokens)
    position_ids: torch.Tensor  # (1, tokens), from 0 in each document
    document_lengths: tuple[int, ...]
    cu_seq_lens: torch.Tensor  # int32 (documents + 1)
    target_positions: torch.Tensor  # (targets,): where the predicting states are
    target_ids: torch.Tensor  # (targets,)


class PackedLanguageModel(nn.Module):
    """A causal language model over packed documents. FSDP's root, so that embedding and head are gathered in forward."""

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, batch: Batch) -> torch.Tensor:
        """The sum of the losses of the micro-batch's target tokens, fp32 scalar, in nats."""
        hidden = self.hidden_states(batch)[0, batch.target_positions]
        return cross_entropy_sum(hidden, self.causal_lm.get_output_embeddings().weight, batch.target_ids)

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """What the head reads, `(1, tokens, hidden_size)`."""
        return self.causal_lm.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            document_lengths=batch.document_lengths,
            cu_seq_lens=batch.cu_seq_lens,
        ).last_hidden_state


def read_model_config(path: str) -> PretrainedConfig:
    """The model's own configuration. Raises UserError where there is none or where it cannot be trained truly."""
    if not Path(path).is_dir():
        raise UserError(
            f"model.path={path} is not a folder; python scripts/fetch_base_model.py ORGANISATION/NAME brings a model to "
            "artifacts/models/NAME"
        )
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} holds no model configuration: {str(error).splitlines()[0]}") from error
    check_supported(config)
    return config


def check_supported(config: PretrainedConfig) -> None:
    """Refuse by name what plain causal attention and a plain head would compute wrongly, and what we have not checked."""
    kind = config.model_type
    window = getattr(config, "sliding_window", None)
    uses_window = window is not None and getattr(config, "use_sliding_window", True)
    needs = [
        name
        for name, present in {
            f"a sliding window of {window}": uses_window
            or "sliding_attention" in (getattr(config, "layer_types", None) or ()),
            "attention logit softcapping": getattr(config, "attn_logit_softcapping", None),
            "final logit softcapping": getattr(config, "final_logit_softcapping", None),
            "logit scaling": getattr(config, "logits_scaling", None) or getattr(config, "logit_scale", None),
            "attention dropout": getattr(config, "attention_dropout", 0.0),
            "a bias in the head": getattr(config, "lm_head_bias", False),
        }.items()
        if present
    ]
    if needs:
        raise UserError(f"the {kind} model needs {' and '.join(needs)}, which packed training does not support yet")
    if kind not in SUPPORTED:
        raise UserError(f"model type {kind} has not been checked for packed training; checked: {', '.join(SUPPORTED)}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise UserError(
            f"RoPE type {rope} takes its frequencies from the longest document in a micro-batch, which breaks the "
            "isolation of packed documents; choose linear, yarn or llama3 in config.json"
        )


def build_on_meta(config: PretrainedConfig) -> PackedLanguageModel:
    """The model with fp32 parameters that have shapes but no memory yet, tied where its config ties them."""
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(
            config, attn_implementation=packed_attention.NAME, dtype=torch.float32
        )
    return PackedLanguageModel(causal_lm)


def load_weights(model: PackedLanguageModel, path: str, device: torch.device) -> None:
    """Give the (sharded) meta model memory on `device` and read this rank's own slices from the safetensors files.

    Raises UserError where a tensor is missing or has another shape.
    """
    model.to_empty(device=device)
    model.causal_lm.tie_weights()  # to_empty makes two tensors of a tied one (verl#7834)
    files = _tensor_files(Path(path))
    names = {id(p): name for name, p in reversed(list(model.causal_lm.named_parameters(remove_duplicate=False)))}
    with torch.no_grad():
        for parameter in model.parameters():
            name = _stored_name(names[id(parameter)], parameter, model.causal_lm, files, path)
            with safe_open(files[name], framework="pt") as tensors:
                stored = tensors.get_slice(name)
                if tuple(stored.get_shape()) != tuple(parameter.shape):
                    raise UserError(
                        f"{files[name]}: {name} has shape {tuple(stored.get_shape())}, config.json wants {tuple(parameter.shape)}"
                    )
                local, start = _local_slice(parameter)
                if local.numel():
                    local.copy_(stored[start : start + local.shape[0]] if local.dim() else stored[...])
    _recompute_buffers(model, device)


def num_parameters(model: nn.Module) -> int:
    """Parameters of the whole model, tied ones once, whatever this rank holds of them."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_names(model: PackedLanguageModel) -> dict[str, nn.Parameter]:
    """Hugging Face name -> parameter, tied ones once: the names of checkpoints and exports."""
    return dict(model.causal_lm.named_parameters())


def _tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return {name: path / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = path / "model.safetensors"
    if not single.is_file():
        raise UserError(f"{path} holds neither model.safetensors nor model.safetensors.index.json")
    with safe_open(single, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _stored_name(name: str, parameter: nn.Parameter, causal_lm: nn.Module, files: dict, path: str) -> str:
    """The name the file uses for a parameter: its own, or that of a tensor tied to it."""
    if name in files:
        return name
    for other, candidate in causal_lm.named_parameters(remove_duplicate=False):
        if candidate is parameter and other in files:
            return other
    raise UserError(f"{path} holds no tensor {name}; the files do not fit its config.json")


def _local_slice(parameter: nn.Parameter) -> tuple[torch.Tensor, int]:
    """This rank's memory of a parameter and the row of the whole tensor where it begins.

    FSDP2 shards dimension 0 as torch.chunk does: every rank but the last ones holds ceil(rows / ranks) rows.
    """
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(parameter, DTensor):
        return parameter.data, 0
    start = 0
    for dimension, placement in enumerate(parameter.placements):
        if placement == Shard(0):
            ranks = parameter.device_mesh.size(dimension)
            rank = parameter.device_mesh.get_local_rank(dimension)
            start = min(parameter.shape[0], rank * -(-parameter.shape[0] // ranks))
    return parameter.to_local(), start


def _recompute_buffers(model: PackedLanguageModel, device: torch.device) -> None:
    """Buffers that no file stores hold garbage after meta: build each such module again from its config, in fp32."""
    for name, module in model.causal_lm.named_modules():
        missing = [b for b in module._non_persistent_buffers_set if module._buffers.get(b) is not None]
        if not missing:
            continue
        if not hasattr(module, "config") or "RotaryEmbedding" not in type(module).__name__:
            raise UserError(f"{name} ({type(module).__name__}) has buffers that no file stores: not supported")
        fresh = type(module)(config=module.config)
        for buffer in missing:
            module._buffers[buffer] = fresh._buffers[buffer].to(device)
