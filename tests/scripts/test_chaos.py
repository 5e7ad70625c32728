"""scripts/chaos.py: one kill of a run, from a new interpreter to the comparison. test_survival.py has kills at chosen moments."""

import pytest

from tests.distributed.workload import write_workload
from tests.processes import run_python


@pytest.mark.slow
def test_one_kill(tmp_path) -> None:
    """With this seed: SIGKILL after the second save has begun, of three."""
    config = write_workload(tmp_path, 6)
    command = ("scripts/chaos.py", config, "ewc.documents=4", "--kills", 1, "--ranks", 1, "--seed", 1245)
    done = run_python(*command, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("kill   1 | chaos-1 | launcher | ") and lines[-1].endswith("; no difference"), lines
    assert len(list((tmp_path / "runs").glob("chaos-1.*.txt"))) == 2  # the launch that was killed, and the one after it
    again = run_python(*command)
    assert again.returncode == 2 and "chaos-0 exists; remove it, or choose another place" in again.stderr
