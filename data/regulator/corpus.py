"""Which banks file what: the population of invented reports, from sound ones to those with up to four violations."""

import datetime
import pathlib
import random
from dataclasses import dataclass, field
from decimal import Decimal

from data.regulator.banks import Bank, make_bank
from data.regulator.economics import STEP, draw_economics, draw_levels
from data.regulator.mutations import PLANTS, plant
from data.regulator.report import Fact, Report
from data.regulator.reporting import RATIO_DECIMALS, RATIO_ROWS, REQUIREMENT_ROWS, Cells, full_cells, short_cells
from data.regulator.rules import Rule, built_in_rules, evaluate, violations

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
    clean: float  # share of reports without violation
    how_many: tuple[int, ...] = (45, 35, 20)  # weights of one, two, three things going wrong in the others
    filing_errors: float = 0.0  # share of those that are filing errors
    near: float = 0.45  # share of ratios within ten steps of a limit
    conceal: tuple[int, ...] = (55, 30, 15)  # weights of 0, 1, 2 figures that are not filed
    troubles: tuple[tuple[int, dict[str, str]], ...] | None = field(default=None, hash=False)
    rules: tuple[str, ...] = ()  # the rules that its answers know; all if empty


FULL = Profile(
    name="full",
    style="cells",
    letters="full",
    instruction="Name every violation of prudential rules in this bank report, then write the supervisor's directive.",
    quarters=2,
    clean=0.36,
    filing_errors=0.25,
    rules=(
        *("CET1_MIN", "T1_MIN", "TC_MIN", "TSCR_CET1", "TSCR_T1", "TSCR_TC", "OCR_TC", "LR_MIN", "LR_OLRR", "LCR_MIN"),
        *("NSFR_MIN", "OF_SUM", "T1_SUM", "LCR_CALC"),
    ),
)
# A few figures a report and one sentence a letter, so that a model of 135M parameters learns it in minutes on a CPU.
SHORT = Profile(
    name="short",
    style="labels",
    letters="short",
    instruction="",
    quarters=1,
    clean=0.36,
    how_many=(65, 30, 5),
    near=0.35,
    conceal=(70, 30),
    troubles=(
        (10, {"cet1": "minimum"}),
        (8, {"cet1": "own"}),
        (12, {"leverage": "minimum"}),
        (12, {"lcr": "minimum"}),
        (12, {"nsfr": "minimum"}),
    ),
    rules=("CET1_MIN", "TSCR_CET1", "LR_MIN", "LCR_MIN", "NSFR_MIN"),
)
PROFILES = {profile.name: profile for profile in (FULL, SHORT)}


@dataclass(frozen=True)
class Filing:
    """What one bank files for one reference date."""

    bank: Bank
    period: str  # YYYY-MM-DD
    figures: Cells = field(hash=False)


def make_filing(seed: int, index: int, quarter: int, profile: Profile) -> Filing:
    """Report `quarter` (0 is the first) of bank `index`: pure in its arguments."""
    bank = make_bank(seed, index)
    rng = random.Random(f"filing {seed} {index} {quarter}")
    start = rng_of_bank(seed, index).randrange(4)
    period = quarter_end(start + quarter)
    trea = (bank.trea * (1 + bank.growth) ** (start + quarter)).quantize(Decimal(1))
    short = profile.name == "short"
    if short:
        trea = round(trea, 3 - len(str(trea))).quantize(Decimal(1))
    clean = rng.random() < profile.clean
    while True:
        wrong = 0 if clean else 1 + rng.choices(range(len(profile.how_many)), profile.how_many)[0]
        errors = rng.sample(
            sorted(PLANTS), min(len(PLANTS), sum(rng.random() < profile.filing_errors for _ in range(wrong)))
        )
        levels = draw_levels(rng, wrong - len(errors), profile.troubles)
        economics = draw_economics(rng, bank, trea, levels, profile.near, STEP * 10 if short else STEP)
        if economics is None:
            continue
        figures = short_cells(bank, economics) if short else full_cells(rng, bank, economics)
        for rule_id in errors:
            figures = figures and plant(rng, rule_id, figures)
        if figures is None:
            continue
        figures = _conceal(rng, bank, period, figures, profile)
        found = _violated(bank, period, figures, profile)
        if set(errors) <= found and len(found) <= MAX_VIOLATIONS and bool(found) != clean:
            return Filing(bank, period, figures)


def rules_of(profile: Profile) -> tuple[Rule, ...]:
    """The rules that the answers of a profile know."""
    return tuple(rule for rule in built_in_rules() if not profile.rules or rule.id in profile.rules)


def quarter_end(quarter: int) -> str:
    """The reference date `quarter` quarters after the first one, YYYY-MM-DD."""
    month = FIRST_PERIOD.month + 3 * quarter
    after = datetime.date(FIRST_PERIOD.year + month // 12, month % 12 + 1, 1)
    return (after - datetime.timedelta(days=1)).isoformat()


def rng_of_bank(seed: int, index: int) -> random.Random:
    """Chance that all quarters of a bank share."""
    return random.Random(f"quarters {seed} {index}")


def _conceal(rng: random.Random, bank: Bank, period: str, figures: Cells, profile: Profile) -> Cells:
    """Leave a few figures out. A ratio goes only where that hides no violation: its amounts could still show it."""
    for _ in range(rng.choices(range(len(profile.conceal)), profile.conceal)[0]):
        group = rng.choice([group for group in REQUIREMENT_ROWS + RATIO_ROWS if set(group) & set(figures)])
        fewer = {key: value for key, value in figures.items() if key not in group}
        if group in REQUIREMENT_ROWS or _violated(bank, period, figures, profile) == _violated(
            bank, period, fewer, profile
        ):
            figures = fewer
    return figures


def _violated(bank: Bank, period: str, figures: Cells, profile: Profile) -> set[str]:
    """The rules that these figures violate. It only steers the generator: labels are made from the files."""
    facts = []
    for key, value in figures.items():
        is_ratio = value.as_tuple().exponent < 0
        unit, decimals = ("xbrli:pure", RATIO_DECIMALS) if is_ratio else (bank.currency, bank.decimals)
        facts.append(Fact("", value, unit, decimals, bank.entity, period, {}, key))
    report = Report(pathlib.Path(), "", bank.entity, period, bank.currency, {}, tuple(facts), ())
    return {result.rule_id for result in violations(evaluate(report, rules_of(profile)))}
