"""A sweep: every run of a grid (experiment/grid.py) by train.py, and one table by a validation curve. It never looks at a test.

OUT/sweep.json is the interface for others: `best.overrides` are the settings to train with, beside `fixed`.
"""

import hashlib
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.durable_files import write_durably, write_json
from common.errors import UserError
from configs.config import as_dict
from experiment.commands import Command, duration, read_times
from experiment.contrasts import table
from experiment.grid import Grid, Metric, Run, options

_TEST = re.compile(r"(^|[^a-z])tests?([^a-z]|$)")
SAME_TOKENS = 0.01  # relative difference of tokens that seeds and packing make


@dataclass(frozen=True)
class Result:
    """One run. state: finished | diverged | stopped | waiting. value: the curve at the exported step.

    base: the curve before the first step. step: of the exported weights. why: what a diverged run says.
    """

    name: str
    seed: int
    state: str
    value: float | None
    base: float | None
    step: int | None
    tokens: int
    why: str


@dataclass(frozen=True)
class Point:
    """The runs of one point, which differ in their seed alone."""

    overrides: tuple[str, ...]
    results: list[Result]

    @property
    def values(self) -> list[float]:
        """The values of the finished runs, by seed."""
        return [result.value for result in self.results if result.value is not None]

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

    @property
    def label(self) -> str:
        """Its overrides as they were written."""
        return " ".join(self.overrides) or "the runs"


