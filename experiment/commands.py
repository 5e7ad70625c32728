"""An experiment is a list of commands. Each names the file that exists when it is done, and what is done is not run again.

Another file makes the list (experiment/pareto.py); this one runs what is left of it, so that it can be interrupted anywhere, and
says how long that takes. A training that was stopped or killed goes on from its last checkpoint when it is started again.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from common.child_process import environment_of_no_rank, last_words, start_child, tied_to_parent, under_torchrun
from common.durable_files import write_durably, write_json_lines
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
POLL = 0.1  # seconds between two looks at the children
TIMES = "times.jsonl"
DIVERGED = "not finite"  # in the error of a run that stops for its weights (train.py)


@dataclass(frozen=True)
class Command:
    """A script of the project with its options.

    output: the file that exists when it is done. needs: outputs of other commands, which it reads, or reads what is beside them.
    frees: directories and files that nobody needs once it is done. Commands of one kind take about as long. diverged: of a
    training whose failure is a result: the file that says why it diverged, which is done then. results: the small files that
    are to be kept (`keep`). A command without them that others need runs only as long as one of these is left.
    """

    name: str
    kind: str
    script: str
    options: tuple[str, ...]
    output: Path
    needs: tuple[Path, ...] = ()
    frees: tuple[Path, ...] = ()
    diverged: Path | None = None
    processes: int = 1
    results: tuple[Path, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether its output is there, or it has diverged."""
        return self.output.is_file() or (self.diverged is not None and self.diverged.is_file())


def left_of(commands: Sequence[Command]) -> list[Command]:
    """What has to run, in order: what is not done, but no training whose weights nobody needs any more."""
    for_others = {path for command in commands for path in command.needs}
    left = [c for c in commands if not c.is_done and (c.results or c.output not in for_others)]
    for command in left:  # grows
        left += [c for c in commands if c.output in command.needs and not c.is_done and c not in left]
    return [command for command in commands if command in left]


@dataclass(frozen=True)
class _Child:
    command: Command
    log: Path
    process: subprocess.Popen
    started: float


def run_commands(
    list_them: Callable[[], Sequence[Command]],
    out: Path,
    parallel: int = 1,
    until: datetime | None = None,
    on_change: Callable[[], object] = lambda: None,
) -> None:
    """Run what is left in the order of the list, `parallel` at once, each on its share of the machine.

    A command that needs a file waits for the command that writes it. The list is made again before each command, because a
    choice, such as that of a learning rate, may lengthen it. until: no command is started after this time. on_change is called at
    the start and after each command. On Ctrl-C and SIGTERM the running commands save and end before this process does; a second
    one does not wait for them, and ends them at once. Raises UserError if a command fails, when the others have ended.
    """
    running: dict[int, _Child] = {}
    failures: list[UserError] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with owned(out):
        on_change()
        try:
            while True:
                while len(running) < parallel and not failures:
                    command = _next(list_them(), [child.command for child in running.values()], out, parallel, until)
                    if command is None:
                        break
                    slot = min(set(range(parallel)) - running.keys())
                    log = out / "logs" / f"{command.name.replace('/', '-')}.log"
                    process = start(command.script, command.options, log, command.processes, slot, parallel)
                    running[slot] = _Child(command, log, process, time.monotonic())
                if not running:
                    break
                for slot in _ended(running):
                    failures += _end(running.pop(slot), out, parallel)
                    on_change()
        except BaseException:  # KeyboardInterrupt, too
            if running:
                print("the running scripts save and end; a second signal ends them at once", flush=True)
            for child in running.values():
                child.process.send_signal(signal.SIGTERM)
            while running:
                for slot in _ended(running):
                    _end(running.pop(slot), out, parallel)
            raise
        if failures:
            raise failures[0]


