"""Notes of the bank, and a person's decisions on them: facts that the model proposes, lines to copy, doubts about decisions.

The model proposes facts (`rules/note_facts.py`). A fact whose words stand in no note is refuted. The consequences of the other
facts follow by arithmetic and law. A person decides in a file for --findings whether the facts are true. That file is written by
hand or copied from a page, and its figures may come from an earlier report. A letter with a statement that the report and its
notes do not support is therefore not ready.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from xbrl.desk.letters import has_figures
from xbrl.read.filed_report import Note, Report
from xbrl.read.render import cell_name
from xbrl.rules.findings import Finding, concerns, csv_line, note_rules
from xbrl.rules.formula import keeps_to
from xbrl.rules.note_facts import SHARE, NoteFact, consequences, undecided
from xbrl.rules.reported_figures import index_facts, row_keys
from xbrl.rules.rules import RuleResult, violations

WAIVED = ("LCR_MIN", "LCR_PLEDGED")  # the rules that a waiver lifts


@dataclass(frozen=True)
class ReadNote:
    """A note with the decisions on it and the facts that the model read in it.

    `if_so` has the lines of a decision file if the facts hold, `if_not` the line if the note changes nothing. `open` lists
    the consequences that the figures of the report cannot decide.
    """

    id: str
    text: str
    decisions: tuple[Finding, ...]
    facts: tuple[NoteFact, ...]
    if_so: list[str]
    if_not: str
    open: list[str]


def read_notes(
    report: Report, results: Sequence[RuleResult], decisions: Sequence[Finding], facts: Iterable[NoteFact]
) -> tuple[list[ReadNote], list[NoteFact]]:
    """Assign the facts of the model's answer to the notes of a report. Return (notes, facts whose words stand in no note)."""
    left, own = list(dict.fromkeys(facts)), {}
    for note in report.notes:
        own[note] = [fact for fact in left if quotes(fact, note)]
        left = [fact for fact in left if fact not in own[note]]
    decided = {note: tuple(line for line in decisions if line.note == note.id) for note in report.notes}
    # The amounts of several notes are added up, without notes from which nothing follows by decision.
    relevant = [note for note in report.notes if not any(line.state == "benign" for line in decided[note])]
    together = [fact for note in relevant for fact in own[note]]
    follows = [replace(finding, entity=report.entity) for finding in consequences(report, results, together)]
    read = []
    for note in report.notes:
        applying = {fact.kind for fact in own[note] if fact.applies} if note in relevant else set()
        kind = next((fact.kind for fact in own[note]), "")
        read.append(
            ReadNote(
                id=note.id,
                text=note.text,
                decisions=decided[note],
                facts=tuple(own[note]),
                if_so=[csv_line(replace(line, note=note.id)) for line in follows if line.kind in applying],
                if_not=csv_line(Finding(report.entity, report.period, "", "benign", kind=kind, note=note.id)),
                open=undecided(report, own[note]),
            )
        )
    return read, left


def quotes(fact: NoteFact, note: Note) -> bool:
    """Return whether the quotation of a fact stands in the note, up to white space.

    A quotation of fewer than three words or ten characters proves nothing.
    """
    words = " ".join(fact.quote.split())
    proves = len(words.split()) >= 3 and len(words) >= 10
    return proves and bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", " ".join(note.text.split())))


def in_force(report: Report, decisions: Iterable[Finding]) -> list[Finding]:
    """Select the decisions that hold for a report: annotations of its figures, and decisions on notes with unchanged words."""
    names = {note.id for note in report.notes}
    own = (line for line in decisions if line.period == report.period)
    return [line for line in own if line.note in names or not (line.note or line.is_of_note)]


def limits_without(report: Report, results: Sequence[RuleResult], decisions: Sequence[Finding]) -> dict[str, str]:
    """Return, for each decided rule `..._COUNTED`, whether the corrected figure meets its limits.

    The value is "met", "unknown" if figures or the amount are missing, or "waived" if the limit does not bind the bank. Rules
    whose limit is decided as missed are left out. The finding stands in each case, because the reported figure is wrong.
    """
    unknown = undecided(report, facts_of(decisions))
    open_kinds = {note_rules()[sentence.partition(":")[0]].kind for sentence in unknown}
    violated = [line.note_rule for line in decisions if line.state == "violated" and line.note_rule]
    lifted = any(line.state == "lifted" and line.rule in WAIVED for line in decisions)
    missed = {rule.kind for rule in violated if not rule.counted}
    return {
        rule.id: "waived" if rule.kind == "pledged" and lifted else "unknown" if rule.kind in open_kinds else "met"
        for rule in violated
        if rule.counted and rule.kind not in missed
    }


