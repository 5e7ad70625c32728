"""Filing errors as banks make them: one wrong figure in an otherwise consistent report."""

import random
from collections.abc import Callable
from decimal import Decimal

from data.regulator.reporting import Cells


def plant(rng: random.Random, rule_id: str, figures: Cells) -> Cells | None:
    """`figures` with an error that violates `rule_id`; None if this report has no place for it."""
    return PLANTS[rule_id](rng, dict(figures))


def _wrong_total(rng: random.Random, figures: Cells) -> Cells | None:
    """Own funds: a stale or mistyped total, or one without Tier 2."""
    total, tier2 = ("C_01.00", "r0010", "c0010"), ("C_01.00", "r0750", "c0010")
    if rng.random() < 0.3 and tier2 in figures:
        figures[total] -= figures[tier2]
    else:
        figures[rng.choice([key for key in (total, tier2) if key in figures])] += _slip(rng, figures[total])
    return figures


def _wrong_tier(rng: random.Random, figures: Cells) -> Cells | None:
    """Tier 1: the AT1 line is missing, or does not belong to these totals."""
    additional = ("C_01.00", "r0530", "c0010")
    if additional in figures and rng.random() < 0.4:
        del figures[additional]
    else:
        figures[additional] = figures.get(additional, Decimal(0)) + abs(
            _slip(rng, figures["C_01.00", "r0020", "c0010"])
        )
    return figures


def _wrong_coverage(rng: random.Random, figures: Cells) -> Cells | None:
    """LCR: a stale ratio, or a buffer that still holds what exceeds the caps."""
    ratio, buffer = ("C_76.00.a", "r0030", "c0010"), ("C_76.00.a", "r0010", "c0010")
    if ratio not in figures:
        return None
    if rng.random() < 0.5:
        figures[ratio] += rng.choice((-1, 1)) * Decimal(rng.randint(100, 2000)) / 10_000
    else:
        figures[buffer] += abs(_slip(rng, figures[buffer]))
    return figures


def _slip(rng: random.Random, amount: Decimal) -> Decimal:
    """A difference of 0.5% to 8% of `amount`, up or down, that keeps its rounding."""
    difference = (abs(amount) * rng.randint(5, 80) / 1000).quantize(Decimal(1))
    thousand = Decimal(1000)
    difference = (difference / thousand).quantize(Decimal(1)) * thousand if amount % thousand == 0 else difference
    return difference * rng.choice((-1, 1))


PLANTS: dict[str, Callable[[random.Random, Cells], Cells | None]] = {
    "OF_SUM": _wrong_total,
    "T1_SUM": _wrong_tier,
    "LCR_CALC": _wrong_coverage,
}
