"""The README's table of the models that fit. Run `python -m tests.scripts.plan.fits` to print it.

A cell is the answer of `python scripts/plan.py --model NAME --gpus GPUS --gpu-memory GB` to the settings as typed: with 16 bytes
per parameter, with `optimizer.memory=6N`, and with `lora.rank=64`. All of them take 4,096 tokens, micro-batch 1, everything
sharded, full activation checkpointing and no CPU offload.
"""

import functools
from dataclasses import replace

from configs.load import override
from scripts.plan.machines import Cluster, cluster_of, generic_device
from scripts.plan.planner import Plan, plan_setting
from scripts.plan.subject import assumed_subject
from scripts.plan.workload import Workload

# By the bytes of their weights.
MODELS = {size: f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")}
MODELS["70B"] = "meta-llama/Llama-3.1-70B"
GIGABYTES = (24, 40, 48, 80, 141)
GPUS = (1, 2, 4, 8)


@functools.cache
def planned(size: str, rank: int) -> Plan:
    """Return the plan of a size on one GPU. The model is built once, because its shapes are the same on every cluster."""
    subject = assumed_subject(MODELS[size], [f"lora.rank={rank}"], cluster_of(1, 1, generic_device(80)))
    return plan_setting(subject, subject.config, as_written=True)


def fits(size: str, rank: int, memory: str, cluster: Cluster) -> bool:
    """Return whether a micro-batch of one document of 4,096 tokens fits."""
    plan = planned(size, rank)
    same = Workload(1, [], plan.workload.worst, True)
    subject = replace(plan.subject, cluster=cluster, workload_of=lambda rows, context: same)
    return Plan(subject, override(plan.config, [f"optimizer.memory={memory}"])).fits


def largest(rank: int, memory: str, gigabytes: int, gpus: int) -> str:
    """Return the largest size that fits."""
    cluster = cluster_of(gpus, 1, generic_device(gigabytes))
    return next(size for size in reversed(MODELS) if fits(size, rank, memory, cluster))


def rows() -> list[str]:
    """Return the rows of the table, in Markdown."""
    lines = []
    for gigabytes in GIGABYTES:
        cells = []
        for gpus in GPUS:
            ways = ((0, "16N"), (0, "6N"), (64, "16N"))
            cells.append(", ".join(largest(rank, memory, gigabytes, gpus) for rank, memory in ways))
        lines.append(f"{gigabytes} GB | {' | '.join(cells)}")
    return lines


if __name__ == "__main__":
    print("\n".join(rows()))
