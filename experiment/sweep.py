"""A sweep: every run of a grid by train.py, one table by a validation metric. It never looks at a test.

OUT/sweep.json is the interface for others: `best.overrides` are the settings to train with, beside `fixed`.
"""

import fcntl
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.durable_files import write_durably, write_json
from common.errors import UserError
from experiment.cost import Plan, cost_lines, plan_runs
from experiment.grid import Grid, Run, options
from experiment.launch import Ended, Interrupted, Job, run_jobs
from experiment.metric import Metric, check_measured
from experiment.run_files import exported_step
from experiment.standing import Standing
from experiment.table import Point, best_point, notes, table

FILE = "sweep.json"
SAVE_EVERY, SAY_EVERY = 10.0, 60.0  # seconds
DIVERGED = "not finite"  # in the error of a run that stops for its weights (training/ending.py, train.py)
_TEST = re.compile(r"(^|[^a-z])tests?([^a-z]|$)")


class Sweep:
    """A grid, where its runs stand, and the training of what is left."""

    def __init__(
        self, grid: Grid, metric: Metric, processes: int = 1, parallel: int = 1, keeps_checkpoints: bool = True
    ) -> None:
        """Read what exists in the directory of the sweep. Raises UserError if it belongs to another one."""
        if min(processes, parallel) < 1:
            raise UserError("--processes and --parallel must be 1 or more")
        check_yardstick(grid, metric)
        self.grid, self.metric, self.processes, self.parallel = grid, metric, processes, parallel
        self.keeps_checkpoints, self.out, self.begin = keeps_checkpoints, Path(grid.out), time.monotonic()
        self._read()

    def _read(self) -> None:
        before = _read_file(self.out / FILE, self.grid)
        self.known_plans: dict[str, dict] = before.get("plans", {})
        self.wall_before: float = before.get("cost", {}).get("wall_seconds", 0.0)
        self.standing = Standing(self.grid, self.metric, before.get("records", {}))

    def plans(self) -> dict[str, Plan]:
        """The plan of every run; new ones are made with `train.py --dry-run`."""
        return plan_runs(self.grid, self.processes, self.parallel, self.known_plans)

    def cost(self, plans: dict[str, Plan]) -> list[str]:
        """What the sweep has cost and what is left, in words."""
        return cost_lines(plans, self.standing.spent(), self.parallel, self._wall())

    def _wall(self) -> float:
        """Seconds that all starts of the sweep have taken."""
        return self.wall_before + time.monotonic() - self.begin

    def run(self) -> None:
        """Train what is left. Raises Interrupted after a signal, when all runs have saved; UserError if a run fails."""
        with owned(self.out):
            self._read()  # now that no other sweep can change it
            plans = self.plans()
            self.write()
            print("\n".join(self.cost(plans)), flush=True)
            jobs = [self._job(run) for run in self.standing.left()]
            saved = said = time.monotonic()

            def tick() -> None:
                nonlocal saved, said
                now = time.monotonic()
                if now - saved > SAVE_EVERY:
                    saved = now
                    self.standing.count()
                    self.write()
                if now - said > SAY_EVERY:
                    said = now
                    self._say_where(plans)

            def end(ended: Ended) -> None:
                self._end(ended)
                if not ended.stopped:
                    self._say_where(plans)

            try:
                run_jobs(jobs, self.parallel, self._start, end, tick)
            finally:
                self.write()

    def _say_where(self, plans: dict[str, Plan]) -> None:
        running = self.standing.running()
        for line in [f"running: {', '.join(running)}"] * bool(running) + self.cost(plans):
            print(f"    {line}", flush=True)

    def _job(self, run: Run) -> Job:
        arguments = (self.grid.config_file, *options(run, self.grid))
        return Job("train.py", arguments, self.out / "logs" / f"{run.name}.log", self.processes)

    def _start(self, job: Job) -> None:
        name = job.log.stem
        continues = self.standing.results[name].state == "stopped"
        print(f"{name}: {'continues' if continues else 'starts'}, see {job.log}", flush=True)
        self.standing.start(name, self.processes)

    def _end(self, ended: Ended) -> None:
        name = ended.job.log.stem
        finished = ended.code == 0 and exported_step(self.out / name) is not None
        failed = not finished and not ended.stopped
        has_diverged = failed and DIVERGED in ended.last_words
        result = self.standing.end(name, ended.last_words if has_diverged else None)
        self.write()
        if failed and not has_diverged:
            raise UserError(
                f"{name} failed: {ended.last_words}; its log is {ended.job.log}; run the same command again to continue"
            )
        has_value = result.value is not None
        words = f"{self.metric.curve} {result.value:.4g} at step {result.step}" if has_value else result.state
        print(f"{name}: {words}", flush=True)
        if result.state == "finished" and not self.keeps_checkpoints:
            shutil.rmtree(self.out / name / "checkpoints", ignore_errors=True)

    def report(self) -> str:
        """The table and the notes, as Markdown."""
        ordered = self.standing.ordered()
        lines = "\n".join(f"- {line}" for line in notes(ordered, self.grid, self.metric))
        return "\n\n".join(filter(None, (table(ordered, self.grid, self.metric), lines)))

    def write(self) -> None:
        """Write sweep.json and sweep.md."""
        spent, ordered = self.standing.spent(), self.standing.ordered()
        best = best_point(ordered)
        content = {
            "config": self.grid.config_file,
            "fixed": self.grid.fixed,
            "axes": self.grid.axes,
            "seeds": self.grid.seeds,
            "metric": self.metric.curve,
            "lower_is_better": self.metric.lower_is_better,
            "is_complete": not self.standing.left(),
            "best": best and _point(best, self.out),
            "points": [_point(point, self.out) for point in ordered],
            "notes": notes(ordered, self.grid, self.metric),
            "cost": {
                "wall_seconds": self._wall(),
                "runs_finished": sum(cost.is_finished for cost in spent.values()),
                "steps": sum(cost.steps for cost in spent.values()),
                "tokens": sum(cost.tokens for cost in spent.values()),
                "process_hours": sum(cost.process_seconds for cost in spent.values()) / 3600,
            },
            "records": self.standing.records,
            "plans": self.known_plans,
        }
        write_json(self.out / FILE, content)
        write_durably(self.out / "sweep.md", self.report() + "\n")


