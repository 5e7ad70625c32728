"""Sharding with FSDP2 (`fully_shard`): which modules are units, over which ranks, and what each micro-batch communicates.

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
from torch.distributed.distributed_c10d import _get_default_group, _set_pg_timeout
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from common.dtypes import DTYPES
from common.errors import UserError
from configs.config import Model, Sharding

PIECE_ROWS = 4096  # of a gradient that is reduced in pieces, over all ranks: in fp32 4096 x 4096 x 4 bytes = 67 MB


def decoder_layers(model: nn.Module, layer_class: str | None = None) -> list[nn.Module]:
    """The modules to shard and checkpoint one by one: transformer auto-wrap.

    These are the modules of class `layer_class`, or of the classes that the model declares in `_no_split_modules`. Raises
    UserError if there is none.
    """
    declared = {n for module in model.modules() for n in (getattr(module, "_no_split_modules", None) or ())}
    names = declared if layer_class is None else {layer_class}
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        found = sorted({type(m).__name__ for m in model.modules() if "Layer" in type(m).__name__})
        raise UserError(
            f"model.layer_class={layer_class}: the model has no module of that class; it has "
            f"{', '.join(found) or 'no layers'}"
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
    """Join the context group, tile MLPs, apply activation checkpointing, compile, shard, in this order and in place. A collective.

    Parameters may still be on `meta`. Returns the strategy for `before_micro_batch`. The order matters: compiled code must contain
    the recomputation, and FSDP's hooks must stay outside of it, as must the copies of `offload`, which only a GPU needs.
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
    """The device mesh: over which ranks parameters are sharded, and over which they are replicated.

    `full` and `grad_op` have one dimension. `hybrid` has `(world / shard_size) x shard_size`: neighbouring ranks (those of a node)
    hold one copy of the model. `none` has `world x 1`, as DDP.
    """
    shards = {"hybrid": sharding.shard_size or world_size, "none": 1}.get(sharding.strategy, world_size)
    if shards == world_size:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    mesh = init_device_mesh(device_type, (world_size // shards, shards), mesh_dim_names=("replicate", "shard"))
    bound_collectives(mesh.get_all_groups())
    return mesh


def bound_collectives(groups: Sequence[dist.ProcessGroup]) -> None:
    """Give groups of some ranks the timeout of the group of all, `run.timeout_minutes`. torch's own is 10 minutes (NCCL) or 30."""
    options = _get_default_group()._get_backend(torch.device("cpu")).options
    for group in groups if options else ():  # a pretended group has none
        _set_pg_timeout(options._timeout, group)


def gathering_strategy(sharding: Sharding, mesh: DeviceMesh) -> str:
    """`sharding.strategy`, but `grad_op` in place of `full` on a single CPU rank.

    A single rank only casts its weights: once per step takes less time than twice per micro-batch, and a host has room for the
    copy. On a single GPU the copy would take memory from the activations, and the cast takes next to no time.
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
    """`fully_shard` each layer, each of `extra_units`, then the root with the rest (norm; tied embedding and head).

    Computation is in `compute_dtype`, reduction in `sharding.reduce_dtype`. `full` and `hybrid` gather parameters for each
    use and free them again (ZeRO-3). For `grad_op` and `none` see `before_micro_batch`. `extra_units` are an untied
    embedding and head: as separate units they halve the peak memory of the vocabulary's gradients (Automodel#3708).
    """
    reduce_dtype = DTYPES[sharding.reduce_dtype]
    if mesh.size() == 1:  # nothing is added up, so the dtype of the weights holds the same gradients
        reduce_dtype = next((one.dtype for one in model.parameters() if one.requires_grad), reduce_dtype)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if sharding.cpu_offload else OffloadPolicy()
    shards = mesh.size(mesh.ndim - 1)
    options: dict[str, Any] = {
        "mesh": mesh,
        "shard_placement_fn": lambda parameter: Shard(sharded_dimension(parameter.shape, shards)),
        # OLMo and ERNIE rotate by fp32 cosines, which FSDP would cast too.
        "mp_policy": MixedPrecisionPolicy(compute_dtype, reduce_dtype, cast_forward_inputs=False),
        "offload_policy": offload,
    }
    free = gathering_strategy(sharding, mesh) in ("full", "hybrid")
    for unit in [*layers, *extra_units]:
        # Our head computes its gradients in forward, so freeing it after forward would gather it twice for nothing.
        is_head = bool(extra_units) and unit is extra_units[-1]
        sharded = fully_shard(unit, reshard_after_forward=free and not is_head, **options)
        if isinstance(unit, nn.Embedding):
            sharded.set_unshard_in_backward(False)  # its gradient is a sum of rows and needs no weights
    # The root holds a tied head, which the loss needs after the model's forward, and the norm: backward begins with them.
    root = fully_shard(model, reshard_after_forward=False, **options)
    if mesh.device_type == "cuda":
        # The host asks for the weights of the next unit as soon as it asks for those of this one. FSDP does the same in
        # backward by itself. gloo would only compete for the processor.
        order = [root, *extra_units[:1], *layers, *extra_units[1:]]
        for unit, following in itertools.pairwise(order):
            unit.set_modules_to_forward_prefetch([following])
    if mesh.size() > 1:  # a single rank does not divide, and the switch would cost a copy of every gradient
        sum_gradients(model)
    # Over one dimension of ranks the loss adds the gradient of the head to the shards itself, and FSDP sees none. Not for a tied
    # head, whose part of the embedding FSDP reduces anyway; and not where the shards are in the memory of the host, because the
    # device would wait for every piece.
    head, on_host = getattr(model, "head", None), sharding.cpu_offload and mesh.device_type == "cuda"
    if (
        mesh.ndim == 1
        and head is not None
        and (extra_units or mesh.size() == 1)
        and not on_host
        and head.weight.requires_grad
    ):
        units = {id(one) for unit in layers for one in unit.parameters()}
        for one in model.parameters() if not extra_units else ():  # of the root, beside a tied head
            if one.requires_grad and id(one) not in units | {id(head.weight)}:
                one.register_post_accumulate_grad_hook(_own_gradient)  # FSDP calls it
        head.add_gradient = functools.partial(add_in_pieces, head.weight, reduce_dtype)


def _own_gradient(parameter: torch.Tensor) -> None:
    """Copy a gradient that is a view of the reduced gradients of its whole unit.

    FSDP gives such a view to a parameter without a gradient. That of the norm of the root would keep a second gradient of a tied
    head until the end of the step.
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
    """Sum a gradient over all ranks and add this rank's rows of it to the gradient of its shard. A collective.

    The gradient is made, reduced in `dtype` and added in pieces with the same number of rows of every rank's shard, and never exists
    as a whole. rows_of: as `model.loss.Rows`, for this rank's part of the sum; only the first `num_rows` rows have a gradient.
    factor: fp32 scalar by which it is multiplied.
    """
    ranks = parameter.device_mesh.size()
    rows = -(-parameter.shape[0] // ranks)  # of a shard, as in `local_shard`
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
        if len(piece) < ranks * (last - first):  # rows of padding, or that fill up the last shards, get zeros
            made = piece.split([stop - start for start, stop in spans])
            piece = torch.cat([nn.functional.pad(part, (0, 0, 0, last - first - len(part))) for part in made])
        if ranks == 1:
            finish(first, piece, None)
            continue
        mine = torch.empty_like(piece[: last - first])
        work = reduce_scatter(mine, piece, group=parameter.device_mesh.get_group(), async_op=True)
        if pending:  # the previous piece was reduced while this one was made
            finish(*pending)
        pending = first, mine, work
    if pending:
        finish(*pending)


def sum_gradients(model: nn.Module) -> None:
    """Switch off FSDP's division by the number of ranks. The loss is already divided by the tokens of all ranks.

    gloo has no pre-multiplied sum, hence the second switch.
    """
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def before_micro_batch(model: nn.Module, strategy: str, is_last: bool) -> None:
    """Set what this micro-batch communicates. Call it before every forward of a step, on every rank.

    strategy: `gathering_strategy`. `grad_op` and `none` keep parameters gathered until the last backward (ZeRO-2: `shard` has switched
    off resharding after forward). `hybrid` and `none` all-reduce gradients over the copies of the model in the last backward only.
    """
    if strategy == "full":
        return
    assert isinstance(model, FSDPModule)
    if strategy in ("grad_op", "none"):
        model.set_reshard_after_backward(is_last)
    if strategy in ("hybrid", "none"):
        model.set_requires_all_reduce(is_last)


def reshard(model: nn.Module) -> None:
    """Free gathered parameters, so that `model.parameters()` are shards again, also after a forward without backward under `grad_op`.

    Everything that reads parameters afterwards (optimizer, checkpoint, export) must see shards.
    """
    for unit in _units(model):
        unit.reshard()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside the block; afterwards the previous mode, and shards again (`reshard`)."""
    training = model.training
    model.eval()
    with torch.no_grad():
        yield
    reshard(model)
    model.train(training)


def sharded_dimension(shape: Sequence[int], ranks: int) -> int:
    """The dimension of a parameter of this shape of which each rank has a part: 0, that of the rows or of the experts.

    1 for experts `(experts, rows, columns)` of which there are fewer than ranks, as 32 on 64 ranks: FSDP2 fills dimension 0 up,
    here with experts that are empty. Dimension 1 it does not fill up, so the ranks must divide it.
    """
    return int(len(shape) == 3 and shape[0] < ranks and shape[1] % ranks == 0)


def local_shape(shape: Sequence[int], ranks: int) -> torch.Size:
    """The shape of the part of a parameter that rank 0 has, which is the largest. FSDP2 cuts like torch.chunk."""
    dimension, part = sharded_dimension(shape, ranks), list(shape)
    if part:
        part[dimension] = -(-part[dimension] // ranks)
    return torch.Size(part)


def local_shard(parameter: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """(this rank's part of a parameter, the dimension that is cut, index of the part's begin along it)."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0, 0
    mesh = parameter.device_mesh
    ranks, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)  # the dimension before replicates
    dimension = getattr(parameter.placements[-1], "dim", 0)
    rows = parameter.shape[dimension] if parameter.dim() else 0
    return local(parameter), dimension, min(rows, rank * -(-rows // ranks))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a (possibly sharded) tensor, detached."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, detached; of a sharded one by a collective."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def flat_parts(parameter: torch.Tensor, size: int) -> Iterator[tuple[slice, int]]:
    """Parts of at most `size` elements of this rank's flattened shard, none on a rank without elements.

    Of each also the index of its first element in the whole flattened tensor, which goes on from there without a gap.
    """
    shard, dimension, start = local_shard(parameter)
    whole, run = parameter.shape[dimension:].numel(), shard.shape[dimension:].numel()  # of one expert, if it is cut
    first = start * parameter.shape[dimension + 1 :].numel()
    for index in range(shard.numel() // run if run else 0):
        for begin in range(0, run, size):
            end = min(begin + size, run)
            yield slice(index * run + begin, index * run + end), index * whole + first + begin


def sum_over_shards(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Add up, in place, a sum over this rank's shards with those of all ranks; copies of the model count once.

    All ranks get the same number, also where a copy differs from the others, which then is an error that all of them see.
    """
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        dist.all_reduce(value, group=mesh.get_group(mesh.ndim - 1))
        if mesh.ndim == 2:  # the first dimension replicates
            dist.all_reduce(value, group=mesh.get_group(0))
            value /= mesh.size(0)
    return value
