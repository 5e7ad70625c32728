"""Start train.py under the real torchrun, find its ranks, and leave no process behind."""

import os
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_MARK = "RELIABILITY_LAUNCH"  # environment variable that names a launch; every process of it inherits the variable


class Torchrun:
    """One launch of `torchrun train.py ARGUMENTS`. Linux only: the ranks are found in /proc.

    The launcher and every rank have a session of their own, and ranks outlive a launcher that is killed. A mark in the
    environment finds all of them.
    """

    def __init__(self, arguments: list[str], world_size: int, output: Path) -> None:
        self.mark, self.output = uuid.uuid4().hex, output  # a file of its own: ranks may outlive their launcher
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        # One thread per rank: on matrices this small, threads only wait for each other.
        environment = os.environ | {_MARK: self.mark, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [*command, ROOT / "train.py", *arguments],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def launcher(self) -> int:
        """The process id of torchrun."""
        return self.process.pid

    def ranks(self) -> dict[int, int]:
        """Rank -> process id of the ranks that are alive."""
        # In descending order, so that a rank's own process and not a child of it gets the last word.
        return {rank: pid for pid, rank in sorted(self._processes().items(), reverse=True) if rank is not None}

    def has_ended(self) -> bool:
        """Whether the launcher has ended."""
        return self.process.poll() is not None

    def exit_code(self) -> int | None:
        """The launcher's exit code, or None while it runs."""
        return self.process.poll()

    def text(self) -> str:
        """What this launch has printed."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def kill_all(self) -> None:
        """SIGKILL to every process of this launch, and wait for the launcher."""
        while processes := self._processes():  # one may have started another meanwhile
            for pid in processes:
                kill(pid)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.1)
        self.process.wait()

    def _processes(self) -> dict[int, int | None]:
        """Process id -> rank, None if it is no rank, of every process of this launch that is not a zombie."""
        found = {}
        mark = f"{_MARK}={self.mark}".encode()
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            try:
                variables = Path("/proc", name, "environ").read_bytes().split(b"\0")
                command = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
            except OSError:  # ended, or another user's
                continue
            if mark in variables:
                rank = next((int(v[5:]) for v in variables if v.startswith(b"RANK=")), None)
                is_rank = (
                    any(part.endswith(b"train.py") for part in command) and b"torch.distributed.run" not in command
                )
                found[int(name)] = rank if is_rank else None
        return found


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal; nothing happens if the process has ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
