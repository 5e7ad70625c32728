"""Children of a sweep: logs, shares of the cores, signals, and no orphans. Their scripts import nothing slow."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common.errors import UserError
from scripts.sweep.runs import Training, run_trainings
from tests.processes import ROOT

# Writes FOLDER/NAME.ready, then waits for a signal, writes its name to FOLDER/NAME.signals and ends.
WAITS = """
import os, pathlib, signal, sys
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
signals = {signal.SIGINT, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # one that comes before the wait is kept for it
(folder / f"{name}.cores").write_text(" ".join(map(str, sorted(os.sched_getaffinity(0)))))
print("waits", flush=True)
os.replace(folder / f"{name}.cores", folder / f"{name}.ready")
received = signal.sigtimedwait(signals, 60)
with (folder / f"{name}.signals").open("a") as file:
    file.write(signal.Signals(received.si_signo).name + " ")
print("error: ended by a signal", flush=True)
sys.exit(7)
"""


@pytest.fixture
def script(tmp_path) -> str:
    path = tmp_path / "waits.py"
    path.write_text(WAITS)
    return str(path)


def is_ready(folder: Path, *names: str) -> bool:
    return all((folder / f"{name}.ready").exists() for name in names)


def waiting(script: str, folder: Path, *names: str) -> list[Training]:
    return [Training(name, (str(folder), name), folder / name, script=script) for name in names]


def when_ready(folder: Path, names: str, act) -> threading.Thread:
    """Start a thread that calls `act` when all scripts wait for a signal."""

    def wait() -> None:
        end = time.monotonic() + 60
        while not is_ready(folder, *names) and time.monotonic() < end:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_an_error_quotes_the_newest_start(tmp_path) -> None:
    path, log = tmp_path / "ends.py", tmp_path / "logs" / "ends.log"
    path.write_text("import sys; print('said', *sys.argv[1:], file=sys.stderr); sys.exit(3)")
    for words in ("two words", "others"):
        training = Training("ends", ("0", words), tmp_path / "none", script=str(path))
        with pytest.raises(UserError, match=f"ends failed: said 0 {words}; its log is"):
            run_trainings([training], tmp_path)
    lines = [line for line in log.read_text().splitlines() if line]
    assert lines == [f"$ {path} 0 two words", "said 0 two words", f"$ {path} 0 others", "said 0 others"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_all_children_save_and_end(script, tmp_path, capfd, number) -> None:
    listed = waiting(script, tmp_path, *"abc")
    sender = when_ready(tmp_path, "ab", lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        run_trainings(listed, tmp_path, parallel=2)
    sender.join()
    assert capfd.readouterr().out.count("the running scripts save and end") == 1
    assert [(tmp_path / f"{name}.signals").read_text() for name in "ab"] == ["SIGTERM ", "SIGTERM "]
    assert not is_ready(tmp_path, "c")
    cores = [(tmp_path / f"{name}.ready").read_text().split() for name in "ab"]
    mine = sorted(os.sched_getaffinity(0))
    assert (sorted(map(int, cores[0] + cores[1])) == mine) if len(mine) > 1 else cores[0] == cores[1]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells a child that its parent has died")
def test_children_of_a_killed_parent_get_sigterm(script, tmp_path) -> None:
    parent = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from scripts.sweep import runs
folder = Path({str(tmp_path)!r})
def die(seconds):
    if (folder / "a.ready").exists():
        os.kill(os.getpid(), signal.SIGKILL)
runs.time.sleep = die
runs.run_trainings([runs.Training("a", (str(folder), "a"), folder / "none", script={script!r})], folder)
"""
    assert subprocess.run([sys.executable, "-c", parent], timeout=60).returncode == -signal.SIGKILL
    end = time.monotonic() + 30
    while not (tmp_path / "a.signals").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert (tmp_path / "a.signals").read_text() == "SIGTERM "
