"""Facts and reports, independent of the syntax they were filed in."""

import datetime
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
# Module and time of creation in an EBA file name: LEI.CON_DE_COREP040200_COREPLCRDA_2026-03-31_20260415120000000.zip
EBA_NAME = re.compile(r"_([A-Z][A-Z0-9]*)_\d{4}-\d\d-\d\d_(\d{14,17})(?!\d)")
NUMERIC_TYPES = ("monetary", "percentage", "integer", "decimal")  # numeric data types of the DPM
CellKey = tuple[str, str, str]  # (table, row, column) as the EBA writes them, e.g. ("C_76.00.a", "r0030", "c0010")


@dataclass(frozen=True)
class Fact:
    """One reported value."""

    concept: str  # EBA datapoint id (`dp5435202`) in xBRL-CSV, a prefixed name (`eba_met:mi53`) in the other syntaxes
    value: Decimal | str | bool | None  # None for nil; a numeric fact with an invalid value keeps the text as filed
    unit: str | None  # `iso4217:EUR`, `xbrli:pure`, or None if the value is not a number
    decimals: int | str | None  # "INF" for exact, None if not given
    entity: str
    period: str  # a day (YYYY-MM-DD), START/END with both days inclusive, or "" if the file gives none
    dimensions: dict[str, str] = field(hash=False)  # dimension -> member; `sheet` is the key of a fixed sheet
    cell: CellKey | None = None
    other_cells: tuple[CellKey, ...] = ()  # further cells that show this fact, which xBRL-XML has once for all tables
    fixed: tuple[str, ...] = ()  # dimensions that are part of the definition of the cell
    type: str = ""  # from a taxonomy package, if given
    label: str = ""  # from a taxonomy package, if given

    @property
    def keys(self) -> dict[str, str]:
        """Return the dimensions that the cell leaves open, without prefix: the key of an open row or sheet, {} for most cells."""
        return {name.rpartition(":")[2]: self.dimensions[name] for name in self.dimensions if name not in self.fixed}


@dataclass(frozen=True)
class Note:
    """An explanation that the bank gives in its report: a footnote (XBRL 2.1, 4.11; OIM 1.0, 5.4)."""

    text: str
    # Cells of the facts that the note is attached to; in an open table the row is its key. () for a note on the whole report.
    cells: tuple[CellKey, ...] = ()
    language: str = ""

    @property
    def id(self) -> str:
        """Return the name by which decisions refer to a note: a hash of its text.

        If the bank files the note with another text, the name changes and no earlier decision applies. The name has 16
        hexadecimal digits, because with 8 a bank could find another text with the same name in minutes.
        """
        return hashlib.sha256(" ".join(self.text.split()).encode("utf-8", "replace")).hexdigest()[:16]


@dataclass(frozen=True)
class Report:
    """One report, or the merged reports of one bank for one reference date."""

    path: Path
    format: str  # "xBRL-CSV", "xBRL-XML", "iXBRL", "xBRL-JSON"
    entity: str
    period: str  # the reference date, YYYY-MM-DD
    currency: str | None  # e.g. "EUR"; None if the file has no single currency
    filing_indicators: dict[str, bool] = field(hash=False)  # template (`C_76.00`) -> whether it was filed
    facts: tuple[Fact, ...]
    warnings: tuple[str, ...]
    notes: tuple[Note, ...] = ()
    files: tuple[Path, ...] = ()  # all files of a merged report
    # Reasons why figures are missing: facts without a cell, refused files of the same bank and date
    incomplete: tuple[str, ...] = ()
    # (number of an EBA filing rule, sentence) for breaches that the facts do not show
    breaches: tuple[tuple[str, str], ...] = ()

    @property
    def amounts(self) -> str:
        """Return the currency of the amounts, or "no single currency", or "no amounts"."""
        has_amounts = any((fact.unit or "").startswith("iso4217:") for fact in self.facts)
        return self.currency or ("no single currency" if has_amounts else "no amounts")