class Sweep:
    """A grid, the commands that train it, and the table of what they have found."""

    def __init__(self, grid: Grid, metric: Metric, processes: int = 1, keeps_checkpoints: bool = True) -> None:
        """Check the yardstick. Raises UserError, also if the directory is another sweep's or its data have changed."""
        check_yardstick(grid, metric)
        self.grid, self.metric, self.out, self.processes = grid, metric, Path(grid.out), processes
        self.keeps_checkpoints = keeps_checkpoints
        before = _read_json(self.out / "sweep.json").get("begun_with", {})
        if before and set(before["axes"]) != set(grid.axes):
            raise UserError(
                f"{self.out} is a sweep of {', '.join(before['axes']) or 'seeds'}, not of {', '.join(grid.axes) or 'seeds'}; "
                "choose another --out"
            )
        self.begun_with = {"axes": list(grid.axes), **_fixed_settings(grid), **_digests(grid)}
        for name, now in self.begun_with.items():
            if before and name != "axes" and before.get(name, now) != now:
                raise UserError(
                    f"{self.out} was begun with {name}={before[name]}, now it is {now}; put it back, or choose another --out"
                )

    def commands(self) -> list[Command]:
        """One for each run."""
        return [
            Command(
                name=run.name,
                kind="train",
                script="train.py",
                options=(self.grid.config_file, *options(run, self.grid)),
                output=self.out / run.name / "export" / "export.json",
                frees=() if self.keeps_checkpoints else (self.out / run.name / "checkpoints",),
                diverged=self.out / run.name / "diverged.txt",
                processes=self.processes,
            )
            for run in self.grid.runs
        ]

    def points(self) -> list[Point]:
        """From the best point to the worst by the mean of the curve. Points whose seeds have not all finished come last."""
        sign = 1 if self.metric.lower_is_better else -1
        found = [Point(overrides, [*map(self._result, runs)]) for overrides, runs in self.grid.points.items()]
        return sorted(found, key=lambda p: (not p.is_complete, not p.values, sign * p.mean if p.values else 0.0))

    def _result(self, run: Run) -> Result:
        folder, curve, value, why = self.out / run.name, self.metric.curve, None, ""
        rows = read_rows(folder)
        step = _read_json(folder / "export" / "export.json").get("step")
        base = _value_at(rows, curve, 0)
        tokens = next((int(row["train/tokens"]) for row in reversed(rows) if "train/tokens" in row), 0)
        state = "stopped" if rows else "waiting"
        if step is not None:
            found = _value_at(rows, curve, step)
            if found is None:
                curves = sorted({name for row in rows for name in row if name.startswith("validation/")})
                hint = f"its curves are {', '.join(curves)}" if curves else "it has no validation curves"
                raise UserError(
                    f"{folder / 'metrics.jsonl'} has no {curve} at step {step}; {hint}: choose one with --by"
                )
            value, state = (found, "finished") if math.isfinite(found) else (None, "diverged")
            why = "" if value is not None else f"its {curve} is {found}"
        elif (folder / "diverged.txt").is_file():
            state, why = "diverged", (folder / "diverged.txt").read_text(encoding="utf-8").strip()
        return Result(run.name, run.seed, state, value, base, step, tokens, why)

    def report(self) -> str:
        """Write sweep.json and sweep.md, and return the table and its notes as Markdown."""
        points = self.points()
        best = points[0] if points[0].is_complete else None
        sentences = notes(points, self.grid, self.metric)
        text = "\n\n".join(filter(None, (self._table(points, best), "\n".join(f"- {line}" for line in sentences))))
        content = {
            "config": self.grid.config_file,
            "fixed": self.grid.fixed,
            "axes": self.grid.axes,
            "seeds": self.grid.seeds,
            "metric": self.metric.curve,
            "lower_is_better": self.metric.lower_is_better,
            "notes": sentences,
            "is_complete": all(command.is_done for command in self.commands()),
            "best": best and self._point(best),
            "points": [*map(self._point, points)],
            "begun_with": self.begun_with,
        }
        write_json(self.out / "sweep.json", content)
        write_durably(self.out / "sweep.md", text + "\n")
        return text

    def _point(self, point: Point) -> dict:
        runs = [vars(result) | {"directory": str(self.out / result.name)} for result in point.results]
        mean = point.mean if point.values else None
        return {"overrides": list(point.overrides), "mean": mean, "spread": point.spread, "runs": runs}

    def _table(self, points: Sequence[Point], best: Point | None) -> str:
        direction = "lower" if self.metric.lower_is_better else "higher"
        head = [*self.grid.axes, f"{self.metric.curve} ({direction} is better)", "spread", "by seed"]
        rows = [[*head, "exported step", "tokens", "time of a run", ""]]
        seconds: dict[str, float] = {}
        for row in read_times(self.out):
            seconds[row["name"]] = seconds.get(row["name"], 0.0) + row["seconds"]
        for point in points:
            results, states = point.results, [result.state for result in point.results]
            counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
            steps = sorted({result.step for result in results if result.step is not None})
            times = [seconds[result.name] for result in results if result.name in seconds]
            rows.append(
                [
                    *(text.partition("=")[2] for text in point.overrides),
                    f"{point.mean:.4g}" if point.values else "",
                    "" if point.spread is None else f"{point.spread:.4g}",
                    " ".join(result.state if result.value is None else f"{result.value:.4g}" for result in results),
                    " to ".join(map(str, dict.fromkeys((*steps[:1], *steps[-1:])))),
                    f"{statistics.fmean(result.tokens for result in results):,.0f}",
                    duration(statistics.fmean(times)) if times else "",
                    "best" if point is best else "" if point.is_complete else counted,
                ]
            )
        return table(rows)


def notes(points: Sequence[Point], grid: Grid, metric: Metric) -> list[str]:
    """Sentences about the best point and about what the table compares."""
    results = [result for point in points for result in point.results]
    lines, best = [], points[0]
    if best.is_complete:
        lines += [*_edges(best, points, grid), *_difference(points)]
        bases = [result.base for result in best.results if result.base is not None]
        if bases and not metric.is_better(best.mean, statistics.fmean(bases)):
            lines.append(
                f"no point is better than the base model, whose {metric.curve} is {statistics.fmean(bases):.4g}"
            )
        unfinished = sum(result.state in ("stopped", "waiting") for result in results)
        if unfinished:
            lines.append(f"runs that are not finished: {unfinished}; the best point can still change")
    finished = [result for result in results if result.state == "finished"]
    tokens = [result.tokens for result in finished]
    if tokens and max(tokens) > (1 + SAME_TOKENS) * min(tokens):
        lines.append(
            f"the runs did not train on equally many tokens: from {min(tokens):,} to {max(tokens):,}; a better value may be "
            "that of the longer run"
        )
    elif len({result.step for result in finished}) > 1:
        lines.append("the values are those of the exported steps, not after equally many tokens (run.export=best)")
    diverged = [result for result in results if result.state == "diverged"]
    return [*lines, *(f"{result.name} diverged: {result.why.partition('; ')[0]}" for result in diverged)]


