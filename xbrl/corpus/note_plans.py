"""The notes of the full profile: which kind, what it says, and what follows from it together with the figures.

A note decides, or it does not because of its words, or it does not because of the figures. Amounts are drawn so that the
reported ratio, recomputed without them, falls below its limit or does not. All five kinds occur in sound reports and in
reports with other violations.
"""

import random
from dataclasses import dataclass, replace
from decimal import Decimal

from xbrl.corpus.banks import Bank
from xbrl.corpus.note_amounts import (
    DEDUCTIONS,
    LCR,
    LIMIT,
    OWN,
    RATIO,
    TOTAL,
    TREA,
    amount_note,
    cell_of,
    clients,
    number,
)
from xbrl.corpus.notes import NoteParts, PlannedNote, note_finding
from xbrl.corpus.reporting import Figures
from xbrl.read.render import cell_name
from xbrl.rules.dates import DAYS_TO_REMIT, days_after, long_date, quarter_end
from xbrl.rules.findings import Finding

KINDS = ("pledged", "connected", "own_shares", "profit", "waiver")
CASES = ("decides", "words", "figures")  # the note decides; it does not because of its words, or of the figures
CASE_WEIGHTS = (3, 3, 2)


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
_CELLS_OF_WAIVER = {"LCR_MIN": cell_of(LCR, 30), "NSFR_MIN": ("C_84.00.a", "r0220", "c0040")}


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
    weights = dict.fromkeys(KINDS, 1) | {"waiver": 3 if bank.scope == "IND" else 0, "connected": 2}
    kind = rng.choices(KINDS, list(weights.values()))[0]
    case = rng.choices(CASES, CASE_WEIGHTS)[0]
    scope = rng.choice(sorted(WAIVERS)) if kind == "waiver" else ""
    return NotePlan(kind, case, scope, Decimal(rng.randint(2, 8)) * Decimal("0.0025"))


def with_guidance(plan: NotePlan, figures: Figures) -> Figures:
    """The figures with Pillar 2 guidance in the requirement rows (C 03.00 r0130, r0160) if the plan asks for it.

    The rows on guidance (r0190 to r0220) are then not reported.
    """
    if plan.kind != "guidance":
        return figures
    changed = {key: value for key, value in figures.items() if not (key[0] == RATIO and "r0190" <= key[1] <= "r0220")}
    for key in (cell_of(RATIO, 130), cell_of(RATIO, 160)) if plan.is_inflated else ():
        if key in changed:
            changed[key] = number(changed, key) + plan.guidance
    return changed


def plan_note(
    rng: random.Random, plan: NotePlan, bank: Bank, period: str, figures: Figures, found: set[str]
) -> PlannedNote | None:
    """The note on these figures, of which the engine finds the rules `found` violated. None if they do not allow it."""
    if {rule.partition("_")[0] for rule in found} & _RELATED.get(plan.kind, set()):
        return None
    planned = None
    if plan.kind in DEDUCTIONS:
        planned = amount_note(rng, plan.kind, plan.case, bank, figures)
    elif plan.kind == "connected":
        planned = _connected(rng, plan, bank, figures)
    elif plan.kind == "waiver":
        planned = _waiver(rng, plan, period, figures, found)
    elif plan.kind == "late":
        planned = _late(rng, plan, period, figures)
    elif _allows_guidance(plan, figures, found):
        planned = _guidance(plan, figures)
    if planned is None:
        return None
    fields, cells, findings = planned
    own = tuple(replace(finding, entity=bank.entity, period=period, kind=plan.kind) for finding in findings)
    return PlannedNote(plan.kind, plan.case != "words", tuple(fields.items()), cells, own)


def _connected(rng: random.Random, plan: NotePlan, bank: Bank, figures: Figures) -> NoteParts | None:
    """Two clients below the limit that are said to be connected; together they are above it or not."""
    below = [(row, share) for row, share in clients(figures) if share <= LIMIT]
    crosses = plan.case == "decides" or (plan.case == "words" and rng.random() < 0.6)
    pairs = [
        (one, two, share + other)
        for one, share in below
        for two, other in below
        if one != two and (share + other > LIMIT) == crosses
    ]
    if not pairs:
        return None
    one, two, total = rng.choice(pairs)
    cells = tuple(("C_28.00", row, "c350") for row in (one, two))
    return {"one": one, "two": two}, cells, [note_finding(plan.case, "LE_CONNECTED", cell_name(cells[0]), total, LIMIT)]


def _waiver(rng: random.Random, plan: NotePlan, period: str, figures: Figures, found: set[str]) -> NoteParts | None:
    """A waiver that lifts what the engine finds, is not granted, or ended before the reference date."""
    _, rules, article = WAIVERS[plan.scope]
    cells = {rule: _CELLS_OF_WAIVER.get(rule) for rule in rules if rule in found}
    if "LE_LIMIT" in cells:
        over = [row for row, share in clients(figures) if share > LIMIT]
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


def _late(rng: random.Random, plan: NotePlan, period: str, figures: Figures) -> NoteParts | None:
    """The date of submission, after the remittance date or not. One or two days are left out: they may be holidays."""
    cell = next((cell for cell in (cell_of(OWN, 10), TREA, cell_of(RATIO, 10)) if cell in figures), None)
    if cell is None:
        return None
    late = plan.case == "decides" or (plan.case == "words" and rng.random() < 0.7)
    days = DAYS_TO_REMIT + (rng.randint(3, 45) if late else -rng.randint(0, 20))
    finding = note_finding(plan.case, "LATE_FILING", cell_name(cell), Decimal(days), Decimal(DAYS_TO_REMIT))
    return {"sent": long_date(days_after(period, days))}, (cell,), [finding]


def _allows_guidance(plan: NotePlan, figures: Figures, found: set[str]) -> bool:
    """Whether total capital misses the reported overall requirement alone, and the true one as the plan says."""
    needed = (cell_of(RATIO, 50), cell_of(RATIO, 130), cell_of(RATIO, 160))
    capital = {rule for rule in found if rule.partition("_")[0] in _CAPITAL - {"LR", "OUTPUT"}}
    if capital != {"OCR_TC"} or not set(needed) <= set(figures):
        return False
    ratio, true = number(figures, needed[0]), number(figures, needed[2]) - (plan.guidance if plan.is_inflated else 0)
    return (ratio >= true) == (plan.case == "decides")


def _guidance(plan: NotePlan, figures: Figures) -> NoteParts:
    """Guidance that is reported as part of the requirement, or not; without it the requirement is met, or not.

    If it is not met even without the guidance, the finding has the true requirement.
    """
    cell, requirement = cell_name(TOTAL.ratio), number(figures, cell_of(RATIO, 160))
    if plan.case == "figures":
        finding = Finding("", "", "OCR_TC", "violated", cell, limit=requirement - plan.guidance)
    else:
        state = "lifted" if plan.case == "decides" else "benign"
        finding = Finding("", "", "OCR_TC", state, cell, legal="CRD Art. 104b")
    return {"share": f"{(plan.guidance * 100).normalize():f}%"}, (cell_of(RATIO, 160),), [finding]
