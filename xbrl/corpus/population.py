"""The population of invented bank reports. Each report is generated around its note, or has no note.

Reports have up to three planted problems (breaches and filing errors), near misses and duties. They are drawn independently
of the note, so that a model cannot guess the note from the problems or the problems from the note. Random numbers come from
two kinds of streams: `rng` is seeded per report, `bank_rng` per bank, so that all quarters of a bank draw the same values.

A filing error changes one figure that the rule reads: the figure is mistyped, filed in the wrong unit, given the wrong sign,
left out, or moved by the smallest amount that violates the rule. A tolerated difference moves a figure by the largest amount
that does not violate the rule. Together they are near misses on both sides of the tolerance.
"""

import datetime
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal

from xbrl.answers.profiles import Profile
from xbrl.corpus.banks import LEI_PREFIX, Bank, in_euro, lei, make_bank
from xbrl.corpus.economics import Economics, draw_economics, draw_levels, in_round_amounts
from xbrl.corpus.note_texts import GROUP, NO_NOTE, HandNote
from xbrl.corpus.report_figures import Figures, Filing, draw_figures, leave_out, shorten, violated
from xbrl.read.filed_report import CellKey
from xbrl.rules.note_facts import BUFFER, CET1, LCR, OUTFLOW, TREA
from xbrl.rules.rules import Rule, built_in_rules

FIRST_PERIOD, QUARTERS = "2025-03-31", 6  # reference dates of reports without a note
# Violated rules per report. One ratio below its minimum misses up to three requirements.
MAX_VIOLATIONS, MAX_OF_SHORT = 9, 5
CLEAN = 0.36  # probability of a report without planted problems
PROBLEMS = (48, 36, 16)  # weights of one, two and three problems in a report with problems
PERSISTS = 0.5  # probability that a quarter already has the problems of the next quarter
# Probability of an LCR below 100% if the note is about a waiver and does not state the LCR, by whether the waiver is in force.
# Notes that do state the LCR mostly state a low LCR with a waiver and a sound LCR without one. These probabilities balance that:
# over all notes on waivers, half of the reports have a low LCR, with a waiver and without one.
LOW_LCR = {True: 0.4, False: 0.8}
EXACT_ATTEMPTS = 80  # from then on, the note's statements have precedence over the draw of `crosses`
Violates = Callable[[Figures], bool]  # whether the figures violate the rule in question
# The weight of most rules is 10. A rule on the sign of a surplus can only fail where a deficit is. The other rules apply to few banks.
WEIGHTS = {"AT1_EXCESS": 40, "LE_PCT": 20, "FX_12_5": 20, "FX_XTAB": 20, "FIN_BS": 18, "FIN_PL": 18}
WEIGHTS |= {"CET1_SIGN": 40, "T1_SIGN": 40, "TC_SIGN": 40}
# Rules for which a figure with the wrong sign is a plausible error.
SIGN_FLIPS = (
    "AT1_EXCESS",
    "LCR_L1ADJ",
    "FIN_PL",
    *(f"{tier}_{ending}" for tier in ("CET1", "T1", "TC") for ending in ("SURPLUS", "SIGN")),
)
STATED: dict[str, CellKey] = {"nsfr": ("C_84.00.a", "r0220", "c0040"), "leverage": ("C_47.00", "r0340", "c0010")}
SHOWN_TWICE = {("C_01.00", "r0015", "c0010"), ("C_47.00", "r0320", "c0010")}  # Tier 1 is one fact in two tables
MAX_CHANGE = 2  # the largest change of a figure, as a multiple of the figure