def _edges(best: Point, points: Sequence[Point], grid: Grid) -> list[str]:
    """A sentence for each number whose best value is the smallest or largest of the grid, once every value has a result."""
    done = ("finished", "diverged")
    known = {text for point in points if any(r.state in done for r in point.results) for text in point.overrides}
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


def _difference(points: Sequence[Point]) -> list[str]:
    """Whether the two best points differ by more than their seeds do."""
    complete = [point for point in points if point.is_complete]
    if len(complete) < 2:
        return []
    first, second = complete[:2]
    words = f"{first.label} and {second.label} differ by {abs(first.mean - second.mean):.4g}"
    if first.spread is None or second.spread is None:
        return [f"{words}; with one seed the spread is not known (--seeds 3)"]
    spread = math.sqrt((first.spread**2 + second.spread**2) / 2)
    if abs(first.mean - second.mean) > spread:
        return []
    within = f"within the spread over {len(first.results)} seeds (standard deviation {spread:.4g})"
    return [f"{words}, {within}: this sweep does not tell them apart"]


def check_yardstick(grid: Grid, metric: Metric) -> None:
    """Raise UserError if the runs cannot be compared on validation data, or if they would read a test file."""
    config = grid.runs[0].config
    if not config.data.validation and not config.data.validation_share:
        raise UserError(
            f"{grid.config_file} has no validation data, by which a sweep chooses; set data.validation or data.validation_share"
        )
    if not metric.curve.startswith("validation/loss") and not config.run.eval_generate:
        raise UserError(
            f"--by {metric.curve} is a score of generated answers; set run.eval_generate to a number of examples"
        )
    for path in _data_of(grid):
        if _TEST.search(Path(path).name.lower()):
            raise UserError(
                f"the data name {path}, a test file by its name: a sweep never reads the test, which is scored once at the "
                "end; give other data, or rename the file"
            )


def read_rows(directory: Path) -> list[dict]:
    """The rows of metrics.jsonl that are complete; none if the run has not started."""
    path, rows = directory / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # being written
            continue
    return rows


def _value_at(rows: Sequence[dict], curve: str, step: int) -> float | None:
    """The curve at a step; None if it was not measured there."""
    found = [float(row[curve]) for row in rows if row["step"] == step and curve in row]
    return found[-1] if found else None


def _data_of(grid: Grid) -> list[str]:
    """All that the runs read as data.train and data.validation, sorted."""
    return sorted(
        {path for run in grid.runs for key in ("train", "validation") for path in getattr(run.config.data, key)}
    )


def _fixed_settings(grid: Grid) -> dict[str, object]:
    """section.key -> value of what all runs share, as JSON has it."""
    sections = json.loads(json.dumps(as_dict(grid.runs[0].config)))
    settings = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    own = {*grid.axes, "run.name", "run.seed", "run.directory"}
    return {name: value for name, value in settings.items() if name not in own}


def _digests(grid: Grid) -> dict[str, object]:
    """File of the data -> its SHA-256. Folders, and what lies elsewhere, are not compared."""
    files = filter(Path.is_file, map(Path, _data_of(grid)))
    return {f"SHA-256 of {path}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _read_json(path: Path) -> dict:
    """A JSON file; empty if there is none. Raises UserError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        raise UserError(f"{path} is damaged; remove it, or choose another --out") from None
