"""Activation checkpointing (Chen et al., arXiv:1604.06174): keep less for backward and recompute the rest.

https://docs.pytorch.org/docs/stable/checkpoint.html
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Outputs that `selective` keeps, because they are expensive to recompute. Norms, activations and RoPE are cheap. Batched
# products are those of attention without a kernel of its own (softcap; a CPU in bf16), whose scores are quadratic in a
# document's length.
_EXPENSIVE = (
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
)


def checkpoint_activations(layers: list[nn.Module], mode: str) -> None:
    """Checkpoint each of `layers`, in place.

    `full` keeps only the layer's input. `selective` also keeps the outputs of matrix products and of kernels of
    attention, so only cheap operations are recomputed. `offload` is `full` with the kept inputs in host memory. `none` changes nothing.

    This wraps the layer's forward instead of the layer, so parameter names do not change and FSDP's hooks stay outside.
    """
    if mode == "none":
        return
    # Models with dropout are refused, so there is no random state to restore for the second forward.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_expensive)
    for layer in layers:
        wrapped = functools.partial(checkpoint, layer.forward, **options)
        layer.forward = functools.partial(_inputs_on_host, wrapped) if mode == "offload" else wrapped


def _keep_expensive(
    context: object, operator: torch._ops.OpOverload, *arguments: object, **options: object
) -> CheckpointPolicy:
    kept = operator.name().removesuffix(".default") in _EXPENSIVE
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _inputs_on_host(forward: Callable, *arguments: object, **options: object) -> object:
    """As torch.autograd.graph.save_on_cpu, whose copies to the host make it wait for the device in torch 2.11."""
    with torch.autograd.graph.saved_tensors_hooks(_to_host, _to_device):
        return forward(*arguments, **options)


def _to_host(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    """The copy runs in the stream of the forward, before that of `_to_device`; only the device reads it."""
    if not tensor.is_cuda:
        return tensor.device, tensor
    held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return tensor.device, held.copy_(tensor, non_blocking=True)


def _to_device(saved: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, held = saved
    return held.to(device, non_blocking=True)
