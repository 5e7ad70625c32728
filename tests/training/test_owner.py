"""A run directory has one owner: a second start is refused, and a killed owner is followed at once."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from common.durable_files import write_durably
from common.errors import UserError
from distributed.process_group import start_process_group
from tests.processes import new_process
from training.owner import own_directory


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_owner_names_itself_in_the_lock(tmp_path, ranks) -> None:
    run = tmp_path / "runs" / "a"
    for _ in range(2):  # several runs in one process
        with pytest.raises(ValueError, match="in the run"), own_directory(run, ranks):
            owner = json.loads((run / "run.lock").read_text())
            assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", owner["started"]) and owner["command"]
            raise ValueError("in the run")
        assert (run / "run.lock").read_text() == ""


def hold(run: Path, child_file: Path) -> None:
    """In a process of its own: own a directory and wait to be killed, with a forked child that outlives this process."""
    with own_directory(run, start_process_group()):
        if child := os.fork():
            write_durably(child_file, str(child))
        signal.pause()


@pytest.mark.slow
def test_second_start_is_refused_until_owner_dies(tmp_path, ranks) -> None:
    """That all ranks are refused with one sentence: distributed/test_durable_runs.py."""
    run, child_file = tmp_path / "run", tmp_path / "child"
    holder = new_process(hold, run, child_file)
    try:
        while not child_file.exists():
            assert holder.is_alive()
            time.sleep(0.01)
        owner, before = json.loads((run / "run.lock").read_text()), tree(run)
        assert owner["pid"] == holder.pid != os.getpid()
        sentence = (
            f"{run} belongs to a run that has not ended: process {owner['pid']} on host {socket.gethostname()}, started "
            f"{owner['started']}; wait for it, stop it, or choose another run.name"
        )
        with pytest.raises(UserError, match=re.escape(sentence)), own_directory(run, ranks, wait_seconds=0.3):
            pass
        assert tree(run) == before
    finally:
        holder.kill()
    with own_directory(run, ranks, wait_seconds=60):
        os.kill(int(child_file.read_text()), signal.SIGKILL)  # raises if the child is not alive
        assert json.loads((run / "run.lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_missing_file_locks_give_a_warning(tmp_path, ranks, monkeypatch, capsys, code) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with own_directory(tmp_path, ranks):
        assert f"warning: the file system of {tmp_path} has no file locks" in capsys.readouterr().out
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "run.lock").read_text() == ""
