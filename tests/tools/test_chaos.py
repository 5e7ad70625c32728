"""scripts/chaos.py: one kill under the real torchrun, of one rank. tests/distributed/test_survival.py has kills at chosen moments."""

import pytest

from tests.distributed.workload import write_workload
from tests.processes import run_python


@pytest.mark.slow
def test_one_kill_with_torchrun(tmp_path) -> None:
    config = write_workload(tmp_path, 10)
    command = ("scripts/chaos.py", config, "run.keep_last=3", "--kills", 1, "--ranks", 1)
    done = run_python(*command, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("kill   1 | chaos-1 | ") and lines[-1].endswith("; no difference")
    assert len(list((tmp_path / "runs").glob("chaos-1.*.txt"))) == 2  # the launch that was killed, and the one after it
    again = run_python(*command)
    assert again.returncode == 2 and "chaos-0 exists; remove it, or choose another place" in again.stderr
