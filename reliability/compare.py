"""Are two runs the same run? Exported weights to the bit, and every row of their curves once."""

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

# Curves that measure this machine at this moment, and differ between any two runs.
MEASURED = {"train/tokens_per_second", "train/mfu", "train/memory_gib", "ewc/time"}
# Rows about a process: the seconds of its saves and of its start. The row of a save that a kill cut off is rightly missing.
OF_A_PROCESS = {"save", "start"}


def differences(run: Path, reference: Path) -> list[str]:
    """What differs between two finished runs, one line each; empty if they are the same.

    Compares export/*.safetensors to the bit, metrics.jsonl and TensorBoard. Raises nothing for a file that is missing: that
    is a difference.
    """
    return [*_weights(run, reference), *_rows(run, reference), *_tensorboard(run)]


def largest_difference(run: Path, reference: Path) -> float:
    """The largest absolute difference between the exported weights of two runs."""
    a, b = exported(run), exported(reference)
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def exported(run: Path) -> dict[str, torch.Tensor]:
    """All exported tensors of a run by name."""
    found = {}
    for path in sorted((run / "export").glob("*.safetensors")):
        found |= load_file(path)
    return found


def read_rows(run: Path) -> list[dict]:
    """The rows of metrics.jsonl in file order."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def kind(row: dict) -> str:
    """train, validation, forgetting, save, start: the first word of a row's curves."""
    return next(name for name in row if name != "step").partition("/")[0]


def _weights(run: Path, reference: Path) -> list[str]:
    found, expected = exported(run), exported(reference)
    if not found or found.keys() != expected.keys():
        return [f"export/: {len(found)} tensors, expected {len(expected)}"]
    return [
        f"export/: {name} differs by {(found[name].double() - value.double()).abs().max().item():.3g}"
        for name, value in expected.items()
        if found[name].dtype != value.dtype or not torch.equal(found[name], value)
    ]


def _rows(run: Path, reference: Path) -> list[str]:
    try:
        rows, expected = read_rows(run), read_rows(reference)
    except (OSError, ValueError) as error:
        return [f"metrics.jsonl: {error}"]
    problems = [
        f"metrics.jsonl: step {step} has {count} rows of {name}"
        for (step, name), count in Counter((row["step"], kind(row)) for row in rows).items()
        if count > 1
    ]
    found_rows, expected_rows = (
        {(row["step"], kind(row)): row for row in some if kind(row) not in OF_A_PROCESS} for some in (rows, expected)
    )
    for step, name in sorted(found_rows.keys() ^ expected_rows.keys()):
        what = "is missing" if (step, name) in expected_rows else "should not be there"
        problems.append(f"metrics.jsonl: the row {name} of step {step} {what}")
    for key in sorted(found_rows.keys() & expected_rows.keys()):
        found, wanted = (
            {name: value for name, value in some[key].items() if name not in MEASURED}
            for some in (found_rows, expected_rows)
        )
        problems += [
            f"metrics.jsonl: step {key[0]}: {name} is {found.get(name)}, expected {wanted.get(name)}"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)
        ]
    return problems


def _tensorboard(run: Path) -> list[str]:
    """Whether TensorBoard shows exactly the rows of metrics.jsonl."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow to import

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    problems = []
    expected: dict[str, dict[int, float]] = {}
    for row in read_rows(run):
        for name, value in row.items():
            if name != "step":
                expected.setdefault(name, {})[row["step"]] = value
    tags = set(events.Tags()["scalars"])
    problems += [f"tensorboard: {name} is only in one of the two" for name in sorted(tags ^ expected.keys())]
    for name in sorted(tags & expected.keys()):
        points = [(event.step, event.value) for event in events.Scalars(name)]
        steps = [step for step, _ in points]
        if sorted(steps) != sorted(expected[name]):
            twice = sorted(step for step, count in Counter(steps).items() if count > 1)
            missing = sorted(expected[name].keys() - set(steps))
            problems.append(f"tensorboard: {name}: steps twice {twice}, missing {missing}")
        elif any(torch.tensor(expected[name][step]).item() != value for step, value in points):
            problems.append(f"tensorboard: {name} has other values than metrics.jsonl")
    return problems
