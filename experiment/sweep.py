"""A sweep: every point of a grid `key=a,b,c`, with every seed a run of train.py, and one table by a validation curve.

It never looks at a test. OUT/sweep.json is the interface for others: `best.overrides` are the settings to train with, beside
`fixed`.
"""

import itertools
import json
import math
import re
import statistics
import typing
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from common.durable_files import write_durably, write_json
from common.errors import UserError
from common.sha256 import sha256
from configs.config import KEYS, Config, as_dict
from configs.load import is_of_answers, load_config, override, parse_best_by
from eval.comparison.arms import metric_rows
from experiment.commands import Command, duration, read_times
from experiment.contrasts import table

FOLDER = "runs/sweeps"
# Keys that a sweep sets itself, or that would give its runs different yardsticks.
_NOT_SWEPT = {
    **dict.fromkeys(("run.name", "run.directory", "run.resume"), "the sweep names and continues its runs, in --out"),
    "run.seed": "use --seeds K",
    **dict.fromkeys(
        ("run.eval_generate", "run.best_by", "data.validation", "data.split_by", "data.validation_share"),
        "all runs must be measured on the same data, in the same way",
    ),
}
_LONGEST_PART = 40  # characters of a value in the name of a run
_TEST = re.compile(r"(^|[^a-z])tests?([^a-z]|$)")


@dataclass(frozen=True)
class Trial:
    """One run of train.py. config: its resolved settings. options: its overrides for the command line."""

    name: str
    point: tuple[str, ...]  # overrides, as the user wrote them
    seed: int
    config: Config
    options: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """axes: key -> value as the user wrote it -> the same, parsed; in his order. fixed: overrides of all runs. runs: point by point."""

    config_file: str
    out: Path
    axes: dict[str, dict[str, typing.Any]]
    fixed: list[str]
    seeds: list[int]
    runs: list[Trial]


def make_grid(config_file: str, arguments: Sequence[str], seeds: int | None, out: str | None) -> Grid:
    """All runs of the product of the arguments' values, in `out` (None: runs/sweeps/NAME). Raises UserError, also for any value that is refused.

    A comma separates values. Where a value may itself have commas (lists, pairs, dictionaries), or if an argument has a |,
    that is what separates them: `optimizer.betas=0.9,0.95|0.9,0.99`. seeds: run.seed is 0 to seeds - 1; None: the config's.
    """
    texts: dict[str, list[str]] = {}
    fixed: list[str] = []
    for key, count in Counter(text.partition("=")[0] for text in arguments).items():
        if count > 1:
            raise UserError(f"{key} is given twice; write all of its values in one argument")
    for text in arguments:
        key, equals, values = text.partition("=")
        parts = _split(key, values) if equals else []
        if len(parts) < 2:
            fixed.append(f"{key}={parts[0]}" if parts else text)
        elif key in _NOT_SWEPT:
            raise UserError(f"{key} cannot be swept: {_NOT_SWEPT[key]}")
        else:
            texts[key] = parts
    if seeds and any(text.startswith("run.seed=") for text in fixed):
        raise UserError("run.seed and --seeds are both given; leave one of them out")
    if not texts and not seeds:
        raise UserError(
            "nothing is swept; give several values, e.g. optimizer.learning_rate=1e-4,3e-4,1e-3, or --seeds K"
        )
    base = load_config(config_file, fixed)
    folder = out or f"{FOLDER}/{base.run.name}"
    before = _read_json(Path(folder, "sweep.json")).get("begun_with", {}).get("axes", ())
    if sorted(before) == sorted(texts):  # the same sweep, its arguments perhaps in another order
        texts = {key: texts[key] for key in before}
    axes: dict[str, dict[str, typing.Any]] = {}
    for key, parts in texts.items():
        axes[key] = {}
        for part in parts:
            value = attrgetter(key)(override(base, [f"{key}={part}"]))
            if part in axes[key] or value in axes[key].values():
                raise UserError(f"{key}: the value {part} is given twice")
            axes[key][part] = value
    grid = Grid(config_file, Path(folder), axes, fixed, [*range(seeds)] if seeds else [base.run.seed], [])
    for choice in itertools.product(*(parts.items() for parts in axes.values())):
        point = tuple(f"{key}={part}" for key, (part, _) in zip(axes, choice, strict=True))
        named = {key: value for key, (_, value) in zip(axes, choice, strict=True)}
        for seed in grid.seeds:
            name = _name(named, seed)
            own = (f"run.seed={seed}", f"run.directory={folder}", f"run.name={name}")
            grid.runs.append(Trial(name, point, seed, override(base, [*point, *own]), (*fixed, *point, *own)))
    return grid


