"""Sharding with FSDP2 (`fully_shard`): its units, the mesh of ranks, and the communication of each micro-batch.

https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from common.errors import UserError
from common.torch_private import private
from configs.config import Model, Sharding
from model.dtypes import DTYPES

# torch < 2.15 has no public name.
set_timeout = getattr(dist, "set_timeout", None) or private("distributed.distributed_c10d._set_pg_timeout")
_backend_of = private("distributed.ProcessGroup._get_backend")
private("_C._distributed_c10d.Backend.Options._timeout")
PIECE_ROWS = 4096  # rows of all ranks in a piece of the head's gradient: in fp32 4096 x 4096 x 4 bytes = 67 MB


def decoder_layers(model: nn.Module, layer_class: str | None = None) -> list[nn.Module]:
    """Return the modules to shard and checkpoint one by one (transformer auto-wrap).

    These are the modules of class `layer_class`, or of the classes that the model declares in `_no_split_modules`. Raises
    UserError if the model has no such module.
    """
    declared = {n for module in model.modules() for n in (getattr(module, "_no_split_modules", None) or ())}
    names = declared if layer_class is None else {layer_class}
    layers, inside = [], ()
    for name, module in model.named_modules():
        # Falcon Mamba declares a layer, and its mixer inside it.
        if type(module).__name__ in names and not name.startswith(inside):
            inside = (*inside, f"{name}.")
            layers.append(module)
    if not layers and layer_class is None:  # a type that declares none: the longest list of equal modules
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(layer) for layer in m}) == 1]
        layers = list(max(lists, key=len, default=[]))
    if not layers:
        classes = sorted({type(m).__name__ for m in model.modules() if "Layer" in type(m).__name__})
        raise UserError(
            f"model.layer_class={layer_class}: the model has no module of that class; it has "
            f"{', '.join(classes) or 'no layers'}"
        )
    return layers


def parallelize(
    model: nn.Module,
    layers: list[nn.Module],
    extra_units: list[nn.Module],
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    model_settings: Model,
    sharding: Sharding,
) -> str:
    """Join the context group, tile MLPs, checkpoint activations, compile and shard, in this order and in place. A collective.

    Parameters may still be on `meta`. Returns the strategy for `before_micro_batch`. The order matters: compiled code must contain
    the recomputation, and must not contain FSDP's hooks or the copies of `offload` (which only a GPU needs).
    """
    checkpointed, mode = layers[:: model_settings.checkpoint_every], model_settings.activation_checkpointing
    if sharding.context > 1:
        from distributed.context import join_context

        model.context = join_context(sharding.context)  # pyright: ignore[reportArgumentType]
    if model_settings.mlp_tiles > 1:
        from distributed.activation_checkpointing import tile_mlps

        tile_mlps(layers, model_settings.mlp_tiles)
    if mode != "none":
        from distributed.activation_checkpointing import checkpoint_activations, keep_inputs_on_host

        checkpoint_activations(checkpointed, mode)
    if model_settings.compile:
        from distributed.compiled_layers import compile_layers  # loads torch's compiler

        compile_layers(layers)
    if mode == "offload" and mesh.device_type == "cuda":
        keep_inputs_on_host(checkpointed)  # pyright: ignore[reportPossiblyUnboundVariable]
    shard(model, layers, extra_units, mesh, compute_dtype, sharding)
    return gathering_strategy(sharding, mesh)


def make_mesh(device_type: str, world_size: int, sharding: Sharding) -> DeviceMesh:
    """Create the device mesh. Its last dimension shards the parameters; the first of two dimensions replicates them. A collective.

    `full` and `grad_op` have a single dimension. `hybrid` has `(world / shard_size) x shard_size`: neighbouring ranks (usually a
    node) share a copy of the model. `none` has `world x 1`, like DDP.
    """
    shards = {"hybrid": sharding.shard_size or world_size, "none": 1}.get(sharding.strategy, world_size)
    if shards == world_size:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    mesh = init_device_mesh(device_type, (world_size // shards, shards), mesh_dim_names=("replicate", "shard"))
    set_timeouts(mesh.get_all_groups())
    return mesh


def set_timeouts(groups: Sequence[dist.ProcessGroup]) -> None:
    """Set the timeout of the default group, `run.timeout_minutes`, on further groups. torch's default is 10 (NCCL) or 30 minutes."""
    options = _backend_of(dist.group.WORLD, torch.device("cpu")).options
    for group in groups if options else ():  # a fake process group has no options
        set_timeout(options._timeout, group)


def gathering_strategy(sharding: Sharding, mesh: DeviceMesh) -> str:
    """Return `sharding.strategy`, but `grad_op` instead of `full` on a single CPU rank.

    A single rank gathers nothing and only casts its weights. Casting once per step takes less time than twice per micro-batch, and
    a host has room for the copy. On a single GPU the copy would take memory from the activations, and the cast takes next to no
    time.
    """
    alone = mesh.size() == 1 and mesh.device_type == "cpu"
    return "grad_op" if sharding.strategy == "full" and alone else sharding.strategy


