"""Whether two finished runs are equal: exported weights to the bit, and every row of metrics.jsonl."""

from collections import Counter
from pathlib import Path

from common.sha256 import sha256
from eval.comparison.arms import metric_rows

# Curves that measure this machine at this moment.
MEASURED = {"train/tokens_per_second", "train/mfu", "train/memory_gib"}
MEASURED |= {"start/total", "time/slowest_rank_seconds", "time/median_rank_seconds"}
# Rows about a process and not about the training. A save that was cut off has no row, and rightly so.
OF_A_PROCESS = {"save", "start"}


def differences(run: Path, reference: Path) -> list[str]:
    """Return a line for each difference between two finished runs."""
    weights, expected_weights = exported(run), exported(reference)
    if not weights:
        return [f"{run} has exported nothing"]
    files = sorted(weights | expected_weights)
    problems = [f"{name} differs" for name in files if weights.get(name) != expected_weights.get(name)]
    keyed_rows, lines = read_rows(run), (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    if len(lines) > len(metric_rows(run)):
        problems.append(f"metrics.jsonl: {len(lines) - len(metric_rows(run))} of {len(lines)} lines are no rows")
    counts = Counter(key for key, _ in keyed_rows)
    problems += [f"metrics.jsonl: {key} is there twice" for key, count in counts.items() if count > 1]
    rows, expected = dict(keyed_rows), dict(read_rows(reference))
    return problems + [
        f"metrics.jsonl: {key} is {rows.get(key)}, expected {expected.get(key)}"
        for key in sorted(rows.keys() | expected.keys())
        if rows.get(key) != expected.get(key)
    ]


def exported(run: Path) -> dict[str, str]:
    """Return file name -> SHA-256 of the exported weights of a run, and of its LoRA adapter if there is one."""
    files = [path for folder in ("export", "adapter") for path in run.glob(f"{folder}/*.safetensors")]
    return {str(path.relative_to(run)): sha256(path) for path in files}


def read_rows(run: Path) -> list[tuple[tuple[int, str], dict]]:
    """Return ((step, first word of the curves), curves) of each row, without measurements of the machine."""
    rows = []
    for row in metric_rows(run):
        kind = next(name for name in row if name != "step").partition("/")[0]
        if kind not in OF_A_PROCESS:
            rows.append(((row["step"], kind), {name: value for name, value in row.items() if name not in MEASURED}))
    return rows
