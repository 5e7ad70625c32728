"""The figures of a comparison: learning against forgetting, and loss curves.

The colours, by Okabe and Ito (https://jfly.uni-koeln.de/color/), can be told apart by people with colour blindness. Arms also
differ in their marker.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

from eval.comparison.arms import Arm, curve
from eval.comparison.measures import measure_of
from eval.comparison.words import heading

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

COLORS = ("#1F87D0", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
MARKERS = "os^Dv<>*P"
MOST = 28  # characters of a name in a figure
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a name may have a dollar sign
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_BESIDE: dict[str, Any] = {"loc": "outside right upper", "fontsize": 8, "frameon": False}  # options of the legend
Style = dict[str, tuple[str, str]]  # arm -> its colour and its marker


@dataclass(frozen=True)
class Picture:
    """A figure as PNG, with its file name without ending, its caption, and a description for readers who cannot see it."""

    name: str
    caption: str
    words: str
    png: bytes


def pictures(result: dict, arms: Sequence[Arm]) -> list[Picture]:
    """Draw the figures for which the comparison has data."""
    rows = [row for row in result["rows"] if row["kind"] == "arm"]
    style = {row["name"]: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, row in enumerate(rows)}
    drawn = []
    with plt.rc_context(STYLE):
        if result["main"] and any("perplexity" in row["metrics"] for row in rows):
            drawn.append(_forgetting(result, rows, style))
        curves = {arm.name: [_curves(seed.source.rows) for seed in arm.seeds] for arm in arms}
        if any(map(any, curves.values())):
            drawn.append(_losses(curves, style))
    return drawn


def png(figure: Figure) -> bytes:
    """Save a figure as PNG, close it, and return the bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    plt.close(figure)
    return content.getvalue()


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    size = (4.6 * count + 2, height)  # with the names on the right
    figure, panels = plt.subplots(1, count, figsize=size, layout="constrained", squeeze=False, sharey=True)
    return figure, list(panels[0])


def _forgetting(result: dict, rows: Sequence[dict], style: Style) -> Picture:
    main = result["main"]
    metrics = [name for name in ("perplexity", "kl") if any(name in row["metrics"] for row in rows)]
    baselines = [row for row in result["rows"] if row["kind"] == "baseline" and main in row["metrics"]]
    best = max(baselines, key=lambda row: row["metrics"][main]["value"], default=None)
    base = next((row["metrics"] for row in result["rows"] if row["kind"] == "base"), {})
    grey = {"color": "grey", "linewidth": 0.9}
    figure, panels = _panels(len(metrics), 3.6)
    for axes, metric in zip(panels, metrics, strict=True):
        for row in rows:
            x, y = (row["metrics"].get(name) for name in (metric, main))
            if x and y:
                color, marker = style[row["name"]]
                bars = {"yerr": _error(y), "xerr": _error(x), "fmt": marker, "color": color, "capsize": 2}
                axes.errorbar(x["value"], y["value"], label=_shortened(row["name"]), **bars)
        if best:
            label = f"best baseline: {_shortened(best['name'])}"
            axes.axhline(best["metrics"][main]["value"], linestyle="--", label=label, **grey)
        if metric in base:
            axes.axvline(base[metric]["value"], linestyle=":", label="base model", **grey)
        axes.set(xlabel=f"forgetting: {heading(result, metric)}")
    panels[0].set(ylabel=f"learning: {heading(result, main)}")
    figure.legend(*panels[0].get_legend_handles_labels(), **_BESIDE)
    if measure_of(main).better < 0:
        panels[0].invert_yaxis()
    words = f"{heading(result, main)} against forgetting; the tables below have the values."
    up = "up and " * bool(measure_of(main).better)
    caption = f"Learning against forgetting, with 95% intervals. Better is {up}to the left."
    return Picture("forgetting", caption, words, png(figure))


def _error(interval: dict) -> list[list[float]]:
    """Return the lengths of the lower and the upper error bar; 0 if the interval is unknown."""
    if interval["low"] is None:
        return [[0.0], [0.0]]
    return [[max(0.0, interval["value"] - interval["low"])], [max(0.0, interval["high"] - interval["value"])]]


def _curves(rows: Sequence[dict]) -> dict[str, tuple[list[int], list[float]]]:
    """Return the training and validation loss of a run, as far as it has them: kind -> (steps, values)."""
    curves = {"training": curve(rows, "train/loss/main", "train/loss"), "validation": curve(rows, "validation/loss")}
    return {kind: points for kind, points in curves.items() if points[0]}


def _losses(curves: dict[str, list[dict]], style: Style) -> Picture:
    kinds = [
        kind for kind in ("training", "validation") if any(kind in run for runs in curves.values() for run in runs)
    ]
    figure, panels = _panels(len(kinds), 3.2)
    for axes, kind in zip(panels, kinds, strict=True):
        for name, runs in curves.items():
            for number, points in enumerate(run[kind] for run in runs if kind in run):
                line = {"color": style[name][0], "marker": style[name][1] if kind == "validation" else None}
                label = _shortened(name) if number == 0 else None
                axes.plot(*points, linewidth=1, markersize=3, label=label, **line)
        axes.set(title=f"{kind} loss", xlabel="step", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")  # the default writes powers of ten as formulas, which STYLE turns off
        axes.yaxis.set_minor_formatter(NullFormatter())
    panels[0].set(ylabel="nats per target token")
    figure.legend(*panels[-1].get_legend_handles_labels(), **_BESIDE)
    last = {
        name: [f"{run['validation'][1][-1]:.4f}" for run in runs if "validation" in run]
        for name, runs in curves.items()
    }
    listed = "; ".join(f"{name} {', '.join(values)}" for name, values in last.items() if values)
    words = f"Loss over steps. Last validation loss: {listed}"
    return Picture("losses", "Loss of target tokens while training; one line for each seed.", words, png(figure))


def _shortened(name: str) -> str:
    """Cut a name so that it fits beside a figure."""
    return name if len(name) <= MOST else f"{name[: MOST - 1]}\u2026"
