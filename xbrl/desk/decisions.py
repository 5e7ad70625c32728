"""Notes of the bank, and a person's decisions on them: facts that the model proposes, lines to copy, hearings of the bank.

The model proposes facts (`rules/note_facts.py`). A fact whose words stand in no note is refuted. The consequences of the other
facts follow by arithmetic and law. A person decides in a file for --findings whether the facts are true. That file is written by
hand or copied from a page, and its figures may come from an earlier report: `derivation.py` examines it.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from common.errors import UserError
from xbrl.desk.letters import Hearing
from xbrl.read.filed_report import Note, Report, is_day
from xbrl.read.render import cell_name
from xbrl.read.xbrl_csv import read_table_of
from xbrl.rules.findings import Finding, csv_line, note_rules
from xbrl.rules.note_facts import (
    COUNTED,
    KINDS,
    LCR,
    NoteFact,
    amounts_in,
    clients_in,
    consequences,
    percentages_in,
    undecided,
)
from xbrl.rules.reported_figures import index_facts
from xbrl.rules.rules import RuleResult

WAIVED = ("LCR_MIN", "LCR_PLEDGED")  # the rules that a waiver lifts
MAX_OFFERS = 3  # amounts or ratios of a note for which a page offers lines


@dataclass(frozen=True)
class ReadNote:
    """A note with the decisions on it and the facts that the model read in it.

    `if_so` has the lines of a decision file if the facts hold, `if_not` the line if the note changes nothing, and `offers` the
    lines for each other meaning: [meaning, lines]. `open` lists the consequences that the figures of the report cannot decide.
    """

    id: str
    text: str
    decisions: tuple[Finding, ...]
    facts: tuple[NoteFact, ...]
    if_so: list[str]
    if_not: str
    offers: list[tuple[str, list[str]]]
    open: list[str]


def read_notes(
    report: Report, results: Sequence[RuleResult], decisions: Sequence[Finding], facts: Iterable[NoteFact]
) -> tuple[list[ReadNote], list[NoteFact]]:
    """Assign the facts of the model's answer to the notes of a report. Return (notes, facts whose words stand in no note)."""
    left, own = list(dict.fromkeys(facts)), {}
    for note in report.notes:
        own[note] = [fact for fact in left if is_quoted(fact.quote, note)]
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
                offers=[] if decided[note] else list(_offers(report, results, note)),
                open=undecided(report, own[note]),
            )
        )
    return read, left


def _offers(report: Report, results: Sequence[RuleResult], note: Note) -> Iterator[tuple[str, list[str]]]:
    """Yield (meaning, lines) for each kind of note, with the amounts and the clients that stand in the note."""
    amounts = amounts_in(note.text)[:MAX_OFFERS] or [None]
    clients = tuple(clients_in(index_facts(report), note.text))
    for kind in KINDS:
        facts = [NoteFact(kind, True, amount) for amount in (amounts if kind in COUNTED else [None])]
        for fact in facts:
            applying = replace(fact, who=clients, quote=" ".join(note.text.split()))
            lines = [
                replace(line, entity=report.entity, note=note.id) for line in consequences(report, results, [applying])
            ]
            if kind == "pledged" and fact.amount is None and lines:
                ratios = sorted(percentages_in(note.text))[:MAX_OFFERS]
                missed = [ratio for ratio in ratios if ratio < 1]
                lines += (
                    [replace(lines[0], rule="LCR_PLEDGED", cell=cell_name(LCR), value=missed[0], limit=Decimal(1))]
                    if missed
                    else []
                )
            if lines:
                yield kind if fact.amount is None else f"{kind}, {fact.amount:,f}", [csv_line(line) for line in lines]


def is_quoted(quote: str, note: Note) -> bool:
    """Return whether a quotation stands in the note, up to white space.

    A quotation of fewer than three words or ten characters proves nothing.
    """
    words = " ".join(quote.split())
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
    violated = [line.note_rule for line in decisions if line.is_violation and line.note_rule]
    lifted = any(line.state == "lifted" and line.rule in WAIVED for line in decisions)
    missed = {rule.kind for rule in violated if not rule.counted}
    return {
        rule.id: "waived" if rule.kind == "pledged" and lifted else "unknown" if rule.kind in open_kinds else "met"
        for rule in violated
        if rule.counted and rule.kind not in missed
    }


def counted(decisions: Iterable[Finding]) -> list[Finding]:
    """Select the decisions that a figure includes an amount that it must not include."""
    return [line for line in decisions if line.is_violation and line.note_rule and line.note_rule.counted]


def facts_of(decisions: Iterable[Finding]) -> list[NoteFact]:
    """Convert decisions on amounts and waivers to facts. The amount of a line `..._COUNTED` is its value minus its limit."""
    facts = []
    for line in {line.rule: line for line in counted(decisions)}.values():
        amount = None if line.value is None or line.limit is None else line.value - line.limit
        facts.append(NoteFact(note_rules()[line.rule].kind, True, amount))
    waived = any(line.state == "lifted" and line.rule in WAIVED for line in decisions)
    return [*facts, NoteFact("waiver", True, None)] if waived else facts


def load_hearings(path: Path) -> dict[tuple[str, str], Hearing]:
    """Read a CSV with the columns `entity,period,heard,urgent`: the day of the hearing, or why the matter is too urgent for one.

    Raise UserError with the line of a mistake.
    """
    hearings: dict[tuple[str, str], Hearing] = {}
    for where, row in read_table_of(path, ("entity", "period", "heard", "urgent")):
        case, day, reason = (row["entity"], row["period"]), row["heard"], row["urgent"]
        if bool(day) == bool(reason) or (day and not (is_day(day) and day > row["period"])):
            raise UserError(
                f"{where}: give in heard a day (YYYY-MM-DD) after the reference date, or in urgent a reason"
            )
        if hearings.setdefault(case, Hearing(day, reason)) != Hearing(day, reason):
            raise UserError(f"{where}: {case[0]} as of {case[1]} occurs twice; keep one of the lines")
    return hearings
