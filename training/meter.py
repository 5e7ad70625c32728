"""Speed, utilization and losses over the steps since the last logged row, and the line on the terminal."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PretrainedConfig

from data.batches import StepBatch
from data.dealing import Deal
from data.sources import Corpus, mean_losses
from distributed.process_group import Ranks
from model.flops import PeakFlops, Work, count_work, step_flops
from model.language_model import PackedLanguageModel
from model.loss import LossSums
from training.log import peak_memory_gib, seconds_since_process_start


def make_meter(
    corpus: Corpus, model: PackedLanguageModel, model_config: PretrainedConfig, dtype: torch.dtype, ranks: Ranks
) -> tuple["Meter", PeakFlops]:
    """The meter of a run that computes in `dtype`, and what a rank can reach. A collective."""
    peak = PeakFlops(ranks.device, dtype)
    peak.measure(ranks)
    return Meter(corpus, count_work(model, model_config), peak.over_all_ranks(ranks), ranks.device), peak


class Meter:
    """Adds up finished steps. A row closes the window of steps it covers; pauses do not count as time."""

    def __init__(self, corpus: Corpus, work: Work, peak_flops: float, device: torch.device) -> None:
        """`work`: FLOPs per unit of this model; `peak_flops`: FLOP/s of all ranks together."""
        self.corpus, self.work, self.peak_flops, self.device = corpus, work, peak_flops, device
        self.peak_note, self.was_raised = "", False  # a note for the next line, once in a run
        self.has_row = False
        self.seconds_per_step = math.nan  # mean over the last closed window
        self._open_window()

    def _open_window(self) -> None:
        self.start = time.perf_counter()
        self.steps, self.tokens, self.flops = 0, 0, 0.0
        self.mean_cost = self.slowest_cost = 0.0  # of a mean and of the slowest rank, summed over the steps
        self.loss_sums = LossSums(len(self.corpus.sources), self.device)
        self.targets = np.zeros(len(self.corpus.sources))  # sums of weights

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block (evaluating, saving) is not time of a step."""
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin

    def add(self, batch: StepBatch, deal: Deal, loss_sums: LossSums) -> None:
        """Add a finished step; `loss_sums` are over all ranks. Does not wait for the device.

        The FLOPs of the head count a target by its weight; the plan does not know their number.
        """
        self.steps += 1
        self.mean_cost += deal.mean
        self.slowest_cost += deal.slowest
        self.tokens += sum(batch.document_lengths)
        self.flops += step_flops(self.work, batch.document_lengths, batch.num_target_tokens)
        self.loss_sums.values.add_(loss_sums.values)
        self.targets += np.array(batch.targets_by_source)

    def row(self, state: dict, epoch: float) -> dict[str, float]:
        """The window's curves, then a new window. state: that of the loop. Read the step's loss first: it waits for the device."""
        seconds = time.perf_counter() - self.start
        self.seconds_per_step = seconds / self.steps
        self._raise_peak(self.flops / seconds)
        row = {
            "train/tokens_per_second": self.tokens / seconds,
            "train/mfu": self.flops / seconds / self.peak_flops,
            "train/balance": self.mean_cost / self.slowest_cost if self.slowest_cost else 1.0,
            "train/memory_gib": peak_memory_gib(self.device),
            "train/epoch": epoch,
            "train/tokens": state["tokens"],
            "train/skipped_steps": state["skipped_steps"],
        }
        if not self.has_row:  # how long the start took, with the steps of the first row
            row, self.has_row = row | {"start/total": seconds_since_process_start()}, True
        if len(self.corpus.sources) > 1:
            means = mean_losses(self.corpus, self.loss_sums.by_source.tolist(), self.targets)
            row |= {f"train/loss/{name}": loss for name, loss in means.items()}
            row |= _shares("train/share", self.corpus.names, state["targets"])
            row |= _shares("train/step_share", self.corpus.names, self.targets)
        self._open_window()
        return row

    def _raise_peak(self, reached: float) -> None:
        """The peak is at least what a window reached, so that MFU is at most 100%.

        The peak was then measured while the processor was busy. Each rank has its own clock, and raises its own peak: only
        the log of rank 0 shows it, and nothing is decided by it.
        """
        if reached <= self.peak_flops:
            return
        if not self.was_raised:
            self.peak_note = (
                f"the peak is raised from {self.peak_flops / 1e12:.3g} to {reached / 1e12:.3g} TFLOP/s, which these steps "
                "reached (a busy processor is measured too low)"
            )
        self.peak_flops, self.was_raised = reached, True

    def line(self, row: dict[str, float], step: int, total_steps: int, was_skipped: bool) -> str:
        """A row in one line: loss, gradient norm, learning rate, speed, memory, time left, and whether it was skipped."""
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
            parts.append(f"EWC {row['ewc/penalty']:.3g}, {row['ewc/time']:.1%} of the step")
        if self.peak_note:
            parts.append(self.peak_note)
            self.peak_note = ""
        if was_skipped:
            is_finite = math.isfinite(row["train/loss"]) and math.isfinite(row["train/grad_norm"])
            why = "a spike of the gradient norm" if is_finite else "not finite"
            parts.append(f"SKIPPED, {why} ({row['train/skipped_steps']} so far)")
        return " | ".join(parts)


def _shares(curve: str, names: Sequence[str], targets: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Each source's share of target tokens. `targets`: of each source."""
    return {f"{curve}/{name}": float(count / sum(targets)) for name, count in zip(names, targets, strict=True)}
