"""The rows of a run's metrics.jsonl, as the tools read them: after a kill, and while the run is being trained."""

import json
from pathlib import Path


def rows_of(run: Path) -> list[dict]:
    """All whole rows; none without the file. One that is being written, or that a kill has cut off, is left out."""
    path, rows = run / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def timed_steps(rows: list[dict]) -> list[tuple[int, float]]:
    """(tokens, seconds) of each row of a training step after the first, which has what happens only once."""
    found = [row for row in rows if row.get("train/tokens_per_second")]
    tokens = [after["train/tokens"] - before["train/tokens"] for before, after in zip(found, found[1:], strict=False)]
    return [(count, count / row["train/tokens_per_second"]) for count, row in zip(tokens, found[1:], strict=True)]