def make_filings(
    seed: int,
    index: int,
    count: int,
    profile: Profile,
    note: HandNote | None = None,
    pair: HandNote | None = None,
) -> list[Filing]:
    """Return the filings of bank `index` for `count` quarters, oldest first. The last filing has the note. Deterministic.

    `pair` is the second note of a minimal pair. The last filing is then followed by a copy with that note. The copy has the
    date of its note; if both notes have the same date, it comes from a bank of the same name with another code.
    """
    filings: list[Filing] = []
    following, note, name = None, note or NO_NOTE, f"{seed} {index}"
    bank = replace(make_bank(seed, index), scope=random.Random(f"scope {name}").choice(("CON", "CON", "IND")))
    if profile.is_short:
        bank = replace(bank, decimals=-3, ratio_decimals=4)
    if note.id:
        bank = replace(in_euro(bank), scope="IND" if "waiver" in note.kinds else bank.scope)
    if pair:  # the output floor differs between years and would tell the two reports apart
        bank = replace(bank, uses_irb=False)
    last = note.period or quarter_end(random.Random(f"period {name}").randrange(QUARTERS), FIRST_PERIOD)
    for quarter in range(count):
        period = quarter_end(-quarter, last)
        filing, following = _draw_filing(bank, period, name, profile, NO_NOTE if quarter else note, following)
        filings.insert(0, filing)
    if pair:
        filings[-1] = replace(filings[-1], pair=note.id)
        filings.append(_twin(filings[-1], pair))
    return filings


