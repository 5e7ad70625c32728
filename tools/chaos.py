"""Kill a run again and again until it has finished, and compare it with one that nobody killed. scripts/chaos.py is the command."""

import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from common.errors import UserError
from common.sha256 import sha256
from configs.load import load_config
from distributed.checkpoint_directory import latest_checkpoint
from eval.comparison.arms import metric_rows
from tools.launched import Launch, kill, torchrun

PATIENCE = 90.0  # seconds in which the other processes must end after one was killed
# Curves that measure this machine at this moment, and rows about a process: the row of a save that was cut off is rightly missing.
MEASURED = {"train/tokens_per_second", "train/mfu", "train/memory_gib"}
MEASURED |= {"start/total", "time/slowest_rank_seconds", "time/median_rank_seconds"}
OF_A_PROCESS = {"save", "start"}


class Failed(Exception):
    """A run did not end as it must; the message says how."""


class Chaos:
    """The runs chaos-0, which nobody kills, chaos-1, chaos-2 and so on of a config. Its methods raise Failed.

    what: a config and settings `key=value`. ranks: of a run. rng: decides victims and moments.
    """

    def __init__(self, what: Sequence[str], ranks: int, rng: random.Random) -> None:
        """Raises UserError if the config cannot be read, or its directory has such runs already."""
        self.what, self.ranks, self.rng, self.launches = what, ranks, rng, 0
        self.directory = Path(load_config(what[0], what[1:]).run.directory).resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.longest = 0.0  # seconds of the run that nobody kills
        if found := sorted(self.directory.glob("chaos-*")):
            raise UserError(f"{found[0]} exists; remove it, or choose another place with run.directory=DIR")

    def run(self, kills: int) -> None:
        """Start run after run until all kills are used. Each must end as chaos-0, which nobody kills. Prints a line per kill."""
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
            if found := differences(self.directory / name, self.directory / "chaos-0"):
                raise Failed(f"{name} differs from chaos-0, which nobody killed:\n" + "\n".join(found))
            print(f"{name} finished: same weights and rows as chaos-0, which nobody killed", flush=True)
        minutes = (time.monotonic() - begin) / 60
        print(f"{done} kills in {minutes:.1f} min and {self.launches} launches; no difference")

    def start(self, name: str) -> Launch:
        """Start or continue the run of this name."""
        self.launches += 1
        overrides = [*self.what[1:], f"run.name={name}", f"run.directory={self.directory}"]
        return Launch(torchrun(self.ranks, self.what[0], *overrides), self.directory / f"{name}.{self.launches}.txt")

    def finish(self, name: str) -> None:
        """Start or continue a run, and wait until it has ended well."""
        with self.start(name) as launch:
            check_code(name, launch, launch.process.wait())

    def kill_once(self, name: str) -> str | None:
        """Start or continue a run, and kill somebody. Returns a line about it; None if the run ended well before that."""
        checkpoints = self.directory / name / "checkpoints"
        with self.start(name) as launch:
            self._await_moment(checkpoints, launch)
            ranks, code = launch.ranks(), launch.wait(0)
            if code is not None:
                check_code(name, launch, code)
                return None
            saves = [path.name for path in checkpoints.glob("step-*.tmp")]
            victim = self.rng.choice(["all", "launcher", "signal", *(["a rank"] * 2 if ranks else [])])
            if victim == "a rank":
                kill(ranks[self.rng.choice(sorted(ranks))])
            elif victim == "all":
                launch.kill_all()
            else:
                kill(launch.process.pid, signal.SIGKILL if victim == "launcher" else signal.SIGTERM)
            begin = time.monotonic()
            while launch.wait(0.01) is None or launch.ranks():
                if time.monotonic() - begin > PATIENCE:
                    raise Failed(f"{name}: {PATIENCE:.0f} s after the kill ({victim}) the other processes still run")
        newest = latest_checkpoint(checkpoints)
        moment = f"while saving {saves[0]}" if saves else "not in a save"
        return f"{victim:8} | {moment:28} | newest {newest.name if newest else 'none'}"

    def _await_moment(self, checkpoints: Path, launch: Launch) -> None:
        """Wait for one of the next saves, half of the time, or for any moment of a run. Ends early if the run does."""
        if self.rng.random() < 0.5:
            launch.wait(self.rng.uniform(0, self.longest))
            return
        started, number, seen = time.time_ns(), self.rng.randint(1, 5), set()
        while len(seen) < number and launch.process.poll() is None:
            for path in checkpoints.glob("step-*.tmp"):
                with suppress(OSError):  # renamed meanwhile
                    seen |= {path.name} if path.stat().st_ctime_ns > started else set()
            time.sleep(0.001)
        launch.wait(self.rng.uniform(0, 0.06))  # a save of a tiny model takes so long


def check_code(name: str, launch: Launch, code: int) -> None:
    """Raise Failed if a run that nobody killed has not ended well."""
    if code:
        said = "\n".join(launch.text().splitlines()[-15:])
        raise Failed(f"{name} ended with exit code {code}, and nobody killed it:\n{said}")


def differences(run: Path, reference: Path) -> list[str]:
    """What differs between two finished runs, one line each: exported weights, to the bit, and every row of the curves."""
    found, expected = exported(run), exported(reference)
    if not found:
        return [f"{run} has exported nothing"]
    problems = [f"{name} differs" for name in sorted(found | expected) if found.get(name) != expected.get(name)]
    rows, lines = read_rows(run), (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    if len(lines) > len(metric_rows(run)):
        problems.append(f"metrics.jsonl: {len(lines) - len(metric_rows(run))} of {len(lines)} lines are no rows")
    problems += [
        f"metrics.jsonl: {key} is there twice" for key, count in Counter(key for key, _ in rows).items() if count > 1
    ]
    rows, wanted = dict(rows), dict(read_rows(reference))
    return problems + [
        f"metrics.jsonl: {key} is {rows.get(key)}, expected {wanted.get(key)}"
        for key in sorted(rows.keys() | wanted.keys())
        if rows.get(key) != wanted.get(key)
    ]


def exported(run: Path) -> dict[str, str]:
    """The SHA-256 of all exported weights of a run by the names of their files; with LoRA also of the adapter's."""
    files = [path for folder in ("export", "adapter") for path in run.glob(f"{folder}/*.safetensors")]
    return {str(path.relative_to(run)): sha256(path) for path in files}


def read_rows(run: Path) -> list[tuple[tuple[int, str], dict]]:
    """((step, first word of its curves), curves) of each row of metrics.jsonl, without what only this machine decides."""
    found = []
    for row in metric_rows(run):
        kind = next(name for name in row if name != "step").partition("/")[0]
        if kind not in OF_A_PROCESS:
            found.append(((row["step"], kind), {name: value for name, value in row.items() if name not in MEASURED}))
    return found
