"""What is odd about a person's decisions: a letter that would state what the report and its notes do not hold is not ready.

A file for --findings is written by hand or copied from a page; its figures may be those of an earlier report.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from xbrl.desk.notes import csv_line, decides
from xbrl.read.render import cell_name
from xbrl.read.report import Report
from xbrl.rules.figures import index_facts, row_keys
from xbrl.rules.findings import Finding, concerns, note_rules
from xbrl.rules.note_facts import SHARE, NoteFact, consequences
from xbrl.rules.rules import RuleResult, violations

WAIVED = ("LCR_MIN", "LCR_PLEDGED")


def doubts(
    report: Report, results: Sequence[RuleResult], violated: Sequence[RuleResult], decisions: Sequence[Finding]
) -> Iterator[str]:
    """Why decisions cannot be right as they stand, one sentence each. `violated` are the findings after them."""
    found = violations(results)
    for one in decisions:
        of_note = one.state == "violated" and one.rule in note_rules()
        if of_note and not report.notes:
            yield f"{one.where} says what a note shows, and the report has no note"
        elif (
            one.state == "lifted" and one.rule not in WAIVED[1:] and not any(concerns(one, result) for result in found)
        ):
            yield f"{one.where} lifts {one.rule}, which the rules do not find: if a note changes nothing, decide `benign`"
        elif one.state == "lifted" and not one.legal:
            yield f"{one.where}, column legal: it is empty; name the article that lifts {one.rule}"
        elif of_note and one.rule == "LE_CONNECTED" and not _is_client(report, one):
            yield f"{one.where}, column cell: {one.cell} is no client of C 28.00"
        elif one.state == "violated" and any(concerns(one, result) and _keeps(result) for result in violated):
            yield f"{one.where} says that {one.rule} is violated, and its value keeps to its limit"
    for note in report.notes:
        own = [one for one in decisions if decides(one, note, len(report.notes))]
        nothing = next((one for one in own if one.state == "benign"), None)
        other = next((one for one in own if one.state != "benign"), None)
        if nothing and other:
            yield f"{nothing.where} says that nothing follows from a note, and {other.where} that {other.rule} does; keep one"
    yield from _other_amounts(report, results, decisions)


def _other_amounts(report: Report, results: Sequence[RuleResult], decisions: Iterable[Finding]) -> Iterator[str]:
    """What does not follow from the amounts that are decided, and what follows from them and is not decided.

    The amount is what a line `..._COUNTED` takes out of the reported figure.
    """
    rules = note_rules()
    stated = [one for one in decisions if one.state == "violated" and one.rule in rules and one.rule != "LE_CONNECTED"]
    counted = {one.rule: one for one in stated if rules[one.rule].counted}
    facts = [
        NoteFact(rules[one.rule].kind, True, None if one.value is None or one.limit is None else one.value - one.limit)
        for one in counted.values()
    ]
    if any(one.state == "lifted" and one.rule in WAIVED for one in decisions):
        facts.append(NoteFact("waiver", True, None))
    unknown = [rules[one.rule].kind for one in counted.values() if one.limit is None]
    notes = {one.kind: one.note for one in stated}
    follows = {
        one.rule: replace(one, note=notes.get(one.kind, ""))
        for one in consequences(report, results, facts)
        if one.state == "violated"
    }
    for one in stated:
        right = follows.get(one.rule)
        if right is None and rules[one.rule].kind in unknown:
            continue  # the note gives the ratio and no amount
        if right is None:
            yield f"{one.where}: {one.rule} does not follow from the figures of the report and a line that takes the amount out"
        elif any(
            own not in (None, "") and own != other
            for own, other in ((one.cell, right.cell), (one.value, right.value), (one.limit, right.limit))
        ):
            yield f"{one.where} does not agree with the figures of the report, by which it is {csv_line(right)}"
    for rule in sorted(follows.keys() - {one.rule for one in stated}):
        unless = " (with the state `lifted` and CRR Art. 8 if a waiver covers it)" if rule in WAIVED else ""
        yield f"{rule} follows from the amounts that are decided, and no line says so: add {csv_line(follows[rule])}{unless}"


def _is_client(report: Report, finding: Finding) -> bool:
    figures = index_facts(report)
    rows = [" ".join(member for _, member in key) for key in row_keys(figures, (SHARE, ("C_28.00", "*", "c330")))]
    return finding.cell in [cell_name(SHARE, row) for row in rows]


def _keeps(result: RuleResult) -> bool:
    """Whether the value keeps to the limit (an amount below nothing, of a line `..._COUNTED`)."""
    if result.value is None or result.limit is None:
        return False
    return {
        "min": result.value >= result.limit,
        "max": result.value <= result.limit,
        "expected": result.value == result.limit,
    }[result.relation]
