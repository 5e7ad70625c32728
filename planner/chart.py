"""A chart: memory per GPU against the number of GPUs, with the memory of common cards."""

import dataclasses
from pathlib import Path

import matplotlib

from planner.cluster import cluster_of
from planner.memory import device_memory
from planner.report import GIB
from planner.subject import Assumed, from_name

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter

MODELS = ("7B", "13B", "70B")
MEMORIES = {"16N": "-", "12N": "--", "8N": ":"}  # optimizer.memory -> line
GPUS = (1, 2, 4, 8, 16, 32, 64, 128)
CARDS = {"A100-40": "40 GB", "A100-80": "80 GB", "H200": "141 GB"}
PER_NODE = 8


def memory_per_gpu(model: str, memory: str, sequence: int = 4096) -> list[float]:
    """GiB of the fullest GPU under `full` sharding and checkpointing, with micro_batch=1, for each of `GPUS`."""
    subject = from_name(model, Assumed(sequence), [])
    config = dataclasses.replace(subject.config, optimizer=dataclasses.replace(subject.config.optimizer, memory=memory))
    sizes = []
    for gpus in GPUS:
        cluster = cluster_of(gpus, -(-gpus // PER_NODE), "H200")
        worst = subject.workloads(gpus, "cuda")(1).worst
        sizes.append(device_memory(subject.shape, config, cluster, worst).total / GIB)
    return sizes


def draw_memory(path: Path) -> None:
    """Draw the chart into a .png or .svg file."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, model in enumerate(MODELS):
        for memory, style in MEMORIES.items():
            axes.plot(
                GPUS, memory_per_gpu(model, memory), style, color=f"C{number}", marker=".", label=f"{model}, {memory}"
            )
    for card, label in CARDS.items():
        usable = cluster_of(1, 1, card).device.memory / GIB
        axes.axhline(usable, color="black", linewidth=0.8)
        axes.annotate(label, (GPUS[-1], usable), xytext=(0, 2), textcoords="offset points", ha="right", va="bottom")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
    axes.set(
        xticks=GPUS,
        xlabel="GPUs",
        ylabel="GiB per GPU at the peak of a step",
        title="sharding.strategy=full, activation_checkpointing=full, 4,096 tokens per micro-batch",
    )
    axes.grid(alpha=0.3)
    axes.legend(ncols=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
