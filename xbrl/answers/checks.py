"""The checks of a report and of its note: the lines of an answer in the short form (`answers.py`).

Each figure that a limit applies to has a line, in the order of the report, and each limit of a figure has its own: minimum, TSCR,
overall requirement. What follows from a fact of the note that applies comes after the figures, with its working. A small model
never has to know which line to leave out: it copies a figure, compares it, and writes the verdict.
"""

from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal

from xbrl.answers.answers import Check
from xbrl.read.filed_report import CellKey, Report
from xbrl.read.render import PURE, format_figure, format_limit, round_beside, short_label
from xbrl.rules.findings import note_rules
from xbrl.rules.note_facts import (
    BUFFER,
    CAPITAL,
    CET1,
    COUNTED,
    LARGEST_SHARE,
    LCR,
    OUTFLOW,
    SHARE,
    TREA,
    NoteFact,
    amount_in,
    capital_limits,
    connected_shares,
)
from xbrl.rules.reported_figures import Figures, index_facts, read_figure, row_keys
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
    comparison = f"{value} {SIGNS[result.relation][is_missed]} {limit}"
    return Check(what, comparison, result.rule_id, short_legal(result.legal)) if is_missed else Check(what, comparison)


def compared(what: str, value: Decimal, limit: Decimal, rule_id: str, working: str = "") -> Check:
    """The check of a ratio against the limit of a rule of notes. `working` stands before the ratio: `14% + 13%`."""
    rule = note_rules()[rule_id]
    is_missed = value < limit if rule.relation == "min" else value > limit
    printed = f"{working} = {percent(value)}" if working else percent(value)
    comparison = f"{printed} {SIGNS[rule.relation][is_missed]} {format_limit(limit, 'xbrli:pure')}"
    return Check(what, comparison, rule_id, short_legal(rule.legal)) if is_missed else Check(what, comparison)


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
            within = Check(f"{short_label(SHARE)} {share.row}", f"{percent(share.value)} <= {percent(LARGEST_SHARE)}")
            found.setdefault(SHARE, []).append(above.get(share.row, within))
    return [check for cell in sorted(found) for check in found[cell]]


def fact_checks(report: Report, facts: Iterable[NoteFact]) -> Iterator[Check]:
    """The checks of what follows from the facts of a note: `note_facts.consequences`, step by step.

    The requirements on capital are compared from the most severe one on, and end with the first that is missed.
    """
    figures = index_facts(report)
    applying = [fact for fact in dict.fromkeys(facts) if fact.applies]
    is_waived = any(fact.kind == "waiver" for fact in applying)
    amounts = {kind: sum(fact.amount or 0 for fact in applying if fact.kind == kind) for kind in COUNTED}
    for kind, amount in amounts.items():
        cell = BUFFER if kind == "pledged" else CET1
        reported = amount_in(figures, cell)
        if not amount or reported is None:
            continue
        rule = note_rules()[COUNTED[kind]]
        whole, less, left = in_one_unit(reported, Decimal(amount), reported - amount)
        yield Check(short_label(cell), f"{whole} - {less} = {left}", rule.id, short_legal(rule.legal))
        outflow = amount_in(figures, OUTFLOW)
        if kind != "pledged":
            yield from _capital_checks(figures, CAPITAL[kind], Decimal(sum(amounts[one] for one in CAPITAL)))
        elif outflow and not is_waived:
            value, _ = round_beside((reported - amount) / outflow, Decimal(1))
            yield compared(short_label(LCR), value, Decimal(1), "LCR_PLEDGED", _quotient(reported - amount, outflow))
    for fact in applying:
        found = connected_shares(figures, fact) if fact.kind == "connected" else ""
        if not isinstance(found, str):
            shares, limit = found
            working = " + ".join(percent(share) for _, share in shares)
            what = f"{short_label(SHARE)} {shares[0][0]}"  # where the finding stands
            yield compared(what, sum((share for _, share in shares), Decimal(0)), limit, "LE_CONNECTED", working)
    if is_waived:
        yield Check("Waiver", "", "lifts LCR_MIN", "CRR Art. 8")


def _capital_checks(figures: Figures, rule: str, amount: Decimal) -> Iterator[Check]:
    """The capital ratios without an amount, each against the same requirement, up to the first that misses it.

    The requirement is the most severe one that is missed (minimum, TSCR, overall), or the last one if all are met.
    """
    trea = amount_in(figures, TREA)
    if not trea:
        return
    limits = [
        (suffix, row, capital, limit)
        for suffix, row, capital, limit in capital_limits(figures, trea)
        if capital is not None and limit is not None
    ]
    missed = [suffix for suffix, _, capital, limit in limits if (capital - amount) / trea < limit]
    level = missed[0] if missed else limits[-1][0] if limits else ""
    for _, row, capital, limit in (one for one in limits if one[0] == level):
        left = capital - amount
        value, _ = round_beside(left / trea, limit)
        whole, less, rest, exposure = (one.partition(" ")[0] for one in in_one_unit(capital, amount, left, trea))
        taken_off = "" if row == "r0010" else f"{whole} - {less} = {rest}, "  # CET1 has a line of its own for that
        what = short_label(("C_03.00", row, "c0010"))
        yield compared(what, value, limit, rule + level, f"{taken_off}{rest} / {exposure}")
        if left / trea < limit:
            return


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
