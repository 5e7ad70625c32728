"""scripts/chaos.py: one kill under the real torchrun. tests/distributed/test_survival.py has kills at chosen moments."""

import pytest

from tests.processes import run_python


@pytest.mark.slow
def test_one_kill_with_torchrun(tmp_path) -> None:
    out = tmp_path / "out"
    done = run_python("scripts/chaos.py", "--kills", 1, "--steps", 10, "--out", out, "run.keep_last=3", fresh=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("1 kills, seed 0: 10 steps on 2 ranks, run.keep_last=3 run.async_save=False")
    assert sum(line.startswith("kill ") for line in lines) == 1 and lines[-1].endswith("; no difference")
    again = run_python("scripts/chaos.py", "--out", out)
    assert again.returncode == 2 and "exists; choose another name or remove it" in again.stderr
