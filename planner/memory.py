"""The memory of a run by arithmetic: each term is a function with its source. Bytes on the fullest rank."""

from dataclasses import dataclass

from configs.config import Config
from planner.cluster import Cluster
from planner.shape import ModelShape
from planner.workload import Load


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
    """Peak memory of a step of `config` whose worst micro-batch is `load`."""
    raise NotImplementedError


def host_memory(shape: ModelShape, config: Config, cluster: Cluster, load: Load) -> HostMemory:
    """Memory of the host of one node."""
    raise NotImplementedError


def disk(shape: ModelShape, config: Config) -> Disk:
    """Room for checkpoints and export."""
    raise NotImplementedError


def save_seconds(size: Disk, bytes_per_second: float) -> float:
    """Seconds of one save at the given bandwidth of the disk."""
    raise NotImplementedError


def largest_rows(shape: ModelShape, config: Config, cluster: Cluster, at_most: int) -> int:
    """The largest `batch.micro_batch` whose full micro-batches fit `cluster.device.memory`; 0 if not even 1 does."""
    raise NotImplementedError
