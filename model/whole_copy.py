"""A whole copy of a sharded model on every rank, in transformers' own form, to generate with."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from model.language_model import PackedLanguageModel, materialize, parameter_names


def whole_copy(
    config: PretrainedConfig,
    parameters: dict[str, nn.Parameter],
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    added: Callable[[str], torch.Tensor | None] = lambda name: None,
) -> PreTrainedModel:
    """The model with its own attention and head, in eval mode, with the values of `parameters` in `dtype`. A collective.

    parameters: by their Hugging Face names, sharded or not; rows of padding are cut off. `path` and `config` are those that
    they were built from. Each is cast before it is gathered, so the ranks send `dtype`, and beside the copy there is at most
    one whole parameter. `added(name)`, a collective, is added to a whole weight in fp32 (model/lora.py). The copy takes `dtype.itemsize` bytes per parameter until its last reference is gone.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        causal_lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    packed = PackedLanguageModel(causal_lm)  # knows how parameters and buffers are made
    del packed.head.forward  # logits, not losses
    materialize(packed, path, device)
    with torch.no_grad():
        for name, target in parameter_names(packed).items():
            value = parameters[name].detach().to(dtype)
            value = value.full_tensor() if isinstance(value, DTensor) else value
            change = added(name)
            value = value if change is None else value.float() + change.to(value.device)
            target.copy_(value[: target.shape[0]] if target.dim() else value)
    return causal_lm.eval()
