"""All processes that one command has started, for tools that watch them, kill them and leave none behind. Linux only.

torchrun gives every rank a session of its own, and ranks outlive a launcher that is killed. A mark in the environment, which
every process inherits, finds them all in /proc.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from common.child_process import start_child, under_torchrun
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
MARK = "LAUNCHED_AS"


class Launch:
    """A command that runs in `directory`. Its output goes to a file.

    Leaving the context kills whatever is left of it. Raises UserError where there is no /proc.
    """

    def __init__(
        self, command: Sequence[object], output: Path, directory: str | Path = ROOT, **environment: str
    ) -> None:
        if sys.platform != "linux":
            raise UserError("this tool finds the processes of a run in /proc, which only Linux has")
        self.mark, self.output = uuid.uuid4().hex, output
        with output.open("wb") as file:
            marked = os.environ | environment | {MARK: self.mark}
            self.process = start_child([str(part) for part in command], marked, file, directory)

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()

    def text(self) -> str:
        """What it has printed."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def processes(self) -> Iterator[tuple[int, dict[str, str]]]:
        """(process id, environment) of every process of it that is alive, the latest first."""
        mark = f"{MARK}={self.mark}".encode()
        for pid in sorted((int(name) for name in os.listdir("/proc") if name.isdigit()), reverse=True):
            with suppress(OSError):  # it has ended, or belongs to another user
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if mark in variables:
                    parts = (part.decode(errors="replace").partition("=") for part in variables)
                    yield pid, {name: value for name, _, value in parts}

    def ranks(self) -> dict[int, int]:
        """Rank -> process id. A rank's own process is older than those that it starts, so it is the last to be entered."""
        return {int(variables["RANK"]): pid for pid, variables in self.processes() if "RANK" in variables}

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None if it has not ended after so many seconds."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    def kill_all(self) -> None:
        """SIGKILL to all its processes, until there are none: one may have started another meanwhile."""
        while processes := list(self.processes()):
            for pid, _ in processes:
                kill(pid)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.1)
            time.sleep(0.01)
        self.process.wait()


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal; nothing happens if the process has ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def torchrun(ranks: int, *arguments: object, script: str | Path = "train.py") -> list[object]:
    """The command that trains on this machine: plain python for one rank."""
    return [sys.executable, *under_torchrun(ranks), script, *arguments]
