"""What a report is once it has been read, whatever the syntax it was filed in."""

import itertools
import re
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
NUMERIC_TYPES = ("monetary", "percentage", "integer", "decimal")  # of the DPM
CellKey = tuple[str, str, str]  # (table, row, column) as the EBA writes them, e.g. ("C_76.00.a", "r0030", "c0010")


@dataclass(frozen=True)
class Fact:
    """One reported value.

    `concept` is the EBA datapoint id (`dp5435202`) in xBRL-CSV and a prefixed name (`eba_met:mi53`) in the other syntaxes.
    `value` is a Decimal for a number, None for nil, and the text as filed where a number was promised and none stands.
    `unit` is `iso4217:EUR`, `xbrli:pure`, or None for what is not a number. `decimals` is None where none was given.
    `period` is a day, `YYYY-MM-DD`, or `START/END` with both days inclusive, or empty where the file names none.
    `dimensions` maps a dimension to its member; `sheet` is the key of a fixed sheet of an EBA table.
    `other_cells` are the further cells that show this same fact (in xBRL-XML it is filed once for all of its tables) and
    `fixed` the dimensions that the cell itself stands for. `type` and `label` come from a taxonomy package, if one was given.
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
    fixed: tuple[str, ...] = ()
    type: str = ""
    label: str = ""

    @property
    def keys(self) -> dict[str, str]:
        """The dimensions that the cell leaves open, without prefix: the key of an open row or sheet. Empty for most cells."""
        return {name.rpartition(":")[2]: self.dimensions[name] for name in self.dimensions if name not in self.fixed}


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
    if fact.keys:
        name += " [" + ", ".join(f"{key}={value}" for key, value in sorted(fact.keys.items())) + "]"
    return name


def parse_number(text: str) -> Decimal | None:
    """A decimal number as XML Schema and xBRL-CSV write it; None for anything else (`NaN`, `1,5`, `1_000`, `INF`)."""
    text = text.strip()
    return Decimal(text) if NUMBER.fullmatch(text) else None


def disagreements(facts: tuple[Fact, ...]) -> list[str]:
    """One warning for each fact that is reported twice with values that cannot both be right.

    Two facts are duplicates when concept, entity, period, unit and dimensions are equal (XBRL 2.1, 4.10; OIM 1.0, 5.1).
    Numbers agree when the intervals that their `decimals` allow meet; without `decimals` a number is exact.
    """
    groups: dict[tuple, list[Fact]] = {}
    for fact in facts:
        key = (fact.concept, fact.entity, fact.period, fact.unit, tuple(sorted(fact.dimensions.items())))
        known = groups.setdefault(key, [])
        if not known or not any(fact.value == other.value for other in known):
            known.append(fact)
    warnings = []
    for known in groups.values():
        if all(_agree(one, two) for one, two in itertools.combinations(known, 2)):
            continue
        values = " and ".join(f"as {_shown(fact.value)}" for fact in known[:4])
        elsewhere = [describe(fact) for fact in known[1:] if fact.cell != known[0].cell]
        warnings.append(f"{describe(known[0])} is reported {values}" + (f" ({elsewhere[0]})" if elsewhere else ""))
    return warnings


def _agree(one: Fact, two: Fact) -> bool:
    if one.value == two.value:
        return True
    if not isinstance(one.value, Decimal) or not isinstance(two.value, Decimal):
        return False
    allowed = sum(Decimal(1).scaleb(-fact.decimals) / 2 for fact in (one, two) if isinstance(fact.decimals, int))
    return abs(one.value - two.value) <= allowed


def _shown(value: Decimal | str | bool | None) -> str:
    return "nil" if value is None else repr(value[:40]) if isinstance(value, str) else str(value)
