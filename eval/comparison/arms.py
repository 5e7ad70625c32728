"""The arms of a comparison: the runs, models or results that the user names, and their settings and curves.

An arm is a training recipe; its seeds are runs of it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError

# A directory with one of these is a run.
RUN_FILES = ("record.jsonl", "metrics.jsonl", "checkpoints", "export/export.json")


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

    @property
    def run(self) -> Path | None:
        """The directory of its run: of a result RUN/eval/test-0123abcd.json it is RUN. None for a model or any other result."""
        if self.kind == "result":
            return self.path.parents[1] if self.path.parent.name == "eval" else None
        return self.path if self.kind == "run" else None

    @property
    def rows(self) -> list[dict]:
        """The curves of its run; empty without a run."""
        return metric_rows(self.run) if self.run else []

    @property
    def tokens(self) -> int | None:
        """The number of tokens that its run has trained on, targets or not; None if unknown."""
        return next((row["train/tokens"] for row in reversed(self.rows) if "train/tokens" in row), None)

    def setting(self, section: str, key: str) -> Any:  # noqa: ANN401  of any type
        """Return a setting of its run; None if unknown."""
        try:
            config = json.loads((self.run / "config.json").read_text(encoding="utf-8")) if self.run else {}
            return config["config"][section][key]
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Seed:
    """One seed of an arm: its result on the task, on general text (or None), and its tokens of training (None if unknown)."""

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
    """Parse `NAME=PATH[,PATH...]` or `PATH` to arm name -> its seeds. Raise UserError for a path that cannot be compared."""
    arms: dict[str, list[Source]] = {}
    for text in texts:
        name, equals, paths = text.partition("=")
        if not equals or "/" in name:
            name, paths = "", text
        sources = [_source(Path(path)) for path in paths.split(",") if path]
        if not sources:
            raise UserError(f"{text!r} names no run; write NAME=PATH or NAME=PATH,PATH for several seeds")
        name = name.strip() or _name(sources[0])
        if name in arms:
            raise UserError(f"two arms have the name {name}; write NAME=PATH, with another name for each")
        arms[name] = sources
    if len(arms) < 2:
        raise UserError("a comparison needs two arms or more; name a second run, model or result")
    return arms


def _source(path: Path) -> Source:
    """Return the run, model or result at `path`. Raise UserError if there is none, or if the run's training is not finished."""
    if path.name == "export" and (path / "export.json").is_file():
        path = path.parent
    if path.is_file():
        return Source(path, "result")
    if not any((path / name).exists() for name in RUN_FILES):
        if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
            from model.architectures import check_model_directory  # slow to import

            check_model_directory(path)
            return Source(path, "model")
        raise UserError(
            f"{path} is neither the directory of a run nor a model directory nor the JSON of scripts/evaluate.py"
            + ("" if path.exists() else "; it does not exist")
        )
    try:
        steps = json.loads((path / "export" / "export.json").read_text(encoding="utf-8"))["steps_in_total"]
        trained = max((row["step"] for row in metric_rows(path)), default=0)
        why = f"its export is of step {steps}, and it has trained to step {trained} since" if trained > steps else ""
    except (OSError, ValueError, KeyError, TypeError):
        why = "it has no complete export"
    if why:
        raise UserError(f"{path} is not finished: {why}; start its train.py command again, which continues it")
    return Source(path, "run")


def _name(source: Source) -> str:
    if source.kind == "result" and not source.run:
        return source.path.stem
    return (source.run or source.path).resolve().name


def metric_rows(run: Path) -> list[dict]:
    """Return the rows of metrics.jsonl; [] without the file. A last line that was cut off is ignored.

    Raise UserError, with the line, for any other line that is no row.
    """
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
    """Return the steps and values of the first of these curves that has a finite value; two empty lists if none has."""
    for name in names:
        points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
        if points:
            return [step for step, _ in points], [value for _, value in points]
    return [], []


def find_base(arms: dict[str, list[Source]]) -> str:
    """Return the base model of all runs, from their config.json. Raise UserError if they have several, or none."""
    runs = [source for sources in arms.values() for source in sources if source.kind == "run"]
    run_by_base = {path: run.path for run in runs if (path := run.setting("model", "path"))}
    if len(run_by_base) != 1:
        bases = " and ".join(f"{path} ({run})" for path, run in run_by_base.items())
        problem = f"the arms have {bases}" if bases else "no run among the arms names one"
        raise UserError(f"--general needs one base model, and {problem}; name it with --base")
    return next(iter(run_by_base))


def validation_data(arms: dict[str, list[Source]]) -> tuple[str, str, dict[str, str]]:
    """Return (validation file, data.format, data.fields) of the runs' configs. Raise UserError unless all runs have the same file."""
    runs = [source for sources in arms.values() for source in sources if source.run]
    files = {tuple(source.setting("data", "validation") or ()): source.run for source in runs}
    listing = "; ".join(f"{run} has {', '.join(names)}" for names, run in files.items() if names)
    without = [source for source in runs if not source.setting("data", "validation")]
    if without:
        shares = [source.setting("data", "validation_share") for source in without]
        why = ", because validation was a share of the training files" if all(shares) else ""
        listing = "; ".join(filter(None, [listing, f"{', '.join(str(run.path) for run in without)}: none{why}"]))
    listing = listing or "no run is named"
    paths = next(iter(files), ())
    if len(files) != 1 or len(paths) != 1 or not Path(paths[0]).is_file():
        raise UserError(
            f"the runs' configs do not name one validation file ({listing}); name examples that no run was trained on: "
            "scripts/compare.py ... --data FILE"
        )
    format, fields = (runs[0].setting("data", key) for key in ("format", "fields"))
    return paths[0], format or "auto", fields or {}


def final_validation(arms: dict[str, list[Source]]) -> dict[str, dict[str, list[float]]]:
    """Return the last value of each validation curve that all runs have: curve -> arm -> values of its seeds.

    Return {} unless every seed is a run and all runs were validated on the same data, as their configs name it.
    """
    keys = ("validation", "validation_share", "split_by")
    runs = [source for sources in arms.values() for source in sources]
    data = {str([source.setting("data", key) for key in keys]) for source in runs}
    if any(not source.run or source.setting("data", "train") is None for source in runs) or len(data) > 1:
        return {}
    # The examples that a share holds out depend on the training files.
    files = {str(source.setting("data", "train")) for source in runs}
    if runs[0].setting("data", "validation_share") and len(files) > 1:
        return {}
    rows = {source: source.rows for source in runs}
    values = [item for row in rows[runs[0]] for item in row.items()]
    names = dict.fromkeys(n for n, value in values if n.startswith("validation/") and not isinstance(value, str))
    curves = {name: {source: curve(rows[source], name)[1] for source in runs} for name in names}
    return {
        name: {arm: [values[source][-1] for source in seeds] for arm, seeds in arms.items()}
        for name, values in curves.items()
        if all(values.values())
    }
