"""Ratios that look as if their decimal point were two places off: 3.15 filed for 3.15%, or 0.0315 for 315%.

Ratios are filed as decimal fractions, 9.31% as 0.0931 (EBA filing rules 3.2; EBA Q&A 2014_1564). A ratio is doubtful

- if it is about 100 times, or a hundredth of, the ratio that its numerator and denominator give;
- if these are missing or give neither, if it is more than 10 times or less than a 30th of its usual size, and would not be if its decimal
  point were moved by two places.

The usual sizes are rounded averages of the banks in the EU (EBA Risk Dashboard, Q2 2022: CET1 15%, LCR 165%, NSFR
127%), or the legal limit. They serve this warning only; no rule depends on them.
"""

from collections.abc import Iterator
from decimal import Decimal

from xbrl.read.report import CellKey
from xbrl.rules.figures import Figure, Figures, is_ratio, read_figure, recompute

USUAL: dict[CellKey, Decimal] = {
    **{("C_03.00", row, "c0010"): Decimal("0.15") for row in ("r0010", "r0030", "r0050")},
    ("C_47.00", "r0340", "c0010"): Decimal("0.055"),
    ("C_76.00.a", "r0030", "c0010"): Decimal("1.65"),
    ("C_84.00.a", "r0220", "c0040"): Decimal("1.27"),
}
# Requirements and shares of Tier 1 can be small: only too large a one is doubtful.
USUAL_AT_MOST: dict[CellKey, Decimal] = {
    **{("C_03.00", row, "c0010"): Decimal("0.12") for row in ("r0130", "r0140", "r0150", "r0160", "r0170", "r0180")},
    ("C_47.00", "r0440", "c0010"): Decimal("0.035"),
    **{("C_28.00", "*", column): Decimal("0.25") for column in ("c230", "c350")},
}
SHIFTS = (Decimal(100), Decimal("0.01"))
SAME = Decimal("0.02")  # two ratios are about equal if they differ by at most 2%


def doubtful_ratios(figures: Figures) -> Iterator[tuple[Figure, Decimal, Figure | None]]:
    """Yields (a doubtful ratio, its probable value, the recomputed ratio that shows it if there is one)."""
    for cell in (*USUAL, *USUAL_AT_MOST):
        for key in figures.facts.get(cell, {}):
            figure = read_figure(figures, cell, key)
            if not isinstance(figure.value, Decimal) or not is_ratio(figure.unit) or not figure.value:
                continue
            ratio = recompute(figures, cell, key, figures.tables)
            if isinstance(ratio.value, Decimal):
                if _about(figure.value, ratio.value):
                    continue
                if any(_about(figure.value * shift, ratio.value) for shift in SHIFTS):
                    yield figure, ratio.value, ratio
                    continue
            if (probable := _unusual(cell, figure.value)) is not None:
                yield figure, probable, None


def _about(value: Decimal, other: Decimal) -> bool:
    return abs(value - other) <= SAME * abs(other)


def _unusual(cell: CellKey, value: Decimal) -> Decimal | None:
    """The value with its decimal point moved by two places, if the value is of an unusual size and that is not."""
    usual = USUAL.get(cell) or USUAL_AT_MOST[cell]
    if value > 10 * usual:
        return value / 100
    is_small = cell in USUAL and 0 < value < usual / 30
    return value * 100 if is_small and value * 100 >= usual / 10 else None
