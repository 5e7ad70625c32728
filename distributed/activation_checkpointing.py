"""Activation checkpointing (Chen et al., arXiv:1604.06174): keep fewer activations for backward and recompute the rest.

https://docs.pytorch.org/docs/stable/checkpoint.html
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from common.errors import UserError

# Operators whose outputs `selective` keeps, because they are expensive to recompute. Norms, activations and RoPE are cheap.
# Batched products (aten::bmm) are not kept: attention without a kernel of its own (softcap; a CPU in bf16) computes scores with
# them, which are quadratic in a document's length.
_EXPENSIVE = (
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "packed::attention",  # attention of compiled layers without the varlen kernel (model/packed_attention.py)
)


# Models with dropout are refused, so there is no random state to restore for the second forward.
_checkpoint = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def checkpoint_activations(layers: list[nn.Module], mode: str) -> None:
    """Checkpoint each layer, in place.

    `full` keeps only the layer's input. `selective` also keeps the outputs of matrix products and attention kernels, except the
    products of experts, which are recomputed: they are as large as all other products of their layer together. `offload` is
    `full`, and `keep_inputs_on_host` moves the inputs. `none` changes nothing. A router (model/experts.py) chooses experts only
    in the first forward. The second forward repeats the choice, so that rounding cannot change it.
    The layer's forward is wrapped, so parameter names do not change and FSDP's hooks stay outside.
    """
    if mode == "none":
        return
    keep = functools.partial(create_selective_checkpoint_contexts, _keep_expensive) if mode == "selective" else None
    for layer in layers:
        context = functools.partial(_keep_choice, keep) if _has_router(layer) else keep
        kept = {"context_fn": context} if context else {}
        layer.forward = functools.partial(_checkpoint, layer.forward, **kept)


def _has_router(layer: nn.Module) -> bool:
    return any(hasattr(module, "top_k") for module in layer.modules())


def _keep_choice(keep: Callable | None = None) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return contexts for the first and second forward of a checkpoint, which make routers repeat their choice.

    `keep`, if given, returns two more contexts; they are entered around the returned ones.
    """
    chosen: list[torch.Tensor] = []
    first, second = _Choice(chosen, is_first=True), _Choice(chosen, is_first=False)
    if keep is None:
        return first, second
    return tuple(map(_both, keep(), (first, second)))  # pyright: ignore[reportReturnType]


@contextmanager
def _both(outer: AbstractContextManager, inner: AbstractContextManager) -> Iterator[None]:
    with outer, inner:
        yield


class _Choice(TorchFunctionMode):
    """A mode that records the indices of torch.topk in the first forward and returns them again in the second.

    In both forwards the values are gathered by these indices, because a checkpoint must save the same tensors in both.
    """

    def __init__(self, chosen: list[torch.Tensor], is_first: bool) -> None:
        super().__init__()
        self.chosen, self.is_first, self.again = chosen, is_first, iter(chosen)

    def __enter__(self) -> "_Choice":
        self.again = iter(self.chosen)  # backward may run the second forward more than once
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs = kwargs or {}
        if func is not torch.topk:
            return func(*args, **kwargs)
        scores, *rest = args
        if self.is_first:
            self.chosen.append(func(scores.detach(), *rest, **kwargs).indices)
        indices = self.chosen[-1] if self.is_first else next(self.again)
        return torch.return_types.topk((scores.gather(-1, indices), indices))


def tile_mlps(layers: list[nn.Module], tiles: int) -> None:
    """Split the tokens into `tiles` parts and compute each layer's MLP part by part, in place.

    Each part is checkpointed by itself, so the intermediate activations of only a single part exist at a time (ALST,
    arXiv:2506.13996, section 3). Raises UserError for layers without a module `mlp`.
    """
    for layer in layers:
        mlp = getattr(layer, "mlp", None)
        if mlp is None:
            raise UserError(
                f"model.mlp_tiles={tiles}: a {type(layer).__name__} has no module `mlp`; set it to 1, or model.layer_class=None"
            )
        kept = {"context_fn": _keep_choice} if _has_router(mlp) else {}
        mlp.forward = functools.partial(_in_tiles, mlp.forward, tiles, kept)


def _in_tiles(
    forward: Callable, tiles: int, kept: dict[str, Any], hidden: torch.Tensor
) -> torch.Tensor | tuple[torch.Tensor, None]:
    parts = [_checkpoint(forward, part, **kept) for part in hidden.chunk(tiles, 1)]
    if isinstance(parts[0], tuple):  # gpt-oss also returns the weights of the chosen experts, which no layer reads
        return torch.cat([part for part, _ in parts], 1), None
    return torch.cat(parts, 1)


def _keep_expensive(context: object, operator: Any, *arguments: object, **options: object) -> CheckpointPolicy:
    kept = operator.name().removesuffix(".default") in _EXPENSIVE
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def keep_inputs_on_host(layers: list[nn.Module]) -> None:
    """Keep the input of each layer in pinned host memory between forward and backward, in place.

    The layers are checkpointed and run on a GPU. The copies run in the compute stream, in order with its kernels: the host does
    not wait for them, and the allocator may reuse the memory of an input as soon as its copy is done.
    """
    for layer in layers:
        layer.forward = functools.partial(_with_input_on_host, layer.forward)


def _with_input_on_host(forward: Callable, hidden: torch.Tensor, *arguments: object, **options: object) -> object:
    # The hooks live until backward and must not hold a reference to the input.
    storage, device = hidden.untyped_storage().data_ptr(), hidden.device

    def pack(tensor: torch.Tensor) -> torch.Tensor:  # compiled code also saves weights and RoPE, which stay on the GPU
        return _to_host(tensor) if tensor.untyped_storage().data_ptr() == storage else tensor

    def unpack(kept: torch.Tensor) -> torch.Tensor:
        return kept.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return forward(hidden, *arguments, **options)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return on_host.copy_(tensor, non_blocking=True)