def _next(
    commands: Sequence[Command], running: Sequence[Command], out: Path, parallel: int, until: datetime | None
) -> Command | None:
    """The next command to start; None if nothing is left, or if all that is left waits for the running ones."""
    names, being_written = {command.name for command in running}, {command.output for command in running}
    all_left = left_of(commands)
    left = [command for command in all_left if command.name not in names]
    if left and until and datetime.now() >= until:
        print(f"it is past {until:%H:%M}: no other command is started; start again to continue", flush=True)
        return None
    ready = next((c for c in left if all(p.exists() and p not in being_written for p in c.needs)), None)
    if ready is None:
        if left and not running:
            missing = next(path for path in left[0].needs if not path.exists())
            raise UserError(f"{left[0].name} needs {missing}, which no command writes")
        return None
    done = len(commands) - len(all_left)
    print(f"{done} of {len(commands)} done | {left_in_words(commands, out, parallel)} | {ready.name}", flush=True)
    return ready


def _ended(running: dict[int, _Child]) -> list[int]:
    """Wait until a child has ended; the numbers of all that have."""
    while True:
        ended = [slot for slot, child in running.items() if child.process.poll() is not None]
        if ended:
            return ended
        time.sleep(POLL)


def _end(child: _Child, out: Path, parallel: int) -> list[UserError]:
    """Note how a command has ended; its failure, if its output is not there."""
    command, seconds = child.command, time.monotonic() - child.started
    said = "" if command.is_done else _said(child)
    if command.diverged and DIVERGED in said:
        command.diverged.parent.mkdir(parents=True, exist_ok=True)
        write_durably(command.diverged, said + "\n")
        print(f"{command.name} diverged: {said}", flush=True)
    row = {"name": command.name, "kind": command.kind, "options": command.options, "done": command.is_done}
    row |= {"seconds": round(seconds, 1), "parallel": parallel}
    write_json_lines(out / TIMES, [*read_times(out), row])
    if command.is_done:
        for path in command.frees:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        print(f"{command.name}: {duration(seconds)}", flush=True)
        return []
    return [UserError(f"{command.name} failed: {said}; its log is {child.log}; start again to continue")]


def _said(child: _Child) -> str:
    """Its last words, which follow the line of its start in the log."""
    of_start = child.log.read_text(encoding="utf-8", errors="replace").rpartition("\n$ ")[2]
    return last_words(of_start.partition("\n")[2]) or f"exit code {child.process.poll()}"


# ---- A child, with its share of the machine ------------------------------------------------------------------------------


def start(script: str, options: Sequence[str], log: Path, processes: int, slot: int, parallel: int) -> subprocess.Popen:
    """Start a script of the project, with torchrun if it has several processes. Its output is added to `log`.

    It has a session of its own, so that Ctrl-C in a terminal does not reach it: `run_commands` ends it. It is the one with the
    number `slot` of `parallel` children that share the cores and GPUs. Raises UserError if there are too few GPUs.
    """
    command = [*under_torchrun(processes), str(ROOT / script), *options]
    environment = environment_of_no_rank() | _gpus(slot, parallel, processes)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"\n$ {script} {' '.join(options)}\n".encode())
        file.flush()
        # If this process is killed, its children save a checkpoint and end.
        return start_child(tied_to_parent(command, signal.SIGTERM, _cores(slot, parallel)), environment, file)


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


# ---- What is done, and what is left --------------------------------------------------------------------------------------


def read_times(out: Path) -> list[dict]:
    """One row for each start of a command: name, kind, options, seconds, whether it was done then."""
    path = out / TIMES
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def check_options(commands: Sequence[Command], out: Path) -> None:
    """Raise UserError if what is done was done with other options, as texts, than those of the list."""
    before = {row["name"]: row.get("options") for row in read_times(out) if row["done"]}
    for command in commands:
        found = before.get(command.name)
        if command.is_done and found is not None and found != list(command.options):
            was, now = (
                sorted(set(one) - set(other)) for one, other in ((found, command.options), (command.options, found))
            )
            raise UserError(
                f"{command.name} was done with {' '.join(was) or 'fewer options'}, now it is {' '.join(now) or 'without them'}; "
                f"remove {command.output} to do it again, or choose another directory"
            )


