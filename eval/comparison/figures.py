"""The figures of a comparison: learning against forgetting, and loss curves.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which people with colour blindness can tell apart; arms
also differ in their marker.
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
_BESIDE: dict[str, Any] = {"loc": "outside right upper", "fontsize": 8, "frameon": False}  # where the names stand
Style = dict[str, tuple[str, str]]  # arm -> its colour and its marker


@dataclass(frozen=True)
class Picture:
    """A figure: file name without ending, caption, what is to be seen in words (for readers who see none), and the PNG."""

    name: str
    caption: str
    words: str
    png: bytes


def pictures(result: dict, arms: Sequence[Arm]) -> list[Picture]:
    """The figures that the comparison has data for."""
    rows = [row for row in result["rows"] if row["kind"] == "arm"]
    style = {row["name"]: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, row in enumerate(rows)}
    found = []
    with plt.rc_context(STYLE):
        if result["main"] and any("perplexity" in row["metrics"] for row in rows):
            found.append(_forgetting(result, rows, style))
        curves = {arm.name: [_curves(seed.source.rows) for seed in arm.seeds] for arm in arms}
        if any(map(any, curves.values())):
            found.append(_losses(curves, style))
    return found


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
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
    others = [row for row in result["rows"] if row["kind"] in ("baseline", "engine") and main in row["metrics"]]
    best = max(others, key=lambda row: row["metrics"][main]["value"], default=None)
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
    words = f"{heading(result, main)} against forgetting; the values stand in the tables below."
    up = "up and " * bool(measure_of(main).better)
    caption = f"Learning against forgetting, with 95% intervals. Better is {up}to the left."
    return Picture("forgetting", caption, words, png(figure))


def _error(found: dict) -> list[list[float]]:
    """The lengths of the two error bars; 0 where the interval is unknown."""
    if found["low"] is None:
        return [[0.0], [0.0]]
    return [[max(0.0, found["value"] - found["low"])], [max(0.0, found["high"] - found["value"])]]


def _curves(rows: Sequence[dict]) -> dict[str, tuple[list[int], list[float]]]:
    """Training and validation loss of a run, as far as it has them: (steps, values)."""
    found = {"training": curve(rows, "train/loss/main", "train/loss"), "validation": curve(rows, "validation/loss")}
    return {kind: points for kind, points in found.items() if points[0]}


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
        axes.yaxis.set_major_formatter("{x:g}")  # powers of ten would be formulas, which are off
        axes.yaxis.set_minor_formatter(NullFormatter())
    panels[0].set(ylabel="nats per target token")
    figure.legend(*panels[-1].get_legend_handles_labels(), **_BESIDE)
    last = {
        name: [f"{run['validation'][1][-1]:.4f}" for run in runs if "validation" in run]
        for name, runs in curves.items()
    }
    each = "; ".join(f"{name} {', '.join(values)}" for name, values in last.items() if values)
    words = f"Loss over steps. Last validation loss: {each}"
    return Picture("losses", "Loss of target tokens while training; one line for each seed.", words, png(figure))


def _shortened(name: str) -> str:
    """A name that fits beside a figure."""
    return name if len(name) <= MOST else f"{name[: MOST - 1]}\u2026"
