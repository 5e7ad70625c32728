"""What a rank holds during the whole run, from the shapes of the parameters: exact, and the same on CPU and CUDA.

FSDP2 splits dimension 0 like torch.chunk, so that no rank holds more than rank 0: ceil(rows / shards) rows of every
parameter (distributed/sharding.py: local_shard; https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html).
The dtypes are those of distributed/optimizer.py.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from common.dtypes import DTYPES
from configs.config import EWC, Config
from distributed.moments import block_size
from distributed.optimizer import parameter_dtype
from planner.cluster import Cluster
from planner.shape import ModelShape, Unit

FP32 = 4  # bytes


@dataclass(frozen=True)
class Layout:
    """How a run is spread: what distributed/sharding.py makes of the settings."""

    ranks: int
    shards: int  # ranks that share one copy of the model
    keeps_gathered: bool  # parameters stay gathered from the first forward of a step to its last backward
    offloads: bool  # parameters, gradients and moments are in host memory, and forward and backward are not
    on_cuda: bool

    @property
    def replicates(self) -> bool:
        """Whether the mesh has a second dimension, over which gradients are all-reduced."""
        return self.shards != self.ranks


def layout(config: Config, cluster: Cluster) -> Layout:
    """The layout of a run (distributed/sharding.py: make_mesh, gathering_strategy)."""
    sharding, on_cuda = config.sharding, cluster.device.kind == "cuda"
    shards = {"hybrid": sharding.shard_size or cluster.per_node, "none": 1}.get(sharding.strategy, cluster.devices)
    alone = cluster.devices == 1 and not on_cuda and sharding.strategy == "full"
    keeps = sharding.strategy in ("grad_op", "none") or alone
    return Layout(cluster.devices, shards, keeps, sharding.cpu_offload and on_cuda, on_cuda)


def local_elements(shape: tuple[int, ...], shards: int) -> int:
    """Elements of a parameter on rank 0."""
    if not shape:
        return 1
    return -(-shape[0] // shards) * torch.Size(shape[1:]).numel()


@functools.lru_cache(maxsize=4096)  # every moment of a step asks for every unit
def shard_elements(unit: Unit, shards: int) -> int:
    """Elements of a unit on rank 0."""
    return sum(local_elements(shape, shards) for shape in unit.shapes)


@functools.lru_cache(maxsize=4096)
def trained_elements(unit: Unit, shards: int) -> int:
    """Those of a unit's elements on rank 0 that have gradients and moments: all but LoRA's frozen ones."""
    return sum(local_elements(shape, shards) for shape in unit.trained)


def model_elements(shape: ModelShape, shards: int) -> int:
    """Elements of the whole model on rank 0 that have gradients and moments."""
    return sum(trained_elements(unit, shards) for unit in shape.units)


def trained_bytes(shape: ModelShape, memory: str, shards: int) -> int:
    """Sharded weights that are trained: fp32 under 16N, else bf16."""
    return model_elements(shape, shards) * parameter_dtype(memory).itemsize


def frozen_bytes(shape: ModelShape, shards: int) -> int:
    """Sharded weights beside LoRA's adapters, in the dtype of the products (model/lora.py: build_to_train)."""
    everything = sum(shard_elements(unit, shards) for unit in shape.units)
    return (everything - model_elements(shape, shards)) * shape.frozen_itemsize


def parameter_bytes(shape: ModelShape, memory: str, shards: int) -> int:
    """Sharded weights, trained and frozen."""
    return trained_bytes(shape, memory, shards) + frozen_bytes(shape, shards)


def gradient_itemsize(memory: str) -> int:
    """Bytes of an element of a sharded gradient."""
    return FP32 if memory in ("16N", "14N") else 2


def gradient_bytes(shape: ModelShape, memory: str, shards: int) -> int:
    """Sharded gradients from the first backward to the end of the step."""
    return model_elements(shape, shards) * gradient_itemsize(memory)


def moment_bytes(shape: tuple[int, ...], memory: str, shards: int) -> int:
    """Both moments of a parameter on rank 0: fp32, bf16 under 8N, under 6N 8-bit codes and a scale per block of a row.

    6N: vectors, and matrices whose rows have no suitable divisor, keep fp32 (distributed/moments.py).
    """
    elements = local_elements(shape, shards)
    block = block_size(torch.Size(shape)) if memory == "6N" else None
    if block:
        return 2 * (elements + elements // block * FP32)
    return 2 * elements * (2 if memory == "8N" else FP32)


def optimizer_bytes(shape: ModelShape, memory: str, shards: int) -> int:
    """The tensors of the optimizer's state on rank 0, with AdamW's step counters: one for each parameter under 16N."""
    shapes = list(trained_shapes(shape))
    return sum(moment_bytes(one, memory, shards) for one in shapes) + FP32 * (len(shapes) if memory == "16N" else 1)


def ewc_bytes(shape: ModelShape, ewc: EWC, memory: str, shards: int) -> int:
    """The Fisher diagonal and the reference on rank 0 (model/ewc/anchor.py); 0 without EWC.

    The reference is stored in `ewc.dtype` if that is exact. For bf16 this is taken to depend on the dtype in which the base
    model is stored; a file whose fp32 tensors hold bf16 numbers takes less.
    """
    if not ewc.strength:
        return 0
    itemsize = DTYPES[ewc.dtype].itemsize
    is_exact = parameter_dtype(memory) == torch.bfloat16 or stored_dtype(shape) == torch.bfloat16
    return model_elements(shape, shards) * (itemsize + (itemsize if is_exact else FP32))


def stored_dtype(shape: ModelShape) -> torch.dtype:
    """The dtype of the base model's files and of the export; bf16 if config.json names none."""
    return getattr(shape.config, "dtype", None) or torch.bfloat16


def trained_shapes(shape: ModelShape) -> Iterable[tuple[int, ...]]:
    """The shapes of all trained parameters, tied ones once."""
    return (one for unit in shape.units for one in unit.trained)
