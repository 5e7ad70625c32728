"""Kill a run at random moments until it has finished, again and again, and compare it with one that nobody killed."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from reliability.compare import differences
from reliability.launch import kill
from reliability.moments import Seen, await_moment, draw_moment, half_checkpoints, look

PATIENCE = 90.0  # seconds in which the other ranks must end after one was killed
LONGEST_LAUNCH = 600.0  # seconds
REFUSED = "belongs to a run that has not ended"


class Launch(Protocol):
    """Processes that train together: reliability/launch.py, or the forked ranks of a test."""

    launcher: int | None  # process id; None if the launcher cannot be killed

    def ranks(self) -> dict[int, int]: ...
    def exit_code(self) -> int | None: ...
    def text(self) -> str: ...
    def kill_all(self) -> None: ...


@dataclass(frozen=True)
class Kill:
    """One kill and what it hit."""

    victim: str  # rank 0 | rank 1 | launcher | all
    seen: Seen  # in the instant before
    left: tuple[str, ...]  # temporary names that were left behind: proof that a save was cut off
    ended_after: float  # seconds until every process had ended, those that were not killed by themselves

    def line(self, number: int, run: str) -> str:
        """One line of the log."""
        left = f"; left {', '.join(self.left)}" if self.left else ""
        return f"kill {number:3} | {run} | {self.victim:8} | {self.seen.line()}{left} | all ended after {self.ended_after:.1f} s"


class Campaign:
    """Kills runs of one config. `problems` is empty if every run ended as the reference did."""

    def __init__(
        self,
        launch: Callable[[str], Launch],
        runs: Path,
        reference: str,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        """`launch(name)` starts the run of that name in `runs`; `reference` is the name of the uninterrupted one."""
        self.launch, self.runs, self.reference, self.say = launch, runs, reference, say
        self.rng = random.Random(seed)
        self.kills: list[Kill] = []
        self.problems: list[str] = []
        self.launches = self.refusals = 0
        self.start_seconds = 10.0  # until a launch has trained; running mean
        self.save_seconds = 0.05  # from the temporary name to `latest`; running mean
        self.running: list[Launch] = []

    def run(self, kills: int) -> None:
        """Train run after run until `kills` kills were made and the last run has finished. Leaves no process behind."""
        number = 0
        try:
            while len(self.kills) < kills and not self.problems:
                number += 1
                name = f"run-{number}"
                before, begin = len(self.kills), time.monotonic()
                if not self._run_to_the_end(name, kills):
                    break
                found = differences(self.runs / name, self.runs / self.reference)
                self.problems += [f"{name}: {problem}" for problem in found]
                verdict = f"{len(found)} DIFFERENCES" if found else f"same weights and rows as {self.reference}"
                self.say(
                    f"{name} finished after {len(self.kills) - before} kills and {time.monotonic() - begin:.0f} s: {verdict}"
                )
        finally:
            for launch in self.running:
                launch.kill_all()

    def _run_to_the_end(self, name: str, kills: int) -> bool:
        """Launch `name`, with kills while some are left, until it ends well. False if it does not."""
        directory = self.runs / name
        while True:
            before = look(directory, Seen())
            launch = self._start(name)
            moment = draw_moment(self.rng, self.start_seconds, self.save_seconds) if len(self.kills) < kills else None
            seen = await_moment(directory, before, moment, launch.exit_code, LONGEST_LAUNCH)
            if seen.started_after:
                self.start_seconds += 0.2 * (seen.started_after - self.start_seconds)
            if seen.save_took:
                self.save_seconds += 0.2 * (seen.save_took - self.save_seconds)
            code = launch.exit_code()
            if code == 0:
                self.running.remove(launch)
                return True
            if code is not None or moment is None:
                tail = "\n".join(launch.text().splitlines()[-15:])
                return self._fail(launch, f"{name} ended with exit code {code} and nobody killed it:\n{tail}")
            if not self._strike(launch, name, seen):
                return False

    def _start(self, name: str) -> Launch:
        self.launches += 1
        launch = self.launch(name)
        self.running.append(launch)
        return launch

    def _strike(self, launch: Launch, name: str, seen: Seen) -> bool:
        """Kill somebody. False if the rest does not end, or leaves something half."""
        ranks = launch.ranks()
        victims = ["rank", "rank", "all", "launcher", "launcher"][: 5 if launch.launcher else 3]
        victim = self.rng.choice(victims if ranks else victims[2:])
        begin = time.monotonic()
        if victim == "rank":
            rank = self.rng.choice(sorted(ranks))
            victim = f"rank {rank}"
            kill(ranks[rank])
            has_ended = lambda: launch.exit_code() is not None  # noqa: E731
        elif victim == "launcher":
            assert launch.launcher
            kill(launch.launcher)
            # Half of the time somebody starts the run again at once.
            if ranks and self.rng.random() < 0.5 and not self._waits_or_is_refused(launch, name):
                return False
            has_ended = lambda: not launch.ranks()  # noqa: E731
        else:
            launch.kill_all()
            has_ended = lambda: True  # noqa: E731
        while not has_ended():
            if time.monotonic() - begin > PATIENCE:
                return self._fail(launch, f"{name}: {PATIENCE:.0f} s after the kill of {victim} the others still run")
            time.sleep(0.01)
        seconds = time.monotonic() - begin
        launch.kill_all()
        self.running.remove(launch)
        directory = self.runs / name / "checkpoints"
        left = tuple(sorted(path.name for path in directory.glob("*.tmp")))
        self.kills.append(Kill(victim, seen, left, seconds))
        self.say(self.kills[-1].line(len(self.kills), name))
        self.problems += [f"{name}: {problem}" for problem in half_checkpoints(directory)]
        return not self.problems

    def _waits_or_is_refused(self, orphans: Launch, name: str) -> bool:
        """Launch again beside the ranks of a killed launcher. False, with a problem, if it trains before they have ended."""
        second = self._start(name)
        while orphans.ranks():
            code = second.exit_code()
            if code == 0:  # the ranks had not joined yet and own nothing; the comparison finds two that write
                break
            if code is not None:  # while the ranks were there
                if REFUSED not in second.text():
                    problem = f"{name}: a launch beside ranks that still train ended with exit code {code} and was not refused"
                    return self._fail(second, f"{problem}:\n{second.text()[-2000:]}")
                self.refusals += 1
                break
            time.sleep(0.02)
        second.kill_all()
        self.running.remove(second)
        return True

    def _fail(self, launch: Launch, problem: str) -> bool:
        self.problems.append(problem)
        launch.kill_all()
        return False
