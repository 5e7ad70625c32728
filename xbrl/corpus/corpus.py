"""The population of invented bank reports: from sound reports to reports with up to four rule violations.

Random numbers come from two kinds of streams. `rng` is seeded per report. `bank_rng` is seeded per bank, so that all
quarters of a bank draw the same values from it.
"""

import itertools
import random
from dataclasses import dataclass, field, replace
from decimal import Decimal

from xbrl.corpus.banks import LEI_PREFIX, Bank, lei, make_bank
from xbrl.corpus.economics import (
    Economics,
    RatioDistribution,
    draw_economics,
    draw_levels,
)
from xbrl.corpus.laptop import laptop_filing, opposite
from xbrl.corpus.mutations import TOLERANCE_CELLS, draw_errors, move_within_tolerance, plant_error
from xbrl.corpus.note_plans import draw_plan, plan_note, with_guidance
from xbrl.corpus.notes import PlannedNote
from xbrl.corpus.omissions import omit_details, omit_optional, omit_templates
from xbrl.corpus.positions import draw_positions
from xbrl.corpus.profiles import Profile, rules_of
from xbrl.corpus.reporting import Figures, full_figures
from xbrl.corpus.trial import violated, violates
from xbrl.rules.dates import quarter_end
from xbrl.rules.rules import built_in_rules

MAX_VIOLATIONS = 9  # rules; one ratio below its minimum misses up to three requirements


ATTEMPTS = 60  # to find a report that a planned note fits
HEADROOM = Decimal("0.45")  # below 1, ratios are closer to their limits and move less from quarter to quarter
# The levels that a SIGN rule needs: its own ratio below the minimum, and parts that are no larger than the whole.
LEVELS_OF_SIGN_RULE = {
    "CET1_SIGN": {"cet1": "minimum"},
    "T1_SIGN": {"cet1": "overall", "t1": "minimum"},
    "TC_SIGN": {"cet1": "overall", "t1": "overall", "total": "minimum"},
}


@dataclass(frozen=True)
class Filing:
    """The figures that one bank files for one reference date.

    In a table with open rows, the row of a cell is its key.
    """

    bank: Bank
    period: str  # YYYY-MM-DD
    figures: Figures = field(hash=False)
    unfiled: tuple[str, ...] = ()  # templates declared as not filed
    violated: frozenset[str] = frozenset()  # ids of the violated rules, those that only a note shows among them
    note: PlannedNote | None = None
    pair: str = ""  # shared by the two members of a minimal pair


def make_filings(seed: int, index: int, count: int, profile: Profile) -> list[Filing]:
    """The first `count` reports of bank `index`.

    Deterministic; report `i` is the same for every `count` greater than `i`.
    """
    if profile.name == "laptop":
        return [_laptop_filing(seed, index, quarter, profile) for quarter in range(count)]
    filings: list[Filing] = []
    previous: tuple[Economics, dict[str, str]] | None = None
    for quarter in range(count):
        filing, economics, levels = _full_filing(seed, index, quarter, profile, previous)
        filings.append(filing)
        previous = economics, levels
    return filings


def _laptop_filing(seed: int, index: int, quarter: int, profile: Profile) -> Filing:
    bank, period, figures, note = laptop_filing(seed, index, quarter, profile.clean)
    return _filing(bank, period, figures, (), violated(bank, period, figures, rules_of(profile)), note)


def twin_of(filing: Filing) -> Filing | None:
    """The other member of a minimal pair: the same report of a bank of the same name, whose note says the opposite.

    None without a note, or if the opposite changes nothing. The bank has an entity code of its own, which the style "labels"
    does not print.
    """
    note = opposite(filing.note, filing.period, filing.figures) if filing.note else None
    if note is None or filing.note is None:
        return None
    entity = lei(LEI_PREFIX + filing.bank.entity[17:5:-1])
    own = tuple(replace(finding, entity=entity) for finding in note.findings)
    by_note = {finding.rule for finding in filing.note.findings}
    engine = filing.violated - (by_note if filing.note.kind != "waiver" else set())
    if filing.note.kind == "waiver":
        engine |= by_note  # the figures break what is waived, or not
    bank = replace(filing.bank, entity=entity)
    twin = _filing(bank, filing.period, filing.figures, (), set(engine), replace(note, findings=own))
    return replace(twin, pair=filing.bank.entity)


def _filing(
    bank: Bank,
    period: str,
    figures: Figures,
    unfiled: tuple[str, ...],
    found: set[str],
    note: PlannedNote | None,
) -> Filing:
    """The filing; `found` are the rules that the engine finds violated, to which the note adds or from which it takes."""
    findings = note.findings if note else ()
    lifted = {finding.rule for finding in findings if finding.state == "lifted"}
    added = {finding.rule for finding in findings if finding.state == "violated"}
    return Filing(bank, period, figures, unfiled, frozenset(found - lifted | added), note)


