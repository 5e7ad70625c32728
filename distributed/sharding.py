"""How the model is spread over the ranks. The order is activation checkpointing -> compile -> shard: see `spread`."""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from common.errors import UserError

# What selective checkpointing keeps: the outputs that are dear to compute again. Norms, activations and RoPE are cheap.
_KEPT_BY_SELECTIVE = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
)


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


def spread(
    model: nn.Module,
    layers: list[nn.Module],
    own_units: list[nn.Module],
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    *,
    strategy: str = "full",
    cpu_offload: bool = False,
    activation_checkpointing: str = "none",
    checkpoint_every: int = 1,
    compile_layers: bool = False,
) -> None:
    """Activation checkpointing, then compile, then shard, all in place; parameters may still be on `meta`.

    Compiled code must contain the recomputation, and FSDP's hooks must stay outside of what is compiled.
    """
    checkpoint_activations(layers[::checkpoint_every], activation_checkpointing)
    if compile_layers:
        for layer in layers:
            layer.compile()
    shard(model, layers, own_units, mesh, compute_dtype, strategy, cpu_offload)


def checkpoint_activations(layers: list[nn.Module], mode: str) -> None:
    """Keep less for backward, and compute it again there (Chen et al., arXiv:1604.06174).

    `full`: only each layer's input is kept. `selective`: also the outputs of matrix products and attention, so that what
    is computed again is cheap. `offload`: as full, and the kept inputs wait in host memory. `none`: nothing changes.
    https://docs.pytorch.org/docs/stable/checkpoint.html

    The layer's forward is wrapped, not the layer: names stay as they are, and FSDP's hooks stay outside.
    """
    if mode == "none":
        return
    # No dropout is ever supported, so no random state has to be put back for the second forward.
    options = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_dear_outputs)
    for layer in layers:
        wrapped = functools.partial(checkpoint, layer.forward, **options)
        layer.forward = functools.partial(_inputs_on_host, wrapped) if mode == "offload" else wrapped


def _keep_dear_outputs(context: object, operator: object, *arguments: object, **options: object) -> CheckpointPolicy:
    kept = operator.name().removesuffix(".default") in _KEPT_BY_SELECTIVE
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _inputs_on_host(forward: Callable, *arguments: object, **options: object) -> object:
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return forward(*arguments, **options)


def make_mesh(device_type: str, world_size: int, strategy: str, shard_size: int) -> DeviceMesh:
    """Over which ranks parameters are sharded, and over which they are replicated.

    full, grad_op: one dimension. hybrid: `(world / shard_size) x shard_size`, neighbouring ranks (a node's) share a copy.
    none: `world x 1`, every rank has a copy: data parallel as DDP does it, with FSDP2's mixed precision.
    """
    shards = {"hybrid": shard_size, "none": 1}.get(strategy, world_size)
    if shards == world_size:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (world_size // shards, shards), mesh_dim_names=("replicate", "shard"))


def shard(
    model: nn.Module,
    layers: list[nn.Module],
    own_units: list[nn.Module],
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    strategy: str,
    cpu_offload: bool = False,
) -> None:
    """`fully_shard` each layer, each of `own_units`, then the root with what is left (norm; tied embedding and head).

    Reduction is fp32, compute is `compute_dtype`. `full`, `hybrid`: gathered for each use and freed again (ZeRO-3).
    `grad_op`, `none`: see `before_micro_batch`. own_units: an untied embedding and head; alone they halve the peak of the
    vocabulary's gradients (Automodel#3708). https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    free = strategy in ("full", "hybrid")
    for unit in [*layers, *own_units]:
        # Our head computes its gradients in forward: freed in between it would be gathered twice for nothing.
        last = own_units and unit is own_units[-1]
        fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=free and not last)
        if isinstance(unit, nn.Embedding):
            unit.set_unshard_in_backward(False)  # its gradient is a sum of rows and needs no weights
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=free)
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


def before_micro_batch(model: nn.Module, strategy: str, last: bool) -> None:
    """What a step of several micro-batches communicates only once; call it before each, on every rank.

    `grad_op`, `none`: parameters stay gathered until the last backward (two switches make ZeRO-2: no resharding after
    forward, set once, and none after any but the last backward). `hybrid`, `none`: gradients are all-reduced over the
    copies of the model in the last backward only; within a copy they are reduce-scattered each time.
    """
    if strategy in ("grad_op", "none"):
        model.set_reshard_after_backward(last)
    if strategy in ("hybrid", "none"):
        model.set_requires_all_reduce(last)


def reshard(model: nn.Module) -> None:
    """After a forward without backward (validation) `grad_op` leaves parameters gathered: put the shards back.

    Everything that reads `model.parameters()` afterwards (optimizer, checkpoint, export) must see shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_shard(parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's memory of a parameter, and the row of the whole tensor where it begins.

    FSDP2 shards dimension 0 as torch.chunk does: every rank but the last ones holds ceil(rows / ranks) rows.
    """
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    start = 0
    for dimension, placement in enumerate(parameter.placements):
        if placement == Shard(0):
            ranks = parameter.device_mesh.size(dimension)
            rank = parameter.device_mesh.get_local_rank(dimension)
            start = min(parameter.shape[0], rank * -(-parameter.shape[0] // ranks))
    return parameter.detach().to_local(), start


def has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware (CUDA from Ampere on; CPUs with AMX, AVX512-BF16 or Arm BF16)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    checks = (
        getattr(torch.cpu, name, lambda: False) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(check() for check in checks) or any("bf16" in name and on for name, on in capabilities.items())
