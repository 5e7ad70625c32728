"""Notes of the bank: what the model says of each, what a person has decided, and the lines to copy for a decision.

The model proposes facts (`rules/note_facts.py`). One whose words do not stand in a note is refuted. What the others mean
follows by arithmetic and law; whether they are true, a person decides in a file for --findings.
"""

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from xbrl.read.report import Note, Report
from xbrl.rules.findings import COLUMNS, Finding, note_rules
from xbrl.rules.note_facts import NoteFact, consequences, undecided
from xbrl.rules.rules import RuleResult


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
    if_so: tuple[str, ...]
    if_not: str
    open: tuple[str, ...]


def note_id(note: Note) -> str:
    """How decisions name a note: it changes with the text, so that no decision survives a note that is filed anew.

    16 hexadecimal digits: of 8, a bank finds another text with the same ones in minutes.
    """
    return hashlib.sha256(" ".join(note.text.split()).encode("utf-8", "replace")).hexdigest()[:16]


def read_notes(
    report: Report, results: Sequence[RuleResult], decisions: Sequence[Finding], facts: Iterable[NoteFact]
) -> tuple[list[ReadNote], list[NoteFact]]:
    """(the notes of a report, the facts whose words stand in none of them). `facts` are those of the model's answer."""
    left, own = list(dict.fromkeys(facts)), {}
    for note in report.notes:
        own[note] = [fact for fact in left if quotes(fact, note)]
        left = [fact for fact in left if fact not in own[note]]
    decided = {note: tuple(one for one in decisions if decides(one, note, len(report.notes))) for note in report.notes}
    # Amounts of several notes count together, but for those of notes from which nothing follows by decision.
    held = [note for note in report.notes if not any(one.state == "benign" for one in decided[note])]
    together = [fact for note in held for fact in own[note]]
    follows = consequences(report, results, together)
    entity, read = report.entity.partition(".")[0], []
    for note in report.notes:
        applying = {fact.kind for fact in own[note] if fact.applies} if note in held else set()
        kind = next((fact.kind for fact in own[note]), "")
        read.append(
            ReadNote(
                id=note_id(note),
                text=note.text,
                decisions=decided[note],
                facts=tuple(own[note]),
                if_so=tuple(csv_line(replace(one, note=note_id(note))) for one in follows if one.kind in applying),
                if_not=csv_line(Finding(entity, report.period, "", "benign", kind=kind, note=note_id(note))),
                open=(*undecided(report, results, own[note]), *_odd(own[note], note, report.period)),
            )
        )
    return read, left


def quotes(fact: NoteFact, note: Note) -> bool:
    """Whether the words that prove a fact stand in a note, exactly but for white space."""
    words = " ".join(fact.quote.split())
    return bool(words) and bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", " ".join(note.text.split())))


def _odd(facts: Sequence[NoteFact], note: Note, period: str) -> Iterator[str]:
    """What makes the model's reading of a note doubtful."""
    for fact in (fact for fact in facts if fact.applies):
        if any(other.kind == fact.kind and not other.applies for other in facts):
            yield f"the model contradicts itself: {fact.kind} applies and does not apply"
        if fact.since > period:
            yield f"{fact.kind} applies from {fact.since} on, says the model: that is after the reference date"
        for name in fact.who:
            if name.casefold() not in " ".join(note.text.split()).casefold():
                yield f"the model names {name}, which the note does not"


def decides(finding: Finding, note: Note, notes: int) -> bool:
    """Whether a line of decisions is on this note of `notes`. One without a name is on the only note, if on a note at all."""
    if finding.note:
        return finding.note == note_id(note)
    of_note = finding.kind or finding.state != "violated" or finding.rule in note_rules()
    return notes == 1 and bool(of_note)


def stale(report: Report, decisions: Iterable[Finding]) -> list[Finding]:
    """The decisions on notes that the report does not have, or no longer has in these words."""
    names = {note_id(note) for note in report.notes}
    return [one for one in decisions if one.note and one.note not in names]


def csv_line(finding: Finding) -> str:
    """A finding as a line of findings.csv."""
    text = io.StringIO()
    fields = (getattr(finding, name) for name in COLUMNS)
    csv.writer(text, lineterminator="").writerow(["" if one is None else f"{one}" for one in fields])
    return text.getvalue()
