"""Which results of scripts/evaluate.py and scripts/measure.py forgetting are those of the exported weights."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from model.fingerprint import fingerprint_of_base
from training.ending import RECORD

SAME = ("checkpoint", "averaged")  # in export.json: two exports that agree differ at most in their dtype


@dataclass(frozen=True)
class Result:
    """A result of these weights. file: where it was read. converted: the dtype that was measured, if another is exported."""

    file: Path
    content: dict
    converted: str | None = None


@dataclass(frozen=True)
class Results:
    """Evaluations on data files, forgetting (None: not measured), and why other files were left out, one sentence each."""

    evaluations: tuple[Result, ...]
    forgetting: Result | None
    left_out: tuple[str, ...]


def read_results(run: Path | None, extra: Sequence[Path], record: dict, out: Path) -> Results:
    """The results in `run`/eval and in the files `extra` that are of the weights that `record` describes.

    The evaluated model must be `out`, or another export of the same checkpoint and changes, or the exported directory
    itself, and must not have been written again since. Raises UserError if a file of `extra` cannot be used.
    """
    evaluations, forgetting, left_out = [], None, []
    folder = run / "eval" if run else None
    files = sorted(folder.glob("*.json")) if folder and folder.is_dir() else []
    for file in [*files, *(file for file in extra if file not in files)]:
        try:
            content = _read(file)
            converted = _check_weights(file, Path(content.get("tuned") or content["model"]), record, out)
        except UserError as error:
            if file in extra:
                raise
            left_out.append(str(error))
            continue
        if "tuned" in content:
            forgetting = Result(file, content, converted)
        else:
            evaluations.append(Result(file, content, converted))
    return Results(tuple(evaluations), forgetting, tuple(left_out))


def _read(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error})") from error
    is_evaluation = isinstance(content, dict) and {"model", "data_sha256", "n_examples"} <= content.keys()
    is_forgetting = isinstance(content, dict) and {"base", "tuned", "perplexity_per_byte"} <= content.keys()
    if not (is_evaluation or is_forgetting):
        raise UserError(f"{file} is not the JSON of scripts/evaluate.py or scripts/measure.py forgetting")
    return content


def _check_weights(file: Path, model: Path, record: dict, out: Path) -> str | None:
    """The dtype of the evaluated model if it is another one. Raises UserError if it has other weights than the export."""
    if not (model / "config.json").is_file():
        raise UserError(f"{file} is of {model}, which is gone: it cannot be known whether it had these weights")
    written = model / RECORD
    if not written.is_file():
        if record.get("averaged") or fingerprint_of_base(model) != record.get("fingerprint"):
            raise UserError(f"{file} is of other weights, {model}")
        return None
    other = json.loads(written.read_text(encoding="utf-8"))
    same = all(other.get(key) == record.get(key) for key in SAME)
    if record.get("checkpoint") is None:
        same = same and other.get("fingerprint") == record.get("fingerprint")
    if model.resolve() != out.resolve() and not same:
        raise UserError(f"{file} is of other weights, {model}")
    if written.stat().st_mtime > file.stat().st_mtime:
        raise UserError(f"{file} is older than the weights in {model}; evaluate them again")
    dtype = other.get("dtype")
    return dtype if dtype != record["dtype"] else None