def check_yardstick(grid: Grid, metric: Metric) -> None:
    """Raise UserError if the runs cannot be compared on validation data, or if they would read a test file."""
    check_measured(metric, grid.runs[0].config, grid.config_file)
    for run in grid.runs:
        for key in ("train", "validation"):
            for path in getattr(run.config.data, key):
                if _TEST.search(Path(path).name.lower()):
                    raise UserError(
                        f"data.{key} names {path}, a test file by its name: a sweep never reads the test, which is scored once "
                        "at the end; give other data, or rename the file"
                    )


@contextmanager
def owned(out: Path, what: str = "sweep") -> Iterator[None]:
    """Create the directory of a sweep, or of an experiment, and hold its lock. Raises UserError if another one has it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / "sweep.lock").open("a")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another {what} is running in {out}; wait for it, or choose another --out") from None
        except OSError:
            pass  # the file system has no locks; each run has its own (training/owner.py)
        yield


def interrupted_words(sweep: Sweep, error: Interrupted) -> str:
    """What a stopped sweep says: where it stands and how to continue."""
    states = [result.state for result in sweep.standing.results.values()]
    done = states.count("finished") + states.count("diverged")
    return (
        f"{error}: {done} of {len(states)} runs are done, {states.count('stopped')} stopped on the way; run the same command "
        "again to continue"
    )


def _point(point: Point, out: Path) -> dict:
    return {
        "overrides": list(point.overrides),
        "is_complete": point.is_complete,
        "mean": point.mean if point.values else None,
        "spread": point.spread,
        "runs": [vars(result) | {"directory": str(out / result.name)} for result in point.results],
    }


def _read_file(path: Path, grid: Grid) -> dict:
    """The sweep.json of an earlier start; empty if there is none. Raises UserError if it is of another sweep."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        axes = list(before["axes"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; remove it (finished runs are kept), or choose another --out") from None
    if set(axes) != set(grid.axes):
        raise UserError(
            f"{path.parent} is a sweep of {', '.join(axes) or 'seeds'}, not of {', '.join(grid.axes) or 'seeds'}; choose "
            "another --out"
        )
    return before
