"""How the model is spread over the ranks: activation checkpointing, then FSDP2, in this order."""

import functools

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from errors import UserError


def decoder_layers(model: nn.Module, layer_class: str | None = None) -> list[nn.Module]:
    """The modules to shard and checkpoint one by one: transformer auto-wrap.

    Found by class: the one named, or those that the model declares as not to be split (`_no_split_modules`). Raises
    UserError where there is none of that class.
    """
    if layer_class is not None:
        names = {layer_class}
    else:
        names = {n for module in model.modules() for n in (getattr(module, "_no_split_modules", None) or ())}
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        blocks = sorted({type(m).__name__ for m in model.modules() if "Layer" in type(m).__name__})
        raise UserError(
            f"model.layer_class={layer_class}: the model has no such module; it has {', '.join(blocks) or 'no layers'}"
        )
    return layers


def checkpoint_activations(layers: list[nn.Module]) -> None:
    """Keep only each layer's input, and compute the layer again in backward (Chen et al., arXiv:1604.06174).

    The layer's forward is wrapped, not the layer: names stay as they are, and FSDP's hooks stay outside.
    """
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def shard(
    model: nn.Module, layers: list[nn.Module], mesh: DeviceMesh, compute_dtype: torch.dtype, strategy: str
) -> None:
    """`fully_shard` each layer, then the root with what is left (embedding, norm, head).

    Parameters and their reduction are fp32, compute is `compute_dtype`. `full`: gathered for each use and freed again
    (ZeRO-3). `grad_op`: see `keep_gathered` (ZeRO-2). https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    options = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": strategy == "full"}
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    if mesh.size() > 1:  # alone FSDP does not divide, and the switch would only cost a copy of every gradient
        sum_gradients(model)


def sum_gradients(model: nn.Module) -> None:
    """Switch FSDP's division by the number of ranks off: the loss is already divided by the tokens of all ranks.

    gloo has no pre-multiplied sum, hence the second switch.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def keep_gathered(model: nn.Module, strategy: str, last_micro_batch: bool) -> None:
    """Before each micro-batch: under `grad_op` parameters stay gathered until the last backward of the step.

    Two switches make ZeRO-2: no resharding after forward (set once) and none after any but the last backward.
    """
    if strategy == "grad_op":
        model.set_reshard_after_backward(last_micro_batch)


def reshard(model: nn.Module) -> None:
    """After a forward without backward (validation) `grad_op` leaves parameters gathered: put the shards back.

    Everything that reads `model.parameters()` afterwards (optimizer, checkpoint, export) must see shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware (CUDA from Ampere on; CPUs with AMX, AVX512-BF16 or Arm BF16)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    checks = (
        getattr(torch.cpu, name, lambda: False) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(check() for check in checks) or any("bf16" in name and on for name, on in capabilities.items())
