"""Saves the checkpoints of a run one after the other, at once or in the background (`run.async_save`).

A save in the background pauses training only while the tensors are copied to host memory. A thread then writes them, on
a gloo group of its own. `latest` moves when the files are durable, as in any other save. The copy takes as much host
memory on each rank as the rank's part of the checkpoint.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from common.errors import UserError
from distributed.checkpoint import (
    Registered,
    SaveTimes,
    checkpoint_tensors,
    save_checkpoint,
    start_save,
    write_checkpoint,
)
from distributed.checkpoint_directory import checkpoint_name, replace_state
from distributed.process_group import Ranks, gather_objects, read_on_first


class Saver:
    """Saves one checkpoint at a time. All methods are collectives."""

    def __init__(
        self, directory: Path, keep_last: int, in_background: bool, timeout_minutes: float, ranks: Ranks
    ) -> None:
        self.directory, self.keep_last, self.ranks = directory, keep_last, ranks
        self.finished: list[SaveTimes] = []  # not yet logged
        self.running: Future[SaveTimes] | None = None
        self.pool: ThreadPoolExecutor | None = None
        if in_background:
            group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
            assert isinstance(group, dist.ProcessGroup)
            self.background = replace(ranks, flags=group)
            self.pool = ThreadPoolExecutor(1, thread_name_prefix="save")

    def save(
        self,
        state: dict,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        registered: Registered | None = None,
    ) -> None:
        """Save step `state["step"]`; in the background, return when the tensors have been copied. A collective.

        Waits for the previous save first. Raises UserError on all ranks if either save fails.
        """
        begin = time.perf_counter()
        self.wait()
        if not self.pool:
            times = save_checkpoint(
                self.directory, state, parameters, optimizer, self.ranks, self.keep_last, registered
            )
            self.finished.append(times)
            return
        tensors = checkpoint_tensors(parameters, optimizer, self.ranks, registered)
        start_save(self.directory, state["step"], tensors, self.ranks)
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        self.running = self.pool.submit(self._write, state, copies, begin, time.perf_counter() - begin)

    def _write(self, state: dict, tensors: dict[str, torch.Tensor], begin: float, pause: float) -> SaveTimes:
        checksum = write_checkpoint(self.directory, state, tensors, self.background, self.keep_last)
        return SaveTimes(state["step"], pause, time.perf_counter() - begin, checksum)

    def poll(self) -> list[SaveTimes]:
        """The saves that have finished since the last call. Raises UserError on all ranks if one has failed on any."""
        self._look()
        finished, self.finished = self.finished, []
        return finished

    def wait(self) -> None:
        """Wait until the save in the background is durable. Raises UserError on all ranks if it has failed on any."""
        while self.running:
            # All ranks look again and again: a rank whose thread waits for that of a failed rank must not wait with it.
            self._look()
            if self.running:
                time.sleep(0.02)

    def _look(self) -> None:
        if not self.running:
            return
        status = gather_objects(_status(self.running), self.ranks)
        failures = [reason for reason in status if reason]
        if failures:
            failed, self.running = self.running, None
            error = failed.exception() if failed.done() else None
            if error and not isinstance(error, UserError | OSError):
                raise error  # a bug keeps its traceback
            raise UserError(failures[0])
        if None not in status:
            self.finished.append(self.running.result())
            self.running = None

    def update_state(self, state: dict) -> None:
        """Record an evaluation that finished after its step was saved, because a signal had cut it short before the save."""
        self.wait()
        read_on_first(lambda: replace_state(self.directory / checkpoint_name(state["step"]), state), self.ranks)

    def close(self) -> list[SaveTimes]:
        """Wait for the save in the background, end its thread, and return the saves that `poll` has not returned."""
        self.wait()
        if self.pool:
            self.pool.shutdown()
        return self.poll()


def _status(running: Future[SaveTimes]) -> str | None:
    """None while the save runs, "" when it is durable, else why it failed."""
    if not running.done():
        return None
    error = running.exception()
    if error is None:
        return ""
    return str(error) if isinstance(error, UserError) else f"a save in the background failed: {error!r}"
