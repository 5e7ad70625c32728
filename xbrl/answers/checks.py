"""The checks of a report and of its note: the lines of an answer in the short form (`answers.py`).

Each figure that a limit applies to has a line, in the order of the report, and each limit of a figure has its own: minimum, TSCR,
overall requirement. What follows from a fact of the note that applies comes after the figures, with its working. A small model
never has to know which line to leave out: it copies a figure, compares it, and writes the verdict.
"""

from collections.abc import Iterator, Sequence
from decimal import Decimal

from xbrl.answers.answers import Check
from xbrl.read.filed_report import CellKey, Report
from xbrl.read.render import PURE, format_figure, format_limit, short_label
from xbrl.rules.findings import note_rules
from xbrl.rules.note_facts import LARGEST_SHARE, SHARE, NoteFact, Step, is_waived, steps
from xbrl.rules.reported_figures import index_facts, read_figure, row_keys
from xbrl.rules.rules import RuleResult

# Relation of a limit -> sign if met, if missed
SIGNS = {"min": (">=", "<"), "max": ("<=", ">"), "expected": ("=", "!=")}
UNITS = ((" bn", 9), (" mn", 6), (" k", 3), ("", 0))


def short_legal(legal: str) -> str:
    """The first article of a reference, without the form of the act: `2015/61 Art. 7(2)`."""
    return legal.replace("Delegated Reg. (EU) ", "").partition(",")[0].partition(";")[0]


def check_of(result: RuleResult) -> Check:
    """The check of a result of the engine that is met or violated, or of a finding on a note, which has no inputs.

    A ratio that the engine recomputed is shown as the quotient of amounts. So is one that must be that quotient (`expected`: of
    the rules of short reports LCR_CALC alone), which is then compared with the ratio as reported.
    """
    is_missed, is_expected = result.state == "violated", result.relation == "expected"
    value = format_figure(result.known_value, result.unit, result.decimals, compact=True)
    limit = value if is_expected and not is_missed else result.printed_limit  # a met one differs by rounding at most
    if result.unit not in PURE:
        limit = format_figure(result.known_limit, result.unit, result.decimals, compact=True)
    parts = result.inputs[1:] if is_expected else next((one.parts for one in result.inputs), ())
    if is_expected:
        value, limit = limit, value
    if parts:
        value = f"{_quotient(*(part.value for part in parts if isinstance(part.value, Decimal)))} = {value}"
    what = f"{short_label(result.cell)} {result.row}".strip()
    verdict = (result.rule_id, short_legal(result.legal)) if is_missed else ()
    return Check(what, value, SIGNS[result.relation][is_missed], limit, *verdict)


def compared(what: str, value: Decimal, limit: Decimal, rule_id: str, working: str = "") -> Check:
    """The check of a ratio against the limit of a rule of notes. `working` stands before the ratio: `14% + 13%`."""
    rule = note_rules()[rule_id]
    is_missed = value < limit if rule.relation == "min" else value > limit
    figure = f"{working} = {percent(value)}" if working else percent(value)
    sign, printed = SIGNS[rule.relation][is_missed], format_limit(limit, "xbrli:pure")
    verdict = (rule_id, short_legal(rule.legal)) if is_missed else ()
    return Check(what, figure, sign, printed, *verdict)


def report_checks(report: Report, results: Sequence[RuleResult]) -> list[Check]:
    """The checks of the figures, from the engine's `results`, which are those of the rules of short reports."""
    found: dict[CellKey, list[Check]] = {}
    for result in results:
        if result.state in ("ok", "violated") and result.cell != SHARE:
            found.setdefault(result.cell, []).append(check_of(result))
    above = {result.row: check_of(result) for result in results if result.cell == SHARE and result.state == "violated"}
    figures = index_facts(report)
    for key in sorted(row_keys(figures, [SHARE])):  # the engine has no results for clients within the limit
        share = read_figure(figures, SHARE, key)
        if isinstance(share.value, Decimal):
            within = Check(f"{short_label(SHARE)} {share.row}", percent(share.value), "<=", percent(LARGEST_SHARE))
            found.setdefault(SHARE, []).append(above.get(share.row, within))
    return [check for cell in sorted(found) for check in found[cell]]


def fact_checks(report: Report, facts: Sequence[NoteFact]) -> Iterator[Check]:
    """The checks of what follows from the facts of a note, step by step (`note_facts.steps`)."""
    for step in steps(report, facts):
        if isinstance(step, str) or step.value is None or step.limit is None:
            continue
        what, rule = f"{short_label(step.cell)} {step.row}".strip(), note_rules()[step.rule]
        if rule.counted:
            whole, less, left = in_one_unit(step.value, step.value - step.limit, step.limit)
            yield Check(what, f"{whole} - {less} = {left}", verdict=rule.id, legal=short_legal(rule.legal))
        else:
            yield compared(what, step.value, step.limit, step.rule, _working(step))
    if is_waived(facts):
        yield Check("Waiver", verdict="lifts LCR_MIN", legal="CRR Art. 8")


def _working(step: Step) -> str:
    """What the value of a step is made of: `14% + 13%`, `560610 / 639790`, `120 - 10 = 110, 110 / 1000`."""
    if step.kind == "connected":
        return " + ".join(map(percent, step.parts))
    *taken_off, above, below = (amount.partition(" ")[0] for amount in in_one_unit(*step.parts))
    is_new = taken_off and step.cell[1] != "r0010"  # CET1 has a line of its own for that
    return (f"{' - '.join(taken_off)} = {above}, " if is_new else "") + f"{above} / {below}"


def _quotient(above: Decimal, below: Decimal) -> str:
    """`560610 / 639790`: amounts in one unit, which is left out."""
    return " / ".join(amount.partition(" ")[0] for amount in in_one_unit(above, below))


def in_one_unit(*amounts: Decimal) -> list[str]:
    """Amounts in the largest unit that is exact to one decimal for all of them: `601610 k`, `41000 k`."""
    name, size = next(unit for unit in UNITS if not unit[1] or all(one == round(one, 1 - unit[1]) for one in amounts))
    return [f"{format_figure(amount.scaleb(-size), 'iso4217:EUR')}{name}" for amount in amounts]


def percent(value: Decimal) -> str:
    """A ratio as the lines of checks print it: `93.74%`."""
    return format_figure(value, "xbrli:pure", compact=True)