def _split(key: str, text: str) -> list[str]:
    """The values in an argument; one where a comma belongs to the value, in a tuple or a dictionary."""
    hint = KEYS.get(key)
    holds_commas = any(typing.get_origin(one) in (tuple, dict) for one in (hint, *typing.get_args(hint)))
    if "|" not in text and holds_commas:
        return [text]
    return [part for part in text.split("|" if "|" in text else ",") if part]


def _name(values: dict[str, object], seed: int) -> str:
    """E.g. `learning_rate-0.0003_epochs-2_seed-0`: the same for the same values, however they were written."""
    short = [key.rpartition(".")[2] for key in values]
    parts = []
    for (key, value), last in zip(values.items(), short, strict=True):
        text = value if isinstance(value, str) else json.dumps(value, default=vars)
        plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.")[:_LONGEST_PART]
        if plain != text:  # what cannot be in the name of a file
            plain += f"-{zlib.crc32(text.encode()):08x}"
        parts.append(f"{last if short.count(last) == 1 else key}-{plain}")
    return "_".join([*parts, f"seed-{seed}"])


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
    """The runs of one point, which differ in their seed alone. mean, spread: over the finished seeds (n - 1), or None."""

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
    """A grid, the commands that train it, and the table of what they have found."""

    def __init__(self, grid: Grid, by: str, processes: int = 1, keeps_checkpoints: bool = True) -> None:
        """by: the curve that decides, written like run.best_by.

        Raises UserError if the runs cannot be compared by it on validation data, if they would read a test file, or if the
        directory is another sweep's or its data have changed.
        """
        try:
            self.curve, direction = parse_best_by(by)
        except UserError as error:
            raise UserError(str(error).replace("run.best_by=", "--by ")) from None
        self.grid, self.sign, self.out, self.processes = grid, 1 if direction == "min" else -1, grid.out, processes
        self.keeps_checkpoints = keeps_checkpoints
        data = sorted({path for run in grid.runs for path in _data_of(run.config)})
        self._check_yardstick(by, data)
        files = filter(Path.is_file, map(Path, data))  # folders, and what lies elsewhere, are not compared
        digests = {f"SHA-256 of {path}": sha256(path) for path in files}
        self.begun_with = {"axes": list(grid.axes), **_fixed_settings(grid), **digests}
        before = _read_json(self.out / "sweep.json").get("begun_with", {})
        for name, now in self.begun_with.items():
            if before.get(name, now) != now:
                raise UserError(
                    f"{self.out} was begun with {name}={before[name]}, now it is {now}; put it back, or choose another --out"
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

    def commands(self) -> list[Command]:
        """One for each run."""
        return [
            Command(
                name=run.name,
                kind="train",
                script="train.py",
                options=(self.grid.config_file, *run.options),
                output=self.out / run.name / "export" / "export.json",
                frees=() if self.keeps_checkpoints else (self.out / run.name / "checkpoints",),
                diverged=self.out / run.name / "diverged.txt",
                processes=self.processes,
            )
            for run in self.grid.runs
        ]

    def points(self) -> list[Point]:
        """From the best point to the worst by the mean of the curve. Points whose seeds have not all finished come last."""
        found = []
        for overrides, runs in itertools.groupby(self.grid.runs, lambda run: run.point):
            results = [*map(self._result, runs)]
            values = [result.value for result in results if result.value is not None]
            mean = statistics.fmean(values) if values else None
            found.append(Point(overrides, results, values, mean, statistics.stdev(values) if len(values) > 1 else None))
        return sorted(found, key=lambda p: (not p.is_complete, p.mean is None, self.sign * (p.mean or 0.0)))

    def _result(self, run: Trial) -> Result:
        folder = self.out / run.name
        rows, step = metric_rows(folder), _read_json(folder / "export" / "export.json").get("step")
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
        return {"overrides": list(point.overrides), "mean": point.mean, "spread": point.spread, "runs": runs}

    def _table(self, points: Sequence[Point], best: Point | None) -> str:
        better = "lower" if self.sign > 0 else "higher"
        head = [*self.grid.axes, f"{self.curve} ({better} is better)", "spread", "by seed", "exported step", "tokens"]
        rows, seconds = [[*head, "time of a run", ""]], dict[str, float]()
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
                    *("" if value is None else f"{value:.4g}" for value in (point.mean, point.spread)),
                    " ".join(result.state if result.value is None else f"{result.value:.4g}" for result in results),
                    " to ".join(map(str, dict.fromkeys((*steps[:1], *steps[-1:])))),
                    f"{statistics.fmean(result.tokens for result in results):,.0f}",
                    duration(statistics.fmean(times)) if times else "",
                    "best" if point is best else "" if point.is_complete else counted,
                ]
            )
        return table(rows)

    def notes(self, points: Sequence[Point]) -> list[str]:
        """Sentences about the best point, and about runs that diverged."""
        results = [result for point in points for result in point.results]
        lines, best = [], points[0]
        if best.is_complete and best.mean is not None:
            lines += [*self._edges(best, results), *_difference(points)]
            bases = [result.base for result in best.results if result.base is not None]
            if bases and self.sign * (best.mean - statistics.fmean(bases)) >= 0:
                lines.append(
                    f"no point is better than the base model, whose {self.curve} is {statistics.fmean(bases):.4g}"
                )
            if unfinished := sum(result.state in ("stopped", "waiting") for result in results):
                lines.append(f"runs that are not finished: {unfinished}; the best point can still change")
        diverged = [result for result in results if result.state == "diverged"]
        return [*lines, *(f"{result.name} diverged: {result.why.partition('; ')[0]}" for result in diverged)]

    def _edges(self, best: Point, results: Sequence[Result]) -> list[str]:
        """A sentence for each number whose best value is the smallest or largest of the grid, once every value has a result."""
        done = {result.name for result in results if result.state in ("finished", "diverged")}
        known = {text for run in self.grid.runs if run.name in done for text in run.point}
        lines = []
        for key, text in (one.split("=", 1) for one in best.overrides):
            values = self.grid.axes[key]
            are_numbers = all(type(value) in (int, float) for value in values.values())
            if not are_numbers or not known.issuperset(f"{key}={one}" for one in values):
                continue
            for extreme, name, more in ((min, "smallest", "smaller"), (max, "largest", "larger")):
                if text == extreme(values, key=values.__getitem__):
                    lines.append(
                        f"the best {key}, {text}, is the {name} of the grid: the optimum may lie beyond it; add {more} values "
                        "to the same command (finished runs are kept)"
                    )
        return lines


