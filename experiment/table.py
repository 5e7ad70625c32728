"""The table of a sweep: one row per point, mean and spread over the seeds, and what the figures do not say by themselves."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from experiment.cost import duration
from experiment.grid import Grid
from experiment.metric import Metric

SAME_TOKENS = 0.01  # relative difference of tokens that seeds and packing make


@dataclass(frozen=True)
class Result:
    """One run. state: finished | diverged | stopped | waiting. value: the metric of the exported weights.

    base: the metric before the first step. step: of the exported weights. why: what a diverged run says.
    """

    name: str
    overrides: tuple[str, ...]
    seed: int
    state: str
    value: float | None = None
    base: float | None = None
    step: int | None = None
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    why: str = ""

    @property
    def is_done(self) -> bool:
        """Whether nothing of the run is left to train."""
        return self.state in ("finished", "diverged")


@dataclass(frozen=True)
class Point:
    """The runs of one point, which differ in their seed alone."""

    overrides: tuple[str, ...]
    results: tuple[Result, ...]

    @property
    def values(self) -> list[float]:
        """The metric of the finished runs, by seed."""
        return [result.value for result in self.results if result.state == "finished" and result.value is not None]

    @property
    def is_complete(self) -> bool:
        """Whether the run of every seed has finished."""
        return len(self.values) == len(self.results)

    @property
    def mean(self) -> float:
        """Mean over the finished seeds; NaN without one."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def spread(self) -> float | None:
        """Standard deviation over the finished seeds (n - 1); None for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def order(points: Sequence[Point], metric: Metric) -> list[Point]:
    """From the best point to the worst by the mean of the metric. Points whose seeds have not all finished come last."""
    sign = 1 if metric.lower_is_better else -1
    return sorted(points, key=lambda p: (not p.is_complete, not p.values, sign * p.mean if p.values else 0.0))


def best_point(ordered: Sequence[Point]) -> Point | None:
    """The best of the points whose seeds have all finished."""
    return ordered[0] if ordered and ordered[0].is_complete else None


def table(ordered: Sequence[Point], grid: Grid, metric: Metric) -> str:
    """Markdown, aligned for a terminal, best point first."""
    direction = "lower" if metric.lower_is_better else "higher"
    head = [*grid.axes, f"{metric.curve} ({direction} is better)"]
    seeded = len(grid.seeds) > 1
    head += ["spread", "by seed"] if seeded else []
    rows = [[*head, "exported step", "tokens", "time of a run", ""]]
    best = best_point(ordered)
    for point in ordered:
        row = [text.partition("=")[2] for text in point.overrides]
        row.append(figure(point.mean) if point.values else "")
        if seeded:
            row.append("" if point.spread is None else figure(point.spread))
            row.append(" ".join(_one(result) for result in point.results))
        steps = sorted({result.step for result in point.results if result.step is not None})
        row.append(" to ".join(f"{step}" for step in dict.fromkeys((*steps[:1], *steps[-1:]))))
        started = [result for result in point.results if result.steps]
        row.append(f"{statistics.fmean(r.tokens for r in started):,.0f}" if started else "")
        row.append(duration(statistics.fmean(r.seconds for r in started)) if started else "")
        row.append("best" if point is best else _state(point))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def notes(ordered: Sequence[Point], grid: Grid, metric: Metric) -> list[str]:
    """Sentences about the best point and about what the table compares."""
    best = best_point(ordered)
    lines = []
    if best:
        lines += _edges(best, ordered, grid) + _difference(ordered, grid) + _against_base(best, metric)
        unfinished = sum(not result.is_done for point in ordered for result in point.results)
        if unfinished:
            runs = "1 run is" if unfinished == 1 else f"{unfinished} runs are"
            lines.append(f"{runs} not finished: the best point can still change")
    tokens = [result.tokens for point in ordered for result in point.results if result.state == "finished"]
    if tokens and max(tokens) > (1 + SAME_TOKENS) * min(tokens):
        lines.append(
            f"the runs did not train on equally many tokens: from {min(tokens):,} to {max(tokens):,}; a better value may be "
            "that of the longer run"
        )
    steps = {result.step for point in ordered for result in point.results if result.state == "finished"}
    if len(steps) > 1 and len(set(tokens)) == 1:
        lines.append(
            "the values are those of the exported steps, which are not after equally many tokens (run.export=best)"
        )
    for point in ordered:
        for result in point.results:
            if result.state == "diverged":
                lines.append(f"{result.name} diverged after step {result.steps}: {result.why.partition('; ')[0]}")
    return lines


def _edges(best: Point, ordered: Sequence[Point], grid: Grid) -> list[str]:
    """A sentence for each number whose best value is the smallest or largest of the grid, once every value has a result."""
    known = {
        override for point in ordered if any(result.is_done for result in point.results) for override in point.overrides
    }
    lines = []
    for key, text in (override.split("=", 1) for override in best.overrides):
        values = grid.values[key]
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(numbers) < len(values) or not known.issuperset(f"{key}={axis}" for axis in grid.axes[key]):
            continue
        own = numbers[grid.axes[key].index(text)]
        for extreme, name, more in ((min(numbers), "smallest", "smaller"), (max(numbers), "largest", "larger")):
            if own == extreme:
                lines.append(
                    f"the best {key}, {text}, is the {name} of the grid: the optimum may lie beyond it; add {more} values to "
                    "the same command (finished runs are kept)"
                )
    return lines


def _difference(ordered: Sequence[Point], grid: Grid) -> list[str]:
    """Whether the two best points differ by more than their seeds do."""
    complete = [point for point in ordered if point.is_complete]
    if len(complete) < 2:
        return []
    first, second = complete[:2]
    difference = abs(first.mean - second.mean)
    names = f"{_label(first)} and {_label(second)}"
    if first.spread is None or second.spread is None:
        return [f"{names} differ by {figure(difference)}; with one seed the spread is not known (--seeds 3)"]
    spread = math.sqrt((first.spread**2 + second.spread**2) / 2)
    if difference > spread:
        return []
    return [
        f"{names} differ by {figure(difference)}, within the spread over {len(grid.seeds)} seeds (standard deviation "
        f"{figure(spread)}): this sweep does not tell them apart"
    ]


def _against_base(best: Point, metric: Metric) -> list[str]:
    bases = [result.base for result in best.results if result.base is not None]
    if not bases or len(bases) < len(best.results):
        return []
    base = statistics.fmean(bases)
    if metric.is_better(best.mean, base):
        return []
    return [f"no point is better than the base model, whose {metric.curve} is {figure(base)}"]


def _label(point: Point) -> str:
    return " ".join(point.overrides) or "the runs"


def _state(point: Point) -> str:
    """What the runs of a point have come to, where they have not all finished."""
    if point.is_complete:
        return ""
    states = [result.state for result in point.results]
    if len(states) == 1:
        return states[0]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _one(result: Result) -> str:
    return figure(result.value) if result.state == "finished" and result.value is not None else result.state


def figure(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"
