"""Start train.py and the scripts as children, each with its share of the machine and a log, and pass signals on to them.

After SIGINT and SIGTERM train.py saves a checkpoint, and the scripts keep what is finished. The children have sessions of their
own, so that Ctrl-C in a terminal reaches them only through this process, once.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from common.child_process import tied_to_parent, under_torchrun
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SAME_SIGNAL = 2.0  # seconds; signals within them are one, as in train.py
# What a launcher sets for its ranks. A child is no rank of the launcher of this process.
_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


def start(
    script: str, options: Sequence[str], log: Path, processes: int = 1, slot: int = 0, parallel: int = 1
) -> subprocess.Popen:
    """Start a script of the project, with torchrun if it has several processes. Its output is added to `log`.

    It is the one with the number `slot` of `parallel` children that share the cores and GPUs. Raises UserError if there are
    too few GPUs.
    """
    command = [*under_torchrun(processes), str(ROOT / script), *options]
    environment = {key: value for key, value in os.environ.items() if key not in _OF_A_LAUNCHER}
    environment = {key: value for key, value in environment.items() if not key.startswith("TORCHELASTIC_")}
    environment |= _gpus(slot, parallel, processes)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"\n$ {script} {' '.join(options)}\n".encode())
        file.flush()
        return subprocess.Popen(
            # If this process is killed, its children save a checkpoint and end.
            tied_to_parent(command, signal.SIGTERM, _cores(slot, parallel)),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def last_words(log: Path, code: int) -> str:
    """The last `error:` line of the newest start in a log, else its last line, else the exit code."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line for line in text.rpartition("\n$ ")[2].splitlines()[1:] if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit code {code}"])[-1]


def _cores(slot: int, parallel: int) -> list[int] | None:
    """The cores of one of `parallel` children: train.py starts as many threads as it has cores."""
    if parallel == 1 or not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return cores[slot * len(cores) // parallel : (slot + 1) * len(cores) // parallel] or None


def _gpus(slot: int, parallel: int, processes: int) -> dict[str, str]:
    """The environment variable that gives one of `parallel` children its GPUs; empty without GPUs."""
    if parallel == 1:
        return {}
    import torch  # slow to import

    count = torch.cuda.device_count()
    if not count:
        return {}
    if count < parallel * processes:
        raise UserError(f"{parallel} x {processes} processes at once need as many GPUs, and there are {count}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[slot * processes : (slot + 1) * processes])}


class Interrupted(KeyboardInterrupt):
    """This process has received a signal, and every child has ended. exit_code: 128 + the signal's number, as a shell has it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Signals:
    """`with Signals() as signals:` remembers SIGINT and SIGTERM, which `pass_on` sends to the children. first: the number of the first."""

    def __enter__(self) -> "Signals":
        self.first: int | None = None
        self._pending, self._passed_on, self._last = 0, 0, 0.0
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is None or now - self._last >= SAME_SIGNAL:  # a terminal and a launcher may both send it
            self.first, self._pending, self._last = self.first or number, number, now

    def pass_on(self, children: Iterable[subprocess.Popen]) -> None:
        """Send what has arrived since the last call: the first and the second signal as they are, a third as SIGKILL."""
        number, self._pending = self._pending, 0
        if not number:
            return
        self._passed_on += 1
        words = {1: "the running scripts save and end; a second signal ends them at once", 2: "ending them at once"}
        print(
            f"{signal.Signals(number).name}: {words.get(self._passed_on, 'killing them')}", file=sys.stderr, flush=True
        )
        for child in children:
            with suppress(ProcessLookupError, PermissionError):
                if self._passed_on < 3:
                    child.send_signal(number)
                else:
                    os.killpg(child.pid, signal.SIGKILL)
