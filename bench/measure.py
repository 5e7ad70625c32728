"""One run of one arm: started as its own processes, watched until enough steps are done, then ended.

The end is a kill: what an arm would do after its last step (saving, exporting) is not compared.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Run:
    """What was seen of a run. rows: a dictionary a finished step, see bench.peer.StepLog."""

    rows: list[dict] = field(default_factory=list)
    first_step_seconds: float = float("nan")  # from the start of the process to its first finished step
    peak_rss_gib: float = 0.0  # most resident memory of all its processes together
    failed: str = ""  # why there are too few rows


def watch(
    command: list[str],
    environment: dict[str, str],
    rows_file: Path,
    read_row: Callable[[str], dict | None],
    enough: Callable[[list[dict]], bool],
    log_file: Path,
    timeout: float,
) -> Run:
    """Run `command` until `enough(rows)`, its own end, or `timeout` seconds; all it started is dead afterwards.

    Rows behind the one that was enough are dropped: how many a fast arm writes before it is seen is chance.
    """
    run, done, position = Run(), False, 0
    with log_file.open("wb") as output:
        start = time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
        try:
            while True:
                ended = process.poll() is not None  # before reading, so that its last row is not missed
                lines, position = _new_lines(rows_file, position)
                for row in map(read_row, lines):
                    if row is not None and not done:
                        run.rows.append(row)
                        done = enough(run.rows)
                if run.rows and run.first_step_seconds != run.first_step_seconds:
                    run.first_step_seconds = time.monotonic() - start
                run.peak_rss_gib = max(run.peak_rss_gib, sum(_tree(process.pid).values()) / 2**30)
                if done or ended or time.monotonic() - start > timeout:
                    break
                time.sleep(0.1)
        finally:
            kill_tree(process)
    if not done:
        why = f"exit code {process.returncode}" if ended else f"not finished after {timeout:.0f} s"
        run.failed = f"{why}, {len(run.rows)} steps; see {log_file}"
    return run


def kill_tree(process: subprocess.Popen) -> None:
    """End a process and everything below it. torchrun's workers sit in sessions of their own, so each is killed by itself."""
    for pid in _tree(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def _tree(pid: int) -> dict[int, int]:
    """`pid` and all processes below it, with their resident bytes."""
    resident, children = {}, {}
    for one, parent, size in _processes():
        resident[one] = size
        children.setdefault(parent, []).append(one)
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return {one: resident.get(one, 0) for one in found}


def _processes() -> list[tuple[int, int, int]]:
    """(pid, parent, resident bytes) of every process: from /proc, or from `ps` where there is none."""
    if not os.path.isdir("/proc/self"):
        lines = subprocess.run(["ps", "-axo", "pid=,ppid=,rss="], capture_output=True, text=True).stdout.splitlines()
        return [(int(p), int(parent), int(kib) * 1024) for p, parent, kib in map(str.split, lines)]
    page, found = os.sysconf("SC_PAGE_SIZE"), []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                values = file.read().rpartition(")")[2].split()  # the name before it may hold anything
        except OSError:  # it has just ended
            continue
        found.append((int(name), int(values[1]), int(values[21]) * page))
    return found


def _new_lines(path: Path, position: int) -> tuple[list[str], int]:
    """Whole lines after byte `position`, and where the next ones begin."""
    if not path.is_file():
        return [], position
    with path.open("rb") as file:
        file.seek(position)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    return whole.decode().splitlines(), position + len(whole)
