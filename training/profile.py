"""torch.profiler's trace of chosen steps: run.profile=STEP:COUNT."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from common.errors import UserError
from distributed.process_group import Ranks


class Profile:
    """torch.profiler's trace of the steps of `run.profile`, one file per rank in runs/NAME/profile."""

    def __init__(
        self, wanted: str, total_steps: int, directory: Path, ranks: Ranks, say: Callable[[str], None]
    ) -> None:
        """wanted: STEP:COUNT. Raises UserError if the run ends before that step."""
        self.directory, self.ranks, self.say = directory / "profile", ranks, say
        self.wanted: str | None = wanted  # None: done
        self.first, self.count = map(int, wanted.split(":"))
        self.began: int | None = None  # the first step of the trace
        self.profiler: Any = None
        if self.first > total_steps:
            raise UserError(f"run.profile={wanted}: the run has only {total_steps} steps; choose an earlier one")

    def step(self, number: int) -> None:
        """Call before step `number`, counted from 1: the trace begins, ends, or goes on."""
        if self.wanted is None:
            return
        if number >= self.first + self.count:
            if self.profiler:
                self.close(number - 1)
            else:
                self.say(f"run.profile={self.wanted}: this start begins at step {number}, after these steps")
            self.wanted = None
        elif number >= self.first and not self.profiler:
            # Its library prints its start and stop (level 5, the highest and its default): two lines of no use to a reader.
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
            on_gpu = [ProfilerActivity.CUDA] if self.ranks.device.type == "cuda" else []
            self.began, self.profiler = number, profile(activities=[ProfilerActivity.CPU, *on_gpu], record_shapes=True)
            self.profiler.start()

    def close(self, last: int) -> None:
        """Write the trace, if one has begun, which ends with step `last`."""
        if not self.profiler:
            if self.wanted:
                self.say(f"run.profile={self.wanted}: this start ends with step {last}, before these steps")
            return
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)  # kernels that are still in the queue belong to the trace
        self.profiler.stop()
        self.directory.mkdir(exist_ok=True)
        name = f"steps-{self.began}-{last}-rank-"
        self.profiler.export_chrome_trace(str(self.directory / f"{name}{self.ranks.rank}.json.gz"))
        self.profiler = self.wanted = None
        self.say(f"the trace of steps {self.began} to {last} is in {self.directory}/{name}*; ui.perfetto.dev shows it")
