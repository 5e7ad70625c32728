"""Fourteen damaged checkpoints: each is refused in one sentence that names the file, and resume=previous mends the run."""

import shutil
from pathlib import Path

import pytest

from reliability.compare import largest_difference
from reliability.damage import DAMAGES, newest
from reliability.workload import write_workload
from tests.distributed.launch import launch

pytestmark = pytest.mark.slow
STEPS = 6


def run_of(folder: Path, name: str, *overrides: str, plant: str | None = None, expect: int = 0) -> dict:
    settings = ("run.save_every=1", "run.eval_every=0", "data.validation=", "ewc.strength=0", "data.packing=False")
    arguments = [str(folder / "config.py"), f"run.name={name}", *settings, *overrides]
    return {"arguments": arguments, "plant": plant, "expect": expect}


def contents(run: Path) -> dict[str, bytes]:
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in sorted((run / "checkpoints").rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`straight` is uninterrupted; `stopped` has the checkpoints of two steps, and a copy of it for each damage."""
    folder = tmp_path_factory.mktemp("damage")
    write_workload(folder, STEPS)
    # A step has 3 forwards on a rank: 4 examples and 1 or 2 of the mixed-in source, on 2 ranks.
    runs = [run_of(folder, "straight"), run_of(folder, "stopped", plant="signal_at_micro_batch:13")]
    launch(folder, "first", 2, runs)
    runs = folder / "runs"
    assert (
        len(list((runs / "stopped" / "checkpoints").glob("step-*"))) >= 2 and not (runs / "stopped" / "export").exists()
    )
    for number, damage in enumerate(DAMAGES):
        shutil.copytree(runs / "stopped", runs / f"damaged-{number}")
        damage.apply(runs / f"damaged-{number}" / "checkpoints")
    return folder


@pytest.fixture(scope="module")
def refused(folder) -> tuple[list[str], list[dict], list[dict]]:
    """(one error per damage, contents before, contents after) of a start that resumes from the damaged checkpoint."""
    runs = [folder / "runs" / f"damaged-{number}" for number in range(len(DAMAGES))]
    before = [contents(run) for run in runs]
    output = launch(folder, "refused", 2, [run_of(folder, run.name, expect=2) for run in runs])
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    return errors, before, [contents(run) for run in runs]


@pytest.fixture(scope="module")
def mended(folder, refused) -> str:
    """The output of the starts with run.resume=previous, and of one of a checkpoint with a file that nobody knows."""
    runs = folder / "runs"
    shutil.copytree(runs / "stopped", runs / "junk")
    (newest(runs / "junk" / "checkpoints") / "notes.txt").write_text("a file of somebody else")
    again = [run_of(folder, f"damaged-{number}", "run.resume=previous") for number in range(len(DAMAGES))]
    return launch(folder, "mended", 2, [*again, run_of(folder, "junk")])


@pytest.mark.parametrize("number", range(len(DAMAGES)), ids=[damage.name for damage in DAMAGES])
def test_damage_is_one_sentence_that_names_the_file_and_nothing_is_deleted(folder, refused, number) -> None:
    errors, before, after = refused
    assert len(errors) == len(DAMAGES), "\n".join(errors)
    run = folder / "runs" / f"damaged-{number}" / "checkpoints"
    file = DAMAGES[number].file
    path = run / file if file == "latest" else run / newest(folder / "runs" / "stopped" / "checkpoints").name / file
    assert str(path) in errors[number]
    assert "run.resume=previous continues from the newest whole checkpoint" in errors[number]
    assert after[number] == before[number]


@pytest.mark.parametrize("number", range(len(DAMAGES)), ids=[damage.name for damage in DAMAGES])
def test_resume_previous_ends_with_the_same_weights(folder, mended, number) -> None:
    run = folder / "runs" / f"damaged-{number}"
    assert largest_difference(run, folder / "runs" / "straight") == 0
    if DAMAGES[number].file != "latest":
        damaged = newest(folder / "runs" / "stopped" / "checkpoints").name
        assert f"warning: passed over: {run}/checkpoints/{damaged}/{DAMAGES[number].file} " in mended


def test_an_unknown_file_in_a_checkpoint_does_no_harm(folder, mended) -> None:
    assert largest_difference(folder / "runs" / "junk", folder / "runs" / "straight") == 0
