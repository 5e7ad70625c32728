"""The notes of the full profile: which kind, what it says, and what follows from it together with the figures.

A note decides, or it does not because of its words, or it does not because of the figures. Amounts are drawn so that the
reported ratio, recomputed without them, falls below its limit or does not. All eight kinds occur in sound reports and in
reports with other violations.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_EVEN, Decimal

from data.regulator.banks import Bank
from data.regulator.dates import DAYS_TO_REMIT, days_after, long_date, quarter_end
from data.regulator.findings import Finding, note_rules
from data.regulator.notes import PlannedNote
from data.regulator.render import cell_name
from data.regulator.report import CellKey
from data.regulator.reporting import Figures
from data.regulator.reporting_positions import INSTITUTION

KINDS = ("pledged", "connected", "callable", "own_shares", "profit", "waiver", "late", "guidance")
CASES = ("decides", "words", "figures")  # the note decides; it does not because of its words, or of the figures
CASE_WEIGHTS = (3, 3, 2)
NEAR = 0.35  # probability that an amount misses or passes the limit only just
LIMIT = Decimal("0.25")  # of an exposure to connected clients, CRR Art. 395(1)

_OWN, _RATIO, _TREA, _LCR = "C_01.00", "C_03.00", ("C_02.00.a", "r0010", "c0010"), "C_76.00.a"


def _cell(table: str, row: int) -> CellKey:
    return table, f"r{row:04}", "c0010"


@dataclass(frozen=True)
class Leg:
    """A ratio that an amount is taken out of: numerator, denominator, the ratio itself, its limit."""

    numerator: CellKey
    denominator: CellKey
    ratio: CellKey
    limit: CellKey | Decimal


_CET1 = Leg(_cell(_OWN, 20), _TREA, _cell(_RATIO, 10), _cell(_RATIO, 170))
_TIER1 = Leg(_cell(_OWN, 15), _TREA, _cell(_RATIO, 30), _cell(_RATIO, 180))
_TOTAL = Leg(_cell(_OWN, 10), _TREA, _cell(_RATIO, 50), _cell(_RATIO, 160))


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
        (Leg(_cell(_LCR, 10), _cell(_LCR, 20), _cell(_LCR, 30), Decimal(1)),),
        _cell(_LCR, 10),
        Decimal("0.6"),
    ),
    "callable": Deduction("T2_CALLABLE", (_TOTAL,), _cell(_OWN, 750), Decimal(1)),
    "own_shares": Deduction("OWN_SHARES", (_CET1, _TIER1, _TOTAL), _cell(_OWN, 20), Decimal("0.3")),
    "profit": Deduction("INTERIM_PROFIT", (_CET1, _TIER1, _TOTAL), _cell(_OWN, 20), Decimal("0.25")),
}
# Engine rules on the same figures: a note is planted only where none of them finds anything.
_CAPITAL = {"CET1", "T1", "TC", "TSCR", "OCR", "CBR", "OF", "AT1", "CCB", "LR", "OUTPUT"}
_RELATED = {"pledged": {"LCR"}, "callable": _CAPITAL, "own_shares": _CAPITAL, "profit": _CAPITAL, "connected": {"LE"}}
# what a waiver covers -> (level that breaches it, rules that it lifts, article)
WAIVERS = {
    "the liquidity requirements (Article 8 CRR)": ({"lcr": "minimum"}, ("LCR_MIN", "NSFR_MIN"), "CRR Art. 8"),
    "the requirements on liquidity and stable funding (Article 8 CRR)": (
        {"nsfr": "minimum"},
        ("LCR_MIN", "NSFR_MIN"),
        "CRR Art. 8",
    ),
    "the large exposure limits (Article 7 CRR)": ({"exposure": "over"}, ("LE_LIMIT",), "CRR Art. 7"),
}
_CELLS_OF_WAIVER = {"LCR_MIN": _cell(_LCR, 30), "NSFR_MIN": ("C_84.00.a", "r0220", "c0040")}


@dataclass(frozen=True)
class NotePlan:
    """What a note is to do, before the figures are known."""

    kind: str
    case: str
    scope: str = ""  # of a waiver, a key of WAIVERS
    guidance: Decimal = Decimal(0)  # as a fraction of the total risk exposure amount

    @property
    def levels(self) -> dict[str, str]:
        """The levels of `economics.py` that the note needs: something to waive, or a requirement that is missed."""
        if self.kind == "waiver":
            return WAIVERS[self.scope][0]
        return {"total": "overall"} if self.kind == "guidance" and self.case != "decides" else {}

    @property
    def is_inflated(self) -> bool:
        """Whether the reported requirements contain guidance."""
        return self.kind == "guidance" and self.case != "words"


def draw_plan(rng: random.Random, bank: Bank) -> NotePlan:
    """A kind of note and what it does. Only a bank that reports on an individual basis can have a waiver."""
    weights = [0 if kind == "waiver" and bank.scope != "IND" else 2 if kind == "waiver" else 1 for kind in KINDS]
    kind = rng.choices(KINDS, weights)[0]
    case = rng.choices(CASES, CASE_WEIGHTS)[0]
    scope = rng.choice(sorted(WAIVERS)) if kind == "waiver" else ""
    return NotePlan(kind, case, scope, Decimal(rng.randint(2, 8)) * Decimal("0.0025"))


def with_guidance(plan: NotePlan, figures: Figures) -> Figures:
    """The figures with Pillar 2 guidance in the requirement rows (C 03.00 r0130, r0160) if the plan asks for it.

    The rows on guidance (r0190 to r0220) are then not reported.
    """
    if plan.kind != "guidance":
        return figures
    changed = {key: value for key, value in figures.items() if not (key[0] == _RATIO and "r0190" <= key[1] <= "r0220")}
    for key in (_cell(_RATIO, 130), _cell(_RATIO, 160)) if plan.is_inflated else ():
        if key in changed:
            changed[key] = _number(changed, key) + plan.guidance
    return changed


def plan_note(
    rng: random.Random, plan: NotePlan, bank: Bank, period: str, figures: Figures, found: set[str]
) -> PlannedNote | None:
    """The note on these figures, of which the engine finds the rules `found` violated. None if they do not allow it."""
    if {rule.partition("_")[0] for rule in found} & _RELATED.get(plan.kind, set()):
        return None
    planned = None
    if plan.kind in DEDUCTIONS:
        planned = _deduction(rng, plan, bank, figures)
    elif plan.kind == "connected":
        planned = _connected(rng, plan, bank, figures)
    elif plan.kind == "waiver":
        planned = _waiver(rng, plan, period, figures, found)
    elif plan.kind == "late":
        planned = _late(rng, plan, period, figures)
    elif _allows_guidance(plan, figures, found):
        planned = _guidance(plan)
    if planned is None:
        return None
    fields, cells, findings = planned
    own = tuple(replace(finding, entity=bank.entity, period=period, kind=plan.kind) for finding in findings)
    return PlannedNote(plan.kind, plan.case != "words", tuple(fields.items()), cells, own)


_Parts = tuple[dict[str, str], tuple[CellKey, ...], list[Finding]]  # placeholders, cells, what follows


def _finding(
    plan: NotePlan, rule: str, cell: str, value: Decimal | None = None, limit: Decimal | None = None
) -> Finding:
    """A line of findings.csv, still without bank and date. A note that says no has no value."""
    known = note_rules()[rule]
    state = "violated" if plan.case == "decides" else "benign"
    if plan.case == "words":
        value = limit = None
    return Finding("", "", rule, state, cell, value, limit, known.legal)


def _deduction(rng: random.Random, plan: NotePlan, bank: Bank, figures: Figures) -> _Parts | None:
    """An amount that must not be counted, of which the ratio without it is below its limit or not."""
    deduction = DEDUCTIONS[plan.kind]
    needed = {cell for leg in deduction.legs for cell in (leg.numerator, leg.denominator, leg.ratio)}
    needed |= {leg.limit for leg in deduction.legs if not isinstance(leg.limit, Decimal)}
    if not {*needed, deduction.cell} <= set(figures):
        return None
    room = min(_room(leg, figures) for leg in deduction.legs)
    most = deduction.most * _number(figures, deduction.cell)
    crosses = plan.case == "decides" or (plan.case == "words" and rng.random() < 0.6)
    amount = _draw_amount(rng, room, most, crosses)
    if amount is None or not _keeps_the_rest(plan, figures, amount):
        return None
    unit = Decimal(1).scaleb(-bank.ratio_decimals)
    without = [(leg, _without(leg, figures, amount).quantize(unit, ROUND_HALF_EVEN)) for leg in deduction.legs]
    below = [(leg, value) for leg, value in without if value < _limit(leg, figures)]
    if bool(below) != crosses or min(abs(value - _limit(leg, figures)) for leg, value in without) < unit:
        return None
    shown = below or [min(without, key=lambda one: one[1] - _limit(one[0], figures))]
    findings = [
        _finding(plan, deduction.rule, cell_name(leg.ratio), value, _limit(leg, figures)) for leg, value in shown
    ]
    fields = {"amount": money(amount, bank.currency)}
    if plan.kind == "callable":
        years = rng.randint(2, 4)
        if plan.case == "figures" and rng.random() < 0.5:  # a late call makes the amount irrelevant
            years = rng.randint(5, 8)
        fields["years"] = str(years)
    return fields, (deduction.cell,), findings[:1] if plan.case == "words" else findings


def _number(figures: Figures, cell: CellKey) -> Decimal:
    value = figures[cell]
    assert isinstance(value, Decimal), f"{cell} is the enumeration member {value}"
    return value


def _limit(leg: Leg, figures: Figures) -> Decimal:
    return leg.limit if isinstance(leg.limit, Decimal) else _number(figures, leg.limit)


def _room(leg: Leg, figures: Figures) -> Decimal:
    """The amount that can be taken out of the numerator until the ratio is at its limit."""
    return _number(figures, leg.numerator) - _limit(leg, figures) * _number(figures, leg.denominator)


def _without(leg: Leg, figures: Figures, amount: Decimal) -> Decimal:
    return (_number(figures, leg.numerator) - amount) / _number(figures, leg.denominator)


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


def _keeps_the_rest(plan: NotePlan, figures: Figures, amount: Decimal) -> bool:
    """Whether less Tier 1 capital leaves the leverage ratio and the shares of clients within their limits."""
    tier1 = figures.get(_cell(_OWN, 15))
    if plan.kind not in ("own_shares", "profit") or not isinstance(tier1, Decimal):
        return True
    left = (tier1 - amount) / tier1
    ratio = figures.get(_cell("C_47.00", 340), Decimal(1))
    limit = figures.get(_cell("C_47.00", 440), Decimal("0.045"))
    assert isinstance(ratio, Decimal) and isinstance(limit, Decimal)
    largest = max((share for _, share in _clients(figures) if share <= LIMIT), default=Decimal(0))
    return ratio * left >= limit and largest <= LIMIT * left


def _clients(figures: Figures) -> Iterator[tuple[str, Decimal]]:
    """(row, share of Tier 1) of each client that is no institution."""
    for table, row, column in figures:
        if (table, column) == ("C_28.00", "c350") and figures.get(("C_27.00", row, "c070")) != INSTITUTION:
            yield row, _number(figures, (table, row, column))


def _connected(rng: random.Random, plan: NotePlan, bank: Bank, figures: Figures) -> _Parts | None:
    """Two clients below the limit that are said to be connected; together they are above it or not."""
    clients = [(row, share) for row, share in _clients(figures) if share <= LIMIT]
    crosses = plan.case == "decides" or (plan.case == "words" and rng.random() < 0.6)
    pairs = [
        (one, two, share + other)
        for one, share in clients
        for two, other in clients
        if one != two and (share + other > LIMIT) == crosses
    ]
    if not pairs:
        return None
    one, two, total = rng.choice(pairs)
    cells = tuple(("C_28.00", row, "c350") for row in (one, two))
    return {"one": one, "two": two}, cells, [_finding(plan, "LE_CONNECTED", cell_name(cells[0]), total, LIMIT)]


def _waiver(rng: random.Random, plan: NotePlan, period: str, figures: Figures, found: set[str]) -> _Parts | None:
    """A waiver that lifts what the engine finds, is not granted, or ended before the reference date."""
    _, rules, article = WAIVERS[plan.scope]
    cells = {rule: _CELLS_OF_WAIVER.get(rule) for rule in rules if rule in found}
    if "LE_LIMIT" in cells:
        over = [row for row, share in _clients(figures) if share > LIMIT]
        if len(over) != 1:
            return None
        cells = {"LE_LIMIT": ("C_28.00", over[0], "c350")}
    known = {rule: cell for rule, cell in cells.items() if cell is not None and cell in figures}
    if not known:
        return None
    expired = plan.case == "figures" or (plan.case == "words" and rng.random() < 0.4)
    until = quarter_end(-rng.randint(1, 6) if expired else rng.randint(1, 8), period)
    state = "lifted" if plan.case == "decides" else "benign"
    findings = [Finding("", "", rule, state, cell_name(cell), legal=article) for rule, cell in known.items()]
    return {"scope": plan.scope, "until": long_date(until)}, tuple(known.values())[:1], findings


def _late(rng: random.Random, plan: NotePlan, period: str, figures: Figures) -> _Parts | None:
    """The date of submission, after the remittance date or not. One or two days are left out: they may be holidays."""
    cell = next((cell for cell in (_cell(_OWN, 10), _TREA, _cell(_RATIO, 10)) if cell in figures), None)
    if cell is None:
        return None
    late = plan.case == "decides" or (plan.case == "words" and rng.random() < 0.7)
    days = DAYS_TO_REMIT + (rng.randint(3, 45) if late else -rng.randint(0, 20))
    finding = _finding(plan, "LATE_FILING", cell_name(cell), Decimal(days), Decimal(DAYS_TO_REMIT))
    return {"sent": long_date(days_after(period, days))}, (cell,), [finding]


def _allows_guidance(plan: NotePlan, figures: Figures, found: set[str]) -> bool:
    """Whether total capital misses the reported overall requirement alone, and the true one as the plan says."""
    needed = (_cell(_RATIO, 50), _cell(_RATIO, 130), _cell(_RATIO, 160))
    capital = {rule for rule in found if rule.partition("_")[0] in _CAPITAL - {"LR", "OUTPUT"}}
    if capital != {"OCR_TC"} or not set(needed) <= set(figures):
        return False
    ratio, true = _number(figures, needed[0]), _number(figures, needed[2]) - (plan.guidance if plan.is_inflated else 0)
    return (ratio >= true) == (plan.case == "decides")


def _guidance(plan: NotePlan) -> _Parts:
    """Guidance that is reported as part of the requirement, or not; without it the requirement is met, or not."""
    state = "lifted" if plan.case == "decides" else "benign"
    finding = Finding("", "", "OCR_TC", state, cell_name(_TOTAL.ratio), legal="CRD Art. 104b")
    return {"share": f"{(plan.guidance * 100).normalize():f}%"}, (_cell(_RATIO, 160),), [finding]


def money(amount: Decimal, currency: str) -> str:
    """An amount in a sentence: `EUR 12.4 million`."""
    for name, exponent in (("billion", 9), ("million", 6)):
        if amount >= Decimal(1).scaleb(exponent):
            return f"{currency} {amount.scaleb(-exponent).normalize():f} {name}"
    return f"{currency} {amount.scaleb(-3).normalize():f} thousand"
