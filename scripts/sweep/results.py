"""The results of a sweep: one table by a validation curve, and the best settings. No test set is read.

OUT/sweep.json is for programs: `best.overrides` are the settings to train with, beside `fixed`.
"""

import itertools
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.durable_files import write_durably, write_json
from common.errors import UserError
from common.sha256 import sha256
from configs.config import Config, as_dict
from configs.load import is_of_answers, parse_best_by
from eval.comparison.arms import metric_rows
from scripts.sweep.grid import Grid, Trial, read_json
from scripts.sweep.runs import Training

_TEST = re.compile(r"(^|[^a-z])tests?([^a-z]|$)")


@dataclass(frozen=True)
class Result:
    """The result of one run. state: finished | diverged | stopped | waiting. value: the curve at the exported step.

    base: the curve before the first step. step: the step that was exported. why: the error of a diverged run.
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
    """A point of the grid, whose runs differ in their seed alone.

    mean, spread: the mean and the standard deviation (n - 1) of the finished seeds, or None.
    """

    overrides: tuple[str, ...]
    results: list[Result]
    values: list[float]
    mean: float | None
    spread: float | None

    @property
    def is_complete(self) -> bool:
        """Whether the run of every seed has finished."""
        return len(self.values) == len(self.results)


class Sweep:
    """A grid with the trainings of its runs and the table of their results."""

    def __init__(self, grid: Grid, by: str, processes: int = 1, keeps_checkpoints: bool = True) -> None:
        """Prepare the sweep. by: the curve that decides, written like run.best_by.

        Raise UserError if the curve does not compare the runs on validation data, if a run would read a test file, or if the
        directory belongs to another sweep or to other data.
        """
        try:
            self.curve, direction = parse_best_by(by)
        except UserError as error:
            raise UserError(str(error).replace("run.best_by=", "--by ")) from None
        self.grid, self.sign, self.out, self.processes = grid, 1 if direction == "min" else -1, grid.out, processes
        self.keeps_checkpoints = keeps_checkpoints
        data = sorted({path for run in grid.runs for path in _data_of(run.config)})
        self._check_yardstick(by, data)
        files = filter(Path.is_file, map(Path, data))  # folders and remote files are not compared
        digests = {f"SHA-256 of {path}": sha256(path) for path in files}
        self.begun_with = {"axes": list(grid.axes), **_fixed_settings(grid), **digests}
        recorded = read_json(self.out / "sweep.json").get("begun_with", {})
        for name, value in self.begun_with.items():
            if recorded.get(name, value) != value:
                raise UserError(
                    f"{self.out} was begun with {name}={recorded[name]}, now it is {value}; put it back, or choose another "
                    "--out"
                )

    def _check_yardstick(self, by: str, data: Sequence[str]) -> None:
        config, file = self.grid.runs[0].config, self.grid.config_file
        if not config.data.validation and not config.data.validation_share:
            raise UserError(
                f"{file} has no validation data, by which a sweep chooses; set data.validation or data.validation_share"
            )
        if not self.curve.startswith("validation/"):
            raise UserError(f"--by {by}: a sweep chooses by a curve on data.validation, e.g. validation/loss or f1")
        if is_of_answers(self.curve) and not config.run.eval_generate:
            raise UserError(f"--by {by} is a score of answers; set run.eval_generate to a number of examples")
        if tests := [path for path in data if _TEST.search(Path(path).name.lower())]:
            raise UserError(
                f"the data name {tests[0]}, a test file by its name: a sweep never reads the test, which is scored once at "
                "the end; give other data, or rename the file"
            )

    def trainings(self) -> list[Training]:
        """Return a training for each run."""
        return [
            Training(
                run.name,
                (self.grid.config_file, *run.options),
                self.out / run.name,
                self.processes,
                self.keeps_checkpoints,
            )
            for run in self.grid.runs
        ]

    def points(self) -> list[Point]:
        """Return the points from the best to the worst mean. Points whose seeds have not all finished come last."""
        points = []
        for overrides, runs in itertools.groupby(self.grid.runs, lambda run: run.point):
            results = [*map(self._result, runs)]
            values = [result.value for result in results if result.value is not None]
            mean = statistics.fmean(values) if values else None
            spread = statistics.stdev(values) if len(values) > 1 else None
            points.append(Point(overrides, results, values, mean, spread))
        return sorted(points, key=lambda p: (not p.is_complete, p.mean is None, self.sign * (p.mean or 0.0)))

    def _result(self, run: Trial) -> Result:
        folder = self.out / run.name
        rows, step = metric_rows(folder), read_json(folder / "export" / "export.json").get("step")
        tokens = next((int(row["train/tokens"]) for row in reversed(rows) if "train/tokens" in row), 0)
        values = {row["step"]: float(row[self.curve]) for row in rows if self.curve in row}
        value, state, why = None, "stopped" if rows else "waiting", ""
        if step is not None and step not in values:
            curves = sorted({name for row in rows for name in row if name.startswith("validation/")})
            raise UserError(
                f"{folder / 'metrics.jsonl'} has no {self.curve} at step {step}; its curves are "
                f"{', '.join(curves) or 'none on data.validation'}: choose one with --by"
            )
        if step is not None and math.isfinite(values[step]):
            value, state = values[step], "finished"
        elif step is not None:
            state, why = "diverged", f"its {self.curve} is {values[step]}"
        elif (folder / "diverged.txt").is_file():
            state, why = "diverged", (folder / "diverged.txt").read_text(encoding="utf-8").strip()
        return Result(run.name, run.seed, state, value, values.get(0), step, tokens, why)

    def report(self) -> str:
        """Write sweep.json and sweep.md, and return the table and its notes as Markdown."""
        points = self.points()
        best = points[0] if points[0].is_complete else None
        sentences = self.notes(points)
        text = "\n\n".join(filter(None, (self._table(points, best), "\n".join(f"- {line}" for line in sentences))))
        content = {
            "config": self.grid.config_file,
            "fixed": self.grid.fixed,
            "axes": {key: list(parts) for key, parts in self.grid.axes.items()},
            "seeds": self.grid.seeds,
            "metric": self.curve,
            "lower_is_better": self.sign > 0,
            "notes": sentences,
            "is_complete": all(training.is_done for training in self.trainings()),
            "best": best and self._point(best),
            "points": [*map(self._point, points)],
            "begun_with": self.begun_with,
        }
        write_json(self.out / "sweep.json", content)
        write_durably(self.out / "sweep.md", text + "\n")
        return text

    def _point(self, point: Point) -> dict:
        runs = [vars(result) | {"directory": str(self.out / result.name)} for result in point.results]
        return {"overrides": list(point.overrides), "mean": point.mean, "spread": point.spread, "runs": runs}

    def _table(self, points: Sequence[Point], best: Point | None) -> str:
        better = "lower" if self.sign > 0 else "higher"
        head = [*self.grid.axes, f"{self.curve} ({better} is better)", "spread", "by seed", "exported step", "tokens"]
        rows = [[*head, ""]]
        for point in points:
            results, states = point.results, [result.state for result in point.results]
            counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
            steps = sorted({result.step for result in results if result.step is not None})
            rows.append(
                [
                    *(text.partition("=")[2] for text in point.overrides),
                    *("" if value is None else f"{value:.4g}" for value in (point.mean, point.spread)),
                    " ".join(result.state if result.value is None else f"{result.value:.4g}" for result in results),
                    " to ".join(map(str, dict.fromkeys((*steps[:1], *steps[-1:])))),
                    f"{statistics.fmean(result.tokens for result in results):,.0f}",
                    "best" if point is best else "" if point.is_complete else counted,
                ]
            )
        return table(rows)

    def notes(self, points: Sequence[Point]) -> list[str]:
        """Return sentences about the best point and about diverged runs."""
        results = [result for point in points for result in point.results]
        lines, best = [], points[0]
        if best.is_complete and best.mean is not None:
            bases = [result.base for result in best.results if result.base is not None]
            if bases and self.sign * (best.mean - statistics.fmean(bases)) >= 0:
                lines.append(
                    f"no point is better than the base model, whose {self.curve} is {statistics.fmean(bases):.4g}"
                )
            if unfinished := sum(result.state in ("stopped", "waiting") for result in results):
                lines.append(f"runs that are not finished: {unfinished}; the best point can still change")
        diverged = [result for result in results if result.state == "diverged"]
        return [*lines, *(f"{result.name} diverged: {result.why.partition('; ')[0]}" for result in diverged)]


def _data_of(config: Config) -> list[str]:
    """Return all data paths of a run, with the sources of data.mix."""
    groups = [config.data.train, config.data.validation, config.ewc.data]
    groups += [paths for source in config.data.mix for paths in (source.paths, source.validation)]
    return [path for paths in groups for path in paths]


def _fixed_settings(grid: Grid) -> dict[str, object]:
    """Return section.key -> value of the settings that all runs share, as JSON would read them back."""
    sections = json.loads(json.dumps(as_dict(grid.runs[0].config)))
    settings = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    own = {*grid.axes, "run.name", "run.seed", "run.directory"}
    return {name: value for name, value in settings.items() if name not in own}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a Markdown table, of which the first row is the heading."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
