"""Real runs of the user's own train.py: every rank starts one as its own child, and all ranks follow them together.

A child has the rank, the world size and the store of its parent's launcher (distributed/rendezvous.py: one launch can start
several groups), so that it is what torchrun would have started. It has a process group of its own to be killed by, and the
kernel kills it when its parent dies.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common.child_process import tied_to_parent
from distributed.process_group import Ranks, StopSignal, gather_objects, world_size_from_environment
from distributed.rank_names import host_name, minutes

ROOT = Path(__file__).resolve().parents[1]
POLL, POLL_CLOSELY = 0.2, 0.01  # seconds between two looks at the children
GRACE = 10.0  # seconds that the other children have to end, and to say why, after one has failed
SAY_EVERY = 15.0  # seconds


class Process(Protocol):
    """What is used of subprocess.Popen. `pid` is also the number of its process group."""

    pid: int

    def poll(self) -> int | None: ...


class Interrupted(Exception):
    """A rank has received a signal. Raised on all ranks. number: of the signal."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.number = signal.Signals[name]


@dataclass(frozen=True)
class Job:
    """`python COMMAND` on the first `world_size` ranks; 0: on rank 0, as if there were no launcher."""

    name: str
    command: tuple[str, ...]
    world_size: int
    limit: float  # seconds


@dataclass(frozen=True)
class Ended:
    """How a job ended, the same on every rank. problem: a sentence if a child failed, else None."""

    seconds: float
    killed: bool  # by `kill_when`
    problem: str | None


@dataclass(frozen=True)
class _State:
    """One rank's child at one look."""

    code: int | None = None  # exit code, negative: the signal
    runs: bool = False
    kill: bool = False
    signal: str | None = None  # that the parent has received


def run_job(
    job: Job,
    ranks: Ranks,
    stop: StopSignal,
    folder: Path,
    say: Callable[[str], None],
    kill_when: Callable[[], bool] | None = None,
) -> Ended:
    """Run a job to its end. A collective. When `kill_when()` is true on rank 0, all children get SIGKILL.

    Outputs go to `folder`. When a child fails, or after `job.limit` seconds, the others are killed. Raises Interrupted on
    all ranks after a signal to any of them. No child is left, whatever happens.
    """
    output = folder / f"{job.name}.rank{ranks.rank}" / "output"
    begin = time.monotonic()
    process = None
    try:
        if ranks.rank < max(1, job.world_size):
            output.parent.mkdir(parents=True, exist_ok=True)
            process = start_process(list(job.command), child_environment(job, output.parent), output)
        states, killed, late = _follow(job, process, ranks, stop, output, say, kill_when)
        problem = None
        if late or (not killed and any(state.code for state in states)):
            words = gather_objects((host_name(), last_words(output) if process else ""), ranks)
            problem = _problem(job, states, words, late)
        return Ended(time.monotonic() - begin, killed, problem)
    finally:
        if process:
            _kill(process)


def _follow(
    job: Job,
    process: Process | None,
    ranks: Ranks,
    stop: StopSignal,
    output: Path,
    say: Callable[[str], None],
    kill_when: Callable[[], bool] | None,
) -> tuple[list[_State], bool, bool]:
    """(states at the end or at the kill, whether `kill_when` ended it, whether the limit did). A collective."""
    begin = said = time.monotonic()
    failed_at = None
    while True:
        ranks.watch.tick()
        code = process.poll() if process else None
        kill = bool(kill_when and ranks.rank == 0 and kill_when())
        states = gather_objects(_State(code, process is not None and code is None, kill, stop.name), ranks)
        for state in states:
            if state.signal:
                raise Interrupted(state.signal)
        now = time.monotonic()
        # The clock of rank 0 decides for all: the last rank to be late or out of patience would look once more.
        late, gave_up = gather_objects((now - begin > job.limit, bool(failed_at and now - failed_at > GRACE)), ranks)[0]
        if any(state.kill for state in states):
            return states, True, False
        if late or gave_up or not any(state.runs for state in states):
            return states, False, late
        if failed_at is None and any(state.code for state in states):
            failed_at = now
        if now - said > SAY_EVERY:
            said = now
            say(f"    {now - begin:.0f} s: {_last_line(output)}")
        time.sleep(POLL_CLOSELY if kill_when else POLL)


def child_environment(job: Job, folder: Path) -> dict[str, str]:
    """The environment of this rank's child. `folder` is its own."""
    mine = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("TORCHELASTIC_", "TORCH_ELASTIC_", "PET_"))
    }
    # `python -m preflight...` works from any directory.
    mine["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    if job.command[:1] == ("-m",):  # else Python would look for modules in the user's directory first
        mine["PYTHONSAFEPATH"] = "1"
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
    if not job.world_size or "RANK" not in os.environ:
        return {key: value for key, value in mine.items() if key not in launchers}
    local_world = world_size_from_environment()[1]
    return mine | {
        "WORLD_SIZE": str(job.world_size),
        "LOCAL_WORLD_SIZE": str(min(local_world, job.world_size)),
        # The store of the launcher, or that of the parent of rank 0, which a child must not try to open itself.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        # Each child says for itself why it ends (common/errors.py).
        "TORCHELASTIC_ERROR_FILE": str(folder / "errors" / "error.json"),
    }


def start_process(command: list[str], environment: dict[str, str], output: Path) -> Process:
    """Start `python COMMAND` in a session of its own, with all output in one file."""
    with output.open("wb") as file:
        return subprocess.Popen(
            tied_to_parent(command),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _kill(process: Process) -> None:
    """SIGKILL to a child and all that it has started, and wait for the child for a moment."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    end = time.monotonic() + GRACE
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


def last_words(output: Path) -> str:
    """Why a process says that it ended: its `error:` line, else the exception of a traceback, else its last line."""
    lines = _lines(output)
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    for line in reversed(lines):
        if re.match(r"(\w+\.)*\w*(Error|Exception|Interrupt|Exit)\b", line):
            return line
    return lines[-1] if lines else ""


def _problem(job: Job, states: list[_State], words: list[tuple[str, str]], late: bool) -> str:
    """The sentence about the child that failed first of all, as far as exit codes tell."""
    failed = [rank for rank, state in enumerate(states) if state.code]
    if not failed:
        behind = [rank for rank, state in enumerate(states) if state.runs]
        where = words[behind[0]][1] if behind else ""
        return f"did not end within {minutes(job.limit)}; the last line of rank {behind[0] if behind else 0}: {where}"
    # 2: a mistake, in one sentence. 3: another rank was lost, which is what the others say. A signal: by the kernel.
    order = {2: 0, 1: 1, 3: 3}
    rank = min(failed, key=lambda rank: order.get(states[rank].code or 0, 2))
    code, (host, said) = states[rank].code or 0, words[rank]
    where = f"rank {rank} on host {host}: " if len(states) > 1 and code != 2 else ""
    if code < 0:
        name = signal.Signals(-code).name
        why = ", which the kernel sends when memory runs out" if -code == signal.SIGKILL else ""
        last = f"; its last line: {said}" if said else ""
        return f"{where}killed by {name}{why}{last}"
    return f"{where}{said or f'exit code {code}'}"


def _last_line(output: Path) -> str:
    lines = _lines(output)
    return lines[-1][:100] if lines else "starting"


def _lines(output: Path) -> list[str]:
    try:
        text = output.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]
