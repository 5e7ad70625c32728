"""Result files (JSON): check the path before the work, and read the result of an earlier evaluation.

They are written with `common.durable_files.write_json`.
"""

import json
from pathlib import Path

from common.durable_files import check_can_write
from common.errors import UserError


def prepare_output(path: Path) -> None:
    """Create the parent directory of a result file, so that a bad path fails before the work and not after it.

    Raises UserError if the file could not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror} ({error.filename}); choose another file") from None
    check_can_write(path, "the result")


def read_result(
    path: Path, keys: tuple[str, ...] = ("model", "data_sha256"), mend: str = "make it with scripts/evaluate.py --json"
) -> dict:
    """Read the JSON of an earlier scripts/evaluate.py, or of another with these `keys`. Raises UserError if it is not such a file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict) or not {*keys} <= result.keys():
            raise ValueError(f"it has no {' and '.join(keys)}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not the JSON of an evaluation ({error}); {mend}") from None
    return result
