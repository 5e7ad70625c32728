"""Check the path of a result file before the work, and read the result of an earlier evaluation.

Results are JSON, written with `common.durable_files.write_json`.
"""

import json
from pathlib import Path

from common.durable_files import check_can_write
from common.errors import UserError


def prepare_output(path: Path) -> None:
    """Create the parent directory of a result file. Raise UserError, before the work begins, if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror} ({error.filename}); choose another file") from None
    check_can_write(path, "the result")


def read_result(
    path: Path, keys: tuple[str, ...] = ("model", "data_sha256"), mend: str = "make it with scripts/evaluate.py --json"
) -> dict:
    """Read the JSON of an earlier evaluation. Raise UserError, which ends with `mend`, if it is no JSON or lacks one of `keys`."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict) or not {*keys} <= result.keys():
            raise ValueError(f"it has no {' and '.join(keys)}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not the JSON of an evaluation ({error}); {mend}") from None
    return result
