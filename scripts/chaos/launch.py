"""All processes that one command started, for scripts that watch them, kill them and leave none behind. Linux only.

torchrun gives every rank a session of its own, and ranks outlive a launcher that is killed. Every process inherits a mark in
its environment, by which it is found in /proc.
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

ROOT = Path(__file__).resolve().parents[2]
MARK = "LAUNCHED_AS"


class Launch:
    """A command that runs in `directory` and writes its output to a file.

    Leaving the context kills all of its processes. Raises UserError on a system without /proc.
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
        """Return the output so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def processes(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield (process id, environment) of every living process of the command, the newest first."""
        mark = f"{MARK}={self.mark}".encode()
        for pid in sorted((int(name) for name in os.listdir("/proc") if name.isdigit()), reverse=True):
            with suppress(OSError):  # the process has ended, or belongs to another user
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if mark in variables:
                    parts = (part.decode(errors="replace").partition("=") for part in variables)
                    yield pid, {name: value for name, _, value in parts}

    def ranks(self) -> dict[int, int]:
        """Return rank -> process id. Children of a rank have its RANK too; the rank is the oldest, and overwrites them."""
        return {int(variables["RANK"]): pid for pid, variables in self.processes() if "RANK" in variables}

    def wait(self, seconds: float) -> int | None:
        """Wait at most `seconds`, and return the exit code, or None if the command still runs."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    def kill_all(self) -> None:
        """Send SIGKILL to all processes, again and again until none is left: one may have started another meanwhile."""
        while processes := list(self.processes()):
            for pid, _ in processes:
                kill(pid)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.1)
            time.sleep(0.01)
        self.process.wait()


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process, if it has not ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def torchrun(ranks: int, *arguments: object, script: str | Path = "train.py") -> list[object]:
    """Return the command that runs `script` on so many ranks of this machine. One rank needs no torchrun."""
    return [sys.executable, *under_torchrun(ranks), script, *arguments]