@functools.cache
def template_of(table: str) -> str:
    """Return the template of a table, as filing indicators name it: `C_84.00` for `C_84.00.a`."""
    return re.sub(r"\.[a-z]$", "", table)


def describe(fact: Fact) -> str:
    """Name a fact for a warning: by its cell if known, its concept and its keys."""
    name = fact.concept
    if fact.cell:
        name = "{" + ", ".join(fact.cell) + "} " + name
    if fact.keys:
        name += " [" + ", ".join(f"{key}={value}" for key, value in sorted(fact.keys.items())) + "]"
    return name


def parse_number(text: str) -> Decimal | None:
    """Parse a number in the notation of XML Schema and xBRL-CSV. Return None for other text (`NaN`, `1,5`, `1_000`, `INF`)."""
    text = text.strip()
    return Decimal(text) if NUMBER.fullmatch(text) else None


def is_day(text: str) -> bool:
    """Return whether a text is an existing day in the form YYYY-MM-DD of `xs:date`, before the year 9999."""
    try:
        is_date = re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII) is not None
        return is_date and datetime.date.fromisoformat(text).year < datetime.MAXYEAR
    except ValueError:
        return False


def is_named_after(path: Path, entity: str, period: str) -> bool:
    """Return whether a file name has this bank and date.

    EBA file names begin `LEI.CON_DE_...` and contain the date (EBA filing rules). An `entity` with a scope suffix does not
    match a name with another scope suffix.
    """
    bank, _, scope = entity.partition(".")
    if bank not in path.name or period not in path.name:
        return False
    named = re.search(rf"{re.escape(bank)}(?:\.([A-Z]+))?(?![A-Z0-9])", path.name)
    return bool(named) and (not scope or named[1] in (None, scope))


def duplicate_warnings(facts: tuple[Fact, ...]) -> list[str]:
    """Return one warning per fact that is reported more than once with inconsistent values.

    Facts are duplicates if concept, entity, period, unit and dimensions are equal (XBRL 2.1, 4.10; OIM 1.0, 5.1). Two
    numbers are consistent if their rounding intervals, given by `decimals`, overlap. Without `decimals` they are exact.
    """
    groups: dict[tuple, dict[object, Fact]] = {}
    for fact in facts:
        key = (fact.concept, fact.entity, fact.period, fact.unit, tuple(sorted(fact.dimensions.items())))
        groups.setdefault(key, {}).setdefault(fact.value, fact)
    warnings = []
    for duplicates in map(list, map(dict.values, groups.values())):
        first = duplicates[0]
        if len(duplicates) == 1 or _all_consistent(duplicates):
            continue
        values = " and ".join(f"as {_format_value(fact.value)}" for fact in duplicates[:4])
        elsewhere = [describe(fact) for fact in duplicates[1:] if fact.cell != first.cell]
        warnings.append(f"{describe(first)} is reported {values}" + (f" ({elsewhere[0]})" if elsewhere else ""))
    return warnings


def consistent(first: Fact, second: Fact) -> bool:
    """Return whether two values in the same unit agree within their rounding (OIM 1.0, 5.1.1)."""
    return first.value == second.value or _all_consistent((first, second))


def _all_consistent(facts: Sequence[Fact]) -> bool:
    """Return whether the rounding intervals of all facts have a point in common. Then every pair is `consistent`."""
    numbers = [(fact.value, _half_a_unit(fact)) for fact in facts if isinstance(fact.value, Decimal)]
    if len(numbers) < len(facts):
        return False
    return max(value - half for value, half in numbers) <= min(value + half for value, half in numbers)


def _half_a_unit(fact: Fact) -> Decimal:
    return Decimal(1).scaleb(-fact.decimals) / 2 if isinstance(fact.decimals, int) else Decimal(0)


def _format_value(value: Decimal | str | bool | None) -> str:
    return "nil" if value is None else repr(value[:40]) if isinstance(value, str) else str(value)
