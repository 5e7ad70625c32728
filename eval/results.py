"""Results as JSON files: checked before the work, written whole after it."""

import json
import os
from pathlib import Path

from common.errors import UserError


def prepare_output(path: Path) -> None:
    """Make the folder of a file that is written when the work is done, so that it is not lost then. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror} ({error.filename}); choose another file") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        why = "it is a folder" if path.is_dir() else f"{path.parent} is not writable"
        raise UserError(f"{path} cannot be written: {why}; choose another file")


def read_result(path: Path) -> dict:
    """The JSON of an earlier evaluation by scripts/evaluate.py. Raises UserError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not {"model", "data_sha256"} <= found.keys():
            raise ValueError("no model and data in it")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not the JSON of an evaluation ({error}): make it with --json.") from None
    return found


def write_result(path: Path, result: dict) -> None:
    """Written aside and renamed, so that what stands there is whole."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)
