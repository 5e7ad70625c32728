"""An experiment is a list of commands. Each names the file that exists when it is done, and what is done is not run again.

Another file makes the list (experiment/pareto.py); this one runs what is left of it, so that it can be interrupted anywhere, and
says how long that takes. A training that was stopped or killed goes on from its last checkpoint when it is started again.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from common.durable_files import write_durably, write_json_lines
from common.errors import UserError
from experiment.launch import Ended, Job, run_jobs

TIMES = "times.jsonl"
DIVERGED = "not finite"  # in the error of a run that stops for its weights (training/ending.py, train.py)


@dataclass(frozen=True)
class Command:
    """A script of the project with its options.

    output: the file that exists when it is done. needs: files of other commands that it reads. frees: directories and files that
    nobody needs once it is done. Commands of one kind take about as long. diverged: of a training whose failure is a result: the
    file that says why it diverged, which is done then.
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

    @property
    def is_done(self) -> bool:
        """Whether its output is there, or it has diverged."""
        return self.output.is_file() or (self.diverged is not None and self.diverged.is_file())


@dataclass
class _State:
    """What one start of `run_commands` knows: the commands that run now, and those that have failed."""

    running: dict[Job, Command] = field(default_factory=dict)
    failures: list[UserError] = field(default_factory=list)


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
    the start and after each command. Raises Interrupted after a signal, when the running commands have saved, and UserError if
    one of them fails, when the others have ended.
    """
    with owned(out):
        on_change()
        state = _State()

        def end(ended: Ended) -> None:
            _end(ended, out, parallel, state)
            on_change()

        run_jobs(_jobs(list_them, out, parallel, until, state), parallel, end)
        if state.failures:
            raise state.failures[0]


def _jobs(
    list_them: Callable[[], Sequence[Command]], out: Path, parallel: int, until: datetime | None, state: _State
) -> Iterator[Job | None]:
    """The next command to start, or None as long as all that are left wait for the running ones."""
    while not state.failures:
        commands = list_them()
        names = {command.name for command in state.running.values()}
        being_written = {command.output for command in state.running.values()}
        left = [command for command in commands if not command.is_done and command.name not in names]
        if not left and not names:
            return
        if until and datetime.now() >= until:
            print(f"it is past {until:%H:%M}: no other command is started; start again to continue", flush=True)
            return
        ready = next((c for c in left if all(p.exists() and p not in being_written for p in c.needs)), None)
        if ready is None:
            if not names:
                missing = next(path for path in left[0].needs if not path.exists())
                raise UserError(f"{left[0].name} needs {missing}, which no command writes")
            yield None
            continue
        done = sum(command.is_done for command in commands)
        print(f"{done} of {len(commands)} done | {left_in_words(commands, out, parallel)} | {ready.name}", flush=True)
        job = Job(ready.script, ready.options, out / "logs" / f"{ready.name.replace('/', '-')}.log", ready.processes)
        state.running[job] = ready
        yield job


def _end(ended: Ended, out: Path, parallel: int, state: _State) -> None:
    command = state.running.pop(ended.job)
    if command.diverged and not command.is_done and not ended.stopped and DIVERGED in ended.last_words:
        command.diverged.parent.mkdir(parents=True, exist_ok=True)
        write_durably(command.diverged, ended.last_words + "\n")
        print(f"{command.name} diverged: {ended.last_words}", flush=True)
    row = {"name": command.name, "kind": command.kind, "options": command.options, "done": command.is_done}
    row |= {"seconds": round(ended.seconds, 1), "parallel": parallel}
    write_json_lines(out / TIMES, [*read_times(out), row])
    if command.is_done:
        for path in command.frees:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        print(f"{command.name}: {duration(ended.seconds)}", flush=True)
    elif not ended.stopped:
        words = f"{command.name} failed: {ended.last_words}; its log is {ended.job.log}; start again to continue"
        state.failures.append(UserError(words))


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
    left = [command for command in commands if not command.is_done]
    known = [sum(times[command.kind]) / len(times[command.kind]) for command in left if command.kind in times]
    unknown = len(left) - len(known)
    parts = [f"about {duration(sum(known) / parallel)}"] if known or not unknown else []
    parts += [f"{unknown} commands of kinds that have not run yet"] if unknown else []
    return f"left: {', and '.join(parts)}"


def list_commands(commands: Sequence[Command], out: Path, parallel: int) -> str:
    """One line for each command, and what is left."""
    lines = [
        f"{'done ' if command.is_done else 'to do'} {command.name}: {command.script} {' '.join(command.options)}"
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


@contextmanager
def owned(out: Path) -> Iterator[None]:
    """Create the directory of a list of commands and hold its lock. Raises UserError if another process has it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / "commands.lock").open("a")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
    with file:
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
