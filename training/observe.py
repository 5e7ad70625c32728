"""Diagnostics of a run on many GPUs: a trace of chosen steps, a snapshot of exhausted memory, and the slow rank."""

import os
import socket
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from common.errors import UserError
from common.torch_private import private
from distributed.device import mark, seconds_between
from distributed.process_group import Ranks, StopSignal, gather_objects
from distributed.rank_names import ranks_on_hosts

record_memory_history = private("cuda.memory._record_memory_history")
dump_snapshot = private("cuda.memory._dump_snapshot")
SLOW = 1.5  # a straggler takes this many times as long as the median rank,
PATIENCE = 5  # in this many consecutive rows of curves


class Profile:
    """torch.profiler's trace of the steps of `run.profile`, one file per rank in runs/NAME/profile."""

    def __init__(self, span: str, total_steps: int, directory: Path, ranks: Ranks, say: Callable[[str], None]) -> None:
        """span: STEP:COUNT. Raise UserError if the run ends before that step."""
        self.directory, self.ranks, self.say = directory / "profile", ranks, say
        self.span: str | None = span  # None after the trace was written
        self.first, self.count = map(int, span.split(":"))
        self.began = 0  # the first step of the trace
        self.profiler: profile | None = None
        if self.first > total_steps:
            raise UserError(f"run.profile={span}: the run has only {total_steps} steps; choose an earlier one")

    def step(self, number: int) -> None:
        """Begin, continue or end the trace. Call this before step `number`, counted from 1."""
        if number >= self.first + self.count:
            self.close(number - 1)
        elif number >= self.first and not self.profiler:
            # Its library prints its start and stop (level 5, the highest and its default): two lines of no use to a reader.
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
            on_gpu = [ProfilerActivity.CUDA] if self.ranks.device.type == "cuda" else []
            self.began, self.profiler = number, profile(activities=[ProfilerActivity.CPU, *on_gpu], record_shapes=True)
            self.profiler.start()

    def close(self, last: int) -> None:
        """Write the trace if one has begun, and print its place. `last` is its last step."""
        span, profiler = self.span, self.profiler
        self.span = self.profiler = None
        if profiler:
            if self.ranks.device.type == "cuda":
                torch.cuda.synchronize(self.ranks.device)  # kernels that are still in the queue belong to the trace
            profiler.stop()
            self.directory.mkdir(exist_ok=True)
            name = f"steps-{self.began}-{last}-rank-"
            profiler.export_chrome_trace(str(self.directory / f"{name}{self.ranks.rank}.json.gz"))
            self.say(
                f"the trace of steps {self.began} to {last} is in {self.directory}/{name}*; ui.perfetto.dev shows it"
            )
        elif span:
            self.say(f"run.profile={span}: this start had none of these steps")


@contextmanager
def memory_snapshot(directory: Path, ranks: Ranks) -> Iterator[None]:
    """If a GPU's memory runs out within this context, write a snapshot to `directory` and add hints to the error.

    The snapshot has every block with the line that allocated it, and the last 100,000 allocations. No-op on the CPU.
    https://docs.pytorch.org/docs/stable/torch_cuda_memory.html
    """
    if ranks.device.type != "cuda":
        yield
        return
    record_memory_history(max_entries=100_000, stacks="python")
    try:
        yield
    except torch.OutOfMemoryError as error:
        path, snapshot = directory / f"memory_rank_{ranks.rank}.pickle", ""
        with suppress(OSError):
            dump_snapshot(str(path))
            snapshot = f" {path} has what filled it (docs.pytorch.org/memory_viz draws it);"
        error.add_note(
            f"rank {ranks.rank} has no memory left:{snapshot} try a smaller batch.micro_batch, model.activation_checkpointing=full, "
            "more ranks or a smaller optimizer.memory"
        )
        raise
    finally:
        record_memory_history(enabled=None)


class Pace:
    """The pace of each rank: the time of its own forward through the decoder layers.

    FSDP waits for the other ranks between layers and not inside them, so the time depends on the rank's processor alone; with
    sharding.context it depends on the slowest rank of the group. The ranks exchange their times with the polls of the stop
    signal, which needs no further collective. A row therefore shows the times of the previous row.
    """

    def __init__(self, layers: list[nn.Module], stop: StopSignal, step: int) -> None:
        """step: number of finished steps. Every rank must call this, after the layers are sharded: hooks run in this order."""
        self.stop, self.step = stop, step
        self.spans: list[tuple[Any, Any]] = []  # (begin, end) of each layer's forward
        self.tokens = 0
        self.streak = [0] * stop.ranks.world_size  # of each rank: consecutive rows in which it was slow
        self.hosts = gather_objects(socket.gethostname(), stop.ranks)
        if stop.ranks.world_size > 1:
            for layer in layers:
                layer.register_forward_pre_hook(self._enter)
                layer.register_forward_hook(self._leave)

    def row(self, step: int, say: Callable[[str], None]) -> dict[str, float]:
        """Return the curves of a logged step, in seconds per step, and `say` a line about a straggler. Every rank must call
        this.

        The device must have finished the step. A straggler is slow in total and per token: a rank that was dealt more tokens is
        not one.
        """
        steps, self.step = step - self.step, step
        seconds = sum(seconds_between(begin, end) for begin, end in self.spans)
        received = self.stop.told_by_ranks  # the times of the previous row, by rank
        self.stop.told = (seconds / steps, self.tokens / steps)
        self.spans, self.tokens = [], 0
        if len(self.hosts) == 1 or not received.all():
            return {}
        times = received[:, 0].tolist()
        per_token = (received[:, 0] / received[:, 1]).tolist()
        median, median_per_token = statistics.median_low(times), statistics.median_low(per_token)
        for rank, time_of_rank in enumerate(times):
            is_slow = time_of_rank > SLOW * median and per_token[rank] > SLOW * median_per_token
            self.streak[rank] = self.streak[rank] + 1 if is_slow else 0
            if self.streak[rank] == PATIENCE:
                say(
                    f"warning: {ranks_on_hosts({rank: self.hosts[rank]})} takes {time_of_rank / median:.1f} times as long "
                    f"as the median rank for its part of forward, in {PATIENCE} rows one after the other: all ranks wait for it"
                )
        return {"time/slowest_rank_seconds": max(times), "time/median_rank_seconds": median}

    def _enter(self, layer: nn.Module, arguments: tuple) -> None:
        if layer.training:  # an evaluation is no step
            self.spans.append((mark(self.stop.ranks.device), None))

    def _leave(self, layer: nn.Module, arguments: tuple, output: object) -> None:
        if layer.training:
            self.spans[-1] = (self.spans[-1][0], mark(self.stop.ranks.device))
            self.tokens += arguments[0].shape[:-1].numel()
