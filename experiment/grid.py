"""The grid of a sweep: `key=a,b,c` arguments become points, and every point with a seed becomes a run with a name.

And the curve that it chooses by, and which direction is better.
"""

import itertools
import json
import re
import typing
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import UserError
from configs.config import Config
from configs.load import load_config, override

FOLDER = "runs/sweeps"
# Keys that a sweep sets itself, or that would give its runs different yardsticks.
_NOT_SWEPT = {
    "run.name": "the sweep names its runs",
    "run.directory": "use --out",
    "run.seed": "use --seeds K",
    "run.resume": "a sweep always continues its runs",
    "run.eval_generate": "all runs must be measured in the same way",
    "run.best_by": "all runs must be measured in the same way",
    "data.validation": "all runs must be measured on the same data",
    "data.split_by": "all runs must be measured on the same data",
    "data.validation_share": "all runs must be measured on the same data",
}
_LONGEST_PART = 40  # characters of a value in the name of a run


@dataclass(frozen=True)
class Run:
    """One run of train.py. config: its resolved settings."""

    name: str
    overrides: tuple[str, ...]  # of its point, as the user wrote them
    seed: int
    config: Config


@dataclass(frozen=True)
class Grid:
    """out: the directory of the sweep. axes: key -> values as the user wrote them, in his order. fixed: overrides of all runs. runs: point by point."""

    config_file: str
    out: str
    axes: dict[str, list[str]]
    values: dict[str, list[object]]  # the same, parsed
    fixed: list[str]
    seeds: list[int]
    runs: list[Run]

    @property
    def points(self) -> dict[tuple[str, ...], list[Run]]:
        """The overrides of a point -> its runs, one for each seed."""
        found: dict[tuple[str, ...], list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.overrides, []).append(run)
        return found


def make_grid(config_file: str, arguments: Sequence[str], seeds: int | None, out: str | None) -> Grid:
    """All runs of the product of the arguments' values, in `out` (None: runs/sweeps/NAME). Raises UserError, also for any value that is refused.

    A comma separates values. Where a value may itself have commas (lists, pairs, dictionaries), or if an argument has a |,
    that is what separates them: `optimizer.betas=0.9,0.95|0.9,0.99`. seeds: run.seed is 0 to seeds - 1; None: the config's.
    """
    if seeds is not None and seeds < 1:
        raise UserError(f"--seeds must be 1 or more, not {seeds}")
    axes: dict[str, list[str]] = {}
    fixed = []
    for text in arguments:
        key, equals, values = text.partition("=")
        parts = _split(key, values)
        if key in axes or key in [other.partition("=")[0] for other in fixed]:
            raise UserError(f"{key} is given twice; write all of its values in one argument")
        if len(parts) < 2 or not equals:
            fixed.append(f"{key}={parts[0]}" if parts and equals else text)
        elif key in _NOT_SWEPT:
            raise UserError(f"{key} cannot be swept: {_NOT_SWEPT[key]}")
        else:
            axes[key] = parts
    base = load_config(config_file, fixed)
    if seeds and any(text.startswith("run.seed=") for text in fixed):
        raise UserError("run.seed and --seeds are both given; leave one of them out")
    if not axes and not seeds:
        raise UserError(
            "nothing is swept; give several values, e.g. optimizer.learning_rate=1e-4,3e-4,1e-3, or --seeds K"
        )
    out = out or f"{FOLDER}/{base.run.name}"
    values = {key: [_value(override(base, [f"{key}={part}"]), key) for part in parts] for key, parts in axes.items()}
    for key, found in values.items():
        for number, value in enumerate(found):
            if value in found[:number]:
                raise UserError(f"{key}: the value {axes[key][number]} is given twice")
    grid = Grid(config_file, out, axes, values, fixed, list(range(seeds)) if seeds else [base.run.seed], [])
    for choice in itertools.product(*(range(len(parts)) for parts in axes.values())):
        overrides = tuple(f"{key}={axes[key][i]}" for key, i in zip(axes, choice, strict=True))
        named = {key: values[key][i] for key, i in zip(axes, choice, strict=True)}
        for seed in grid.seeds:
            name = _name(named, seed)
            extra = [f"run.seed={seed}", f"run.directory={out}", f"run.name={name}"]
            grid.runs.append(Run(name, overrides, seed, override(base, [*overrides, *extra])))
    return grid


def options(run: Run, grid: Grid) -> list[str]:
    """The overrides of a run for the command line of train.py."""
    settings = run.config.run
    return [
        *grid.fixed,
        *run.overrides,
        f"run.seed={run.seed}",
        f"run.directory={settings.directory}",
        f"run.name={run.name}",
    ]


def _split(key: str, text: str) -> list[str]:
    """The values in an argument; one if it is not a list of values."""
    if "|" in text:
        return [part for part in text.split("|") if part]
    return [text] if _holds_commas(key) else [part for part in text.split(",") if part]


def _holds_commas(key: str) -> bool:
    """Whether a value of this key may have commas: a tuple or a dictionary. False for an unknown key."""
    section, _, name = key.partition(".")
    kind = typing.get_type_hints(Config).get(section)
    hint = typing.get_type_hints(kind).get(name) if kind else None
    kinds = (hint, *typing.get_args(hint))
    return any(typing.get_origin(kind) in (tuple, dict) for kind in kinds)


def _value(config: Config, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _name(values: dict[str, object], seed: int) -> str:
    """E.g. `learning_rate-0.0003_epochs-2_seed-0`: the same for the same values, however they were written."""
    short = [key.rpartition(".")[2] for key in values]
    parts = []
    for key, value in values.items():
        last = key.rpartition(".")[2]
        parts.append(f"{last if short.count(last) == 1 else key}-{_plain(value)}")
    return "_".join([*parts, f"seed-{seed}"])


def _plain(value: object) -> str:
    """A value as a part of a file name. A checksum stands for what cannot be in one."""
    text = value if isinstance(value, str) else json.dumps(value, default=vars)
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.")[:_LONGEST_PART]
    return plain if plain == text else f"{plain}-{zlib.crc32(text.encode()):08x}".lstrip("-")


# ---- The curve that decides ------------------------------------------------------------------------------------------------

_LOSS = "validation/loss"
_HIGHER = tuple(f"validation/{name}" for name in ("f1", "exact_match", "rouge_l"))


@dataclass(frozen=True)
class Metric:
    """curve: its name in metrics.jsonl."""

    curve: str
    lower_is_better: bool

    def is_better(self, value: float, other: float) -> bool:
        """Whether `value` is better than `other`; of two equal ones none is."""
        return value < other if self.lower_is_better else value > other


def parse_metric(text: str) -> Metric:
    """The metric of `--by`, written like run.best_by: validation/loss, f1, or NAME:max and NAME:min.

    Raises UserError for a curve that is not of data.validation, or whose direction is not known.
    """
    name, colon, direction = text.partition(":")
    curve = name if "/" in name else f"validation/{name}"
    if not curve.startswith("validation/") or not name or (colon and direction not in ("max", "min")):
        raise UserError(
            f"--by {text}: a sweep chooses by a curve on data.validation, e.g. --by validation/loss or --by f1"
        )
    is_loss = curve == _LOSS or curve.startswith(f"{_LOSS}/")
    if not colon and not is_loss and curve not in _HIGHER:
        raise UserError(
            f"--by {text}: it is not known whether a high or a low {curve} is better; write {name}:max or {name}:min"
        )
    return Metric(curve, direction == "min" if colon else is_loss)
