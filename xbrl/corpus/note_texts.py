"""The notes of banks: written by hand, in notes/SPLIT.jsonl, each with the facts that it states.

A line has `id`, `language`, `reference_date`, `text`, `matters` (kind, applies, amount in EUR, who, since, quote), `tags`,
`pair` (the id of its minimal pair, or null) and, where the text says what the report shows, `states`: EUR of `buffer`,
`buffer_least`, `outflow`, `cet1`, `cet1_least`, `profit`; the ratios `lcr`, `lcr_least`, `lcr_most`, `nsfr`, `leverage`; and
`exposures`, the rows of clients with their EUR (null if the text gives none). "A + B" is one row for a group of clients.
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
GROUP = " + "


@dataclass(frozen=True)
class HandNote:
    """One note and what it asks of the figures of its report."""

    id: str
    language: str
    period: str  # reference date
    text: str
    facts: tuple[NoteFact, ...]
    pair: str  # id of its minimal pair, or ""
    states: dict[str, Decimal] = field(default_factory=dict)  # what the text says of the report; EUR and ratios
    # rows of large exposures, with EUR if the text gives it
    clients: dict[str, Decimal | None] = field(default_factory=dict)

    @property
    def ranked(self) -> list[NoteFact]:
        """Its facts, the one that applies first."""
        return sorted(self.facts, key=lambda one: not one.applies)

    @property
    def kind(self) -> str:
        """The kind of the fact that applies, else of the first one, or "nothing"."""
        return next((fact.kind for fact in self.ranked), "nothing")

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of all of its facts."""
        return frozenset(fact.kind for fact in self.facts)

    def amount(self, kinds: Iterable[str]) -> Decimal | None:
        """The amount of the fact of one of these kinds that applies, else of the first one; None if there is none."""
        return next((fact.amount for fact in self.ranked if fact.kind in kinds and fact.amount), None)

    @property
    def connected(self) -> tuple[str, str] | None:
        """The two clients whose shares are added up: of the fact that applies, else of the first with a row for each."""
        pairs = (fact.who for fact in self.ranked if fact.kind == "connected")
        return next(((one, two) for one, two in pairs if {one, two} <= self.clients.keys()), None)

    def cells(self) -> list[CellKey]:
        """The figures that it is about; the row of an open table is the name of the client. Empty for "nothing"."""
        found = {"pledged": [BUFFER], "waiver": [LCR], **dict.fromkeys(CAPITAL, [CET1])}
        found["connected"] = [("C_28.00", name, "c350") for name in self.clients]
        return list(dict.fromkeys(cell for fact in self.facts for cell in found[fact.kind]))


NO_NOTE = HandNote("", "", "", "", (), "")


@functools.cache
def hand_notes(split: str) -> tuple[HandNote, ...]:
    """The notes of a split: train, validation or test."""
    return tuple(map(parse_note, (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()))


def parse_note(line: str) -> HandNote:
    """A note from its line."""
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
