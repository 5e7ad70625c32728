"""The memory of a run by arithmetic: each term is a function with its source. Bytes on the fullest rank."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from configs.config import Config
from distributed.optimizer import parameter_dtype
from model.activations import Activations
from planner.activations import activations_of, full_lengths
from planner.cluster import Cluster
from planner.peak import Moment, Step
from planner.shape import ModelShape
from planner.terms import (
    ewc_bytes,
    gradient_bytes,
    gradient_itemsize,
    layout,
    local_elements,
    moment_bytes,
    optimizer_bytes,
    parameter_bytes,
    stored_dtype,
    trained_bytes,
    trained_shapes,
)
from planner.workload import Load

MIB = 2**20
# With lazy loading of kernels (CUDA >= 11.7) about 300 MB, on a GPU that a PyTorch maintainer looked at (pytorch#107667);
# more kernels are loaded as they are used. Uncertain by a factor of 1.5.
CUDA_CONTEXT = 400 * MIB
# 544 MB for 2 and 688 MB for more A100s with NVLink (nccl#964). It depends on the number of channels: uncertain by a factor
# of 2, and more with NVLink SHARP.
NCCL_COMMUNICATOR = 688 * MIB
# Python, torch and transformers before any tensor, on a CPU.
CPU_PROCESS = 380 * MIB
# Of what comes and goes in a step. The caching allocator rounds blocks up (to 2 MiB above 1 MiB), does not join blocks of
# different segments, and keeps those of FSDP's streams apart.
# https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf
FRAGMENTATION = 0.1
COUNTED_ROWS = 8  # of a full micro-batch, on CUDA; more are extrapolated
RANDOM_STATE = 5056  # bytes of torch.get_rng_state()
# The texts of eval/forgetting.py, and what a token of English has on average in the vocabularies of today's models.
FORGETTING_BYTES, BYTES_PER_TOKEN = 8192, 4


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the device of the fullest rank at the peak of a step."""

    parameters: int  # this rank's shards
    gradients: int
    optimizer: int  # moments and their scales
    ewc: int  # Fisher diagonal and reference, where ewc.device=device
    gathered: int  # whole parameters in the compute dtype
    reduction: int  # gradients of a unit before and while they are reduced
    activations: int  # of the worst micro-batch, with what one recomputed layer needs
    logits: int  # chunk of the head, gradient of hidden states and head
    other: int  # CUDA context, NCCL buffers
    headroom: int  # for fragmentation

    @property
    def total(self) -> int:
        """Sum of all terms."""
        return sum(vars(self).values())

    @property
    def tensors(self) -> int:
        """Sum of all terms that are tensors: what torch.cuda.max_memory_allocated reports."""
        return self.total - self.other - self.headroom


@dataclass(frozen=True)
class HostMemory:
    """Bytes of one node's host, over all of its ranks."""

    offload: int  # parameters, gradients and moments under sharding.cpu_offload
    activations: int  # model.activation_checkpointing=offload
    ewc: int  # ewc.device=cpu
    async_save: int  # copies of a checkpoint's tensors
    forgetting: int  # the base's distributions (run.eval_general)

    @property
    def total(self) -> int:
        """Sum of all terms."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Disk:
    """Bytes on the run's disk. checkpoint: of one; run: of all that are kept, the one being written, and the export."""

    checkpoint: int
    run: int
    export: int


def device_memory(shape: ModelShape, config: Config, cluster: Cluster, load: Load) -> DeviceMemory:
    """Peak memory of a step of `config` whose worst micro-batch is `load`.

    The peak is that of a micro-batch other than the first: the gradients of those before it are there. Layers are counted
    as eager code; torch.compile keeps less. `other` and `headroom` are estimates, everything else is tensors.
    """
    return _device_memory(shape, config, cluster, activations_of(shape, config, cluster, load.lengths), load.targets)


def peak_moment(shape: ModelShape, config: Config, cluster: Cluster, activations: Activations, targets: int) -> Moment:
    """The moment of a step at which the most memory is in use."""
    step = Step(shape, config, layout(config, cluster), activations, targets)
    return max(step.moments(), key=lambda moment: moment.total)


def _device_memory(
    shape: ModelShape, config: Config, cluster: Cluster, activations: Activations, targets: int
) -> DeviceMemory:
    spread, memory = layout(config, cluster), config.optimizer.memory
    moment = peak_moment(shape, config, cluster, activations, targets)
    on_device = 0 if spread.offloads else 1
    ewc_on_device = config.ewc.device == "device" and not spread.offloads or not spread.on_cuda
    return DeviceMemory(
        parameters=on_device * parameter_bytes(shape, memory, spread.shards),
        gradients=on_device * gradient_bytes(shape, memory, spread.shards),
        optimizer=on_device * optimizer_bytes(shape, memory, spread.shards),
        ewc=ewc_bytes(shape, config.ewc, memory, spread.shards) if ewc_on_device else 0,
        gathered=moment.gathered,
        reduction=moment.reduction,
        activations=moment.activations,
        logits=moment.logits,
        other=other_bytes(config, cluster),
        headroom=round(FRAGMENTATION * moment.total),
    )