def left_in_words(commands: Sequence[Command], out: Path, parallel: int) -> str:
    """How long what is left takes, by the mean time of the commands of each kind that are done."""
    times: dict[str, list[float]] = {}
    for row in read_times(out):
        if row["done"]:
            times.setdefault(row["kind"], []).append(row["seconds"])
    left = left_of(commands)
    known = [sum(times[command.kind]) / len(times[command.kind]) for command in left if command.kind in times]
    unknown = len(left) - len(known)
    parts = [f"about {duration(sum(known) / parallel)}"] if known or not unknown else []
    parts += [f"{unknown} commands of kinds that have not run yet"] if unknown else []
    return f"left: {', and '.join(parts)}"


def list_commands(commands: Sequence[Command], out: Path, parallel: int) -> str:
    """One line for each command, and what is left."""
    left = left_of(commands)
    lines = [
        f"{'to do' if command in left else 'done '} {command.name}: {command.script} {' '.join(command.options)}"
        for command in commands
    ]
    return "\n".join([*lines, left_in_words(commands, out, parallel)])


def parse_until(text: str) -> datetime:
    """HH:MM as the next time at which a clock shows it. Raises UserError."""
    now = datetime.now()
    try:
        found = datetime.combine(now.date(), datetime.strptime(text, "%H:%M").time())
    except ValueError:
        raise UserError(f"--until {text}: write the time as HH:MM, e.g. 07:30") from None
    return found if found > now else found + timedelta(days=1)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---- What is kept for another machine ------------------------------------------------------------------------------------


def keep(commands: Sequence[Command], out: Path, folder: Path) -> None:
    """Copy the results of what is done to `folder`. Weights are not kept: what is left and needs them makes them again."""
    for command in commands:
        for path in (*command.results, command.diverged) if command.is_done else ():
            if path and path.is_file():
                _copy(path, folder / path.relative_to(out))
    _join_times(out, folder)


def restore(folder: Path, out: Path) -> None:
    """Copy what `keep` has written to `folder` to `out`, where it is missing."""
    for path in folder.rglob("*") if folder.is_dir() else ():
        to = out / path.relative_to(folder)
        if path.is_file() and not to.is_file():
            _copy(path, to)
    _join_times(folder, out)


def _copy(path: Path, to: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if not to.is_file() or to.read_text(encoding="utf-8") != text:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_durably(to, text)


def _join_times(*folders: Path) -> None:
    """Write the rows of the times of all folders to each of them."""
    rows = dict.fromkeys(json.dumps(row) for folder in folders for row in read_times(folder))
    for folder in folders if rows else ():
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / TIMES, "".join(f"{row}\n" for row in rows))


@contextmanager
def owned(out: Path) -> Iterator[None]:
    """Create the directory of a list of commands and hold its lock. Raises UserError if another process has it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "commands.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is running in {out}; wait for it, or choose another directory") from None
        except OSError:
            pass  # the file system has no locks; each run has its own (training/owner.py)
        yield


# ---- A grid that is tuned ------------------------------------------------------------------------------------------------


def tuned_grid(start: Sequence[float], score: Callable[[float], float | None], extensions: int) -> list[float]:
    """The values to try: `start`, and twice or half of the best one as long as that is the last one on its side.

    score: the higher, the better; None where it is not known yet, which ends the list. At most so many extensions on a side: then
    the best stays at the edge, and the table says so.
    """
    grid, left = list(start), {0: extensions, -1: extensions}
    while True:
        best = chosen_of(grid, score)
        side = 0 if best == grid[0] else -1
        if best is None or best != grid[side] or not left[side]:
            return grid
        left[side] -= 1
        grid.insert(0, best / 2) if side == 0 else grid.append(best * 2)


def chosen_of(grid: Sequence[float], score: Callable[[float], float | None]) -> float | None:
    """The value of the grid with the highest score, the smallest of equals; None before all are known."""
    known = {value: found for value in grid if (found := score(value)) is not None}
    return max(known, key=lambda value: known[value]) if len(known) == len(grid) else None
