"""Survival of a run: kills, and damage in the file of another rank. All on 2 ranks, in four launches.

The run is that of workload.py. The kills come at chosen moments; those of scripts/chaos.py are random. test_checkpoint_directory.py has
every kind of damage, in one process; test_train.py has moves to other numbers of ranks.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from distributed.checkpoint_directory import latest_checkpoint
from scripts.chaos.compare import differences
from tests.distributed.launch import (
    ENVIRONMENT,
    WORKER,
    flip_bit,
    largest_difference,
    launch,
    run_of,
    weights,
    write_plan,
)
from tests.distributed.workload import write_workload
from tests.processes import run_ranks
from training.checkpointer import Record

pytestmark = pytest.mark.slow
STEPS = 6
# A short run without mixture of losses, for the damage: only how it resumes matters.
PLAIN = (
    "optimizer.max_steps=3",
    "run.eval_every=0",
    "data.validation=",
    "ewc.strength=0",
    "data.packing=False",
    "batch.micro_batch=2",
)
FISHER = "ewc.documents=4"
KILLS = {
    "killed-in-a-save": ("kill:data", ()),  # rank 0, in the second save
    "killed-before-pruning": ("kill:prune", ("run.async_save=True",)),  # rank 0, in the background of a step
}
BACKGROUND = ("run.async_save=True",)
DAMAGED = "checkpoints/step-000002/__1_0.distcp"  # the tensors of rank 1


def contents(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("survival")
    write_workload(folder, STEPS)
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> dict:
    """All launches. `output`: of the last launch. `before` and `after`: files around the start from a damaged checkpoint."""
    runs = folder / "runs"
    damaged = runs / "damaged"
    first = [
        run_of(folder, "straight", FISHER, plant="count_files_and_threads and note_unflushed_rows"),
        run_of(folder, "plain", *PLAIN),
        run_of(folder, "damaged", *PLAIN, "run.save_every=1", "run.stop_at=2"),
        run_of(folder, "stopped-in-a-save", FISHER, *BACKGROUND, plant="signal_in_background"),
    ]
    outcome: dict = {"newest": {}, "stopped": launch(folder, "two", 2, first)}
    for name, (plant, overrides) in KILLS.items():
        plan = write_plan(folder, name, [run_of(folder, name, FISHER, *overrides, plant=plant)])
        assert run_ranks(2, WORKER, plan, **ENVIRONMENT).returncode != 0
        outcome["newest"][name] = latest_checkpoint(runs / name / "checkpoints").name
    flip_bit(damaged / DAMAGED)
    outcome["before"] = contents(damaged)
    left = f"first:shutil.copytree('{damaged}/checkpoints', '{folder}/left/checkpoints')"
    resumed = [run_of(folder, name, FISHER, *overrides) for name, (_, overrides) in KILLS.items()]
    resumed += [
        run_of(folder, "stopped-in-a-save", FISHER, *BACKGROUND),
        run_of(folder, "damaged", *PLAIN, expect=2),
        run_of(folder, "damaged", *PLAIN, "run.resume=previous", plant=left),
    ]
    outcome["output"] = launch(folder, "resumed", 2, resumed)
    outcome["after"] = contents(folder / "left")
    return outcome


@pytest.mark.parametrize("name", KILLS)
def test_kill_changes_no_bit_and_no_row(folder, runs, name) -> None:
    assert runs["newest"][name] == ("step-000002" if name == "killed-in-a-save" else "step-000004")
    assert not list((folder / "runs" / name / "checkpoints").glob("*.tmp"))  # half-written checkpoints are removed
    assert differences(folder / "runs" / name, folder / "runs" / "straight") == []


def test_signal_in_background_save_changes_nothing(folder, runs) -> None:
    """The loop stops, waits for that save, and saves the step at which it stopped."""
    run, straight = folder / "runs" / "stopped-in-a-save", folder / "runs" / "straight"
    lines = [line for line in runs["stopped"].splitlines() if line.startswith(("saved step", "SIGTERM: stopped"))]
    first, second, stopped = lines[-3:]
    step = int(re.match(rf"SIGTERM: stopped after step (\d)/{STEPS}, saved", stopped)[1])
    assert step > 2 and first.startswith("saved step 2 ") and second.startswith(f"saved step {step} ")
    assert differences(run, straight) == []
    saved, expected = (
        {e.step: e.content["tensors"] for e in Record(one).read() if e.kind == "checkpoint"} for one in (run, straight)
    )
    assert saved[2] == expected[2] and saved[STEPS] == expected[STEPS]


def test_saves_leave_no_thread_and_no_open_file(folder, runs) -> None:
    counts = json.loads((folder / "straight.counts.json").read_text())
    assert len(counts) >= STEPS // 2 and len({tuple(count) for count in counts[1:]}) == 1, counts


def test_save_flushes_all_rows_first(folder, runs) -> None:
    """The record makes metrics.jsonl durable; `log.sync` in train.py flushes TensorBoard, too."""
    counts = json.loads((folder / "straight.unflushed.json").read_text())
    assert len(counts) >= STEPS // 2 and not any(counts), counts


def test_previous_after_damage_ends_with_same_weights(folder, runs) -> None:
    """Rank 1 alone reads the damaged file, and both ranks end."""
    file = folder / "runs" / "damaged" / DAMAGED
    (error,) = (line for line in runs["output"].splitlines() if line.startswith("error: "))
    assert str(file) in error and "run.resume=previous continues from the newest whole checkpoint" in error
    assert runs["after"] == runs["before"]
    assert largest_difference(weights(folder / "runs" / "damaged"), weights(folder / "runs" / "plain")) == 0
    assert f"warning: passed over and renamed to NAME.bad: {file} " in runs["output"]
    assert (folder / "runs" / "damaged" / "checkpoints" / "step-000002.bad").is_dir()


def test_the_comparison_finds_what_differs(folder, runs) -> None:
    """A changed weight, a line that is no row, a row that is missing, another value."""
    reference, other = folder / "runs" / "straight", folder / "runs" / "other"
    shutil.copytree(reference, other)
    tensors = weights(reference)
    tensors[sorted(tensors)[0]].view(-1)[3] += 1e-3
    save_file(tensors, other / "export" / "model.safetensors", {"format": "pt"})
    lines = (other / "metrics.jsonl").read_text().splitlines()
    train = [i for i, line in enumerate(lines) if "train/loss" in line]
    changed = json.loads(lines[train[2]])
    changed["train/loss"] += 1e-6
    lines[train[2]] = json.dumps(changed)
    del lines[train[4]]
    (other / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 5, "tr']) + "\n")
    weight, line, third, fifth = differences(other, reference)
    assert (
        line == f"metrics.jsonl: 1 of {len(lines) + 1} lines are no rows"
        and weight == "export/model.safetensors differs"
        and "(3, 'train') is {" in third
    )
    assert f"'train/loss': {changed['train/loss']}, " in third and "(5, 'train') is None, expected {" in fifth
