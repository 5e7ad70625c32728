"""Stands in for experiment.commands.start: a script that has ended, in a process that need not import the libraries."""

from collections.abc import Sequence
from pathlib import Path

from tests.processes import run_python, run_ranks


class Ended:
    """What is used of subprocess.Popen, of a process that has ended."""

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code


def start_forked(script: str, options: Sequence[str], log: Path, processes: int = 1, *share: int) -> Ended:
    """Run a script to its end, and write its output to its log."""
    done = run_python(script, *options) if processes == 1 else run_ranks(processes, script, *options)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"\n$ {script}\n{done.stdout}{done.stderr}", encoding="utf-8")
    return Ended(done.returncode)
