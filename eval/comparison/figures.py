"""What the figures of a comparison show: learning against forgetting, every rule, loss curves."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from eval.comparison.arms import Arm, metric_rows, run_of
from eval.comparison.measures import measure_of
from eval.comparison.pictures import COLORS, MARKERS, Picture, shortened
from eval.comparison.words import heading


def pictures(result: dict, arms: Sequence[Arm]) -> list[Picture]:
    """The figures that the comparison has data for."""
    rows = [row for row in result["rows"] if row["kind"] == "arm"]
    style = {row["name"]: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, row in enumerate(rows)}
    found = []
    main = result["main"]
    if main and any("perplexity" in row["metrics"] for row in rows):
        found.append(_forgetting(result, rows, style, main))
    if result["rules"]:
        found.append(_rules(result, rows, style))
    curves = {arm.name: [curve for seed in arm.seeds if (curve := _curve(seed.source)) is not None] for arm in arms}
    if any(curves.values()):
        found.append(_losses(curves, style))
    return found


def _values(row: dict, metric: str) -> str:
    one = row["metrics"].get(metric)
    return f"{row['name']} {one['value']:.{measure_of(metric).digits}f}" if one else f"{row['name']} unknown"


def _forgetting(result: dict, rows: Sequence[dict], style: dict, main: str) -> Picture:
    metrics = [name for name in ("perplexity", "kl") if any(name in row["metrics"] for row in rows)]
    lines = [row for row in result["rows"] if row["kind"] in ("baseline", "engine") and main in row["metrics"]]
    best = max(lines, key=lambda row: row["metrics"][main]["value"], default=None)

    def draw() -> Figure:
        figure, panels = plt.subplots(
            1, len(metrics), figsize=(4.6 * len(metrics), 3.6), layout="constrained", squeeze=False, sharey=True
        )
        for axes, metric in zip(panels[0], metrics, strict=True):
            for row in rows:
                x, y = (row["metrics"].get(name) for name in (metric, main))
                if x and y:
                    color, marker = style[row["name"]]
                    axes.errorbar(
                        x["value"],
                        y["value"],
                        [_error(y)[0:1], _error(y)[1:2]],
                        [_error(x)[0:1], _error(x)[1:2]],
                        fmt=marker,
                        color=color,
                        capsize=2,
                        label=shortened(row["name"]),
                    )
            if best:
                axes.axhline(
                    best["metrics"][main]["value"],
                    color="grey",
                    linestyle="--",
                    linewidth=0.9,
                    label=f"best baseline: {shortened(best['name'])}",
                )
            base = next(
                (
                    row["metrics"][metric]
                    for row in result["rows"]
                    if row["kind"] == "base" and metric in row["metrics"]
                ),
                None,
            )
            if base:
                axes.axvline(base["value"], color="grey", linestyle=":", linewidth=0.9, label="base model")
            axes.set(xlabel=f"forgetting: {heading(result, metric)}")
        panels[0][0].set(ylabel=f"learning: {heading(result, main)}")
        panels[0][0].legend(fontsize=8)
        if measure_of(main).better < 0:
            panels[0][0].invert_yaxis()
        return figure

    words = f"{heading(result, main)} and forgetting: " + "; ".join(
        ", ".join(f"{heading(result, m)} {_values(row, m)}" for m in (main, *metrics)) for row in rows
    )
    caption = "Learning against forgetting, with 95% intervals. Better is up and to the left."
    return Picture("forgetting", caption, words, draw)


def _error(found: dict) -> list[float]:
    """The lengths of the two error bars; 0 where the interval is unknown."""
    if found["low"] is None:
        return [0.0, 0.0]
    return [max(0.0, found["value"] - found["low"]), max(0.0, found["high"] - found["value"])]


def _rules(result: dict, rows: Sequence[dict], style: dict) -> Picture:
    rules = result["rules"]

    def draw() -> Figure:
        step = 0.8 / len(rows)
        figure, axes = plt.subplots(figsize=(8, 0.8 + len(rules) * max(0.32, 0.13 * len(rows))), layout="constrained")
        for i, row in enumerate(rows):
            color, marker = style[row["name"]]
            for place, rule in enumerate(rules):
                found = row["per_rule"][rule]["f1"]
                y, low, high = place + (i - (len(rows) - 1) / 2) * step, *_error(found)
                axes.errorbar(
                    found["value"],
                    y,
                    xerr=[[low], [high]],
                    fmt=marker,
                    color=color,
                    markersize=4,
                    linewidth=1,
                    label=shortened(row["name"]) if place == 0 else None,
                )
        axes.set(
            yticks=range(len(rules)),
            yticklabels=[*map(shortened, rules)],
            xlim=(-0.02, 1.02),
            xlabel="F1",
            ylim=(len(rules) - 0.5, -0.5),
        )
        axes.grid(axis="x", linewidth=0.4)
        for place in range(1, len(rules)):
            axes.axhline(place - 0.5, color="grey", linewidth=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        return figure

    words = "F1 of each rule; the values stand in the table below."
    return Picture("rules", "F1 of each rule, with 95% intervals.", words, draw)


Curve = dict[str, tuple[list[int], list[float]]]


def _curve(source) -> Curve | None:  # noqa: ANN001
    """Training and validation loss of a run; None if it has no curves."""
    run = run_of(source)
    rows = metric_rows(run) if run else []
    found = {}
    for name, keys in (("training", ("train/loss/main", "train/loss")), ("validation", ("validation/loss",))):
        key = next((key for key in keys if any(key in row for row in rows)), None)
        if key:
            points = [(row["step"], row[key]) for row in rows if key in row]
            found[name] = ([step for step, _ in points], [value for _, value in points])
    return found or None


def _losses(curves: dict[str, list[Curve]], style: dict) -> Picture:
    kinds = [
        kind for kind in ("training", "validation") if any(kind in one for each in curves.values() for one in each)
    ]

    def draw() -> Figure:
        figure, panels = plt.subplots(
            1, len(kinds), figsize=(4.6 * len(kinds), 3.2), layout="constrained", squeeze=False, sharey=True
        )
        for axes, kind in zip(panels[0], kinds, strict=True):
            for name, each in curves.items():
                for number, one in enumerate(curve for curve in each if kind in curve):
                    marker = style[name][1] if kind == "validation" else None
                    axes.plot(
                        *one[kind],
                        color=style[name][0],
                        linewidth=1,
                        marker=marker,
                        markersize=3,
                        label=shortened(name) if number == 0 else None,
                    )
            axes.set(title=f"{kind} loss", xlabel="step", yscale="log")
            axes.yaxis.set_major_formatter("{x:g}")  # powers of ten would be formulas, which are off
            axes.yaxis.set_minor_formatter(NullFormatter())
        panels[0][0].set(ylabel="nats per target token")
        panels[0][-1].legend(fontsize=8)
        return figure

    last = {name: [one["validation"][1][-1] for one in each if "validation" in one] for name, each in curves.items()}
    words = "Loss over steps. Last validation loss: " + "; ".join(
        f"{name} {', '.join(f'{value:.4f}' for value in values)}" for name, values in last.items() if values
    )
    return Picture("losses", "Loss of target tokens while training; one line for each seed.", words, draw)
