"""An experiment is a list of commands. Each names the file that exists when it is done, and what is done is not run again.

An experiment's own file makes the list (experiment/pareto.py); this one runs what is left of it, so that it can be interrupted
anywhere, and says how long that takes.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.durable_files import append_json_line
from common.errors import UserError
from experiment.cost import duration
from experiment.launch import Ended, Job, run_jobs
from experiment.sweep import owned

TIMES = "times.jsonl"


@dataclass(frozen=True)
class Command:
    """A script of the project with its options.

    output: the file that exists when it is done. needs: files of other commands that it reads. frees: directories and files that
    nobody needs once it is done. Commands of one kind take about as long.
    """

    name: str
    kind: str
    script: str
    options: tuple[str, ...]
    output: Path
    needs: tuple[Path, ...] = ()
    frees: tuple[Path, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether its output is there."""
        return self.output.is_file()


def run_commands(list_them: Callable[[], Sequence[Command]], out: Path, parallel: int = 1) -> None:
    """Run what is left in the order of the list, `parallel` at once, each with one process on its share of the machine.

    A command that needs a file waits for the command that writes it. The list is made again and again, because a choice, such
    as that of a learning rate, may lengthen it. Raises Interrupted after a signal, when the running
    commands have saved, and UserError if one of them fails, when the others have ended.
    """
    with owned(out, "experiment"):
        while True:
            commands = list_them()
            left = [command for command in commands if not command.is_done]
            if not left:
                return
            ready = [command for command in left if all(path.exists() for path in command.needs)]
            if not ready:
                raise UserError(f"{left[0].name} needs {_missing(left[0])}, which no command writes")
            print(
                f"{len(commands) - len(left)} of {len(commands)} done | {left_in_words(commands, out, parallel)}",
                flush=True,
            )
            _run(ready[:parallel], out, parallel)


def _run(commands: Sequence[Command], out: Path, parallel: int) -> None:
    jobs = {
        Job(command.script, command.options, out / "logs" / f"{command.name.replace('/', '-')}.log"): command
        for command in commands
    }
    failures: list[UserError] = []

    def end(ended: Ended) -> None:
        command = jobs[ended.job]
        append_json_line(
            out / TIMES,
            {"name": command.name, "kind": command.kind, "seconds": ended.seconds, "done": command.is_done},
        )
        if command.is_done:
            for path in command.frees:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            print(f"{command.name}: {duration(ended.seconds)}", flush=True)
        elif not ended.stopped:
            failures.append(UserError(f"{command.name} failed: {ended.last_words}; its log is {ended.job.log}"))

    run_jobs(list(jobs), parallel, on_end=end)
    if failures:
        raise failures[0]


def left_in_words(commands: Sequence[Command], out: Path, parallel: int) -> str:
    """How long what is left takes, by the mean time of the commands of each kind that are done."""
    times: dict[str, list[float]] = {}
    if (out / TIMES).is_file():
        for line in (out / TIMES).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["done"]:
                times.setdefault(record["kind"], []).append(record["seconds"])
    left = [command for command in commands if not command.is_done]
    known = [sum(times[command.kind]) / len(times[command.kind]) for command in left if command.kind in times]
    unknown = len(left) - len(known)
    return f"left: about {duration(sum(known) / parallel)}" + (
        f", and {unknown} commands of kinds that have not run yet" if unknown else ""
    )


def list_commands(commands: Sequence[Command], out: Path, parallel: int) -> str:
    """One line for each command, and what is left."""
    lines = [f"{'done ' if command.is_done else 'to do'} {command.name}" for command in commands]
    return "\n".join([*lines, left_in_words(commands, out, parallel)])


def _missing(command: Command) -> Path:
    return next(path for path in command.needs if not path.exists())
