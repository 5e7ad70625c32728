"""A run directory has one owner: a second start is refused, and a killed owner is followed at once."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.errors import UserError
from tests.processes import run_python, run_ranks
from training.owner import own_directory

HERE = Path(__file__).parent


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_the_owner_writes_who_it_is_and_leaves_an_empty_file_also_after_an_error(tmp_path, ranks) -> None:
    run = tmp_path / "runs" / "a"
    for _ in range(2):  # several runs in one process
        with pytest.raises(ValueError, match="in the run"), own_directory(run, ranks):
            owner = json.loads((run / "run.lock").read_text())
            assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", owner["started"]) and owner["command"]
            raise ValueError("in the run")
        assert (run / "run.lock").read_text() == ""


@pytest.mark.slow
def test_a_second_start_is_refused_and_a_killed_owner_is_followed_while_its_child_lives(tmp_path, ranks) -> None:
    run, child_file = tmp_path / "run", tmp_path / "child"
    with ThreadPoolExecutor(1) as pool:
        holder = pool.submit(run_python, HERE / "lock_holder.py", run, child_file)
        while not child_file.exists():
            assert not holder.done(), holder.result()
            time.sleep(0.01)
        owner, before = json.loads((run / "run.lock").read_text()), tree(run)
        assert owner["pid"] != os.getpid()
        sentence = (
            f"{run} belongs to a run that has not ended: process {owner['pid']} on host {socket.gethostname()}, started "
            f"{owner['started']}; wait for it, stop it, or choose another run.name"
        )
        with pytest.raises(UserError, match=re.escape(sentence)), own_directory(run, ranks, wait_seconds=0.3):
            pass
        assert tree(run) == before
        os.kill(owner["pid"], signal.SIGKILL)
        with own_directory(run, ranks, wait_seconds=60):
            os.kill(int(child_file.read_text()), signal.SIGKILL)  # raises if the child is not alive
            assert json.loads((run / "run.lock").read_text())["pid"] == os.getpid()
        assert holder.result().returncode == -signal.SIGKILL


@pytest.mark.slow
def test_both_ranks_are_refused_with_the_same_sentence_and_one_start_is_recorded(tmp_path, ranks) -> None:
    owned, file, free = tmp_path / "owned", tmp_path / "file", tmp_path / "free"
    file.write_text("")
    with own_directory(owned, ranks):
        before = tree(owned)
        done = run_ranks(2, HERE / "run_directory_worker.py", owned, file, free, tmp_path / "result")
        assert done.returncode == 0, done.stderr
        assert tree(owned) == before
    first, second = (json.loads((tmp_path / f"result.rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert f"process {os.getpid()} on host {socket.gethostname()}, started" in first["owned"]
    for name in ("log", "provenance", "owner"):
        assert re.search(rf"^{file}\S*: (File exists|Not a directory)", first[name]), first[name]
    (line,) = (free / "record.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["world_size"] == 2 and record["start_step"] == 3 and record["torchrun_restarts"] == 0
    (device,) = record["devices"]
    assert device["host"] == socket.gethostname() and device["ranks"] == [0, 1]
    assert json.loads((free / "config.json").read_text())["config"]["run"]["name"] == "r"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_file_locks_the_run_starts_and_the_user_is_told(tmp_path, ranks, monkeypatch, capsys, code) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with own_directory(tmp_path, ranks):
        assert f"warning: the file system of {tmp_path} has no file locks" in capsys.readouterr().out
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "run.lock").read_text() == ""