def shard(
    model: nn.Module,
    layers: list[nn.Module],
    extra_units: list[nn.Module],
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    sharding: Sharding,
) -> None:
    """Apply `fully_shard` to each layer, to each of `extra_units`, then to the root with the rest (norm; tied embedding and head).

    Computation is in `compute_dtype`, reduction in `sharding.reduce_dtype`. `full` and `hybrid` gather parameters for each
    use and free them again (ZeRO-3). For `grad_op` and `none` see `before_micro_batch`. `extra_units` are an untied
    embedding and head: as separate units they halve the peak memory of the vocabulary's gradients (Automodel#3708).
    """
    reduce_dtype = DTYPES[sharding.reduce_dtype]
    if mesh.size() == 1:  # a single rank adds nothing, so the dtype of the weights loses nothing
        reduce_dtype = next((p.dtype for p in model.parameters() if p.requires_grad), reduce_dtype)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if sharding.cpu_offload else OffloadPolicy()
    shards = mesh.size(mesh.ndim - 1)
    options: dict[str, Any] = {
        "mesh": mesh,
        "shard_placement_fn": lambda parameter: Shard(sharded_dimension(parameter.shape, shards)),
        # OLMo and ERNIE rotate by fp32 cosines, which FSDP would cast as well.
        "mp_policy": MixedPrecisionPolicy(compute_dtype, reduce_dtype, cast_forward_inputs=False),
        "offload_policy": offload,
    }
    free = gathering_strategy(sharding, mesh) in ("full", "hybrid")
    for unit in [*layers, *extra_units]:
        # The head computes its gradients in forward, so a head that is freed after forward would be gathered again for nothing.
        is_head = bool(extra_units) and unit is extra_units[-1]
        sharded = fully_shard(unit, reshard_after_forward=free and not is_head, **options)
        if isinstance(unit, nn.Embedding):
            sharded.set_unshard_in_backward(False)  # backward of an embedding needs no weights
    # The root is not freed after forward: the loss needs a tied head after the model's forward, and backward begins with the norm.
    root = fully_shard(model, reshard_after_forward=False, **options)
    if mesh.device_type == "cuda":
        # In forward, start the all-gather of the next unit together with this unit's. FSDP does so in backward by
        # itself. On a CPU, gloo would only compete for the processor.
        order = [root, *extra_units[:1], *layers, *extra_units[1:]]
        for unit, following in itertools.pairwise(order):
            unit.set_modules_to_forward_prefetch([following])
    if mesh.size() > 1:  # on a single rank FSDP does not divide, and the switch would cost a copy of every gradient
        sum_gradients(model)
    # On a mesh with a single dimension the loss adds the head's gradient to the shards itself, and FSDP sees no gradient of it.
    # Exceptions are a tied head on several ranks, because FSDP reduces the embedding's part of the gradient anyway, and shards in
    # host memory, because the device would wait for every piece.
    head, on_host = getattr(model, "head", None), sharding.cpu_offload and mesh.device_type == "cuda"
    if (
        mesh.ndim == 1
        and head is not None
        and (extra_units or mesh.size() == 1)
        and not on_host
        and head.weight.requires_grad
    ):
        in_layers = {id(p) for unit in layers for p in unit.parameters()}
        for p in model.parameters() if not extra_units else ():
            if p.requires_grad and id(p) not in in_layers | {id(head.weight)}:  # in the root, beside a tied head
                p.register_post_accumulate_grad_hook(_own_gradient)  # FSDP calls it
        head.add_gradient = functools.partial(add_in_pieces, head.weight, reduce_dtype)


def _own_gradient(parameter: torch.Tensor) -> None:
    """Replace a gradient that is a view of the reduced gradients of its whole unit by a copy.

    FSDP sets such a view on a parameter without a gradient. The view of the root's norm would keep a second gradient of a tied head
    in memory until the end of the step.
    """
    assert parameter.grad is not None
    if local(parameter.grad).untyped_storage().nbytes() > local(parameter.grad).nbytes:
        parameter.grad = parameter.grad.clone()


