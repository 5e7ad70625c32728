"""What a report is once it has been read, whatever the syntax it was filed in."""

from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

CellKey = tuple[str, str, str]  # (table, row, column) as the EBA writes them, e.g. ("C_76.00.a", "r0030", "c0010")


@dataclass(frozen=True)
class Fact:
    """One reported value.

    `concept` is the EBA datapoint id (`dp5435202`) in xBRL-CSV and a prefixed name (`eba_met:mi53`) in the other syntaxes.
    `value` is a Decimal for a number, None for nil, and the text as filed where a number was promised and none stands.
    `unit` is `iso4217:EUR`, `xbrli:pure`, or None for what is not a number. `decimals` is None where none was given.
    `period` is a day, `YYYY-MM-DD`, or `START/END` with both days inclusive, or empty where the file names none.
    `dimensions` maps a dimension to its member; `sheet` is the key of a fixed sheet of an EBA table.
    `other_cells` are the further cells that show this same fact (in xBRL-XML it is filed once for all of its tables).
    """

    concept: str
    value: Decimal | str | bool | None
    unit: str | None
    decimals: int | str | None  # the text "INF" means exact
    entity: str
    period: str
    dimensions: dict[str, str] = field(hash=False)
    cell: CellKey | None = None
    other_cells: tuple[CellKey, ...] = ()


@dataclass(frozen=True)
class Report:
    """One report, or several of one bank for one reference date. `filing_indicators`: template (`C_76.00`) -> filed."""

    path: Path
    format: str  # "xBRL-CSV", "xBRL-XML", "iXBRL", "xBRL-JSON"
    entity: str
    period: str  # the reference date, YYYY-MM-DD
    currency: str | None  # "EUR"; None where the file fixes none
    filing_indicators: dict[str, bool] = field(hash=False)
    facts: tuple[Fact, ...]
    warnings: tuple[str, ...]


def describe(fact: Fact) -> str:
    """Name a fact in a warning: its cell where it has one, its concept, and its dimensions."""
    name = fact.concept
    if fact.cell:
        name = "{" + ", ".join(fact.cell) + "} " + name
    if fact.dimensions:
        name += " [" + ", ".join(f"{key}={value}" for key, value in sorted(fact.dimensions.items())) + "]"
    return name


def disagreements(facts: tuple[Fact, ...]) -> list[str]:
    """One warning for each fact that is reported twice with values that cannot both be right.

    Two facts are duplicates when concept, entity, period, unit and dimensions are equal (XBRL 2.1, 4.10; OIM 1.0, 5.1).
    Numbers agree when they are equal after rounding to the coarser of their `decimals`.
    """
    first: dict[tuple, Fact] = {}
    said: dict[tuple, str] = {}
    for fact in facts:
        key = (fact.concept, fact.entity, fact.period, fact.unit, tuple(sorted(fact.dimensions.items())))
        known = first.setdefault(key, fact)
        if key not in said and not _agree(known, fact):
            where = f" (also as {describe(fact)})" if fact.cell != known.cell else ""
            said[key] = f"{describe(known)} is reported as {known.value} and as {fact.value}{where}"
    return list(said.values())


def _agree(one: Fact, two: Fact) -> bool:
    if one.value == two.value:
        return True
    if not isinstance(one.value, Decimal) or not isinstance(two.value, Decimal):
        return False
    known = [fact.decimals for fact in (one, two) if isinstance(fact.decimals, int)]
    if not known:
        return False
    step = Decimal(1).scaleb(-min(known))
    return abs(one.value - two.value) < step
