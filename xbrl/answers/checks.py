"""Make the checks of a report and of its note: the lines of an answer in the short form (`answers.py`).

Each limit of a figure has a line (minimum, TSCR, overall requirement), in the order of the report. The consequences of the note's
facts come after the figures, with their working. A small model never has to know which line to leave out: it copies a figure,
compares it, and writes the verdict.
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
    """Return the first article of a reference, without the form of the act: `2015/61 Art. 7(2)`."""
    return legal.replace("Delegated Reg. (EU) ", "").partition(",")[0].partition(";")[0]


def check_of(result: RuleResult) -> Check:
    """Return the check of an engine's result that is met or violated, or of a finding on a note, which has no inputs.

    A ratio that the engine recomputed is shown as the quotient of amounts. A ratio that must equal its quotient (relation
    `expected`; among the rules of short reports only LCR_CALC) is shown as the quotient and compared with the reported ratio.
    """
    is_missed, is_expected = result.state == "violated", result.relation == "expected"
    value = format_figure(result.known_value, result.unit, result.decimals, compact=True)
    limit = value if is_expected and not is_missed else result.printed_limit  # a met ratio differs by rounding at most
    if result.unit not in PURE:
        limit = format_figure(result.known_limit, result.unit, result.decimals, compact=True)
    parts = result.inputs[1:] if is_expected else next((figure.parts for figure in result.inputs), ())
    if is_expected:
        value, limit = limit, value
    if parts:
        value = f"{_quotient(*(part.value for part in parts if isinstance(part.value, Decimal)))} = {value}"
    subject = f"{short_label(result.cell)} {result.row}".strip()
    verdict = (result.rule_id, short_legal(result.legal)) if is_missed else ()
    return Check(subject, value, SIGNS[result.relation][is_missed], limit, *verdict)


def compared(subject: str, value: Decimal, limit: Decimal, rule_id: str, working: str = "") -> Check:
    """Return the check of a ratio against the limit of a rule of notes. working: printed before the ratio, `14% + 13%`."""
    rule = note_rules()[rule_id]
    is_missed = value < limit if rule.relation == "min" else value > limit
    figure = f"{working} = {percent(value)}" if working else percent(value)
    sign, printed = SIGNS[rule.relation][is_missed], format_limit(limit, "xbrli:pure")
    verdict = (rule_id, short_legal(rule.legal)) if is_missed else ()
    return Check(subject, figure, sign, printed, *verdict)


def report_checks(report: Report, results: Sequence[RuleResult]) -> list[Check]:
    """Return the checks of the figures, from the engine's `results` of the rules of short reports."""
    checks: dict[CellKey, list[Check]] = {}
    for result in results:
        if result.state in ("ok", "violated") and result.cell != SHARE:
            checks.setdefault(result.cell, []).append(check_of(result))
    above = {result.row: check_of(result) for result in results if result.cell == SHARE and result.state == "violated"}
    figures = index_facts(report)
    for key in sorted(row_keys(figures, [SHARE])):  # the engine has no results for clients within the limit
        share = read_figure(figures, SHARE, key)
        if isinstance(share.value, Decimal):
            within = Check(f"{short_label(SHARE)} {share.row}", percent(share.value), "<=", percent(LARGEST_SHARE))
            checks.setdefault(SHARE, []).append(above.get(share.row, within))
    return [check for cell in sorted(checks) for check in checks[cell]]


def fact_checks(report: Report, facts: Sequence[NoteFact]) -> Iterator[Check]:
    """Yield the checks of the consequences of a note's facts, step by step (`note_facts.steps`)."""
    for step in steps(report, facts):
        if isinstance(step, str) or step.value is None or step.limit is None:
            continue
        subject, rule = f"{short_label(step.cell)} {step.row}".strip(), note_rules()[step.rule]
        if rule.counted:
            whole, less, left = in_one_unit(step.value, step.value - step.limit, step.limit)
            yield Check(subject, f"{whole} - {less} = {left}", verdict=rule.id, legal=short_legal(rule.legal))
        else:
            yield compared(subject, step.value, step.limit, step.rule, _working(step))
    if is_waived(facts):
        yield Check("Waiver", verdict="lifts LCR_MIN", legal="CRR Art. 8")


def _working(step: Step) -> str:
    """Return the computation of a step's value: `14% + 13%`, `560610 / 639790`, `120 - 10 = 110, 110 / 1000`."""
    if step.kind == "connected":
        return " + ".join(map(percent, step.parts))
    *taken_off, above, below = (amount.partition(" ")[0] for amount in in_one_unit(*step.parts))
    is_new = taken_off and step.cell[1] != "r0010"  # for CET1 a line of its own shows the subtraction
    return (f"{' - '.join(taken_off)} = {above}, " if is_new else "") + f"{above} / {below}"


def _quotient(above: Decimal, below: Decimal) -> str:
    """Return a quotient of amounts in one unit, without the unit: `560610 / 639790`."""
    return " / ".join(amount.partition(" ")[0] for amount in in_one_unit(above, below))


def in_one_unit(*amounts: Decimal) -> list[str]:
    """Format amounts in the largest unit in which all are exact to one decimal: `601610 k`, `41000 k`."""
    name, size = next(
        unit for unit in UNITS if not unit[1] or all(amount == round(amount, 1 - unit[1]) for amount in amounts)
    )
    return [f"{format_figure(amount.scaleb(-size), 'iso4217:EUR')}{name}" for amount in amounts]


def percent(value: Decimal) -> str:
    """Format a ratio as the lines of checks print it: `93.74%`."""
    return format_figure(value, "xbrli:pure", compact=True)
