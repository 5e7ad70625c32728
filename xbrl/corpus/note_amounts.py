"""Notes on amounts that must not be counted: pledged assets, callable Tier 2, own shares, interim profit.

The amount is drawn so that the reported ratio, recomputed without it, falls below its limit or does not.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal

from xbrl.corpus.banks import Bank
from xbrl.corpus.notes import NoteParts, note_finding
from xbrl.corpus.reporting import Figures
from xbrl.corpus.reporting_positions import INSTITUTION
from xbrl.read.render import cell_name
from xbrl.read.report import CellKey

NEAR = 0.35  # probability that an amount misses or passes the limit only just
LIMIT = Decimal("0.25")  # of an exposure to one client or to connected clients, CRR Art. 395(1)


def number(figures: Figures, cell: CellKey) -> Decimal:
    """The figure in a cell that is not an enumeration."""
    value = figures[cell]
    assert isinstance(value, Decimal), f"{cell} is the enumeration member {value}"
    return value


def cell_of(table: str, row: int) -> CellKey:
    """The cell in column c0010."""
    return table, f"r{row:04}", "c0010"


OWN, RATIO, TREA, LCR = "C_01.00", "C_03.00", ("C_02.00.a", "r0010", "c0010"), "C_76.00.a"


@dataclass(frozen=True)
class Leg:
    """A ratio that an amount is taken out of: numerator, denominator, the ratio itself, its limit."""

    numerator: CellKey
    denominator: CellKey
    ratio: CellKey
    limit: CellKey | Decimal


_CET1 = Leg(cell_of(OWN, 20), TREA, cell_of(RATIO, 10), cell_of(RATIO, 170))
_TIER1 = Leg(cell_of(OWN, 15), TREA, cell_of(RATIO, 30), cell_of(RATIO, 180))
TOTAL = Leg(cell_of(OWN, 10), TREA, cell_of(RATIO, 50), cell_of(RATIO, 160))


@dataclass(frozen=True)
class Deduction:
    """A kind of note on an amount that must not be counted."""

    rule: str
    legs: tuple[Leg, ...]
    cell: CellKey  # the note is attached to it; the amount is part of this figure
    most: Decimal  # largest plausible share of that figure


DEDUCTIONS = {
    "pledged": Deduction(
        "LCR_PLEDGED",
        (Leg(cell_of(LCR, 10), cell_of(LCR, 20), cell_of(LCR, 30), Decimal(1)),),
        cell_of(LCR, 10),
        Decimal("0.6"),
    ),
    "callable": Deduction("T2_CALLABLE", (TOTAL,), cell_of(OWN, 750), Decimal(1)),
    "own_shares": Deduction("OWN_SHARES", (_CET1, _TIER1, TOTAL), cell_of(OWN, 20), Decimal("0.3")),
    "profit": Deduction("INTERIM_PROFIT", (_CET1, _TIER1, TOTAL), cell_of(OWN, 20), Decimal("0.25")),
}


def amount_note(rng: random.Random, kind: str, case: str, bank: Bank, figures: Figures) -> NoteParts | None:
    """A note of a kind in `DEDUCTIONS`; None if these figures do not allow it.

    The ratio without the amount is below its limit or not. A Tier 2 instrument whose call opens after five years or more
    does not matter, although the ratio without it would be below.
    """
    deduction = DEDUCTIONS[kind]
    needed = {cell for leg in deduction.legs for cell in (leg.numerator, leg.denominator, leg.ratio)}
    needed |= {leg.limit for leg in deduction.legs if not isinstance(leg.limit, Decimal)}
    if not {*needed, deduction.cell} <= set(figures):
        return None
    room = min(_room(leg, figures) for leg in deduction.legs)
    most = deduction.most * number(figures, deduction.cell)
    late_call = kind == "callable" and case == "figures" and rng.random() < 0.5
    crosses = case == "decides" or late_call or (case == "words" and rng.random() < 0.6)
    amount = _draw_amount(rng, room, most, crosses)
    if amount is None or not _keeps_the_rest(kind, figures, amount):
        return None
    unit = Decimal(1).scaleb(-bank.ratio_decimals)
    without = [(leg, _without(leg, figures, amount).quantize(unit, ROUND_HALF_EVEN)) for leg in deduction.legs]
    below = [(leg, value) for leg, value in without if value < _limit(leg, figures)]
    if bool(below) != crosses or min(abs(value - _limit(leg, figures)) for leg, value in without) < unit:
        return None
    shown = below or [min(without, key=lambda one: one[1] - _limit(one[0], figures))]
    fields = {"amount": money(amount, bank.currency)}
    if kind == "callable":
        fields["years"] = str(rng.randint(5, 8) if late_call else rng.randint(2, 4))
    if case == "words" or late_call:
        return fields, (deduction.cell,), [note_finding(case, deduction.rule, cell_name(shown[0][0].ratio))]
    findings = [
        note_finding(case, deduction.rule, cell_name(leg.ratio), value, _limit(leg, figures)) for leg, value in shown
    ]
    return fields, (deduction.cell,), findings


def _limit(leg: Leg, figures: Figures) -> Decimal:
    return leg.limit if isinstance(leg.limit, Decimal) else number(figures, leg.limit)


def _room(leg: Leg, figures: Figures) -> Decimal:
    """The amount that can be taken out of the numerator until the ratio is at its limit."""
    return number(figures, leg.numerator) - _limit(leg, figures) * number(figures, leg.denominator)


def _without(leg: Leg, figures: Figures, amount: Decimal) -> Decimal:
    return (number(figures, leg.numerator) - amount) / number(figures, leg.denominator)


def _draw_amount(rng: random.Random, room: Decimal, most: Decimal, crosses: bool) -> Decimal | None:
    """An amount above `room` (or below it) and up to `most`, with three significant digits; None if there is none."""
    if room <= 0 or (crosses and room >= most):
        return None
    if rng.random() < NEAR:
        factor = 1 + Decimal(rng.randint(5, 60)) / 1000 * (1 if crosses else -1)
        amount = room * factor
    elif crosses:
        amount = room + (min(most, 3 * room) - room) * Decimal(rng.randint(20, 1000)) / 1000
    else:
        amount = min(room, most) * Decimal(rng.randint(150, 980)) / 1000
    amount = amount.quantize(Decimal(1).scaleb(amount.adjusted() - 2)) if amount > 1000 else Decimal(0)
    return Decimal(f"{amount:f}") if 1000 <= amount <= most else None


def _keeps_the_rest(kind: str, figures: Figures, amount: Decimal) -> bool:
    """Whether less Tier 1 capital leaves the leverage ratio and the shares of clients within their limits."""
    tier1 = figures.get(cell_of(OWN, 15))
    if kind not in ("own_shares", "profit") or not isinstance(tier1, Decimal):
        return True
    left = (tier1 - amount) / tier1
    ratio = figures.get(cell_of("C_47.00", 340), Decimal(1))
    limit = figures.get(cell_of("C_47.00", 440), Decimal("0.045"))
    assert isinstance(ratio, Decimal) and isinstance(limit, Decimal)
    largest = max((share for _, share in clients(figures) if share <= LIMIT), default=Decimal(0))
    return ratio * left >= limit and largest <= LIMIT * left


def clients(figures: Figures) -> Iterator[tuple[str, Decimal]]:
    """(row, share of Tier 1) of each client that is no institution."""
    for table, row, column in figures:
        if (table, column) == ("C_28.00", "c350") and figures.get(("C_27.00", row, "c070")) != INSTITUTION:
            yield row, number(figures, (table, row, column))


def money(amount: Decimal, currency: str) -> str:
    """An amount in a sentence: `EUR 12.4 million`."""
    for name, exponent in (("billion", 9), ("million", 6)):
        if amount >= Decimal(1).scaleb(exponent):
            return f"{currency} {amount.scaleb(-exponent).normalize():f} {name}"
    return f"{currency} {amount.scaleb(-3).normalize():f} thousand"
