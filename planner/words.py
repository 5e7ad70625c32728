"""Numbers in words, for tables of at most `WIDTH` columns."""

from collections.abc import Iterable, Sequence

from planner.report import GIB
from planner.step_time import Speed
from training.description import counted

WIDTH = 100


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:,.0f}" if size >= 999.5 * GIB else f"{size / GIB:,.1f}"


def tokens(speed: Speed) -> str:
    """Tokens per second of one device, from low to high."""
    low, high = speed.tokens_per_second
    if high < 10:
        return f"{low:.2g}-{high:.2g}"
    return ranged([round(value, -1 if value >= 1000 else 0) for value in (low, high)])


def hours(values: Iterable[float]) -> str:
    """Two numbers of hours."""
    low, high = values
    digits = 0 if high >= 100 else 1 if high >= 1 else 2 if high >= 0.1 else 3 if high >= 0.01 else 4
    return f"{low:,.{digits}f}-{high:,.{digits}f}"


def counted_range(values: Sequence[int], noun: str) -> str:
    """`2-4 batches`."""
    low, high = min(values), max(values)
    return counted(high, noun) if low == high else f"{low:,}-{counted(high, noun)}"


def ranged(values: Sequence[float]) -> str:
    """The smallest and the largest, or one number if they are equal."""
    low, high = min(values), max(values)
    return f"{low:,.0f}" if low == high else f"{low:,.0f}-{high:,.0f}"
