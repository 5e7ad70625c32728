"""All examples of a source in a few lines: their lengths as a histogram, their targets, and what was left out."""

from collections.abc import Iterable

import numpy as np

from data.batches import StepBatch
from data.token_texts import one_line

BAR = 50  # characters of the longest bar
BINS = 10


def describe_source(name: str, report: str, lengths: np.ndarray, targets: np.ndarray) -> list[str]:
    """Lines about one source. lengths, targets: `(sequences,)`, tokens and sums of weights; report: what was read."""
    lines = [f"{name}:", *(f"  {one_line(part)}" for part in report.split("\n"))]
    lines += ["  length in tokens:", *(f"  {line}" for line in histogram(lengths))]
    least, tenth, median, ninetieth, most = np.quantile(targets, (0, 0.1, 0.5, 0.9, 1))
    share = float(targets.sum()) / max(1, int(lengths.sum()))
    return [
        *lines,
        f"  targets per sequence: {least:,.4g} to {most:,.4g}, median {median:,.4g}, 80% have {tenth:,.4g} to {ninetieth:,.4g}; "
        f"{share:.1%} of all tokens",
    ]


def histogram(lengths: np.ndarray) -> list[str]:
    """How many lengths lie in each range, as bars. At most 90 characters wide.

    The ranges are powers of two, or BINS ranges of equal size where the lengths differ by less than a factor of 16.
    """
    least, most = int(lengths.min()), int(lengths.max())
    if most < 16 * least:
        size = -(-(most - least + 1) // BINS)
        edges = list(range(least, most + 1, size)) + [most + 1]
    else:
        edges = [0, *(2**power for power in range(most.bit_length() + 1))]
        edges = [*edges[max(i for i, edge in enumerate(edges) if edge <= least) : -1], most + 1]
    counts, _ = np.histogram(lengths, edges)
    lines = []
    for low, high, count in zip(edges, edges[1:], counts.tolist(), strict=False):
        bar = "#" * (-(-BAR * count // int(counts.max())))  # rounded up: what is there is seen
        label = f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}"
        lines.append(f"{label:>20} |{bar:<{BAR}}{count:>10,} {count / len(lengths):>6.1%}")
    return lines


def describe_steps(steps: Iterable[StepBatch], sequence_length: int, of_steps: int) -> str:
    """How many tokens some steps have. of_steps: number of steps of which these were chosen."""
    tokens = [sum(step.document_lengths) for step in steps]
    which = f"all {len(tokens):,}" if len(tokens) == of_steps else f"{len(tokens):,} of {of_steps:,}"
    mean = sum(tokens) / len(tokens)
    return (
        f"steps: {min(tokens):,} to {max(tokens):,} tokens in {which} steps of the first epoch, {mean:,.0f} on average, which is "
        f"{mean / sequence_length:.1f} times data.sequence_length; nothing is padded"
    )
