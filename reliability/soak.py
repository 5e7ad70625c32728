"""What a long run costs its processes: resident memory, threads, open files, page faults, CPU seconds."""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

POLL = 0.05  # seconds
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Launch(Protocol):
    """Processes that train together."""

    def ranks(self) -> dict[int, int]: ...
    def exit_code(self) -> int | None: ...


@dataclass(frozen=True)
class Sample:
    """One look at one rank, soon after a step was logged."""

    step: int
    resident: float  # MiB
    threads: int
    files: int  # open descriptors
    faults: int  # minor page faults since the start of the process
    cpu: float  # seconds, user and system, since the start of the process


@dataclass(frozen=True)
class Slope:
    """Resident memory over steps, a least-squares line, in MiB per 1,000 steps."""

    value: float
    error: (
        float  # standard error of independent residuals; successive samples are not independent, so it is a lower bound
    )

    def is_flat(self, allowed: float) -> bool:
        """Whether it grows by less than `allowed`, or by less than three standard errors."""
        return self.value < max(allowed, 3 * self.error)


def take_sample(pid: int, step: int) -> Sample:
    """Look at a process in /proc. Raises OSError if it has ended."""
    folder = Path("/proc", str(pid))
    values = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return Sample(
        step=step,
        resident=resident / 2**20,
        threads=int(values[17]),
        files=len(list((folder / "fd").iterdir())),
        faults=int(values[7]),
        cpu=(int(values[11]) + int(values[12])) / TICKS,
    )


def watch(launch: Launch, metrics: Path, every: int, show: Callable[[int, Sample], None]) -> dict[int, list[Sample]]:
    """Sample all ranks at every `every`-th step that `metrics` (metrics.jsonl) logs, until the launch ends: rank -> samples.

    `show(rank, sample)` is called for each.
    """
    samples: dict[int, list[Sample]] = {}
    last = 0
    while launch.exit_code() is None:
        step = last_step(metrics)
        if step // every > last // every:
            last = step
            for rank, pid in sorted(launch.ranks().items()):
                try:
                    sample = take_sample(pid, step)
                except OSError:  # has just ended
                    continue
                samples.setdefault(rank, []).append(sample)
                show(rank, sample)
        time.sleep(POLL)
    return samples


def last_step(metrics: Path) -> int:
    """The step of the last complete line, 0 if there is none."""
    try:
        with metrics.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 2**14))
            lines = file.read().rpartition(b"\n")[0].splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError):
        return 0


def memory_slope(samples: list[Sample], skip: int) -> Slope:
    """The line through the samples after step `skip`. NaN if there are fewer than three."""
    steps = np.array([s.step for s in samples if s.step > skip]) / 1000
    resident = np.array([s.resident for s in samples if s.step > skip])
    if len(steps) < 3:
        return Slope(math.nan, math.nan)
    centred = steps - steps.mean()
    value = float(centred @ resident / (centred @ centred))
    residuals = resident - resident.mean() - value * centred
    return Slope(value, float(np.sqrt(residuals @ residuals / (len(steps) - 2) / (centred @ centred))))


def changes(samples: list[Sample], skip: int) -> list[str]:
    """Which counts of threads or open files have changed from the first to the second half of the samples after `skip`.

    The smallest count of each half is compared: a sample in a save sees its files too.
    """
    late = [s for s in samples if s.step > skip]
    halves = late[: len(late) // 2], late[len(late) // 2 :]
    if not all(halves):
        return []
    found = []
    for name, count in (("threads", lambda s: s.threads), ("open files", lambda s: s.files)):
        before, after = (min(map(count, half)) for half in halves)
        if before != after:
            found.append(f"{name}: {before} -> {after}")
    return found
