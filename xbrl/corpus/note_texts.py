"""The notes of banks, written by hand. They stand in notes/SPLIT.jsonl, each with the facts that it states.

A line has `id`, `language`, `reference_date`, `text`, `matters` (kind, applies, amount in EUR, who, since, quote), `tags`,
`pair` (the id of the other note of its minimal pair, or null) and, where the text states figures of the report, `states`: the
amounts in EUR `buffer`, `buffer_least`, `outflow`, `cet1`, `cet1_least`, `profit`; the ratios `lcr`, `lcr_least`, `lcr_most`,
`nsfr`, `leverage`; and `exposures`, which maps rows of clients to EUR (null if the text gives no amount). The name "A + B" is
one row for a group of two clients.
"""

import functools
import json
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal

from xbrl.read.filed_report import CellKey
from xbrl.rules.note_facts import BUFFER, CAPITAL, CET1, LCR, NoteFact

FOLDER = pathlib.Path(__file__).with_name("notes")
GROUP = " + "  # joins the names of two clients that form one group


@dataclass(frozen=True)
class HandNote:
    """A note, with its facts and the figures that it states about its report."""

    id: str
    language: str
    period: str  # reference date
    text: str
    facts: tuple[NoteFact, ...]
    pair: str  # id of the other note of its minimal pair, or ""
    states: dict[str, Decimal] = field(default_factory=dict)  # stated figures by name: EUR and ratios
    # Rows of large exposures; the value is in EUR, or None if the text gives no amount.
    clients: dict[str, Decimal | None] = field(default_factory=dict)

    @property
    def ranked(self) -> list[NoteFact]:
        """Return the facts; a fact that applies comes first."""
        return sorted(self.facts, key=lambda fact: not fact.applies)

    @property
    def kind(self) -> str:
        """Return the kind of the first fact in `ranked`, or "nothing" if the note states no fact."""
        return next((fact.kind for fact in self.ranked), "nothing")

    @property
    def kinds(self) -> frozenset[str]:
        """Return the kinds of all facts."""
        return frozenset(fact.kind for fact in self.facts)

    def amount(self, kinds: Iterable[str]) -> Decimal | None:
        """Return the first amount in `ranked` of a fact with one of these kinds, or None."""
        return next((fact.amount for fact in self.ranked if fact.kind in kinds and fact.amount), None)

    @property
    def connected(self) -> tuple[str, str] | None:
        """Return the two clients whose exposures are added up: the first pair in `ranked` of which both have a row, or None."""
        pairs = (fact.who for fact in self.ranked if fact.kind == "connected")
        return next(((first, second) for first, second in pairs if {first, second} <= self.clients.keys()), None)

    def cells(self) -> list[CellKey]:
        """Return the cells that the note is about, none if it states no fact. A client's row has the name in place of the code."""
        by_kind = {"pledged": [BUFFER], "waiver": [LCR], **dict.fromkeys(CAPITAL, [CET1])}
        by_kind["connected"] = [("C_28.00", name, "c350") for name in self.clients]
        return list(dict.fromkeys(cell for fact in self.facts for cell in by_kind[fact.kind]))


NO_NOTE = HandNote("", "", "", "", (), "")


@functools.cache
def hand_notes(split: str) -> tuple[HandNote, ...]:
    """Read the notes of a split: train, validation or test."""
    return tuple(map(parse_note, (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()))


def parse_note(line: str) -> HandNote:
    """Parse a line of notes/SPLIT.jsonl. The module's docstring describes its fields."""
    row = json.loads(line)
    facts = tuple(
        NoteFact(
            kind=matter["kind"],
            applies=matter["applies"],
            amount=None if matter["amount"] is None else Decimal(matter["amount"]),
            who=tuple(matter["who"]) if isinstance(matter["who"], list) else (matter["who"],) if matter["who"] else (),
            since=matter["since"] or "",
            quote=matter["quote"],
        )
        for matter in row["matters"]
    )
    states = dict(row.get("states", {}))
    rows = states.pop("exposures", {})
    clients = {name: None if amount is None else Decimal(amount) for name, amount in rows.items()}
    grouped = {name for row_name in clients if GROUP in row_name for name in row_name.split(GROUP)}
    for fact in facts:
        if fact.kind == "connected":
            clients |= {name: None for name in fact.who if name not in clients and name not in grouped}
    return HandNote(
        id=row["id"],
        language=row["language"],
        period=row["reference_date"],
        text=row["text"],
        facts=facts,
        pair=row["pair"] or "",
        states={name: Decimal(str(value)) for name, value in states.items()},
        clients=clients,
    )
