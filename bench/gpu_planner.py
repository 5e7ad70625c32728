"""The planner's errors: its memory and speed for each rung of bench/ladder.py, against what the rung measured."""

import torch
from transformers import LlamaConfig

from bench.ladder import DOCUMENTS, EXTRA, RUNGS, SHAPES, Rung
from common.errors import UserError
from configs.config import Batch, Config, Data, Model, Optimizer, Run
from planner.cluster import Cluster, cpu_cluster, generic_device, named_device
from planner.memory import device_memory
from planner.shape import shape_of
from planner.step_time import expected_speed
from planner.workload import Load, uniform_workload

GIB = 2**30


def planner_rows(measured: dict[str, dict], device: str, peak: float) -> list[dict]:
    """One row for each rung in `measured`, by its key. device: cuda | cpu. peak: FLOP/s.

    memory: bytes of torch.cuda.max_memory_allocated, without what it does not see (the CUDA context) and without headroom. The
    rungs that keep all logits at once are left out, because the planner knows our loss only; so is memory on a CPU, where a
    process has more than its tensors.
    """
    config = LlamaConfig(**SHAPES[device], tie_word_embeddings=True)
    shape, cluster, length = shape_of("ladder", config), _cluster(device, peak), config.max_position_embeddings
    rows = []
    for key, rung in (RUNGS | EXTRA).items():
        found = measured.get(key)
        if not found or "tokens_per_second" not in found or not rung.chunked:
            continue
        settings = _settings(rung, length)
        load = Load((length,) * DOCUMENTS, DOCUMENTS * (length - 1))
        memory = device_memory(shape, settings, cluster, load)
        speed = expected_speed(
            shape, settings, cluster, uniform_workload(shape, DOCUMENTS, length, DOCUMENTS, 1, DOCUMENTS, 1)
        )
        low, high = speed.tokens_per_second
        row = {"rung": key, "tokens_per_second": found["tokens_per_second"], "planned_low": low, "planned_high": high}
        row["in_range"] = low <= found["tokens_per_second"] <= high
        if device == "cuda":
            planned = memory.total - memory.other - memory.headroom
            row |= {"gib": found["memory_gib"], "planned_gib": planned / GIB}
            row["memory_error"] = planned / (found["memory_gib"] * GIB) - 1
        rows.append(row)
    return rows


def _settings(rung: Rung, length: int) -> Config:
    return Config(
        model=Model(path="", activation_checkpointing=rung.checkpointing, compile=rung.compiled),
        data=Data(train=("none",), sequence_length=length),
        batch=Batch(global_examples=DOCUMENTS, micro_batch=DOCUMENTS),
        optimizer=Optimizer(1e-5, memory=rung.memory),
        run=Run("ladder"),
    )


def _cluster(device: str, peak: float) -> Cluster:
    """The machine of the measurements, as the planner knows it."""
    if device == "cpu":
        return cpu_cluster(1, peak, 8 * GIB)
    try:
        card = named_device(torch.cuda.get_device_name(0).removeprefix("NVIDIA "))
    except UserError:
        card = generic_device(torch.cuda.get_device_properties(0).total_memory / 1e9)
    return Cluster(card, 1)