def other_bytes(config: Config, cluster: Cluster) -> int:
    """What is not tensors: the CUDA context and NCCL's buffers, or on a CPU the process itself.

    A mesh of one dimension uses the default group; of two, it adds a group for each dimension that has several ranks.
    """
    if cluster.device.kind != "cuda":
        return CPU_PROCESS
    spread = layout(config, cluster)
    if spread.ranks == 1:
        return CUDA_CONTEXT
    communicators = 1 + (spread.replicates + (spread.replicates and spread.shards > 1))
    return CUDA_CONTEXT + communicators * NCCL_COMMUNICATOR


def host_memory(shape: ModelShape, config: Config, cluster: Cluster, load: Load) -> HostMemory:
    """Memory of the host of one node, beside that of its processes. On a CPU, what is on the device is not counted again."""
    spread, memory, ranks = layout(config, cluster), config.optimizer.memory, cluster.per_node
    on_host = spread.on_cuda and (config.ewc.device == "cpu" or spread.offloads)
    activations = activations_of(shape, config, cluster, load.lengths)
    checkpoint = trained_bytes(shape, memory, spread.shards) + sum(
        moment_bytes(one, memory, spread.shards) for one in trained_shapes(shape)
    )
    return HostMemory(
        offload=ranks * offloaded_bytes(shape, memory, spread.shards) if spread.offloads else 0,
        activations=ranks * activations.on_host,
        ewc=ranks * ewc_bytes(shape, config.ewc, memory, spread.shards) if on_host else 0,
        async_save=ranks * checkpoint if config.run.async_save else 0,
        forgetting=forgetting_bytes(shape, cluster) if config.run.eval_general else 0,
    )


def offloaded_bytes(shape: ModelShape, memory: str, shards: int) -> int:
    """Host memory of one rank under sharding.cpu_offload. Weights and gradients are pinned, moments are not.

    torch rounds every pinned tensor up to a power of two (pytorch#150517).
    """
    itemsizes = parameter_dtype(memory).itemsize, gradient_itemsize(memory)
    trained = list(trained_shapes(shape))
    pinned = sum(_power_of_two(local_elements(one, shards) * itemsize) for one in trained for itemsize in itemsizes)
    for unit in shape.units:
        frozen = Counter(unit.shapes) - Counter(unit.trained)
        pinned += sum(_power_of_two(local_elements(one, shards) * shape.frozen_itemsize) for one in frozen.elements())
    return pinned + optimizer_bytes(shape, memory, shards)


def forgetting_bytes(shape: ModelShape, cluster: Cluster) -> int:
    """Host memory of a node for the base's distributions (eval/forgetting.py): fp16 log-probabilities and an int64 a token.

    The texts are dealt to all ranks.
    """
    tokens = -(-FORGETTING_BYTES // BYTES_PER_TOKEN // cluster.nodes)
    return tokens * (2 * shape.num_tokens + 8)


def disk(shape: ModelShape, config: Config) -> Disk:
    """Room for checkpoints and export (distributed/disks.py: check_room_for_run), and for EWC's anchor."""
    memory = config.optimizer.memory
    checkpoint = trained_bytes(shape, memory, 1) + sum(moment_bytes(one, memory, 1) for one in trained_shapes(shape))
    checkpoint += 4 + RANDOM_STATE  # the step counter, and a rank's random state
    export = shape.num_exported * stored_dtype(shape).itemsize
    kept = (config.run.keep_last + 1) * checkpoint  # and the best one
    return Disk(checkpoint, kept + max(checkpoint, export) + ewc_bytes(shape, config.ewc, memory, 1), export)


def save_seconds(size: Disk, bytes_per_second: float) -> float:
    """Seconds of one save at the given bandwidth of the disk."""
    return size.checkpoint / bytes_per_second


def largest_rows(shape: ModelShape, config: Config, cluster: Cluster, at_most: int) -> int:
    """The largest `batch.micro_batch` whose full micro-batches fit `cluster.device.memory`; 0 if not even 1 does."""

    def fits(rows: int) -> bool:
        return full_memory(shape, config, cluster, rows).total <= cluster.device.memory

    return largest_that(fits, at_most)


def largest_that(fits: Callable[[int], bool], at_most: int) -> int:
    """The largest number from 1 to `at_most` that fits, if all smaller ones do; 0 if none does."""
    low, high = 0, 1
    while high <= at_most and fits(high):
        low, high = high, 2 * high
    high = min(high, at_most + 1)  # does not fit, or must not be taken
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def full_memory(shape: ModelShape, config: Config, cluster: Cluster, rows: int) -> DeviceMemory:
    """`device_memory` of a micro-batch of `rows` full rows, all of it targets, of the lengths that need the most."""
    counted = min(rows, COUNTED_ROWS if cluster.device.kind == "cuda" else 1)
    activations = activations_of(shape, config, cluster, full_lengths(config, cluster, counted))
    tokens = rows * config.data.sequence_length
    return _device_memory(shape, config, cluster, activations.scaled(rows / counted), tokens)


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length() if size else 0
