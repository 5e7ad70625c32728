"""Run one arm once: start its process, watch it until enough steps are done, then kill it.

The run is killed because what a trainer does after its last step (saving, exporting) is not compared.
"""

import math
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
    """The observations of one run."""

    rows: list[dict] = field(default_factory=list)  # one per finished step; keys as in bench.peer.StepLog
    first_step_seconds: float = math.nan  # from the start of the process to the end of its first step
    peak_rss_gib: float = 0.0  # maximum over time of the resident memory of all its processes together
    failed: str = ""  # why the run has too few rows; empty if it succeeded


def watch(
    command: list[str],
    environment: dict[str, str],
    rows_file: Path,
    read_row: Callable[[str], dict | None],
    is_done: Callable[[list[dict]], bool],
    log_file: Path,
    timeout: float,
) -> Run:
    """Run `command` until `is_done(rows)`, its own end, or `timeout` seconds; then kill all processes that it started.

    Rows after the one that made `is_done` true are dropped, because how many more a fast arm writes before it is killed
    depends on chance.
    """
    run, done, position = Run(), False, 0
    with log_file.open("wb") as output:
        start = time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
        try:
            while True:
                ended = process.poll() is not None  # checked before reading, so that the last row is not missed
                lines, position = _new_lines(rows_file, position)
                for row in map(read_row, lines):
                    if row is not None and not done:
                        run.rows.append(row)
                        done = is_done(run.rows)
                if run.rows and math.isnan(run.first_step_seconds):
                    run.first_step_seconds = time.monotonic() - start
                run.peak_rss_gib = max(run.peak_rss_gib, sum(_tree(process.pid).values()) / 2**30)
                if done or ended or time.monotonic() - start > timeout:
                    break
                time.sleep(0.1)
        finally:
            kill_tree(process)
    if not done:
        reason = f"exit code {process.returncode}" if ended else f"not finished after {timeout:.0f} s"
        run.failed = f"{reason}, {len(run.rows)} steps; see {log_file}"
    return run


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process and all its descendants, one by one: torchrun starts its workers in sessions of their own."""
    for pid in _tree(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def _tree(root: int) -> dict[int, int]:
    """Process id -> resident bytes, for the process `root` and all its descendants."""
    resident, children = {}, {}
    for pid, parent, size in _processes():
        resident[pid] = size
        children.setdefault(parent, []).append(pid)
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return {pid: resident.get(pid, 0) for pid in found}


def _processes() -> list[tuple[int, int, int]]:
    """(pid, parent pid, resident bytes) of every process, from /proc, or from `ps` on systems without it."""
    if not os.path.isdir("/proc/self"):
        lines = subprocess.run(["ps", "-axo", "pid=,ppid=,rss="], capture_output=True, text=True).stdout.splitlines()
        return [(int(p), int(parent), int(kib) * 1024) for p, parent, kib in map(str.split, lines)]
    page, found = os.sysconf("SC_PAGE_SIZE"), []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                values = file.read().rpartition(")")[2].split()  # the process name in parentheses may contain anything
        except OSError:  # the process has just ended
            continue
        found.append((int(name), int(values[1]), int(values[21]) * page))
    return found


def _new_lines(path: Path, position: int) -> tuple[list[str], int]:
    """The complete lines after byte `position`, and the position after them."""
    if not path.is_file():
        return [], position
    with path.open("rb") as file:
        file.seek(position)
        text = file.read()
    complete = text[: text.rfind(b"\n") + 1]
    return complete.decode().splitlines(), position + len(complete)
