"""Notes of the bank: what one says, what follows from it, and the sentence that says it.

A planned note has the facts. Its wording is chosen later, when the split of the report is known, because each split
has its own sentences (note_phrases.py). What follows from the note is planned with it and stands in findings.csv: no
engine derives it from the text.
"""

import random
from dataclasses import dataclass
from decimal import Decimal

from xbrl.corpus.note_phrases import CONNECTED, FAMILIES, PLEDGED, WAIVER
from xbrl.corpus.note_phrases_capital import CALLABLE, GUIDANCE, LATE, OWN_SHARES, PROFIT
from xbrl.read.report import CellKey, Note
from xbrl.rules.findings import Finding, note_rules

PHRASES = {
    **{"pledged": PLEDGED, "connected": CONNECTED, "callable": CALLABLE, "own_shares": OWN_SHARES},
    **{"profit": PROFIT, "waiver": WAIVER, "late": LATE, "guidance": GUIDANCE},
}


@dataclass(frozen=True)
class PlannedNote:
    """The facts of a note and what follows from them."""

    kind: str  # a key of PHRASES
    holds: bool  # whether the note states the fact that matters in law, or that it is not so
    fields: tuple[tuple[str, str], ...]  # values of the placeholders
    cells: tuple[CellKey, ...]  # the note is attached to these; the row of an open table is its key
    findings: tuple[Finding, ...]  # one at least; "benign" if nothing follows


NoteParts = tuple[dict[str, str], tuple[CellKey, ...], list[Finding]]  # placeholders, cells, what follows


def note_finding(
    case: str, rule: str, cell: str, value: Decimal | None = None, limit: Decimal | None = None
) -> Finding:
    """A line of findings.csv, still without bank and date. Only the case "decides" is a violation.

    In the case "words" nothing is to be computed, so value and limit are left out.
    """
    if case == "words":
        value = limit = None
    return Finding(
        "", "", rule, "violated" if case == "decides" else "benign", cell, value, limit, note_rules()[rule].legal
    )


def write_note(planned: PlannedNote, split: str, seed: str) -> Note:
    """The note in a wording of the family of `split`. Deterministic in `seed`."""
    place = random.Random(f"note {seed}").choice(FAMILIES[split])
    return Note(wording(planned, place), planned.cells, "en")


def wording(planned: PlannedNote, place: int) -> str:
    """The sentence in one place of the tuple of wordings. The two sides of a kind have similar words in the same place."""
    text = PHRASES[planned.kind]["holds" if planned.holds else "fails"][place].format(**dict(planned.fields))
    return text[:1].upper() + text[1:]
