"""All processes of a command are found and killed, also processes in a session of their own."""

import os
import select
import sys

from scripts.chaos.launch import Launch

PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True, env=os.environ | {"RANK": "5"})
print(child.pid, flush=True)
time.sleep(600)
"""


def test_all_processes_of_a_command_are_killed(tmp_path) -> None:
    with Launch([sys.executable, "-c", PARENT], tmp_path / "output.txt") as launch:
        while not launch.text().endswith("\n"):
            assert launch.wait(0.01) is None
        child = int(launch.text())
        assert launch.ranks() == {5: child}
        assert {pid for pid, _ in launch.processes()} == {launch.process.pid, child}
        ended = os.pidfd_open(child)  # readable once the process has ended
    assert list(launch.processes()) == [] and launch.wait(0) == -9
    assert select.select([ended], [], [], 60)[0] == [ended]
    os.close(ended)
