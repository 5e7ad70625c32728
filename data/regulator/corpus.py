"""Which banks file what: the population of invented reports, from sound ones to those with up to four violations."""

import datetime
import random
from dataclasses import dataclass, field, replace
from decimal import Decimal

from data.regulator.banks import Bank, make_bank
from data.regulator.economics import (
    ALL_BREACHES,
    STEP,
    Economics,
    RatioDistribution,
    WeightedBreaches,
    draw_economics,
    draw_levels,
)
from data.regulator.mutations import TOLERANCE_CELLS, draw_errors, move_within_tolerance, plant_error
from data.regulator.positions import draw_positions
from data.regulator.reporting import Cells, full_cells, short_cells
from data.regulator.rules import Rule, built_in_rules
from data.regulator.trial import template_of, violated, violates

FIRST_PERIOD = datetime.date(2026, 3, 31)  # the modules of DPM release 4.2 hold from here
MAX_VIOLATIONS = 4


@dataclass(frozen=True)
class Profile:
    """How the reports of a corpus look."""

    name: str
    style: str  # of the reports and answers, see render.py
    letters: str  # style of the letters, see directives.py
    instruction: str  # said before each report; may be empty
    quarters: int  # reports of each bank
    clean: float  # chance of a report without violation
    how_many: tuple[int, ...] = (45, 35, 20)  # weights of one, two, three things going wrong in the others
    filing_errors: float = 0.0  # share of those that are filing errors
    near: float = 0.45  # share of ratios within ten steps of a limit
    repeats: float = 0.0  # chance that what was wrong in one quarter still is in the next
    troubles: WeightedBreaches = field(default=ALL_BREACHES, hash=False)
    rules: tuple[str, ...] = ()  # the rules that its answers know; all if empty
    system: str = ""  # a system message; may be empty


FULL = Profile(
    name="full",
    style="cells",
    letters="full",
    instruction="Name every violation of prudential rules in this bank report, then write the supervisor's directive.",
    quarters=4,
    clean=0.36,
    how_many=(48, 36, 16),
    filing_errors=0.55,
    repeats=0.35,
)
# A few figures a report and one sentence a letter, so that a model of 135M parameters learns it in minutes on a CPU.
SHORT = Profile(
    name="short",
    style="labels",
    letters="short",
    instruction="",
    quarters=1,
    clean=0.38,
    how_many=(65, 30, 5),
    near=0.2,
    troubles=(
        (12, {"leverage": "minimum"}),
        (12, {"lcr": "minimum"}),
        (12, {"nsfr": "minimum"}),
    ),
    rules=("LR_MIN", "LCR_MIN", "NSFR_MIN"),
    # Shorter than the one that SmolLM2's template puts there by itself.
    system="Find violations.",
)
PROFILES = {profile.name: profile for profile in (FULL, SHORT)}

# What a bank may file or not: modules by habit, templates now and then.
MODULES = (
    (0.93, ("C_47.00",)),
    (0.93, ("C_76.00",)),
    (0.88, ("C_84.00",)),
    (0.6, ("C_26.00", "C_27.00", "C_28.00")),
    (0.45, ("F_01.01", "F_01.02", "F_01.03", "F_02.00")),
)
TEMPLATES = ((0.05, "C_01.00"), (0.03, "C_02.00"), (0.10, "C_04.00"), (0.05, "C_22.00"), (0.08, "F_02.00"))
# Figures that rules read and whose absence is no error: requirements of the bank's own, and the LCR.
SILENT = (
    *(("C_03.00", row, "c0010") for row in ("r0140", "r0150")),
    *(("C_47.00", "r0440", "c0010"), ("C_76.00.a", "r0030", "c0010")),
)
MAX_FIGURES = 88  # so that a report and its answer fit into 4,096 tokens
COMFORT = Decimal("0.45")  # quarters of a bank move less far when sound ratios lie less far above their limits
RATIO_OF_SIGN = {"CET1_SIGN": "cet1", "T1_SIGN": "t1", "TC_SIGN": "total"}


@dataclass(frozen=True)
class Filing:
    """What one bank files for one reference date. In tables with open rows the row of a cell is its key."""

    bank: Bank
    period: str  # YYYY-MM-DD
    figures: Cells = field(hash=False)
    unfiled: tuple[str, ...] = ()  # templates that it declares as not filed