def add_in_pieces(
    parameter: DTensor,
    dtype: torch.dtype,
    rows_of: Callable[[Sequence[tuple[int, int]]], torch.Tensor],
    num_rows: int,
    factor: torch.Tensor,
) -> None:
    """Sum a gradient over all ranks and add this rank's rows of the sum to the gradient of its shard. A collective.

    The gradient never exists as a whole: it is computed, multiplied by `factor` (fp32 scalar), reduced in `dtype` and added in
    pieces, which have the same number of rows of every rank's shard. `rows_of` (see `model.loss.Rows`) computes rows of this
    rank's addend. Only the first `num_rows` rows of the parameter have a gradient.
    """
    ranks = parameter.device_mesh.size()
    rows = -(-parameter.shape[0] // ranks)  # rows of a shard, as in `local_shard`
    is_first = parameter.grad is None
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter, requires_grad=False)
    gradient = local(parameter.grad)

    def finish(first: int, mine: torch.Tensor, work: dist.Work | None) -> None:
        if work is not None:
            work.wait()
        shard = gradient[first : first + len(mine)]
        shard.copy_(mine[: len(shard)]) if is_first else shard.add_(mine[: len(shard)])

    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # torch < 2.13
    pending = None
    step = max(1, PIECE_ROWS // ranks)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        starts = range(0, ranks * rows, rows)
        spans = [(min(start + first, num_rows), min(start + last, num_rows)) for start in starts]
        piece = rows_of(spans).float().mul_(factor).to(dtype)
        if len(piece) < ranks * (last - first):  # zeros for rows of padding and for the missing rows of the last shards
            parts = piece.split([stop - start for start, stop in spans])
            piece = torch.cat([nn.functional.pad(part, (0, 0, 0, last - first - len(part))) for part in parts])
        if ranks == 1:
            finish(first, piece, None)
            continue
        mine = torch.empty_like(piece[: last - first])
        work = reduce_scatter(mine, piece, group=parameter.device_mesh.get_group(), async_op=True)
        if pending:  # the previous piece was reduced while this piece was computed
            finish(*pending)
        pending = first, mine, work
    if pending:
        finish(*pending)


def sum_gradients(model: nn.Module) -> None:
    """Disable FSDP's division by the number of ranks, because the loss is already divided by the tokens of all ranks.

    The second switch is needed because gloo has no pre-multiplied sum.
    """
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def before_micro_batch(model: nn.Module, strategy: str, is_last: bool) -> None:
    """Set the communication of the next micro-batch. Call it before every forward of a step, on every rank.

    `strategy` is the result of `gathering_strategy`. `grad_op` and `none` keep parameters gathered until the last backward (ZeRO-2;
    `shard` has disabled resharding after forward). `hybrid` and `none` all-reduce gradients over the copies of the model only in
    the last backward.
    """
    if strategy == "full":
        return
    assert isinstance(model, FSDPModule)
    if strategy in ("grad_op", "none"):
        model.set_reshard_after_backward(is_last)
    if strategy in ("hybrid", "none"):
        model.set_requires_all_reduce(is_last)


def reshard(model: nn.Module) -> None:
    """Free gathered parameters, so that `model.parameters()` are shards again. No communication.

    Optimizer, checkpoint and export must read shards, but a forward without backward leaves gathered parameters under `grad_op`.
    """
    for unit in _units(model):
        unit.reshard()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without gradients. Afterwards restore the previous mode and `reshard` the model."""
    training = model.training
    model.eval()
    with torch.no_grad():
        yield
    reshard(model)
    model.train(training)


def sharded_dimension(shape: Sequence[int], ranks: int) -> int:
    """Return the dimension in which FSDP shards a parameter: usually 0 (rows, or whole experts).

    It is 1 for experts `(experts, rows, columns)` if there are more ranks than experts (64 ranks and 32 experts), because FSDP2 pads
    dimension 0, here with empty experts. FSDP2 does not pad dimension 1, so the ranks must divide its size.
    """
    return int(len(shape) == 3 and shape[0] < ranks and shape[1] % ranks == 0)


def local_shape(shape: Sequence[int], ranks: int) -> torch.Size:
    """Return the shape of rank 0's part of a parameter, which is the largest part. FSDP2 cuts like torch.chunk."""
    dimension, part = sharded_dimension(shape, ranks), list(shape)
    if part:
        part[dimension] = -(-part[dimension] // ranks)
    return torch.Size(part)


def local_shard(parameter: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """Return (this rank's part of a parameter, the sharded dimension, index in this dimension at which the part begins)."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0, 0
    mesh = parameter.device_mesh
    ranks, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)  # the dimension before replicates
    dimension = getattr(parameter.placements[-1], "dim", 0)
    rows = parameter.shape[dimension] if parameter.dim() else 0
    return local(parameter), dimension, min(rows, rank * -(-rows // ranks))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a (possibly sharded) tensor, detached."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor, detached. A collective if the tensor is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def flat_parts(parameter: torch.Tensor, size: int) -> Iterator[tuple[slice, int]]:
    """Yield parts of at most `size` elements of this rank's flattened shard, as (slice, index of its first element).

    The index counts in the whole flattened tensor, in which the part's elements are contiguous. A rank without elements yields
    nothing.
    """
    shard, dimension, start = local_shard(parameter)
    # Elements of the whole parameter and of the shard; if experts are cut by rows, elements per expert.
    whole, run = parameter.shape[dimension:].numel(), shard.shape[dimension:].numel()
    first = start * parameter.shape[dimension + 1 :].numel()
    for index in range(shard.numel() // run if run else 0):
        for begin in range(0, run, size):
            end = min(begin + size, run)
            yield slice(index * run + begin, index * run + end), index * whole + first + begin


def sum_over_shards(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """All-reduce, in place, a sum over this rank's shards. Copies of the model count once. A collective.

    All ranks get the same number, even if copies differ by mistake, so that all ranks see the error.
    """
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        dist.all_reduce(value, group=mesh.get_group(mesh.ndim - 1))
        if mesh.ndim == 2:  # the first dimension replicates
            dist.all_reduce(value, group=mesh.get_group(0))
            value /= mesh.size(0)
    return value
