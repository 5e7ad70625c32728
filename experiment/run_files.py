"""What a run has left in its directory, as far as a sweep needs it: curves, the export's record, settings, data.

Only metrics.jsonl and small JSON files are read: no data file, no weights.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from configs.config import Config, as_dict

# Settings that a run fills in where the config has this value (training/chat_settings.py, training/micro_batch.py).
_FILLED_IN = {("data", "chat_date"): None, ("batch", "micro_batch"): "auto"}


def read_rows(directory: Path) -> list[dict]:
    """The rows of metrics.jsonl that are complete; none if the run has not started."""
    rows = []
    try:
        lines = (directory / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # being written
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def trained(rows: Sequence[dict]) -> tuple[int, int, float]:
    """(steps, tokens, tokens per second of the last row) of the curves; zeros before the first step."""
    for row in reversed(rows):
        if "train/tokens" in row:
            return row["step"], int(row["train/tokens"]), float(row.get("train/tokens_per_second", 0.0))
    return 0, 0, 0.0


def value_at(rows: Sequence[dict], metric: str, step: int) -> float | None:
    """The metric at a step; None if it was not measured there."""
    found = [row[metric] for row in rows if row["step"] == step and metric in row]
    return float(found[-1]) if found else None


def exported_step(directory: Path) -> int | None:
    """The step of the exported weights of a finished run; None if it has not finished."""
    try:
        record = json.loads((directory / "export" / "export.json").read_text(encoding="utf-8"))
        return int(record["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def final_value(directory: Path, rows: Sequence[dict], metric: str, step: int) -> float:
    """The metric of the exported weights. Raises UserError if the run did not measure it."""
    value = value_at(rows, metric, step)
    if value is None:
        curves = sorted({name for row in rows for name in row if name.startswith("validation/")})
        hint = f"its curves are {', '.join(curves)}" if curves else "it has no validation curves"
        raise UserError(f"{directory / 'metrics.jsonl'} has no {metric} at step {step}; {hint}: choose one with --by")
    return value


def check_settings(directory: Path, config: Config) -> None:
    """Raise UserError if the run in `directory` was started with other settings than `config`."""
    try:
        record = json.loads((directory / "config.json").read_text(encoding="utf-8"))["config"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{directory / 'config.json'} is damaged; remove {directory} to train this run again") from None
    wanted = json.loads(json.dumps(as_dict(config)))
    changed = [
        f"{section}.{key}={record[section][key]}, now it is {value}"
        for section, keys in wanted.items()
        for key, value in keys.items()
        if key in record.get(section, {})  # newer keys are not compared
        and record[section][key] != value
        and not ((section, key) in _FILLED_IN and _FILLED_IN[(section, key)] == value)
    ]
    if changed:
        raise UserError(f"{directory} was trained with {'; '.join(changed)}; set it back, or choose another --out")


def data_of(directory: Path) -> list[str] | None:
    """[fingerprint of what is trained on and from, fingerprint of the validation data]; None without a checkpoint."""
    checkpoints = directory / "checkpoints"
    try:
        name = (checkpoints / "latest").read_text(encoding="utf-8").strip()
        state = json.loads((checkpoints / name / "manifest.json").read_text(encoding="utf-8"))["state"]
        identity = state["identity"]
        mixture = (identity["the data"]["data.mix"] or [None])[0]
        trained_on = [identity["the data"]["data.train"], mixture, identity["the weights"]]
        return [json.dumps(trained_on), json.dumps(state["validation"])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def is_finite(value: float | None) -> bool:
    """Whether there is a value, and it is finite."""
    return value is not None and math.isfinite(value)
