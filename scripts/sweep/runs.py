"""Run the trainings of a sweep as child processes, several at once. A finished training is not run again.

The sweep can be interrupted anywhere: its children save a checkpoint and end, and the next start resumes them.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.child_process import environment_of_no_rank, last_words, start_child, tied_to_parent, under_torchrun
from common.durable_files import write_durably
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.1  # seconds between two looks at the children
DIVERGED = "not finite"  # in the error of a train.py that stops because of a non-finite loss


@dataclass(frozen=True)
class Training:
    """One run of train.py in its own directory. options: of the command line, without the script."""

    name: str
    options: tuple[str, ...]
    directory: Path
    processes: int = 1
    keeps_checkpoints: bool = True
    script: str = "train.py"

    @property
    def output(self) -> Path:
        """The file that exists once the run has finished."""
        return self.directory / "export" / "export.json"

    @property
    def diverged(self) -> Path:
        """The file that says why the run diverged. A diverged run is a result, and is not run again."""
        return self.directory / "diverged.txt"

    @property
    def is_done(self) -> bool:
        """Whether the run has finished or diverged."""
        return self.output.is_file() or self.diverged.is_file()


@dataclass(frozen=True)
class _Child:
    training: Training
    log: Path
    process: subprocess.Popen


def run_trainings(
    trainings: Sequence[Training],
    out: Path,
    parallel: int = 1,
    on_change: Callable[[], object] = lambda: None,
) -> None:
    """Run all trainings that are not done, in order, `parallel` at once, each on its share of the cores and GPUs.

    `on_change` is called at the start and after each training. On Ctrl-C and SIGTERM the running trainings save and end before
    this process does; a second signal ends them at once. If a training fails, raise UserError as soon as the others have ended.
    """
    running: dict[int, _Child] = {}  # by slot, which decides the share of the machine
    failures: list[UserError] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with owned(out):
        on_change()
        try:
            while True:
                while len(running) < parallel and not failures:
                    taken = [child.training for child in running.values()]
                    training = next((each for each in trainings if not each.is_done and each not in taken), None)
                    if training is None:
                        break
                    done = sum(each.is_done for each in trainings)
                    print(f"{done} of {len(trainings)} done | {training.name}", flush=True)
                    slot = min(set(range(parallel)) - running.keys())
                    log = out / "logs" / f"{training.name}.log"
                    process = start(training.script, training.options, log, training.processes, slot, parallel)
                    running[slot] = _Child(training, log, process)
                if not running:
                    break
                for slot in _await_ended(running):
                    failures += _end(running.pop(slot))
                    on_change()
        except BaseException:  # KeyboardInterrupt, too
            if running:
                print("the running scripts save and end; a second signal ends them at once", flush=True)
            for child in running.values():
                child.process.send_signal(signal.SIGTERM)
            while running:
                for slot in _await_ended(running):
                    _end(running.pop(slot))
            raise
        if failures:
            raise failures[0]


def _await_ended(running: dict[int, _Child]) -> list[int]:
    """Wait until a child has ended, and return the slots of all children that have."""
    while True:
        ended = [slot for slot, child in running.items() if child.process.poll() is not None]
        if ended:
            return ended
        time.sleep(POLL)


def _end(child: _Child) -> list[UserError]:
    """Record that a training has diverged, and remove checkpoints that nobody needs. Return its failure, if it is not done."""
    training = child.training
    problem = "" if training.is_done else _last_words_of(child)
    if DIVERGED in problem:
        training.directory.mkdir(parents=True, exist_ok=True)
        write_durably(training.diverged, problem + "\n")
        print(f"{training.name} diverged: {problem}", flush=True)
    if not training.is_done:
        return [UserError(f"{training.name} failed: {problem}; its log is {child.log}; start again to continue")]
    if not training.keeps_checkpoints:
        shutil.rmtree(training.directory / "checkpoints", ignore_errors=True)
    return []


def _last_words_of(child: _Child) -> str:
    """Return the last words of a child in its log, after the line of its start."""
    since_start = child.log.read_text(encoding="utf-8", errors="replace").rpartition("\n$ ")[2]
    return last_words(since_start.partition("\n")[2]) or f"exit code {child.process.poll()}"


# ---- A child, with its share of the machine ------------------------------------------------------------------------------


def start(script: str, options: Sequence[str], log: Path, processes: int, slot: int, parallel: int) -> subprocess.Popen:
    """Start a script of the project, with torchrun if it has several processes, and append its output to `log`.

    The child has a session of its own, so that Ctrl-C in a terminal does not reach it: `run_trainings` ends it. It is number
    `slot` of `parallel` children that share the cores and GPUs. Raise UserError if there are too few GPUs.
    """
    command = [*under_torchrun(processes), str(ROOT / script), *options]
    environment = environment_of_no_rank() | _gpus(slot, parallel, processes)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"\n$ {script} {' '.join(options)}\n".encode())
        file.flush()
        # If this process is killed, its children get SIGTERM: they save a checkpoint and end.
        return start_child(tied_to_parent(command, signal.SIGTERM, _cores(slot, parallel)), environment, file)


def _cores(slot: int, parallel: int) -> list[int] | None:
    """Return the cores of a child. train.py starts as many threads as it has cores."""
    if parallel == 1 or not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return cores[slot * len(cores) // parallel : (slot + 1) * len(cores) // parallel] or None


def _gpus(slot: int, parallel: int, processes: int) -> dict[str, str]:
    """Return the environment variable that gives a child its GPUs, or {} without GPUs."""
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


def list_trainings(trainings: Sequence[Training]) -> str:
    """Return a line for each training with its command."""
    return "\n".join(
        f"{'done ' if training.is_done else 'to do'} {training.name}: {training.script} {' '.join(training.options)}"
        for training in trainings
    )


@contextmanager
def owned(out: Path) -> Iterator[None]:
    """Create the directory of a sweep and hold its lock. Raise UserError if another process holds it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "sweep.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is running in {out}; wait for it, or choose another directory") from None
        except OSError:
            pass  # the file system has no locks; each run has its own (training/owner.py)
        yield
