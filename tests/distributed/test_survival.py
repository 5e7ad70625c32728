"""What a run survives: kills, moves to other numbers of ranks, damaged checkpoints. All in six launches.

The run is that of workload.py. The kills come at chosen moments; those of scripts/chaos.py are random.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.distributed.launch import ENVIRONMENT, WORKER, largest_difference, launch, rows, run_of, weights, write_plan
from tests.distributed.workload import write_workload
from tests.processes import run_ranks
from tools.chaos import differences, exported

pytestmark = pytest.mark.slow
STEPS = 8
OTHER_DATA, MANIFEST = "__1_0.distcp", "manifest.json"
# Short runs without mixture of losses, for the damage: only how they resume matters.
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
    "killed-before-latest": ("kill:latest", ("run.async_save=True",)),  # rank 0, in the background of a step
}


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_step(path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["state"]["step"] += 1
    path.write_text(json.dumps(manifest))


# What one process does not show: name -> (file of the newest checkpoint, what is done to it). test_checkpoint_directory.py has the
# others: truncated and missing files, a flipped bit in the index, what `latest` may hold.
DAMAGES = {
    "a flipped bit in the tensors of rank 1": (OTHER_DATA, flip_bit),
    "another step in the manifest": (MANIFEST, change_step),
    "`latest` holds garbage": ("latest", lambda path: path.write_bytes(b"\xff\x00step\n")),
}


def newest(checkpoints: Path) -> Path:
    return checkpoints / (checkpoints / "latest").read_text().strip()


def damaged_file(runs: Path, number: int) -> Path:
    checkpoints, file = runs / f"damaged-{number}" / "checkpoints", [*DAMAGES.values()][number][0]
    return (
        checkpoints / file if file == "latest" else checkpoints / newest(runs / "stopped" / "checkpoints").name / file
    )


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
    """All launches. `output`: what the starts from damaged checkpoints printed; `before` and `after`: their files around that."""
    launch(folder, "one", 1, [run_of(folder, "moved", FISHER, "run.stop_at=2")])
    first = [
        run_of(folder, "straight", FISHER, plant="count_files_and_threads"),
        run_of(folder, "moved", FISHER, "run.stop_at=4"),
        run_of(folder, "plain", *PLAIN),
        run_of(folder, "stopped", *PLAIN, "run.save_every=1", "run.stop_at=2"),
    ]
    launch(folder, "two", 2, first)
    launch(folder, "four", 4, [run_of(folder, "moved", FISHER, "run.stop_at=5")])
    found: dict = {"latest": {}}
    for name, (plant, overrides) in KILLS.items():
        plan = write_plan(folder, name, [run_of(folder, name, FISHER, *overrides, plant=plant)])
        assert run_ranks(2, WORKER, plan, **ENVIRONMENT).returncode != 0
        found["latest"][name] = (folder / "runs" / name / "checkpoints" / "latest").read_text()
    copies = [folder / "runs" / f"damaged-{number}" for number in range(len(DAMAGES))]
    for number, (copy, (_, damage)) in enumerate(zip(copies, DAMAGES.values(), strict=True)):
        shutil.copytree(folder / "runs" / "stopped", copy)
        damage(damaged_file(folder / "runs", number))
    shutil.copytree(folder / "runs" / "stopped", folder / "runs" / "junk")
    (newest(folder / "runs" / "junk" / "checkpoints") / "notes.txt").write_text("a file of somebody else")
    found["before"] = list(map(contents, copies))
    resumed = [run_of(folder, name, FISHER, *overrides) for name, (_, overrides) in KILLS.items()]
    resumed += [run_of(folder, "moved", FISHER), run_of(folder, "junk", *PLAIN)]
    resumed += [run_of(folder, copy.name, *PLAIN, expect=2) for copy in copies]
    for copy in copies:  # mended, after a copy of what the refused start has left
        left = f"first:shutil.copytree('{copy}/checkpoints', '{folder}/left/{copy.name}/checkpoints')"
        resumed.append(run_of(folder, copy.name, *PLAIN, "run.resume=previous", plant=left))
    found["output"] = launch(folder, "resumed", 2, resumed)
    found["after"] = [contents(folder / "left" / copy.name) for copy in copies]
    return found


@pytest.mark.parametrize("name", KILLS)
def test_a_kill_changes_no_bit_and_no_row(folder, runs, name) -> None:
    assert runs["latest"][name] in ("step-000002", "step-000004")
    assert not list((folder / "runs" / name / "checkpoints").glob("*.tmp"))  # what was half written is gone
    assert differences(folder / "runs" / name, folder / "runs" / "straight") == []


def test_1_2_4_2_ranks_with_a_stop_between_them_end_with_the_weights_of_2(folder, runs) -> None:
    said = "".join((folder / f"{name}.out").read_text() for name in ("one", "two", "four"))
    assert re.findall(rf"run.stop_at: stopped after step (\d+)/{STEPS}", said) == ["2", "4", "5"]
    assert set(rows(folder / "runs" / "moved")) == set(range(1, STEPS + 1))
    assert largest_difference(weights(folder / "runs" / "moved"), weights(folder / "runs" / "straight")) < 1e-5


def test_saves_leave_no_thread_and_no_open_file(folder, runs) -> None:
    counts = json.loads((folder / "straight.counts.json").read_text())
    assert len(counts) >= STEPS // 2 and len({tuple(count) for count in counts[1:]}) == 1, counts


@pytest.mark.parametrize("number", range(len(DAMAGES)), ids=DAMAGES)
def test_damage_is_one_sentence_nothing_is_deleted_and_previous_ends_with_the_same_weights(
    folder, runs, number
) -> None:
    errors = [line for line in runs["output"].splitlines() if line.startswith("error: ")]
    assert len(errors) == len(DAMAGES), "\n".join(errors)
    file, plain = damaged_file(folder / "runs", number), weights(folder / "runs" / "plain")
    assert str(file) in errors[number]
    assert "run.resume=previous continues from the newest whole checkpoint" in errors[number]
    assert runs["after"][number] == runs["before"][number]
    assert largest_difference(weights(folder / "runs" / f"damaged-{number}"), plain) == 0
    assert file.name == "latest" or f"warning: passed over: {file} " in runs["output"]


def test_an_unknown_file_in_a_checkpoint_does_no_harm(folder, runs) -> None:
    assert largest_difference(weights(folder / "runs" / "junk"), weights(folder / "runs" / "plain")) == 0


def test_the_comparison_finds_what_differs(folder, runs) -> None:
    """A changed weight, a line that is no row, a row that is missing, another value."""
    reference, other = folder / "runs" / "straight", folder / "runs" / "other"
    shutil.copytree(reference, other)
    tensors = exported(reference)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[3] += 1e-3
    save_file(tensors, other / "export" / "model.safetensors")
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
        and weight == f"export: {name} differs"
        and "(3, 'train') is {" in third
    )
    assert f"'train/loss': {changed['train/loss']}, " in third and "(5, 'train') is None, expected {" in fifth
