"""How long a start takes, from the start of the process to the end of its first step: one line, and curves `start/...`."""

import os
import time
from pathlib import Path

import torch

from distributed.process_group import Ranks, gather_objects
from training.run_log import RunLog

TOTAL = "total"


class StartTimes:
    """Seconds of each phase. A phase ends with `lap`, the last one, the first step, with `finish`."""

    def __init__(self) -> None:
        """Everything before this call is the phase "imports"."""
        self.is_running = True
        self.seconds = {"imports": seconds_since_process_start()}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End `phase`, which began with the end of the one before. A phase that ends twice is the sum of both.

        No-op after `finish`.
        """
        if not self.is_running:
            return
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def finish(self, step: int, log: RunLog, ranks: Ranks) -> None:
        """End the first step, which is number `step` of the run, and show the times of rank 0. A collective."""
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)  # the step is still in the device's queue
        self.lap("first step")
        self.is_running = False
        totals = gather_objects(sum(self.seconds.values()), ranks)
        log.row(step, curves(self.seconds))
        log.say(line(self.seconds, totals))


def curves(seconds: dict[str, float]) -> dict[str, float]:
    """`start/config_and_tokenizer` and so on, and their sum `start/total`, in seconds."""
    rows = {f"start/{phase.replace(' ', '_')}": value for phase, value in seconds.items()}
    return rows | {f"start/{TOTAL}": sum(seconds.values())}


def line(seconds: dict[str, float], totals: list[float]) -> str:
    """The phases of rank 0 in words, and the total of the slowest rank if it differs. `totals`: by rank."""
    phases = ", ".join(f"{phase} {value:.1f} s" for phase, value in seconds.items())
    text = f"start: {phases}: {totals[0]:.1f} s after the process began"
    slowest = max(range(len(totals)), key=totals.__getitem__)
    if totals[slowest] - totals[0] >= 0.1:
        text += f" ({totals[slowest]:.1f} s on rank {slowest}, the slowest)"
    return text


def seconds_since_process_start() -> float:
    """From the kernel on Linux, to 10 ms. Elsewhere the processor time so far: imports, which use one thread, are most of it."""
    try:
        # Field 22. The name of the program, which is field 2, may contain spaces and brackets: proc_pid_stat(5).
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after the system's boot
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, ValueError, IndexError, AttributeError):
        age = 0.0
    # A sandbox may show a time that is not that of this process; no process is younger than its processor time.
    return age if age >= time.process_time() / (os.cpu_count() or 1) else time.process_time()
