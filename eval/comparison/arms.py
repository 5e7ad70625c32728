"""The arms of a comparison: which runs, models or results the user names, and what is known of each.

An arm is a training recipe; its seeds are runs of it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError


@dataclass(frozen=True)
class Source:
    """One seed of an arm, as named on the command line.

    kind: "run", "model" (a Hugging Face directory) or "result" (the JSON of an evaluation).
    """

    path: Path
    kind: str

    @property
    def model(self) -> Path:
        """The model directory of a run or a model."""
        return self.path / "export" if self.kind == "run" else self.path


@dataclass(frozen=True)
class Seed:
    """The results of one seed: on the task, on general text (or None), and the tokens trained on (None if unknown)."""

    source: Source
    task: dict
    general: dict | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Arm:
    """All seeds of one recipe."""

    name: str
    seeds: tuple[Seed, ...]


def parse_arms(texts: Sequence[str]) -> dict[str, list[Source]]:
    """Arm name -> its seeds, from `NAME=PATH[,PATH...]` or `PATH`. Raises UserError for what cannot be compared."""
    found: dict[str, list[Source]] = {}
    for text in texts:
        name, equals, paths = text.partition("=")
        if not equals or "/" in name:
            name, paths = "", text
        sources = [_source(Path(path)) for path in paths.split(",") if path]
        if not sources:
            raise UserError(f"{text!r} names no run; write NAME=PATH or NAME=PATH,PATH for several seeds")
        name = name.strip() or _name(sources[0])
        if name in found:
            raise UserError(f"two arms have the name {name}; write NAME=PATH, with another name for each")
        found[name] = sources
    if len(found) < 2:
        raise UserError("a comparison needs two arms or more; name a second run, model or result")
    return found


def _source(path: Path) -> Source:
    if path.name == "export" and (path / "export.json").is_file():
        path = path.parent  # the export of a run
    if path.is_file():
        return Source(path, "result")
    if any((path / name).exists() for name in ("record.jsonl", "metrics.jsonl", "checkpoints", "export/export.json")):
        return _finished(path)
    if (path / "config.json").is_file():
        return Source(path, "model")
    raise UserError(
        f"{path} is neither the directory of a run nor a model directory nor the JSON of scripts/evaluate.py"
        + ("" if path.exists() else "; it does not exist")
    )


def _finished(run: Path) -> Source:
    """The run, if its training is finished. Raises UserError otherwise."""
    record = run / "export" / "export.json"
    try:
        steps = json.loads(record.read_text(encoding="utf-8"))["steps_in_total"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{run} is not finished: it has no complete export; start its train.py command again, which continues it"
        ) from None
    trained = max((row["step"] for row in metric_rows(run)), default=0)
    if trained > steps:
        raise UserError(
            f"{run} is not finished: its export is of step {steps}, and it has trained to step {trained} since; start its "
            "train.py command again, which continues it"
        )
    return Source(run, "run")


def _name(source: Source) -> str:
    if source.kind != "result":
        return source.path.resolve().name
    inside_run = source.path.parent.name == "eval"  # RUN/eval/test-0123abcd.json
    return source.path.resolve().parents[1].name if inside_run else source.path.stem


def metric_rows(run: Path) -> list[dict]:
    """The rows of metrics.jsonl; none without the file. A last line that was cut off is left out."""
    path, rows = run / "metrics.jsonl", []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif number < len(lines):
            raise UserError(f"{path}, line {number} is not a row of curves; remove the line")
    return rows


def curve(rows: Sequence[dict], *names: str) -> tuple[list[int], list[float]]:
    """The steps and values of the first of these curves that has a finite value; two empty lists if none has."""
    for name in names:
        points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
        if points:
            return [step for step, _ in points], [value for _, value in points]
    return [], []


def tokens_of(source: Source) -> int | None:
    """The tokens that the run of a source has trained on, targets or not; None if it does not say."""
    run = run_of(source)
    rows = metric_rows(run) if run else []
    return next((row["train/tokens"] for row in reversed(rows) if "train/tokens" in row), None)


def run_of(source: Source) -> Path | None:
    """The directory of the run that a source is of; None if it does not say."""
    if source.kind == "result":
        return source.path.parents[1] if source.path.parent.name == "eval" else None  # RUN/eval/FILE
    return source.path if source.kind == "run" else None


def seed_of(source: Source) -> int | None:
    """run.seed of a source; None if it does not say."""
    run = run_of(source)
    return _setting(run, "run", "seed") if run else None


def _setting(run: Path, section: str, key: str) -> Any:  # noqa: ANN401  of any type
    try:
        return json.loads((run / "config.json").read_text(encoding="utf-8"))["config"][section][key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_base(arms: dict[str, list[Source]]) -> str:
    """The base model of all runs, from their config.json. Raises UserError if it is not one and the same."""
    found: dict[str, Path] = {}
    for source in (source for sources in arms.values() for source in sources if source.kind == "run"):
        if path := _setting(source.path, "model", "path"):
            found.setdefault(path, source.path)
    if len(found) != 1:
        what = " and ".join(f"{path} ({run})" for path, run in found.items()) or "no run names one"
        raise UserError(f"--general needs one base model, and the arms have {what}; name it with --base")
    return next(iter(found))
