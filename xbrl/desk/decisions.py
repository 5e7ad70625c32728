"""Notes of the bank and a person's decisions on them: what the model proposes, the lines to copy, what is odd about a decision.

The model proposes facts (`rules/note_facts.py`). One whose words do not stand in a note is refuted. What the others mean
follows by arithmetic and law; whether they are true, a person decides in a file for --findings. That file is written by hand or
copied from a page, and its figures may be those of an earlier report: a letter that would state what the report and its notes do
not hold is not ready.
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

WAIVED = ("LCR_MIN", "LCR_PLEDGED")  # what a waiver lifts


@dataclass(frozen=True)
class ReadNote:
    """A note with the decisions on it and the facts that the model read in it.

    `if_so` are the lines of a decision file if the facts hold, `if_not` the line if the note changes nothing. `open` says what
    the figures of the report do not decide if the facts hold, and what is odd about the facts.
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
    """(the notes of a report, the facts whose words stand in none of them). `facts` are those of the model's answer."""
    left, own = list(dict.fromkeys(facts)), {}
    for note in report.notes:
        own[note] = [fact for fact in left if quotes(fact, note)]
        left = [fact for fact in left if fact not in own[note]]
    decided = {note: tuple(one for one in decisions if one.note == note.id) for note in report.notes}
    # Amounts of several notes count together, but for those of notes from which nothing follows by decision.
    held = [note for note in report.notes if not any(one.state == "benign" for one in decided[note])]
    together = [fact for note in held for fact in own[note]]
    follows = [replace(one, entity=report.entity) for one in consequences(report, results, together)]
    read = []
    for note in report.notes:
        applying = {fact.kind for fact in own[note] if fact.applies} if note in held else set()
        kind = next((fact.kind for fact in own[note]), "")
        read.append(
            ReadNote(
                id=note.id,
                text=note.text,
                decisions=decided[note],
                facts=tuple(own[note]),
                if_so=[csv_line(replace(one, note=note.id)) for one in follows if one.kind in applying],
                if_not=csv_line(Finding(report.entity, report.period, "", "benign", kind=kind, note=note.id)),
                open=[*undecided(report, own[note]), *_odd(own[note], note, report.period)],
            )
        )
    return read, left


def quotes(fact: NoteFact, note: Note) -> bool:
    """Whether the words that prove a fact stand in a note, exactly but for white space: three words and ten characters at least."""
    words = " ".join(fact.quote.split())
    proves = len(words.split()) >= 3 and len(words) >= 10
    return proves and bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", " ".join(note.text.split())))


def _odd(facts: Sequence[NoteFact], note: Note, period: str) -> Iterator[str]:
    """What makes the model's reading of a note doubtful."""
    for fact in (fact for fact in facts if fact.applies):
        if replace(fact, applies=False) in (replace(other, since=fact.since, quote=fact.quote) for other in facts):
            yield f"the model contradicts itself: {fact.kind} applies and does not apply"
        if fact.since > period:
            yield f"{fact.kind} applies from {fact.since} on, says the model: that is after the reference date"
        for name in fact.who:
            if name.casefold() not in " ".join(note.text.split()).casefold():
                yield f"the model names {name}, which the note does not"


def in_force(report: Report, decisions: Iterable[Finding]) -> list[Finding]:
    """The decisions that hold for a report: those on notes that it has in these words, and annotations of its figures."""
    names = {note.id for note in report.notes}
    own = (one for one in decisions if one.period == report.period)
    return [one for one in own if one.note in names or not (one.note or one.is_of_note)]


def limits_without(report: Report, results: Sequence[RuleResult], decisions: Sequence[Finding]) -> dict[str, str]:
    """Rule `..._COUNTED` that is decided -> what is known of the limits of the corrected figure, if none is decided as missed.

    "met"; "unknown" if figures or the amount are missing; "waived" if the bank need not meet the limit. The finding stands in
    each case, for the reported figure is wrong: the letter says what was checked beyond that.
    """
    unknown = undecided(report, facts_of(decisions))
    open_kinds = {note_rules()[sentence.partition(":")[0]].kind for sentence in unknown}
    violated = [one.note_rule for one in decisions if one.state == "violated" and one.note_rule]
    lifted = any(one.state == "lifted" and one.rule in WAIVED for one in decisions)
    missed = {rule.kind for rule in violated if not rule.counted}
    return {
        rule.id: "waived" if rule.kind == "pledged" and lifted else "unknown" if rule.kind in open_kinds else "met"
        for rule in violated
        if rule.counted and rule.kind not in missed
    }


def counted(decisions: Iterable[Finding]) -> list[Finding]:
    """The decisions that a figure counts an amount that it must not."""
    return [one for one in decisions if one.state == "violated" and one.note_rule and one.note_rule.counted]


def facts_of(decisions: Iterable[Finding]) -> list[NoteFact]:
    """What decisions say of amounts and waivers, as facts. The amount is what a line `..._COUNTED` takes out of the figure."""
    facts = []
    for one in {one.rule: one for one in counted(decisions)}.values():
        amount = None if one.value is None or one.limit is None else one.value - one.limit
        facts.append(NoteFact(note_rules()[one.rule].kind, True, amount))
    waived = any(one.state == "lifted" and one.rule in WAIVED for one in decisions)
    return [*facts, NoteFact("waiver", True, None)] if waived else facts


def doubts(
    report: Report, results: Sequence[RuleResult], violated: Sequence[RuleResult], decisions: Sequence[Finding]
) -> Iterator[str]:
    """Why decisions cannot be right as they stand, one sentence each. `violated` are the findings after them."""
    found = violations(results)
    for one in decisions:
        if one.state == "lifted" and one.rule not in WAIVED[1:] and not any(concerns(one, other) for other in found):
            yield f"{one.where} lifts {one.rule}, which the rules do not find: if a note changes nothing, decide `benign`"
        elif one.state == "lifted" and not one.legal:
            yield f"{one.where}, column legal: it is empty; name the article that lifts {one.rule}"
        elif (one.state, one.rule) == ("violated", "LE_CONNECTED") and not _is_client(report, one):
            yield f"{one.where}, column cell: {one.cell} is no client of C 28.00"
        elif one.state == "violated" and any(
            keeps_to(result.known_value, result.relation, result.known_limit)
            for result in violated
            if concerns(one, result) and has_figures(result)
        ):
            yield f"{one.where} says that {one.rule} is violated, and its value keeps to its limit"
    for note in report.notes:
        own = [one for one in decisions if one.note == note.id]
        nothing = next((one for one in own if one.state == "benign"), None)
        other = next((one for one in own if one.state != "benign"), None)
        if nothing and other:
            yield f"{nothing.where} says that nothing follows from a note, and {other.where} that {other.rule} does; keep one"
    yield from _other_amounts(report, results, decisions)


def _other_amounts(report: Report, results: Sequence[RuleResult], decisions: Sequence[Finding]) -> Iterator[str]:
    """What does not follow from the amounts that are decided, and what follows from them and is not decided."""
    rules = note_rules()
    stated = [one for one in decisions if one.state == "violated" and one.note_rule and one.rule != "LE_CONNECTED"]
    unknown = [rules[one.rule].kind for one in counted(stated) if one.limit is None]
    notes = {rules[one.rule].kind: one.note for one in stated}
    follows = {
        one.rule: replace(one, entity=report.entity, note=notes[one.kind])
        for one in consequences(report, results, facts_of(decisions))
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