def _full_filing(
    seed: int, index: int, quarter: int, profile: Profile, previous: tuple[Economics, dict[str, str]] | None
) -> tuple[Filing, Economics, dict[str, str]]:
    """One report, and its amounts and levels, which are the input `previous` of the next quarter."""
    bank = with_reporting_accuracy(make_bank(seed, index), seed, index)
    rng = random.Random(f"filing {seed} {index} {quarter}")
    period, trea = _period_and_trea(seed, index, quarter, bank)
    trea = (trea * Decimal(rng.randint(990, 1010)) / 1000).quantize(Decimal(1))
    previous_economics, previous_levels = previous or (None, {})
    persists = bool(previous_levels) and rng.random() < profile.repeats
    clean = not persists and rng.random() < profile.clean
    distribution = RatioDistribution(profile.near_limit, headroom=HEADROOM)
    plan = None
    for attempt in itertools.count():
        if attempt % ATTEMPTS == 0:  # some notes are impossible for some banks: another one is drawn
            plan = draw_plan(rng, bank) if _has_note(seed, index, quarter, profile) else None
        problems, errors = _draw_problems(rng, profile, clean, previous_levels if persists else {})
        levels = problems | (plan.levels if plan else {})
        economics = draw_economics(rng, bank, trea, levels, distribution, previous_economics, _has_at1(seed, index))
        if economics is None:
            continue
        bank_rng = random.Random(f"habit {seed} {index}")
        positions = draw_positions(rng, bank_rng, bank, economics, levels, profile.near_limit, int(period[:4]))
        if positions is None:
            continue
        figures = full_figures(bank_rng, rng, bank, economics, positions)
        figures, unfiled = omit_templates(rng, random.Random(f"modules {seed} {index}"), figures)
        figures = omit_details(random.Random(f"details {seed} {index}"), figures)
        figures = omit_optional(rng, bank, period, figures)
        figures = with_guidance(plan, figures) if plan else figures
        figures = _plant_errors(rng, bank, period, figures, errors)
        if figures is None:
            continue
        found = violated(bank, period, figures)
        note = plan_note(rng, plan, bank, period, figures, found) if plan else None
        if plan and not note:
            continue
        others = found - {finding.rule for finding in note.findings} if note else found
        if set(errors) <= found and len(found) <= MAX_VIOLATIONS and bool(others) != clean:
            return _filing(bank, period, figures, unfiled, found, note), economics, problems
    raise AssertionError("unreachable")


def _has_note(seed: int, index: int, quarter: int, profile: Profile) -> bool:
    """Whether this report explains a figure. Six in ten banks do so, most of the time."""
    explains = random.Random(f"explains {seed} {index}").random() < 0.6
    return explains and random.Random(f"note {seed} {index} {quarter}").random() < profile.notes / 0.6


def _draw_problem_count(rng: random.Random, profile: Profile) -> int:
    return 1 + rng.choices(range(len(profile.problem_counts)), profile.problem_counts)[0]


def _draw_problems(
    rng: random.Random, profile: Profile, clean: bool, previous_levels: dict[str, str]
) -> tuple[dict[str, str], list[str]]:
    """(levels, filing errors) of a report. Both are empty for a `clean` report. `previous_levels`, if any, persist."""
    if clean:
        return {}, []
    problems = _draw_problem_count(rng, profile)
    error_count = sum(rng.random() < profile.filing_errors for _ in range(problems))
    errors = draw_errors(rng, error_count)
    sign = next((rule_id for rule_id in errors if rule_id in LEVELS_OF_SIGN_RULE), None)
    if sign:
        return LEVELS_OF_SIGN_RULE[sign], [sign]
    if previous_levels:
        return previous_levels, errors[: problems - 1]
    return draw_levels(rng, problems - error_count), errors


def _plant_errors(rng: random.Random, bank: Bank, period: str, figures: Figures, errors: list[str]) -> Figures | None:
    """Plant the errors, and sometimes differences that are just within tolerance.

    None if an error cannot be planted.
    """
    by_id = {rule.id: rule for rule in built_in_rules()}

    def check_for(rule_id: str):  # noqa: ANN202
        return lambda changed: violates(bank, period, changed, by_id[rule_id])

    if rng.random() < 0.35:
        for rule_id in rng.sample(sorted(TOLERANCE_CELLS), 2):
            figures = move_within_tolerance(rng, rule_id, figures, check_for(rule_id))
    for rule_id in errors:
        changed = plant_error(rng, rule_id, figures, check_for(rule_id))
        if changed is None:
            return None
        figures = changed
    return figures


def with_reporting_accuracy(bank: Bank, seed: int, index: int) -> Bank:
    """The bank with the accuracy (XBRL decimals) of its amounts and ratios, and the scope of its reports.

    One in ten loses its Pillar 2 requirement.
    """
    rng = random.Random(f"dress {seed} {index}")
    pillar2 = bank.pillar2 if rng.random() < 0.9 else Decimal(0)
    decimals = {"small": (0, -3, -3), "medium": (-3,), "large": (-3, -4, -4)}[bank.size]
    changed = replace(bank, pillar2=pillar2, decimals=rng.choice(decimals), ratio_decimals=rng.choice((4, 4, 4, 5, 6)))
    return replace(changed, scope="IND" if rng.random() < 0.4 else "CON")


def _has_at1(seed: int, index: int) -> bool:
    return random.Random(f"instruments {seed} {index}").random() < 0.75


def _period_and_trea(seed: int, index: int, quarter: int, bank: Bank) -> tuple[str, Decimal]:
    """(reference date, total risk exposure amount) of a report. Banks start filing in different quarters."""
    number = random.Random(f"quarters {seed} {index}").randrange(4) + quarter
    return quarter_end(number), (bank.trea * (1 + bank.growth) ** number).quantize(Decimal(1))
