"""Runs that are killed again and again, and runs that move to other numbers of ranks, end with the same weights.

The module of scripts/chaos.py, with forked ranks; one kill goes through the script itself and the real torchrun.
"""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reliability.campaign import Campaign
from reliability.compare import differences, largest_difference, read_rows
from reliability.soak import last_step
from reliability.workload import write_workload
from tests.processes import run_python
from tests.reliability.forked import ForkedLaunch

pytestmark = [pytest.mark.slow, pytest.mark.beside]
STEPS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The config, and the run `reference`: uninterrupted, on 2 ranks."""
    folder = tmp_path_factory.mktemp("chaos")
    write_workload(folder, STEPS)
    finish(start(folder, "reference", 2))
    return folder


def start(folder: Path, name: str, world_size: int, *overrides: str) -> ForkedLaunch:
    arguments = [str(folder / "config.py"), f"run.name={name}", *overrides]
    return ForkedLaunch(arguments, world_size, folder / f"{name}.out")


def finish(launch: ForkedLaunch) -> str:
    """Wait for a launch that ends well; return what it printed."""
    end = time.monotonic() + 300
    try:
        while launch.exit_code() is None and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        code = launch.exit_code()
        launch.kill_all()
    assert code == 0, launch.text()[-3000:]
    return launch.text()


@pytest.mark.parametrize("in_background", [False, True])
def test_three_kills_change_no_bit_and_no_row(folder, in_background) -> None:
    lines = []
    overrides = [f"run.async_save={in_background}"]
    # Each run has its own folder: both are called run-1.
    runs = folder / f"background-{in_background}"
    runs.mkdir()
    shutil.copytree(folder / "runs" / "reference", runs / "reference")

    def launch(name: str) -> ForkedLaunch:
        return start(folder, name, 2, f"run.directory={runs}", *overrides)

    campaign = Campaign(launch, runs, "reference", seed=int(in_background), say=lines.append)
    campaign.run(3)
    assert campaign.problems == []
    assert len(campaign.kills) == 3
    assert {kill.victim for kill in campaign.kills} <= {"rank 0", "rank 1", "all"}
    assert [line for line in lines if line.endswith("same weights and rows as reference")], lines


def test_1_2_4_2_ranks_with_a_stop_between_them_end_with_the_weights_of_2(folder) -> None:
    for world_size, until in ((1, 6), (2, 12), (4, 18)):
        launch = start(folder, "moved", world_size)
        metrics = folder / "runs" / "moved" / "metrics.jsonl"
        try:
            while last_step(metrics) < until and launch.exit_code() is None:
                time.sleep(0.005)
            launch.signal_all(signal.SIGTERM)  # as torchrun forwards it
        finally:
            text = finish(launch)
        stopped = next(line for line in text.splitlines() if line.startswith("SIGTERM: stopped after step"))
        assert until <= int(stopped.split("step ")[1].split("/")[0]) < until + 6, stopped
    assert "exported" in finish(start(folder, "moved", 2))
    assert largest_difference(folder / "runs" / "moved", folder / "runs" / "reference") < 1e-5
    losses = {row["step"] for row in read_rows(folder / "runs" / "moved") if "train/loss" in row}
    assert losses == set(range(1, STEPS + 1))


def test_a_difference_is_found(folder) -> None:
    """The comparison itself: a changed weight, a row twice, a row that is missing, another value."""
    reference = folder / "runs" / "reference"
    assert differences(reference, reference) == []
    other = folder / "runs" / "other"
    shutil.copytree(reference, other)
    file = next((other / "export").glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[3] += 1e-3
    save_file(tensors, file)
    lines = (other / "metrics.jsonl").read_text().splitlines()
    train = [i for i, line in enumerate(lines) if "train/loss" in line]
    changed = json.loads(lines[train[2]])
    changed["train/loss"] += 1e-6
    lines[train[2]] = json.dumps(changed)
    lines[train[4]] = lines[train[5]]
    (other / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = differences(other, reference)
    assert any(f"export/: {name} differs by 0.001" in problem for problem in found)
    assert "metrics.jsonl: step 6 has 2 rows of train" in found
    assert "metrics.jsonl: the row train of step 5 is missing" in found
    assert any(problem.startswith("metrics.jsonl: step 3: train/loss is ") for problem in found)
    assert any(problem.startswith("tensorboard: train/loss") for problem in found)
    del tensors[name]
    save_file(tensors, file)
    assert f"export/: {len(tensors)} tensors, expected {len(tensors) + 1}" in differences(other, reference)
    assert not torch.equal(load_file(file)[sorted(tensors)[0]], torch.zeros(1))


def test_the_script_with_torchrun(tmp_path) -> None:
    log = tmp_path / "chaos.log"
    done = run_python(
        "scripts/chaos.py", "--kills", 1, "--steps", 10, "--out", tmp_path / "out", "--log", log, fresh=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = log.read_text().splitlines()
    assert lines[0].startswith("1 kills, seed 0: 10 steps on 2 ranks, saved at once")
    assert lines[-1] == "every run ended with the weights and rows of the reference"
    assert sum(line.startswith("kill ") for line in lines) == 1
    again = run_python("scripts/chaos.py", "--out", tmp_path / "out")
    assert again.returncode == 2 and "exists; choose another name or remove it" in again.stderr