def quarter_end(quarter: int, start: str) -> str:
    """Return the reference date `quarter` quarters after `start`, as YYYY-MM-DD."""
    first = datetime.date.fromisoformat(start)
    month = first.month + 3 * quarter
    next_day = datetime.date(first.year + month // 12, month % 12 + 1, 1)
    return (next_day - datetime.timedelta(days=1)).isoformat()


def _draw_filing(
    bank: Bank, period: str, name: str, profile: Profile, note: HandNote, following: Economics | None
) -> tuple[Filing, Economics]:
    """Draw the filing of a bank for one date. Return it with its amounts, which are `following` for the previous quarter."""
    rng = random.Random(f"filing {name} {period} {note.id}")
    crosses = rng.random() < 0.5
    lcr_is_low = rng.random() < LOW_LCR[any(fact.kind == "waiver" and fact.applies for fact in note.facts)]
    is_clean, is_tolerated = rng.random() < CLEAN, rng.random() < 0.35
    persisting = following.levels if following and rng.random() < PERSISTS else None
    for attempt in itertools.count():
        if persisting is not None:
            levels = persisting
            errors = draw_errors(rng, rng.random() < profile.filing_errors / 2, profile.rules)
        else:
            levels, errors = ({}, []) if is_clean else _draw_problems(rng, profile)
        if "waiver" in note.kinds and lcr_is_low:
            levels = levels | {"lcr": "minimum"}
        economics = draw_economics(rng, bank, levels, note, crosses, following, exactly=attempt < EXACT_ATTEMPTS)
        if economics and profile.is_short:
            economics = in_round_amounts(economics)
        figures = economics and draw_figures(rng, random.Random(f"habit {name}"), bank, economics, period)
        if not economics or not figures:
            continue
        attached, kept = (), _kept(note, economics)
        if note.id:
            codes = {client.name: client.code for client in economics.clients}
            cells = [(table, codes.get(row, row), column) for table, row, column in note.cells()]
            attached = tuple(cells) or (rng.choice((BUFFER, CET1, LCR)),)  # a note without facts gets a random figure
        figures, unfiled = leave_out(rng, random.Random(f"modules {name}"), figures, (*kept, *attached))
        if profile.is_short:
            figures, unfiled = shorten(rng, figures, (*kept, *attached)), ()
        figures = _plant(rng, bank, period, figures, errors, kept, profile.rules, is_tolerated)
        if figures is None:
            continue
        violated_ids = violated(bank, period, figures, profile.rules)
        if {rule.id for rule in errors} <= violated_ids and len(violated_ids) <= (
            MAX_OF_SHORT if profile.is_short else MAX_VIOLATIONS
        ):
            filing = Filing(bank, period, figures, unfiled, note, attached, dropped=economics.dropped)
            return filing, economics
    raise AssertionError("unreachable")


def _draw_problems(rng: random.Random, profile: Profile) -> tuple[dict[str, str], list[Rule]]:
    """Draw (levels, violated filing rules) of a report with planted problems."""
    problems = 1 + rng.choices(range(len(PROBLEMS)), PROBLEMS)[0]
    error_count = sum(rng.random() < profile.filing_errors for _ in range(problems))
    return draw_levels(rng, problems - error_count), draw_errors(rng, error_count, profile.rules)


def _kept(note: HandNote, economics: Economics) -> list[CellKey]:
    """Return the cells that the note is about. They are always reported, and no error is planted there."""
    codes = [client.code for client in economics.clients if client.name in note.clients]
    kept: list[CellKey] = [("C_28.00", code, column) for code in codes for column in ("c330", "c350")]
    kinds, states = note.kinds, {name.partition("_")[0] for name in note.states}
    if kinds & {"pledged", "waiver"} or states & {"buffer", "outflow", "lcr"}:
        kept += [BUFFER, OUTFLOW, LCR]
    if kinds & {"own_shares", "profit"} or "cet1" in states:
        kept += [CET1, TREA, *(("C_03.00", f"r{row:04}", "c0010") for row in (10, 130, 140, 150, 160, 170, 180))]
        kept += [("C_01.00", row, "c0010") for row in ("r0010", "r0015")]
    return kept + [cell for name, cell in STATED.items() if name in states]


def _plant(
    rng: random.Random,
    bank: Bank,
    period: str,
    figures: Figures,
    errors: Sequence[Rule],
    kept: Sequence[CellKey],
    rules: Sequence[Rule],
    is_tolerated: bool,
) -> Figures | None:
    """Return the figures with the errors, and with differences just within tolerance if `is_tolerated`.

    Return None if an error cannot be planted in this report.
    """
    free = {key: value for key, value in figures.items() if key not in kept}
    near = [rule for rule in draw_errors(rng, 2, rules) if rule not in errors] if is_tolerated else []
    for rule, inside in [*((rule, True) for rule in near), *((rule, False) for rule in errors)]:
        changed = _changed(
            rng, rule, figures, free, lambda draft, rule=rule: bool(violated(bank, period, draft, [rule])), inside
        )
        if changed is None and not inside:
            return None
        figures = changed or figures
    return figures


def _twin(filing: Filing, note: HandNote) -> Filing:
    """Return the second member of a minimal pair: the same figures with the second note.

    If this note calls two clients one group ("A + B"), their two rows become one row with the sum.
    """
    bank, figures = filing.bank, dict(filing.figures)
    if note.period == filing.period:
        bank = replace(bank, entity=lei(LEI_PREFIX + bank.entity[17:5:-1]))
    codes = {value: key[1] for key, value in figures.items() if key[0] == "C_27.00" and key[2] == "c021"}
    attached = filing.attached
    for name in note.clients:
        first, group, second = name.partition(GROUP)
        if group and first in codes and second in codes:
            for key in [key for key in figures if key[1] == codes[second]]:
                value, merged_key = figures.pop(key), (key[0], codes[first], key[2])
                present = figures.get(merged_key, Decimal(0))
                if isinstance(value, Decimal) and isinstance(present, Decimal):
                    figures[merged_key] = value + present
            figures["C_27.00", codes[first], "c021"] = name
            attached = tuple(cell for cell in attached if cell[1] != codes[second])
    return replace(filing, bank=bank, period=note.period, figures=figures, note=note, attached=attached)


def draw_errors(rng: random.Random, count: int, rules: Sequence[Rule]) -> list[Rule]:
    """Draw up to `count` different filing rules, with more weight on rules that apply to few banks."""
    left = [rule for rule in rules if rule.kind == "filing"]
    drawn: list[Rule] = []
    for _ in range(min(count, len(left))):
        drawn += rng.choices(left, [WEIGHTS.get(rule.id, 10) for rule in left])
        left.remove(drawn[-1])
    return drawn


def _changed(
    rng: random.Random, rule: Rule, figures: Figures, free: Figures, violates: Violates, inside: bool
) -> Figures | None:
    """Copy `figures` and change one of the `free` ones: so that `rule` is violated, or if `inside`, just tolerates the change.

    Return None if no figure of this report can be changed like this.
    """
    key = _figure_to_change(rng, rule, figures, free, violates)
    if key is None:
        return None
    if not inside:
        value = figures[key]
        assert isinstance(value, Decimal)
        changes: list[Figures] = [{**figures, key: _mistyped(rng, value)}]
        if rule.id in SIGN_FLIPS:
            changes.append({**figures, key: -value})
        if rule.absent_cell == "zero" and key[1].startswith("r"):
            changes.append({name: figure for name, figure in figures.items() if name != key})
        rng.shuffle(changes)
        for changed in changes if rng.random() < 0.75 else ():
            if violates(changed):
                return changed
    moved = boundary_value(rng, key, figures, violates, inside)
    return None if moved is None else {**figures, key: moved}


def _figure_to_change(
    rng: random.Random, rule: Rule, figures: Figures, free: Figures, violates: Violates
) -> CellKey | None:
    """Draw a free figure that the rule reads. Figures that many rules read are drawn rarely.

    Return None if no free figure is read by the rule, or if the rule is violated already.
    """
    readers = Counter(cell for reader in built_in_rules() if reader.kind != "trigger" for cell in reader.cells)
    weights = {}
    for key, value in free.items():
        cell = key if key in rule.cells else (key[0], "*", key[2])
        if key in figures and cell in rule.cells and cell not in SHOWN_TWICE and isinstance(value, Decimal):
            weights[key] = 100_000 // readers[cell] ** 3
    if not weights or violates(figures):
        return None
    return rng.choices(list(weights), list(weights.values()))[0]


def boundary_value(
    rng: random.Random, key: CellKey, figures: Figures, violates: Violates, inside: bool
) -> Decimal | None:
    """Return the value of figure `key` at the edge of the rule's tolerance, in a random direction.

    The figure moves by the smallest number of units in the last place that violates the rule; with `inside`, by one unit less.
    Return None if no move within `MAX_CHANGE` violates the rule, or if the figure would not move at all.
    """
    value = figures[key]
    assert isinstance(value, Decimal)
    unit = _unit_in_last_place(value) * rng.choice((-1, 1))
    high = 1
    while not violates({**figures, key: value + unit * high}):
        high *= 2
        if abs(unit) * high > MAX_CHANGE * abs(value):
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if violates({**figures, key: value + unit * middle}) else (middle, high)
    steps = high - 1 if inside else high
    return value + unit * steps if steps else None


def _unit_in_last_place(value: Decimal) -> Decimal:
    """Return the unit of the last digit of a ratio, and for an amount the largest of 10^6, 10^3 and 1 that divides it."""
    exponent = int(value.as_tuple().exponent)
    if exponent < 0:
        return Decimal(1).scaleb(exponent)
    return next(Decimal(unit) for unit in (1_000_000, 1000, 1) if value % unit == 0)


def _mistyped(rng: random.Random, value: Decimal) -> Decimal:
    """Return the figure with a typing error: the wrong unit, two digits swapped, or off by 0.5% to 8%."""
    unit = _unit_in_last_place(value)
    kind = rng.random()
    if kind < 0.12 and unit >= 1000 and abs(value) >= 1_000_000:
        return (value / 1000 / unit).quantize(Decimal(1)) * unit  # filed in thousands instead of units
    digits = str(abs(int(value / unit)))
    places = [place for place in range(len(digits) - 1) if digits[place] != digits[place + 1]]
    if kind < 0.35 and places:
        place = rng.choice(places)
        swapped = digits[:place] + digits[place + 1] + digits[place] + digits[place + 2 :]
        return (Decimal(swapped) * unit).quantize(unit).copy_sign(value)
    difference = (abs(value) * rng.randint(5, 80) / 1000 / unit).quantize(Decimal(1)) * unit
    return value + max(difference, unit).quantize(unit) * rng.choice((-1, 1))