def make_filings(seed: int, index: int, count: int, profile: Profile) -> list[Filing]:
    """The first `count` reports of bank `index`: pure in its arguments, and the first ones do not depend on `count`."""
    if profile.name == "short":
        return [_short_filing(seed, index, quarter, profile) for quarter in range(count)]
    filings: list[Filing] = []
    before: tuple[Economics, dict[str, str]] | None = None
    for quarter in range(count):
        filing, *before = _full_filing(seed, index, quarter, profile, before)
        filings.append(filing)
    return filings


def _short_filing(seed: int, index: int, quarter: int, profile: Profile) -> Filing:
    bank, rng = make_bank(seed, index), random.Random(f"filing {seed} {index} {quarter}")
    period, trea = _size(seed, index, quarter, bank)
    trea = round(trea, 3 - len(str(trea))).quantize(Decimal(1))
    clean = rng.random() < profile.clean
    while True:
        wrong = 0 if clean else 1 + rng.choices(range(len(profile.how_many)), profile.how_many)[0]
        for _ in range(wrong):
            rng.random()
        levels = draw_levels(rng, wrong, profile.troubles)
        economics = draw_economics(rng, bank, trea, levels, RatioDistribution(profile.near, STEP * 10))
        if economics is None:
            continue
        figures = _conceal_short(rng, bank, period, short_cells(economics), profile)
        found = violated(bank, period, figures, rules_of(profile))
        if len(found) <= MAX_VIOLATIONS and bool(found) != clean:
            return Filing(bank, period, figures)


def _full_filing(
    seed: int, index: int, quarter: int, profile: Profile, before: tuple[Economics, dict[str, str]] | None
) -> tuple[Filing, Economics, dict[str, str]]:
    """One report, with its amounts and levels for the next quarter."""
    bank, rng = _dressed(make_bank(seed, index), seed, index), random.Random(f"filing {seed} {index} {quarter}")
    period, trea = _size(seed, index, quarter, bank)
    trea = (trea * Decimal(rng.randint(990, 1010)) / 1000).quantize(Decimal(1))
    old_levels = before[1] if before else {}
    again = bool(old_levels) and rng.random() < profile.repeats
    clean = not again and rng.random() < profile.clean
    while True:
        levels, errors = _plan(rng, profile, clean, old_levels if again else {})
        distribution = RatioDistribution(profile.near, headroom=COMFORT)
        previous = before[0] if before else None
        economics = draw_economics(rng, bank, trea, levels, distribution, previous, _has_at1(seed, index))
        if economics is None:
            continue
        habit = random.Random(f"habit {seed} {index}")
        positions = draw_positions(rng, habit, bank, economics, levels, profile.near, int(period[:4]))
        if positions is None:
            continue
        figures = full_cells(habit, rng, bank, economics, positions)
        figures, unfiled = _unfile(rng, random.Random(f"modules {seed} {index}"), figures)
        figures = _thin_out(random.Random(f"details {seed} {index}"), figures)
        figures = _conceal(rng, bank, period, figures)
        figures = _err(rng, bank, period, figures, errors)
        found = violated(bank, period, figures) if figures is not None else set()
        if figures is not None and set(errors) <= found and len(found) <= MAX_VIOLATIONS and bool(found) != clean:
            return Filing(bank, period, figures, unfiled), economics, levels


def _plan(
    rng: random.Random, profile: Profile, clean: bool, old_levels: dict[str, str]
) -> tuple[dict[str, str], list[str]]:
    """(levels, filing errors) of a report that is to have something wrong unless it is `clean`."""
    if clean:
        return {}, []
    wrong = 1 + rng.choices(range(len(profile.how_many)), profile.how_many)[0]
    count = sum(rng.random() < profile.filing_errors for _ in range(wrong))
    errors = draw_errors(rng, count)
    sign = next((rule_id for rule_id in errors if rule_id in RATIO_OF_SIGN), None)
    if sign:  # needs a ratio below its minimum, which with its company is all that a report may hold
        return {RATIO_OF_SIGN[sign]: "minimum"}, [sign]
    if old_levels:
        return old_levels, errors[: wrong - 1]
    return draw_levels(rng, wrong - count, profile.troubles), errors


