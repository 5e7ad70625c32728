"""Start train.py and the scripts as children: some at the same time, each with its share of the machine and a log.

SIGINT and SIGTERM are passed on to the children, which save a checkpoint and end (train.py) or keep what is finished (the
scripts). The children have sessions of their own, so that Ctrl-C in a terminal reaches them only through this process, once.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

from common.child_process import tied_to_parent
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
POLL = 0.1  # seconds between two looks at the children
SAME_SIGNAL = 2.0  # seconds; signals within them are one, as in train.py
# What a launcher sets for its ranks. A child is no rank of the launcher of this process.
_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


class Interrupted(KeyboardInterrupt):
    """This process has received a signal, and every child has ended. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell reports it."""
        return 128 + self.number


@dataclass(frozen=True)
class Job:
    """A script of the project, relative to its root, and its options. The output is added to the file `log`.

    processes: 1 starts it with plain python, more with torchrun.
    """

    script: str
    options: tuple[str, ...]
    log: Path
    processes: int = 1


@dataclass(frozen=True)
class Ended:
    """How a job ended. stopped: after a signal; a script that saves and stops then may have any exit code."""

    job: Job
    code: int  # negative: the signal that killed it
    stopped: bool
    seconds: float

    @property
    def last_words(self) -> str:
        """The last `error:` line that the job printed since it was started, else its last line, else the exit code."""
        lines = last_output(self.job.log)
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or [f"exit code {self.code}"])[-1]


@dataclass
class _Child:
    job: Job
    process: subprocess.Popen
    started: float = field(default_factory=time.monotonic)


def run_jobs(
    jobs: Iterable[Job | None],
    parallel: int = 1,
    on_end: Callable[[Ended], None] = lambda ended: None,
    on_tick: Callable[[], None] = lambda: None,
) -> None:
    """Run jobs in their order, `parallel` at once, each on its share of the cores and GPUs. `on_tick` is called often.

    The next job is asked for when there is room for it; None says that it waits for a running one to end. After a signal no job
    is started, the running ones get the signal, and when they have ended Interrupted is raised. An exception in one of the
    functions, or from `jobs`, ends the others in the same way. Raises UserError if there are too few GPUs.
    """
    waiting, running, has_room = iter(jobs), dict[int, _Child](), True
    with _Signals() as signals:
        try:
            while True:
                while has_room and len(running) < parallel and not signals.first:
                    job = next(waiting, None)
                    has_room = job is not None  # else: not before one has ended
                    if job is not None:
                        slot = min(set(range(parallel)) - running.keys())
                        running[slot] = _start(job, slot, parallel)
                if not running:
                    break
                signals.pass_on(running.values())
                time.sleep(POLL)
                for slot, child in list(running.items()):
                    code = child.process.poll()
                    if code is not None:
                        del running[slot]
                        seconds, has_room = time.monotonic() - child.started, True
                        on_end(Ended(child.job, code, signals.first is not None, seconds))
                on_tick()
        finally:  # no-op, but after an exception
            if running:
                signals.remember(signal.SIGTERM)
            while running:
                signals.pass_on(running.values())
                time.sleep(POLL)
                running = {slot: child for slot, child in running.items() if child.process.poll() is None}
        if signals.first:
            raise Interrupted(signals.first)


def last_output(log: Path) -> list[str]:
    """The lines of the newest start in a log, without empty ones."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.rpartition("\n$ ")[2].splitlines()[1:] if line.strip()]


def _start(job: Job, slot: int, parallel: int) -> _Child:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={job.processes}"]
    command = [*(torchrun if job.processes > 1 else []), str(ROOT / job.script), *job.options]
    environment = {key: value for key, value in os.environ.items() if key not in _OF_A_LAUNCHER}
    environment = {key: value for key, value in environment.items() if not key.startswith("TORCHELASTIC_")}
    environment |= _gpus(slot, parallel, job.processes)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        log.write(f"\n$ {job.script} {' '.join(job.options)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            # If this process is killed, its children save a checkpoint and end.
            tied_to_parent(command, signal.SIGTERM, _cores(slot, parallel)),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _Child(job, process)


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


class _Signals:
    """`with _Signals() as signals:` remembers SIGINT and SIGTERM, which `pass_on` sends to the children."""

    def __init__(self) -> None:
        self.first: int | None = None
        self._count, self._passed_on, self._last = 0, 0, 0.0

    def __enter__(self) -> "_Signals":
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self.remember) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def remember(self, number: int, frame: FrameType | None = None) -> None:
        """Count a signal. Those that follow within SAME_SIGNAL are the same one."""
        now = time.monotonic()
        if self._count and now - self._last < SAME_SIGNAL:
            return
        self._count, self._last, self.first = self._count + 1, now, self.first or number

    def pass_on(self, children: Iterable[_Child]) -> None:
        """Send what has arrived since the last call: the first and the second signal as they are, a third as SIGKILL."""
        if self._count == self._passed_on or self.first is None:
            return
        self._passed_on = self._count
        name = signal.Signals(self.first).name
        words = {1: "the running scripts save and end; a second signal ends them at once", 2: "ending them at once"}
        print(f"{name}: {words.get(self._count, 'killing them')}", file=sys.stderr, flush=True)
        for child in children:
            with suppress(ProcessLookupError, PermissionError):
                if self._count < 3:
                    child.process.send_signal(self.first)
                else:
                    os.killpg(child.process.pid, signal.SIGKILL)
