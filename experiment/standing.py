"""Where the runs of a sweep stand, and what they have cost.

A run's own directory says whether it has finished and with which value. sweep.json adds what it does not say: how long it
took, that it diverged, and the data of a run whose checkpoints are gone.
"""

import time
from pathlib import Path
from typing import Any

from common.errors import UserError
from experiment.cost import Spent
from experiment.grid import Grid, Run
from experiment.metric import Metric
from experiment.run_files import (
    check_settings,
    data_of,
    exported_step,
    final_value,
    is_finite,
    read_rows,
    trained,
    value_at,
)
from experiment.table import Point, Result, order

_NO_COST = {"seconds": 0.0, "process_seconds": 0.0}  # of all starts of a run


class Standing:
    """The results of all runs by name, and the records that sweep.json keeps of them."""

    def __init__(self, grid: Grid, metric: Metric, records: dict[str, dict[str, Any]]) -> None:
        """Read all runs. Raises UserError if one was started with other settings, or saw other data than the others."""
        self.grid, self.metric, self.records, self.out = grid, metric, records, Path(grid.out)
        self.results: dict[str, Result] = {}
        self._running: dict[str, tuple[float, int, dict]] = {}  # name -> (start, processes, record at the start)
        for run in grid.runs:
            check_settings(self.out / run.name, run.config)
        self.look()

    def look(self) -> None:
        """Read the runs that were not done at the last look. Raises UserError if finished ones saw different data."""
        for run in self.grid.runs:
            known = self.results.get(run.name)
            if known is None or not known.is_done:
                self.results[run.name] = self._result(run)
        self._check_data()

    def left(self) -> list[Run]:
        """The runs that are not done."""
        return [run for run in self.grid.runs if not self.results[run.name].is_done]

    def ordered(self) -> list[Point]:
        """The points from the best to the worst."""
        points = [
            Point(overrides, tuple(self.results[run.name] for run in runs))
            for overrides, runs in self.grid.points.items()
        ]
        return order(points, self.metric)

    def start(self, name: str, processes: int) -> None:
        """A run starts, or continues."""
        record = self._record(name)
        record.pop("diverged", None)
        self._running[name] = (time.monotonic(), processes, dict(record))

    def end(self, name: str, diverged: str | None) -> Result:
        """A run has ended. diverged: its words, if that is why."""
        self.count()
        del self._running[name]
        if diverged:
            self._record(name)["diverged"] = diverged
        self.look()
        return self.results[name]

    def count(self) -> None:
        """Add the time of the running runs to their records."""
        now = time.monotonic()
        for name, (start, processes, before) in self._running.items():
            self.records[name]["seconds"] = before["seconds"] + now - start
            self.records[name]["process_seconds"] = before["process_seconds"] + processes * (now - start)

    def running(self) -> list[str]:
        """The running runs and their steps, in words."""
        return [f"{name} at step {trained(read_rows(self.out / name))[0]}" for name in self._running]

    def spent(self) -> dict[str, Spent]:
        """What every run has cost."""
        found = {}
        for name, result in self.results.items():
            record, is_running = self.records.get(name, _NO_COST), name in self._running
            steps, tokens, speed = result.steps, result.tokens, 0.0
            if is_running:
                steps, tokens, speed = trained(read_rows(self.out / name))
            found[name] = Spent(
                steps=steps,
                tokens=tokens,
                seconds=record["seconds"],
                process_seconds=record["process_seconds"],
                speed=speed,
                is_done=result.is_done,
                is_finished=result.state == "finished",
                is_running=is_running,
            )
        return found

    def _record(self, name: str) -> dict[str, Any]:
        return self.records.setdefault(name, dict(_NO_COST))

    def _result(self, run: Run) -> Result:
        directory = self.out / run.name
        rows, step = read_rows(directory), exported_step(directory)
        record = self.records.get(run.name, {})
        steps, tokens, _ = trained(rows)
        cost = {"steps": steps, "tokens": tokens, "seconds": record.get("seconds", 0.0)}
        base = value_at(rows, self.metric.curve, 0)
        base = base if is_finite(base) else None
        identity = (run.name, run.overrides, run.seed)
        if step is not None:
            value = final_value(directory, rows, self.metric.curve, step)
            if is_finite(value):
                return Result(*identity, "finished", value, base, step, **cost)
            return Result(*identity, "diverged", None, base, step, why=f"its {self.metric.curve} is {value}", **cost)
        if "diverged" in record and rows:  # without its directory the run starts again
            return Result(*identity, "diverged", None, base, why=record["diverged"], **cost)
        return Result(*identity, "stopped" if rows else "waiting", None, base, **cost)

    def _check_data(self) -> None:
        """Raise UserError if finished runs saw different data: a file has changed between two of them."""
        seen: tuple[str, list[str]] | None = None
        sweeps_data = any(key.startswith(("data.", "model.")) for key in self.grid.axes)
        for name in [name for name, result in self.results.items() if result.state == "finished"]:
            record = self._record(name)
            data = record.get("data") or data_of(self.out / name)
            if not data:
                continue
            record["data"] = data
            seen = seen or (name, data)
            for kind, one, other in zip(("trained", "validated"), data, seen[1], strict=True):
                if one != other and not (kind == "trained" and sweeps_data):
                    raise UserError(
                        f"{self.out / seen[0]} and {self.out / name} were {kind} on different data, because a file has changed "
                        "between them; remove the older runs, or choose another --out"
                    )
