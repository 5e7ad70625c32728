"""One step of our own model, sharding and checkpointing code on fake tensors, at any number of ranks, without a device."""

from dataclasses import dataclass

from configs.config import Config
from planner.cluster import Cluster
from planner.shape import ModelShape
from planner.workload import Load


@dataclass(frozen=True)
class Simulated:
    """Bytes on rank 0. peak: highest sum during forward and backward; the others are parts of it at that moment."""

    peak: int
    parameters: int
    gradients: int
    gathered: int
    activations: int
    saved_activations: int  # alive at the end of forward
    seconds: float  # of the simulation itself


def simulate(shape: ModelShape, config: Config, cluster: Cluster, load: Load) -> Simulated:
    """Run forward and backward of `load` as rank 0 of `cluster.devices` ranks."""
    raise NotImplementedError
