"""The activations of a run's micro-batches (model/activations.py), each counted once."""

import functools
from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig

from common.dtypes import DTYPES
from configs.config import Config, LoRA
from model.activations import Activations, count_activations
from model.product_attention import KEEP_PROBABILITIES
from planner.cluster import Cluster
from planner.shape import ModelShape


def activations_of(shape: ModelShape, config: Config, cluster: Cluster, lengths: tuple[int, ...]) -> Activations:
    """The activations of a micro-batch with documents of `lengths` tokens on the cluster's kind of device."""
    model = config.model
    return _counted(
        _Architecture(shape.config.to_json_string(use_diff=False), shape.config),
        DTYPES[model.compute_dtype],
        lengths,
        cluster.device.kind,
        model.activation_checkpointing,
        model.checkpoint_every,
        model.layer_class,
        config.lora,
    )


@dataclass(frozen=True)
class _Architecture:
    """A model's configuration that is compared by value."""

    text: str
    config: PretrainedConfig = field(compare=False)


@functools.lru_cache(maxsize=128)  # a table asks for the same micro-batch at many strategies
def _counted(
    architecture: _Architecture,
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    device_type: str,
    mode: str,
    every: int,
    layer_class: str | None,
    lora: LoRA,
) -> Activations:
    return count_activations(architecture.config, dtype, lengths, device_type, mode, every, layer_class, lora)


def full_lengths(config: Config, cluster: Cluster, rows: int) -> tuple[int, ...]:
    """Lengths of documents that fill `rows` rows and keep most: as long as a row, on a CPU in bf16 at most 512 tokens.

    Up to that length the probabilities of attention are kept (model/product_attention.py).
    """
    length = config.data.sequence_length
    if cluster.device.kind == "cuda" or config.model.compute_dtype != "bf16":
        return (length,) * rows
    whole, rest = divmod(rows * length, min(length, KEEP_PROBABILITIES))
    return (min(length, KEEP_PROBABILITIES),) * whole + ((rest,) if rest else ())