def _difference(points: Sequence[Point]) -> list[str]:
    """Whether the two best points differ by more than their seeds do."""
    first, second = [*(point for point in points if point.is_complete), None, None][:2]
    if first is None or second is None or first.mean is None or second.mean is None:
        return []
    names = [" ".join(point.overrides) or "the runs" for point in (first, second)]
    words, moved = f"{names[0]} and {names[1]} differ by", abs(first.mean - second.mean)
    if first.spread is None or second.spread is None:
        return [f"{words} {moved:.4g}; with one seed the spread is not known (--seeds 3)"]
    spread = math.sqrt((first.spread**2 + second.spread**2) / 2)
    if moved > spread:
        return []
    within = f"within the spread over {len(first.results)} seeds (standard deviation {spread:.4g})"
    return [f"{words} {moved:.4g}, {within}: this sweep does not tell them apart"]


def _data_of(config: Config) -> list[str]:
    """All that a run reads: what is mixed in as well."""
    parts = [config.data.train, config.data.validation, config.ewc.data]
    parts += [paths for source in config.data.mix for paths in (source.paths, source.validation)]
    return [path for paths in parts for path in paths]


def _fixed_settings(grid: Grid) -> dict[str, object]:
    """section.key -> value of what all runs share, as JSON has it."""
    sections = json.loads(json.dumps(as_dict(grid.runs[0].config)))
    settings = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    own = {*grid.axes, "run.name", "run.seed", "run.directory"}
    return {name: value for name, value in settings.items() if name not in own}


def _read_json(path: Path) -> dict:
    """A JSON file; empty if there is none. Raises UserError if it is damaged."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged; remove it, or choose another --out") from None
