"""Children of a sweep: codes, logs, shares of the cores, signals, and no orphans. The scripts here import nothing slow."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiment.launch import Ended, Interrupted, Job, run_jobs
from tests.processes import ROOT

# Says that it runs, then waits for a signal, writes its name and ends. FOLDER NAME
WAITS = """
import os, pathlib, signal, sys
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
def end(number, frame):
    with (folder / f"{name}.signals").open("a") as file:
        file.write(signal.Signals(number).name + " ")
    print("error: ended by a signal", flush=True)
    sys.exit(7)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)
(folder / f"{name}.cores").write_text(" ".join(map(str, sorted(os.sched_getaffinity(0)))))
print("waits", flush=True)
os.replace(folder / f"{name}.cores", folder / f"{name}.ready")
signal.sigtimedwait([], 60)
"""


@pytest.fixture
def script(tmp_path) -> str:
    path = tmp_path / "waits.py"
    path.write_text(WAITS)
    return str(path)


def is_ready(folder: Path, *names: str) -> bool:
    return all((folder / f"{name}.ready").exists() for name in names)


def test_an_exit_code_and_a_log_that_is_added_to(tmp_path) -> None:
    path, log = tmp_path / "ends.py", tmp_path / "logs" / "ends.log"
    path.write_text("import sys; print('said', *sys.argv[1:], file=sys.stderr); sys.exit(int(sys.argv[1]))")
    codes, waited = [], []

    def jobs():
        yield Job(str(path), ("0", "two words"), log)
        while not codes:  # the second job waits for the first to end
            waited.append(True)
            yield None
        yield Job(str(path), ("3", "two words"), log)

    run_jobs(jobs(), parallel=2, on_end=lambda ended: codes.append(ended.code))
    assert codes == [0, 3] and len(waited) == 1  # asked again when one has ended, not before
    lines = [line for line in log.read_text().splitlines() if line]
    assert lines == [f"$ {path} 0 two words", "said 0 two words", f"$ {path} 3 two words", "said 3 two words"]


def test_a_signal_reaches_all_children_once_and_nothing_is_started_after_it(
    script, tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.setattr("experiment.launch.SAME_SIGNAL", 1000.0)  # however slow this machine is
    jobs = [Job(script, (str(tmp_path), name), tmp_path / f"{name}.log") for name in "abc"]
    ended, sent = [], []

    def interrupt() -> None:
        if is_ready(tmp_path, "a", "b") and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    def end(child: Ended) -> None:
        ended.append(child)
        os.kill(os.getpid(), signal.SIGINT)  # the terminal and a launcher may both send it

    with pytest.raises(Interrupted) as interrupted:
        run_jobs(jobs, parallel=2, on_end=end, on_tick=interrupt)
    assert capfd.readouterr().err.count("SIGINT: ") == 1
    assert interrupted.value.exit_code == 130
    assert sorted((end.job.options[1], end.code, end.stopped) for end in ended) == [("a", 7, True), ("b", 7, True)]
    assert {end.last_words for end in ended} == {"ended by a signal"}
    assert [(tmp_path / f"{name}.signals").read_text() for name in "ab"] == ["SIGINT ", "SIGINT "]
    assert not is_ready(tmp_path, "c")
    cores = [(tmp_path / f"{name}.ready").read_text().split() for name in "ab"]
    mine = sorted(os.sched_getaffinity(0))
    assert (sorted(map(int, cores[0] + cores[1])) == mine) if len(mine) > 1 else cores[0] == cores[1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_here_ends_the_children_softly(script, tmp_path) -> None:
    def fail() -> None:
        if is_ready(tmp_path, "a", "b"):
            raise ValueError("a mistake")

    jobs = [Job(script, (str(tmp_path), name), tmp_path / "log") for name in "ab"]
    with pytest.raises(ValueError, match="a mistake"):
        run_jobs(jobs, parallel=2, on_tick=fail)
    assert [(tmp_path / f"{name}.signals").read_text() for name in "ab"] == ["SIGTERM ", "SIGTERM "]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells a child that its parent has died")
def test_children_of_a_killed_parent_get_sigterm(script, tmp_path) -> None:
    parent = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from experiment.launch import Job, run_jobs
folder = Path({str(tmp_path)!r})
def die():
    if (folder / "a.ready").exists():
        os.kill(os.getpid(), signal.SIGKILL)
run_jobs([Job({script!r}, (str(folder), "a"), folder / "log")], on_tick=die)
"""
    assert subprocess.run([sys.executable, "-c", parent], timeout=60).returncode == -signal.SIGKILL
    end = time.monotonic() + 30
    while not (tmp_path / "a.signals").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert (tmp_path / "a.signals").read_text() == "SIGTERM "
