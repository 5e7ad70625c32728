"""Kill a run again and again until it has finished, and compare it with a run that nobody killed.

A new form of kill is a function (launch, rng) in `FORMS`.
"""

import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from common.errors import UserError
from configs.load import load_config
from distributed.checkpoint_directory import latest_checkpoint
from scripts.chaos.compare import differences
from scripts.chaos.launch import Launch, kill, torchrun

PATIENCE = 90.0  # seconds in which the other processes must end after a kill


class Failed(Exception):
    """A run ended wrongly. The message says how."""


def kill_a_rank(launch: Launch, rng: random.Random) -> None:
    """Send SIGKILL to a random rank, or to all processes if no rank has started."""
    ranks = launch.ranks()
    if not ranks:
        return launch.kill_all()
    kill(ranks[rng.choice(sorted(ranks))])


# Name -> how it kills a running launch. After the kill the other processes must end by themselves.
FORMS: dict[str, Callable[[Launch, random.Random], None]] = {
    "a rank": kill_a_rank,
    "launcher": lambda launch, rng: kill(launch.process.pid),
    "all": lambda launch, rng: launch.kill_all(),
    "signal": lambda launch, rng: kill(launch.process.pid, signal.SIGTERM),
}


class Chaos:
    """The runs of a config under kills: chaos-0, which nobody kills, then chaos-1, chaos-2 and so on.

    arguments: the config file and settings `key=value`. ranks: the number of ranks of each run. rng: chooses the form and the
    moment of each kill. Methods raise Failed.
    """

    def __init__(self, arguments: Sequence[str], ranks: int, rng: random.Random) -> None:
        """Raise UserError if the config cannot be read, or if its directory already has such runs."""
        self.arguments, self.ranks, self.rng, self.launches = arguments, ranks, rng, 0
        self.directory = Path(load_config(arguments[0], arguments[1:]).run.directory).resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.longest = 0.0  # seconds that chaos-0 took
        if earlier := sorted(self.directory.glob("chaos-*")):
            raise UserError(f"{earlier[0]} exists; remove it, or choose another place with run.directory=DIR")

    def run(self, kills: int) -> None:
        """Start run after run until all kills are used, and print a line per kill. Each run must end like chaos-0."""
        begin, done, number = time.monotonic(), 0, 0
        self.finish("chaos-0")
        self.longest = time.monotonic() - begin
        while done < kills:
            number += 1
            name = f"chaos-{number}"
            while done < kills and (line := self.kill_once(name)):
                done += 1
                print(f"kill {done:3} | {name} | {line}", flush=True)
            self.finish(name)
            if problems := differences(self.directory / name, self.directory / "chaos-0"):
                raise Failed(f"{name} differs from chaos-0, which nobody killed:\n" + "\n".join(problems))
            print(f"{name} finished: same weights and rows as chaos-0, which nobody killed", flush=True)
        minutes = (time.monotonic() - begin) / 60
        print(f"{done} kills in {minutes:.1f} min and {self.launches} launches; no difference")

    def start(self, name: str) -> Launch:
        """Start or resume the run of this name."""
        self.launches += 1
        overrides = [*self.arguments[1:], f"run.name={name}", f"run.directory={self.directory}"]
        output = self.directory / f"{name}.{self.launches}.txt"
        return Launch(torchrun(self.ranks, self.arguments[0], *overrides), output)

    def finish(self, name: str) -> None:
        """Start or resume a run, and wait until it has ended well."""
        with self.start(name) as launch:
            check_code(name, launch, launch.process.wait())

    def kill_once(self, name: str) -> str | None:
        """Start or resume a run and kill it. Return a line about the kill, or None if the run ended well before it."""
        checkpoints = self.directory / name / "checkpoints"
        with self.start(name) as launch:
            self._await_moment(checkpoints, launch)
            code = launch.wait(0)
            if code is not None:
                check_code(name, launch, code)
                return None
            saves = [path.name for path in checkpoints.glob("step-*.tmp")]
            form = self.rng.choice(list(FORMS))
            FORMS[form](launch, self.rng)
            begin = time.monotonic()
            while launch.wait(0.01) is None or launch.ranks():
                if time.monotonic() - begin > PATIENCE:
                    raise Failed(f"{name}: {PATIENCE:.0f} s after the kill ({form}) the other processes still run")
        newest = latest_checkpoint(checkpoints)
        moment = f"while saving {saves[0]}" if saves else "not in a save"
        return f"{form:8} | {moment:28} | newest {newest.name if newest else 'none'}"

    def _await_moment(self, checkpoints: Path, launch: Launch) -> None:
        """Wait for a random moment of the run or, half of the time, for one of its next saves. End early if the run does."""
        if self.rng.random() < 0.5:
            launch.wait(self.rng.uniform(0, self.longest))
            return
        started, number, seen = time.time_ns(), self.rng.randint(1, 5), set()
        while len(seen) < number and launch.process.poll() is None:
            for path in checkpoints.glob("step-*.tmp"):
                with suppress(OSError):  # it was renamed meanwhile
                    seen |= {path.name} if path.stat().st_ctime_ns > started else set()
            time.sleep(0.001)
        launch.wait(self.rng.uniform(0, 0.06))  # the time that a save of a tiny model takes


def check_code(name: str, launch: Launch, code: int) -> None:
    """Raise Failed if a run that nobody killed ended with an error."""
    if code:
        last_lines = "\n".join(launch.text().splitlines()[-15:])
        raise Failed(f"{name} ended with exit code {code}, and nobody killed it:\n{last_lines}")
