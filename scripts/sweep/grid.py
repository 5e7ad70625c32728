"""The grid of a sweep: a run of train.py for every combination of values `key=a,b,c`, and for every seed."""

import itertools
import json
import re
import typing
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from common.errors import UserError
from configs.config import KEYS, Config
from configs.load import load_config, override

FOLDER = "runs/sweeps"
# Key -> why a sweep refuses it: the sweep sets it itself, or its runs could not be compared.
_NOT_SWEPT = {
    **dict.fromkeys(("run.name", "run.directory", "run.resume"), "the sweep names and continues its runs, in --out"),
    "run.seed": "use --seeds K",
    **dict.fromkeys(
        ("run.eval_generate", "run.best_by", "data.validation", "data.split_by", "data.validation_share"),
        "all runs must be measured on the same data, in the same way",
    ),
}
_LONGEST_PART = 40  # characters of a value in the name of a run


@dataclass(frozen=True)
class Trial:
    """One run of train.py. config: its resolved settings. options: its overrides for the command line."""

    name: str
    point: tuple[str, ...]  # the overrides of the swept keys, as the user wrote them
    seed: int
    config: Config
    options: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """All runs of a sweep, point by point.

    axes: swept key -> {value as the user wrote it: parsed value}, by key. fixed: overrides of all runs.
    """

    config_file: str
    out: Path
    axes: dict[str, dict[str, typing.Any]]
    fixed: list[str]
    seeds: list[int]
    runs: list[Trial]


def make_grid(config_file: str, arguments: Sequence[str], seeds: int | None, out: str | None) -> Grid:
    """Return the grid of the arguments' values, in the directory `out` (None: runs/sweeps/NAME).

    A comma separates values. A | separates them in an argument that has one, as is needed where a value has commas of its own
    (lists, pairs, dictionaries): `optimizer.betas=0.9,0.95|0.9,0.99`. seeds: run.seed is 0 to seeds - 1; None: the config's
    seed. Raise UserError, also for a value that the config refuses.
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
    axes: dict[str, dict[str, typing.Any]] = {}
    for key, parts in sorted(texts.items()):  # the same sweep with its arguments in another order has the same names
        axes[key] = {}
        for part in parts:
            value = attrgetter(key)(override(base, [f"{key}={part}"]))
            if part in axes[key] or value in axes[key].values():
                raise UserError(f"{key}: the value {part} is given twice")
            axes[key][part] = value
    grid = Grid(config_file, Path(folder), axes, fixed, [*range(seeds)] if seeds else [base.run.seed], [])
    for choice in itertools.product(*(parts.items() for parts in axes.values())):
        point = tuple(f"{key}={part}" for key, (part, _) in zip(axes, choice, strict=True))
        values = {key: value for key, (_, value) in zip(axes, choice, strict=True)}
        for seed in grid.seeds:
            name = _name(values, seed)
            own = (f"run.seed={seed}", f"run.directory={folder}", f"run.name={name}")
            grid.runs.append(Trial(name, point, seed, override(base, [*point, *own]), (*fixed, *point, *own)))
    return grid


def _split(key: str, text: str) -> list[str]:
    """Split the text of an argument into its values. A comma does not split where a value may have commas of its own."""
    hint = KEYS.get(key)
    holds_commas = any(typing.get_origin(part) in (tuple, dict) for part in (hint, *typing.get_args(hint)))
    if "|" not in text and holds_commas:
        return [text]
    return [part for part in text.split("|" if "|" in text else ",") if part]


def _name(values: dict[str, object], seed: int) -> str:
    """Return a name such as `learning_rate-0.0003_epochs-2_seed-0`. Equal values give equal names, however they are written."""
    last_parts = [key.rpartition(".")[2] for key in values]
    parts = []
    for (key, value), last in zip(values.items(), last_parts, strict=True):
        text = value if isinstance(value, str) else json.dumps(value, default=vars)
        plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.")[:_LONGEST_PART]
        if plain != text:  # a file name cannot hold all of the text
            plain += f"-{zlib.crc32(text.encode()):08x}"
        parts.append(f"{last if last_parts.count(last) == 1 else key}-{plain}")
    return "_".join([*parts, f"seed-{seed}"])


def read_json(path: Path) -> dict:
    """Read a JSON object, or return {} if there is no such file. Raise UserError if it is damaged."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged; remove it, or choose another --out") from None
