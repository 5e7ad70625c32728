"""scripts/sweep.py on a tiny model: stopped and continued, it prints the same table as without an interruption."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import run_python
from tests.tiny import write_chat_file, write_tiny_model
from training.record import Record

pytestmark = pytest.mark.slow
SWEEP = Path(__file__).with_name("sweep_worker.py")
VALUES = ("optimizer.learning_rate=1e-2,1e30", "run.save_every=1", "--parallel", "2")
STEPS = 24  # enough to be stopped in the middle
PATIENCE = 300  # seconds; far more than needed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write a model, data with a test file beside them, and a config."""
    folder = tmp_path_factory.mktemp("sweep")
    write_tiny_model(folder / "model")
    for name, count in (("train", 16), ("validation", 6), ("test", 4)):
        write_chat_file(folder / f"{name}.jsonl", count, seed=count)
    os.utime(folder / "test.jsonl", (0, time.time()))  # reading the file would set its first time
    (folder / "config.py").write_text(f"""
from configs.config import *
config = Config(
    model=Model({str(folder / "model")!r}, compute_dtype="fp32"),
    data=Data(
        ({str(folder / "train.jsonl")!r},), ({str(folder / "validation.jsonl")!r},),
        sequence_length=256, cache={str(folder / "tokens")!r},
    ),
    batch=Batch(global_examples=4, micro_batch=2),
    optimizer=Optimizer(1e-2, epochs={STEPS // 4}),
    run=Run("tiny"),
)
""")
    return folder


def stop_in_the_middle(folder: Path, out: Path) -> str:
    """Start the sweep, send SIGINT when its first run has saved a step, and return the output."""
    run = out / "learning_rate-0.01_seed-0"

    def stop(pid: int, is_running: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while is_running() and time.monotonic() < end and not list(run.glob("checkpoints/step-*[0-9]")):
            time.sleep(0.005)
        os.kill(pid, signal.SIGINT)

    stopped = run_python(SWEEP, folder / "config.py", *VALUES, "--out", out, meanwhile=stop)
    text = stopped.stdout + stopped.stderr
    assert stopped.returncode == 130, text
    assert not (run / "export").exists(), text
    return text


def test_stopped_and_continued(folder) -> None:
    out = folder / "out"
    stopped = stop_in_the_middle(folder, out)
    assert "the running scripts save and end" in stopped
    # The second run may not have begun, may be running, or may have diverged.
    assert re.search("[01] of 2 runs are done; run the same command again to continue", stopped)
    before = json.loads((out / "sweep.json").read_text())
    assert before["best"] is None and not before["is_complete"]

    command = (SWEEP, folder / "config.py", *VALUES, "--out", out)
    continued = run_python(*command)
    assert continued.returncode == 0, continued.stdout + continued.stderr
    assert "learning_rate-1e+30_seed-0 diverged: " in stopped + continued.stdout
    written = json.loads((out / "sweep.json").read_text())
    assert written["is_complete"]
    assert [[run["state"] for run in point["runs"]] for point in written["points"]] == [["finished"], ["diverged"]]
    assert written["best"]["overrides"] == ["optimizer.learning_rate=1e-2"]
    # The run was stopped after a few steps, and its curve has every step once.
    run = out / "learning_rate-0.01_seed-0"
    starts = [entry.step for entry in Record(run).read() if entry.kind == "start"]
    assert len(starts) == 2 and 0 < starts[1] < STEPS
    # The same run without an interruption.
    overrides = ("optimizer.learning_rate=1e-2", "run.save_every=0", f"run.directory={folder}", "run.name=whole")
    whole = run_python("train.py", folder / "config.py", *overrides)
    assert whole.returncode == 0, whole.stderr
    record = json.loads((folder / "whole" / "export" / "export.json").read_text())
    assert written["best"]["mean"] == pytest.approx(record["validation_loss"], abs=1e-6)
    assert written["best"]["runs"][0]["step"] == record["step"] == STEPS
    # Both runs used the same tokenised files, and none read the test.
    assert len([path for path in (folder / "tokens").iterdir() if path.is_dir()]) == 2
    assert os.stat(folder / "test.jsonl").st_atime == 0
