"""From step rows to the numbers of the tables. Plain arithmetic without torch."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.measure import Run


@dataclass(frozen=True)
class Result:
    """One run without its warm-up steps. Rates count real work only: no padding, and the head for target tokens only."""

    tokens_per_second: float
    flops_per_second: float
    memory_gib: float
    first_step_seconds: float
    losses: tuple[float, ...]  # of every step, including warm-up


@dataclass(frozen=True)
class Summary:
    """One arm in one setting: medians over its rounds, and spread = (max - min) / median."""

    rounds: int
    tokens_per_second: float
    spread: float
    mfu: float
    memory_gib: float
    first_step_seconds: float
    loss: float
    loss_step: int


def has_enough_steps(rows: Sequence[dict], warmup: int, steps: int, seconds: float) -> bool:
    """Whether there are `steps` steps after the warm-up, or 2 that took `seconds` in total, or 1 that took 4 times as long."""
    measured = rows[warmup:]
    total = sum(row["seconds"] for row in measured)
    is_long = (len(measured) >= 2 and total >= seconds) or (len(measured) == 1 and total >= 4 * seconds)
    return len(measured) >= steps or is_long


def run_result(run: Run, warmup: int, flops: Callable[[list[int], int], float], on_cuda: bool) -> Result:
    """The result of a run.

    flops: function of (document lengths, number of targets) that returns the FLOPs of a step. on_cuda: report the device
    memory that the arm logged instead of the resident memory of its processes.
    """
    measured = run.rows[warmup:]
    seconds = sum(row["seconds"] for row in measured)
    return Result(
        tokens_per_second=sum(sum(row["lengths"]) for row in measured) / seconds,
        flops_per_second=sum(flops(row["lengths"], row["targets"]) for row in measured) / seconds,
        memory_gib=max(row["memory_gib"] for row in run.rows) if on_cuda else run.peak_rss_gib,
        first_step_seconds=run.first_step_seconds,
        losses=tuple(row["loss"] for row in run.rows),
    )


def summarize(results: Sequence[Result], peak: float, loss_step: int) -> Summary:
    """Medians over the rounds of an arm.

    peak: FLOP/s, the denominator of MFU. The loss is that of step `loss_step`, or of the last step if there are fewer.
    """
    rates = [r.tokens_per_second for r in results]
    median_rate = statistics.median(rates)
    step = min(loss_step, *(len(r.losses) for r in results))
    return Summary(
        rounds=len(rates),
        tokens_per_second=median_rate,
        spread=(max(rates) - min(rates)) / median_rate,
        mfu=statistics.median(r.flops_per_second for r in results) / peak,
        memory_gib=statistics.median(r.memory_gib for r in results),
        first_step_seconds=statistics.median(r.first_step_seconds for r in results),
        loss=statistics.median(r.losses[step - 1] for r in results),
        loss_step=step,
    )


def parity_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Maximum over steps of |a - b| / max(1, |a|) between two series of losses; NaN if their lengths differ."""
    if not ours or len(ours) != len(theirs):
        return float("nan")
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(ours, theirs, strict=True))


def render(setting: str, entries: dict[str, Summary | str], reference: str) -> str:
    """The table of a setting as text. entries: arm name -> summary, or the reason why there are no numbers."""
    head = f"{setting:<34}{'tokens/s':>9}{'spread':>8}{'ours is':>9}{'MFU':>7}{'GiB':>7}{'1st step':>10}{'loss':>9}{'at step':>9}"
    text = [head, "-" * len(head)]
    base = entries.get(reference)
    for name, entry in entries.items():
        if isinstance(entry, str):
            text.append(f"{name:<34}  {entry}")
            continue
        ratio = f"{base.tokens_per_second / entry.tokens_per_second:.2f}x" if isinstance(base, Summary) else "-"
        spread = f"{entry.spread:.1%}" if entry.rounds > 1 else "-"
        text.append(
            f"{name:<34}{entry.tokens_per_second:>9,.0f}{spread:>8}{ratio:>9}{entry.mfu:>7.1%}"
            f"{entry.memory_gib:>7.2f}{entry.first_step_seconds:>8.1f} s{entry.loss:>9.4f}{entry.loss_step:>9}"
        )
    return "\n".join(text)
