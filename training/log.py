"""The log of a run: rows of curves in metrics.jsonl and its sinks, lines on the terminal, speed and MFU."""

import json
import math
import os
import resource
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.durable_files import naming, write_durably
from common.errors import UserError
from data.batches import StepBatch
from data.dealing import Deal
from data.sources import Corpus, mean_losses
from distributed.checkpoint import SaveTimes
from distributed.checkpoint_directory import torchrun_grace
from distributed.process_group import Ranks, read_on_first
from model.flops import Work, step_flops
from model.loss import LossSums
from training.checkpointer import AGAIN
from training.sinks import Service, TensorBoard, Values, open_sinks

SHOWN = 32  # hexadecimal digits of the record's head in a line
EVALUATIONS = {"validation", "forgetting"}  # names before the slash in the curves of an evaluation


class Log:
    """The curves of a run, each row once. On ranks other than 0 every method is a no-op.

    A resume drops the rows that the run will write again: all rows after `start_step`, and at `start_step` the rows of an
    evaluation that the checkpoint does not record. The sinks (training/sinks.py) get the same rows.
    """

    def __init__(
        self, directory: Path, ranks: Ranks, log_to: Sequence[str] = ("tensorboard",), config: dict | None = None
    ) -> None:
        """log_to: names of sinks. config: section -> key -> value, for the sinks that show it. `say` works before `open`."""
        self.enabled, self.directory, self.ranks = ranks.rank == 0, directory, ranks
        self.path = directory / "metrics.jsonl"
        self.log_to, self.config, self.sinks = log_to, config or {}, list[TensorBoard | Service]()

    def open(self, start_step: int, evaluated: dict[str, int], total_steps: int) -> "Log":
        """Open the files for a run that continues at `start_step`; 0 starts anew. Return self. Every rank must call this.

        evaluated: evaluation -> the last step at which it finished, as in the checkpoint. Raise UserError on all ranks if
        rank 0 cannot write to the directory, or if metrics.jsonl is damaged before a row that is kept.
        """
        read_on_first(lambda: self._open(start_step, evaluated), self.ranks)
        if self.enabled:
            hidden = not sys.stderr.isatty()
            self.bar = tqdm(total=total_steps, initial=start_step, unit="step", disable=hidden, dynamic_ncols=True)
        return self

    def row(self, step: int, values: Values) -> None:
        """Add one row of curves, and of texts such as a sample of the answers."""
        if self.enabled:
            with naming(self.path):
                self.file.write(json.dumps({"step": step, **values}) + "\n")
                self.file.flush()
            for sink in self.sinks:
                sink.plot(step, values)

    def evaluation(self, step: int, total_steps: int, figures: Values, remark: str) -> None:
        """Add the curves of an evaluation and print them in one line, which ends with `remark`."""
        self.row(step, figures)
        values = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if not isinstance(value, str))
        self.say(f"step {step}/{total_steps} | {values}{remark}")

    def save(self, times: SaveTimes) -> None:
        """Add the curves of a save that has finished, and print its times: a warning if torchrun grants less after a signal."""
        self.row(times.step, {"save/pause_seconds": times.pause, "save/total_seconds": times.total})
        text = f"saved step {times.step} in {times.total:.1f} s; training waited {times.pause:.1f} s"
        text += f"; head {times.head[:SHOWN]}" if times.head else ""
        grace = torchrun_grace()
        if grace is not None and times.total > grace:
            text = (
                f"warning: {text}: longer than the {grace:g} s that torchrun grants after a signal; start torchrun with "
                f"--shutdown-timeout={math.ceil(1.5 * times.total)}"
            )
        self.say(text)

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if self.enabled:
            with suppress(OSError):  # the terminal or the reader of the lines may be gone: the run goes on
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self.enabled:
            self.bar.update(step - self.bar.n)

    def sync(self) -> None:
        """Flush all rows to disk. Call it before a save: the rows of a saved step are not written again."""
        if self.enabled:
            os.fsync(self.file.fileno())
            for sink in self.sinks:
                sink.flush()

    def close(self) -> None:
        """Flush and close all outputs."""
        if self.enabled:
            self.file.close()
            for sink in self.sinks:
                sink.close()
            self.bar.close()

    def where(self) -> str:
        """Return a line on the places of the curves."""
        services = [name for name in self.log_to if name != "tensorboard"]
        here = (
            f"tensorboard --logdir {shlex.quote(str(self.path.with_name('tensorboard')))}"
            if len(services) < len(self.log_to)
            else self.path
        )
        return f"curves: {' and '.join([str(here), *services])}"

    def _open(self, start_step: int, evaluated: dict[str, int]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        kept, at_start, dropped = self._sort_rows(start_step, evaluated)
        if self.path.is_file() and self.path.read_bytes() != kept:
            write_durably(self.path, kept.decode())
            if start_step == 0:
                self.say(f"{self.path}: the rows of an earlier start, which left no checkpoint, are removed")
        self.file = self.path.open("a", encoding="utf-8")
        # The services already have the kept rows of the first step; TensorBoard forgets them (purge_step).
        sent = {(row["step"], name) for row in [*at_start, *dropped] for name in row}
        self.sinks = open_sinks(self.log_to, self.directory, start_step, self.config, sent, self.say)
        for row in at_start:
            for sink in self.sinks:
                sink.plot(start_step, {name: value for name, value in row.items() if name != "step"})
        for sink in self.sinks:
            sink.flush()

    def kept(self, start_step: int, evaluated: dict[str, int]) -> bytes:
        """Return the rows of metrics.jsonl that `open` keeps. On rank 0."""
        return self._sort_rows(start_step, evaluated)[0]

    def _sort_rows(self, start_step: int, evaluated: dict[str, int]) -> tuple[bytes, list[dict], list[dict]]:
        """Return the bytes of all kept rows, the kept rows of `start_step`, and the rows that will be written again.

        A line that is not a row was being written when the process or the machine died, so it is dropped like the rows after
        it. If a row after it should be kept, the file was damaged in another way: raise UserError.
        """
        content = self.path.read_bytes() if self.path.is_file() else b""
        kept, at_start, dropped, broken = [], [], [], 0
        for number, line in enumerate(content.splitlines(), 1):
            row = _parse(line)
            if row is None:
                broken = broken or number
            elif _is_kept(row, start_step, evaluated):
                if broken:
                    raise UserError(f"{self.path}, line {broken} is not a row of curves; {AGAIN}")
                kept.append(line + b"\n")
                if row["step"] == start_step:
                    at_start.append(row)
            else:
                dropped.append(row)
        return b"".join(kept), at_start, dropped


class Meter:
    """Sums over the finished steps since the last row. Pauses do not count as time."""

    def __init__(self, corpus: Corpus, work: Work, peak_flops: float, device: torch.device) -> None:
        """work: FLOPs per unit of this model. peak_flops: FLOP/s of all ranks together."""
        self.corpus, self.work, self.peak_flops, self.device = corpus, work, peak_flops, device
        self.has_row = False
        self.seconds_per_step = math.nan  # mean over the last closed window
        self._open_window()

    def _open_window(self) -> None:
        self.start = time.perf_counter()
        self.steps, self.tokens, self.flops = 0, 0, 0.0
        self.mean_cost = self.slowest_cost = 0.0  # of the average and of the slowest rank, summed over the steps
        self.loss_sums, self.num_targets = LossSums(len(self.corpus.sources), self.device), 0.0
        self.targets = np.zeros(len(self.corpus.sources))  # sums of weights

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time within this context (evaluations, saves) from the time of a step."""
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin

    def add(self, batch: StepBatch, deal: Deal, loss_sums: LossSums) -> None:
        """Add a finished step without waiting for the device. loss_sums: over all ranks.

        The FLOPs of the head count each target with its weight, because the plan does not know the number of targets.
        """
        self.steps += 1
        self.mean_cost += deal.mean
        self.slowest_cost += deal.slowest
        self.tokens += sum(batch.document_lengths)
        self.flops += step_flops(self.work, batch.document_lengths, batch.num_target_tokens)
        self.loss_sums.values.add_(loss_sums.values)
        self.num_targets += batch.num_target_tokens
        self.targets += np.array(batch.targets_by_source)

    def row(self, state: dict, epoch: float) -> dict[str, float]:
        """Return the mean curves since the last row, and start a new window. state: of the loop.

        The device must have finished the step. Losses are means over the targets of all steps of the window, so a row is not
        finite if the loss of any step is not.
        """
        seconds = time.perf_counter() - self.start
        self.seconds_per_step = seconds / self.steps
        row = {
            "train/loss": (self.loss_sums.total / self.num_targets).item(),
            "train/tokens_per_second": self.tokens / seconds,
            "train/mfu": self.flops / seconds / self.peak_flops,
            "train/balance": self.mean_cost / self.slowest_cost if self.slowest_cost else 1.0,
            "train/memory_gib": peak_memory_gib(self.device),
            "train/epoch": epoch,
            "train/tokens": state["tokens"],
            "train/skipped_steps": state["skipped_steps"],
        }
        if not self.has_row:  # the time of the start, including the steps of the first row
            row, self.has_row = row | {"start/total": seconds_since_process_start()}, True
        if len(self.corpus.sources) > 1:
            means = mean_losses(self.corpus, self.loss_sums.by_source.tolist(), self.targets)
            row |= {f"train/loss/{name}": loss for name, loss in means.items()}
            row |= _shares("train/share", self.corpus.names, state["targets"])
            row |= _shares("train/step_share", self.corpus.names, self.targets)
        self._open_window()
        return row

    def line(self, row: dict[str, float], step: int, total_steps: int, was_skipped: bool, is_finite: bool) -> str:
        """Return a row in one line: loss, gradient norm, learning rate, speed, memory, time left, and whether the step was
        skipped.

        is_finite: whether loss and gradient norm of the last step are finite.
        """
        parts = [
            f"step {step}/{total_steps}",
            f"loss {row['train/loss']:.4f}",
            f"grad norm {row['train/grad_norm']:.3f}",
            f"lr {row['train/learning_rate']:.2e}",
            f"{row['train/tokens_per_second']:,.0f} tok/s",
            f"MFU {row['train/mfu']:.1%}",
            f"{row['train/memory_gib']:.1f} GiB",
            f"ETA {self.seconds_per_step * (total_steps - step) / 60:.1f} min",
        ]
        if "ewc/penalty" in row:
            parts.append(f"EWC {row['ewc/penalty']:.3g}")
        if was_skipped:
            why = "a spike of the gradient norm" if is_finite else "not finite"
            parts.append(f"SKIPPED, {why} ({row['train/skipped_steps']} so far)")
        return " | ".join(parts)


def _shares(curve: str, names: Sequence[str], targets: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Return each source's share of the target tokens. targets: the count of each source."""
    total = sum(targets) or 1  # 0 if all targets so far have a weight of 0
    return {f"{curve}/{name}": float(count / total) for name, count in zip(names, targets, strict=True)}


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: allocated on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _parse(line: bytes) -> dict | None:
    """Return the row in a line of metrics.jsonl; None if the line is not a row."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _is_kept(row: dict, start_step: int, evaluated: dict[str, int]) -> bool:
    """Return whether a run that continues at `start_step` keeps this row. It drops the rows that it will write again."""
    if start_step == 0 or row["step"] != start_step:
        return row["step"] < start_step
    groups = {name.partition("/")[0] for name in row}
    return all(evaluated.get(name) == start_step for name in groups & EVALUATIONS)


def seconds_since_process_start() -> float:
    """Return the age of this process, on Linux from the kernel to 10 ms.

    Elsewhere it is the processor time so far: it is mostly imports, which use one thread.
    """
    try:
        # Field 22. The name of the program, which is field 2, may contain spaces and brackets: proc_pid_stat(5).
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.process_time()
