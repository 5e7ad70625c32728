"""Figures of runs and of training methods, drawn with matplotlib into image files."""

import json
from pathlib import Path

import matplotlib

from common.errors import UserError
from eval.compare_methods import Method, metrics_with_intervals

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read_curve(run: Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one curve of a run. Raises UserError if the run has no metrics."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the directory of a run, e.g. runs/quickstart")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    points = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in points], [value for _, value in points]


def plot_runs(runs: list[Path], path: Path) -> None:
    """Loss, gradient norm and learning rate of one or more runs. Raises UserError if one of them has no metrics."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for run in runs:
        name = run.name if len(runs) > 1 else ""
        loss = read_curve(run, "train/loss/main")  # of data.train alone, if other sources are mixed in
        loss = loss if loss[0] else read_curve(run, "train/loss")
        axes[0].plot(*loss, linewidth=1, label=f"{name} training".strip())
        axes[0].plot(*read_curve(run, "validation/loss"), marker="o", markersize=4, label=f"{name} validation".strip())
        axes[1].plot(*read_curve(run, "train/grad_norm"), linewidth=1, label=name)
        axes[2].plot(*read_curve(run, "train/learning_rate"), linewidth=1, label=name)
    axes[0].set(title="loss of target tokens (nats)", xlabel="step", yscale="log")
    axes[1].set(title="gradient norm before clipping", xlabel="step", yscale="log")
    axes[2].set(title="learning rate", xlabel="step")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_methods(methods: list[Method], path: Path) -> None:
    """Learning against forgetting: the loss on held-out answers over KL and over perplexity, with 95% intervals.

    Learning is shown by the loss, because F1 saturates.
    """
    base = methods[0].general["perplexity_per_byte"]["base"]["value"]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    for i, method in enumerate(methods):
        metrics = metrics_with_intervals(method)
        y, label = metrics["loss"], method.name + (f" (F1 {metrics['f1'].value:.3f})" if "f1" in metrics else "")
        yerr = [[min(y.value - y.low, 0.9 * y.value)], [y.high - y.value]]  # the axis is logarithmic
        style = {"fmt": "os^Dv<>*P"[i % 9], "color": f"C{i % 10}", "capsize": 2, "label": label}
        for axes, x in zip(panels, (metrics.get("kl"), metrics["perplexity"]), strict=True):
            if x:
                axes.errorbar(x.value, y.value, yerr, [[x.value - x.low], [x.high - x.value]], **style)
    panels[0].set(
        xlabel="forgetting: KL(base || tuned) on general text, nats per token",
        ylabel="learning: loss on held-out answers, nats per token",
        yscale="log",
    )
    panels[0].invert_yaxis()
    panels[1].set(xlabel="forgetting: perplexity per byte of general text (line: base)")
    panels[1].axvline(base, color="grey", linewidth=0.8)
    panels[1].legend(fontsize=8)
    figure.suptitle("better is up and to the left")
    figure.savefig(path, dpi=110)
    plt.close(figure)
