"""From rows of steps to the numbers of the table. Plain arithmetic, no torch."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.measure import Run


@dataclass(frozen=True)
class Result:
    """One run without its warm-up. tokens_per_second and flops_per_second count real work: no padding, no masked head."""

    tokens_per_second: float
    flops_per_second: float
    memory_gib: float
    first_step_seconds: float
    losses: tuple[float, ...]  # of every step, warm-up included


@dataclass(frozen=True)
class Line:
    """An arm in a setting over its rounds: medians, and spread = (largest - smallest) / median."""

    tokens_per_second: float
    spread: float
    mfu: float
    memory_gib: float
    first_step_seconds: float
    loss: float
    loss_step: int


def enough(rows: Sequence[dict], warmup: int, steps: int, seconds: float) -> bool:
    """Whether `steps` steps after the warm-up are done, or at least 2 that took `seconds` together."""
    measured = rows[warmup:]
    return len(measured) >= steps or (len(measured) >= 2 and sum(row["seconds"] for row in measured) >= seconds)


def result(run: Run, warmup: int, flops: Callable[[list[int], int], float], on_device: bool) -> Result:
    """The numbers of a run. flops(lengths, targets): what a step needs. on_device: memory as the arm's device reports it."""
    measured = run.rows[warmup:]
    seconds = sum(row["seconds"] for row in measured)
    return Result(
        tokens_per_second=sum(sum(row["lengths"]) for row in measured) / seconds,
        flops_per_second=sum(flops(row["lengths"], row["targets"]) for row in measured) / seconds,
        memory_gib=max(row["memory_gib"] for row in run.rows) if on_device else run.peak_rss_gib,
        first_step_seconds=run.first_step_seconds,
        losses=tuple(row["loss"] for row in run.rows),
    )


def line(results: Sequence[Result], peak: float, loss_step: int) -> Line:
    """Medians over the rounds of an arm; the loss is that of step `loss_step`, or of the last one if it did fewer."""
    rates = [r.tokens_per_second for r in results]
    middle = statistics.median(rates)
    step = min(loss_step, *(len(r.losses) for r in results))
    return Line(
        tokens_per_second=middle,
        spread=(max(rates) - min(rates)) / middle,
        mfu=statistics.median(r.flops_per_second for r in results) / peak,
        memory_gib=statistics.median(r.memory_gib for r in results),
        first_step_seconds=statistics.median(r.first_step_seconds for r in results),
        loss=statistics.median(r.losses[step - 1] for r in results),
        loss_step=step,
    )


def parity_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest difference of a step's losses, absolute below a loss of 1 and relative above; nan where steps are missing."""
    if not ours or len(ours) != len(theirs):
        return float("nan")
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(ours, theirs, strict=True))


def render(setting: str, lines: dict[str, Line | str], reference: str) -> str:
    """The table of a setting as text; a line that is a text says why there are no numbers."""
    head = f"{setting:<34}{'tokens/s':>9}{'spread':>8}{'ours is':>9}{'MFU':>7}{'GiB':>7}{'1st step':>10}{'loss':>9}{'at step':>9}"
    text = [head, "-" * len(head)]
    base = lines.get(reference)
    for name, entry in lines.items():
        if isinstance(entry, str):
            text.append(f"{name:<34}  {entry}")
            continue
        ratio = f"{base.tokens_per_second / entry.tokens_per_second:.2f}x" if isinstance(base, Line) else "-"
        text.append(
            f"{name:<34}{entry.tokens_per_second:>9,.0f}{entry.spread:>8.1%}{ratio:>9}{entry.mfu:>7.1%}"
            f"{entry.memory_gib:>7.2f}{entry.first_step_seconds:>8.1f} s{entry.loss:>9.4f}{entry.loss_step:>9}"
        )
    return "\n".join(text)