def counted(decisions: Iterable[Finding]) -> list[Finding]:
    """Select the decisions that a figure includes an amount that it must not include."""
    return [line for line in decisions if line.state == "violated" and line.note_rule and line.note_rule.counted]


def facts_of(decisions: Iterable[Finding]) -> list[NoteFact]:
    """Convert decisions on amounts and waivers to facts. The amount of a line `..._COUNTED` is its value minus its limit."""
    facts = []
    for line in {line.rule: line for line in counted(decisions)}.values():
        amount = None if line.value is None or line.limit is None else line.value - line.limit
        facts.append(NoteFact(note_rules()[line.rule].kind, True, amount))
    waived = any(line.state == "lifted" and line.rule in WAIVED for line in decisions)
    return [*facts, NoteFact("waiver", True, None)] if waived else facts


def doubts(
    report: Report, results: Sequence[RuleResult], violated: Sequence[RuleResult], decisions: Sequence[Finding]
) -> Iterator[str]:
    """Yield a sentence for each decision that cannot be right. `violated` has the violations, corrected by the decisions."""
    by_rules = violations(results)
    for line in decisions:
        if line.state == "lifted" and line.rule not in WAIVED[1:] and not any(concerns(line, own) for own in by_rules):
            yield f"{line.where} lifts {line.rule}, which the rules do not find: if a note changes nothing, decide `benign`"
        elif line.state == "lifted" and not line.legal:
            yield f"{line.where}, column legal: it is empty; name the article that lifts {line.rule}"
        elif (line.state, line.rule) == ("violated", "LE_CONNECTED") and not _is_client(report, line):
            yield f"{line.where}, column cell: {line.cell} is no client of C 28.00"
        elif line.state == "violated" and any(
            keeps_to(result.known_value, result.relation, result.known_limit)
            for result in violated
            if concerns(line, result) and has_figures(result)
        ):
            yield f"{line.where} says that {line.rule} is violated, and its value keeps to its limit"
    for note in report.notes:
        own = [line for line in decisions if line.note == note.id]
        benign = next((line for line in own if line.state == "benign"), None)
        finding = next((line for line in own if line.state != "benign"), None)
        if benign and finding:
            yield (
                f"{benign.where} says that nothing follows from a note, and {finding.where} that {finding.rule} does; keep one"
            )
    yield from _wrong_consequences(report, results, decisions)


def _wrong_consequences(report: Report, results: Sequence[RuleResult], decisions: Sequence[Finding]) -> Iterator[str]:
    """Yield a sentence for each decided finding that does not follow from the decided amounts, and for each missing one."""
    rules = note_rules()
    stated = [line for line in decisions if line.state == "violated" and line.note_rule and line.rule != "LE_CONNECTED"]
    unknown = [rules[line.rule].kind for line in counted(stated) if line.limit is None]
    notes = {rules[line.rule].kind: line.note for line in stated}
    follows = {
        finding.rule: replace(finding, entity=report.entity, note=notes[finding.kind])
        for finding in consequences(report, results, facts_of(decisions))
        if finding.state == "violated"
    }
    for line in stated:
        right = follows.get(line.rule)
        if right is None and rules[line.rule].kind in unknown:
            continue  # the note states the ratio but no amount
        if right is None:
            yield (
                f"{line.where}: {line.rule} does not follow from the figures of the report and a line that takes the amount out"
            )
        elif any(
            own not in (None, "") and own != expected
            for own, expected in ((line.cell, right.cell), (line.value, right.value), (line.limit, right.limit))
        ):
            yield f"{line.where} does not agree with the figures of the report, by which it is {csv_line(right)}"
    for rule in sorted(follows.keys() - {line.rule for line in stated}):
        unless = " (with the state `lifted` and CRR Art. 8 if a waiver covers it)" if rule in WAIVED else ""
        yield f"{rule} follows from the amounts that are decided, and no line says so: add {csv_line(follows[rule])}{unless}"


def _is_client(report: Report, finding: Finding) -> bool:
    figures = index_facts(report)
    rows = [" ".join(member for _, member in key) for key in row_keys(figures, (SHARE, ("C_28.00", "*", "c330")))]
    return finding.cell in [cell_name(SHARE, row) for row in rows]