def _err(rng: random.Random, bank: Bank, period: str, figures: Cells, errors: list[str]) -> Cells | None:
    """Plant the errors, and harmless differences that only just pass; None if an error finds no place."""
    by_id = {rule.id: rule for rule in built_in_rules()}

    def check_of(rule_id: str):  # noqa: ANN202
        return lambda changed: violates(bank, period, changed, by_id[rule_id])

    if rng.random() < 0.35:
        for rule_id in rng.sample(sorted(TOLERANCE_CELLS), 2):
            figures = move_within_tolerance(rng, rule_id, figures, check_of(rule_id))
    for rule_id in errors:
        changed = plant_error(rng, rule_id, figures, check_of(rule_id))
        if changed is None:
            return None
        figures = changed
    return figures


def _dressed(bank: Bank, seed: int, index: int) -> Bank:
    """A bank with the accuracy of its amounts and of its ratios. A few have no requirement of their own beyond Pillar 1."""
    rng = random.Random(f"dress {seed} {index}")
    pillar2 = bank.pillar2 if rng.random() < 0.9 else Decimal(0)
    decimals = {"small": (0, -3, -3), "medium": (-3,), "large": (-3, -6, -6)}[bank.size]
    return replace(bank, pillar2=pillar2, decimals=rng.choice(decimals), ratio_decimals=rng.choice((4, 4, 4, 5, 6)))


def _has_at1(seed: int, index: int) -> bool:
    return random.Random(f"instruments {seed} {index}").random() < 0.75


def _size(seed: int, index: int, quarter: int, bank: Bank) -> tuple[str, Decimal]:
    """(reference date, total risk exposure amount) of a quarter; banks begin to file at different dates."""
    number = random.Random(f"quarters {seed} {index}").randrange(4) + quarter
    return quarter_end(number), (bank.trea * (1 + bank.growth) ** number).quantize(Decimal(1))


def quarter_end(quarter: int) -> str:
    """The reference date `quarter` quarters after the first one, YYYY-MM-DD."""
    month = FIRST_PERIOD.month + 3 * quarter
    after = datetime.date(FIRST_PERIOD.year + month // 12, month % 12 + 1, 1)
    return (after - datetime.timedelta(days=1)).isoformat()


def rules_of(profile: Profile) -> tuple[Rule, ...]:
    """The rules that the answers of a profile know."""
    return tuple(rule for rule in built_in_rules() if not profile.rules or rule.id in profile.rules)


def _unfile(rng: random.Random, habit: random.Random, figures: Cells) -> tuple[Cells, tuple[str, ...]]:
    """Leave out the modules that this bank does not file, and now and then a template."""
    missing = {template for share, templates in MODULES if habit.random() >= share for template in templates}
    unfiled = {template for share, template in TEMPLATES if rng.random() < share}
    kept = {key: value for key, value in figures.items() if template_of(key[0]) not in missing | unfiled}
    filed = {template_of(table) for table, _, _ in figures} - missing
    return kept, tuple(sorted(filed & unfiled))


def _thin_out(habit: random.Random, figures: Cells) -> Cells:
    """Keep as many of the figures that no rule reads as is the habit of this bank, and no more than fit."""
    read = {cell for rule in built_in_rules() for cell in rule.cells}
    others = [key for key in figures if key not in read and (key[0], "*", key[2]) not in read]
    kept = round(len(others) * habit.choice((0.25, 0.5, 0.75, 1.0)))
    kept = max(0, min(kept, MAX_FIGURES - (len(figures) - len(others))))
    order = {key: habit.random() for key in sorted(others)}
    gone = set(sorted(others, key=order.__getitem__)[kept:])
    return {key: value for key, value in figures.items() if key not in gone}


def _conceal(rng: random.Random, bank: Bank, period: str, figures: Cells) -> Cells:
    """Leave out a few figures whose absence is no error. A ratio goes only where that hides no violation."""
    for key in rng.sample(SILENT, rng.choice((0, 0, 0, 1, 1, 2))):
        fewer = {other: value for other, value in figures.items() if other != key}
        if key[0] != "C_76.00.a" or violated(bank, period, figures) == violated(bank, period, fewer):
            figures = fewer
    return figures


def _conceal_short(rng: random.Random, bank: Bank, period: str, figures: Cells, profile: Profile) -> Cells:
    """Leave a ratio out now and then, but none whose absence would hide a violation."""
    rules = rules_of(profile)
    if rng.random() < 0.3:
        key = rng.choice(list(figures))
        fewer = {other: value for other, value in figures.items() if other != key}
        if violated(bank, period, figures, rules) == violated(bank, period, fewer, rules):
            return fewer
    return figures
