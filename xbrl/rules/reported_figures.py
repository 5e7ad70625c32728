"""Look up the figures that formulas read: one per cell, with its source.

A figure is reported, recomputed from other reported figures, or missing. A ratio that a bank leaves out is recomputed
from its numerator and denominator (`RECOMPUTED`), so that leaving out a ratio hides nothing.

Facts of another entity or another reference date than the report's are not figures of the report (EBA filing rules
2.9, 2.13); `quality.py` reports them.
"""

import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from operator import truediv

from xbrl.read.filed_report import CellKey, Fact, Report, consistent
from xbrl.read.render import PURE, cell_name, format_figure, round_beside
from xbrl.rules.formula import Number, combine, exactly, rounded

Key = tuple[tuple[str, str], ...]  # (dimension, member) pairs of an open row or sheet; () for a cell without keys
# The accuracy that EBA filing rules 2.18 demand: ratios to four decimal places, amounts to tens of thousands (since
# 1 April 2025, before that to thousands). A figure that meets it counts as reported.
RATIO_DECIMALS, AMOUNT_DECIMALS = 4, -4
MAX_VALUES = 8  # contradictory values that are kept for one cell, because a hostile file can have any number


def _cell(text: str) -> CellKey:
    table, row, column = text.split()
    return table, row, column


# Ratio -> (numerator, denominator, source of the definition)
RECOMPUTED: dict[CellKey, tuple[CellKey, CellKey, str]] = {
    _cell(ratio): (_cell(numerator), _cell(denominator), legal)
    for ratio, numerator, denominator, legal in (
        ("C_03.00 r0010 c0010", "C_01.00 r0020 c0010", "C_02.00.a r0010 c0010", "CRR Art. 92(2)(a)"),
        ("C_03.00 r0030 c0010", "C_01.00 r0015 c0010", "C_02.00.a r0010 c0010", "CRR Art. 92(2)(b)"),
        ("C_03.00 r0050 c0010", "C_01.00 r0010 c0010", "C_02.00.a r0010 c0010", "CRR Art. 92(2)(c)"),
        ("C_28.00 * c230", "C_28.00 * c210", "C_01.00 r0015 c0010", "CRR Art. 392"),
        ("C_28.00 * c350", "C_28.00 * c330", "C_01.00 r0015 c0010", "CRR Art. 395(1)"),
        ("C_47.00 r0340 c0010", "C_47.00 r0320 c0010", "C_47.00 r0300 c0010", "CRR Art. 429(2)"),
        (*(f"C_76.00.a {row} c0010" for row in ("r0030", "r0010", "r0020")), "Delegated Reg. (EU) 2015/61 Art. 4(1)"),
        ("C_84.00.a r0220 c0040", "C_84.00.d r0120 c0030", "C_84.00.c r0010 c0020", "CRR Art. 428b(1)"),
    )
}


@dataclass(frozen=True)
class Figure:
    """The figure of one cell.

    `source` is "reported"; "recomputed" as the first of `parts` divided by the second; "read as 0" if the cell is not
    reported and the rule reads it as 0; "not reported" (a ratio that cannot be recomputed has its numerator and denominator
    as `parts`); or "contradictory" if the cell has several inconsistent values, which are `parts`.
    """

    cell: CellKey
    row: str  # key of the row in an open table
    value: Decimal | str | bool | None = None
    unit: str | None = None
    decimals: int | str | None = None
    source: str = "not reported"
    parts: tuple["Figure", ...] = ()
    legal: str = ""  # definition of a recomputed ratio


@dataclass(frozen=True)
class Figures:
    """The facts of a report by cell and key. A cell with values that disagree has several facts, usually it has one."""

    facts: dict[CellKey, dict[Key, tuple[Fact, ...]]]
    tables: frozenset[str]  # tables with a fact

    @functools.cached_property
    def joins(self) -> dict[CellKey, dict[tuple[str, str], dict[frozenset[str], tuple[int, Key]]]]:
        """Index the keys of open tables by their parts, to join rows of different tables.

        The nesting is: cell -> part of a key -> names in the whole key -> (position, first key with this part).
        """
        index: dict = {}
        for cell, groups in self.facts.items():
            for place, key in enumerate(groups if cell[1] == "*" else ()):
                for part in key:
                    by_names = index.setdefault(cell, {}).setdefault(part, {})
                    by_names.setdefault(frozenset(name for name, _ in key), (place, key))
        return index


def index_facts(report: Report) -> Figures:
    """Index the facts of a report. Facts of another entity or reference date are left out."""
    facts: dict[CellKey, dict[Key, tuple[Fact, ...]]] = {}
    for fact in report.facts:
        if fact.cell is None or fact.value is None or not is_of_report(fact, report):
            continue
        key = tuple(sorted(fact.keys.items()))
        for cell in (fact.cell, *fact.other_cells):
            groups = facts.setdefault(cell, {})
            groups[key] = _merged(groups.get(key, ()), fact)
    return Figures(facts, frozenset(table for table, _, _ in facts))


def is_of_report(fact: Fact, report: Report) -> bool:
    """Return whether a fact has the entity and the reference date of the report. A fact without them counts, too."""
    date = fact.period.rpartition("/")[2]
    return fact.entity in ("", report.entity) and date in ("", "forever", report.period)


def _merged(facts: tuple[Fact, ...], fact: Fact) -> tuple[Fact, ...]:
    """Add one more fact of the same cell to `facts`. If two are consistent, only the more accurate fact is kept."""
    for index, earlier in enumerate(facts):
        if earlier.unit == fact.unit and consistent(earlier, fact):
            better = fact if _accuracy(fact) > _accuracy(earlier) else earlier
            return (*facts[:index], better, *facts[index + 1 :])
    return (*facts, fact)[:MAX_VALUES]


def _accuracy(fact: Fact) -> float:
    return fact.decimals if isinstance(fact.decimals, int) else float("inf")


def row_keys(figures: Figures, cells: Iterable[CellKey]) -> list[Key]:
    """Return the keys of the open rows that report any of `cells`, in the order of the report."""
    return list(dict.fromkeys(key for cell in cells for key in figures.facts.get(cell, {})))


def read_figure(figures: Figures, cell: CellKey, key: Key = ()) -> Figure:
    """Return the reported figure of a cell, or a figure with the source "not reported" or "contradictory".

    For a cell of an open table, `key` selects its row. Rows of different open tables are joined on any part that their keys
    have in common.
    """
    row = " ".join(member for _, member in key) if cell[1] == "*" else ""
    groups = figures.facts.get(cell, {})
    if cell[1] == "*":
        own = frozenset(name for name, _ in key)
        parts = figures.joins.get(cell, {}) if key not in groups else {}
        joined = [first for part in key for names, first in parts.get(part, {}).items() if names != own]
        facts = groups.get(min(joined)[1] if joined else key, ())
    else:  # a fixed cell has no keys; if it has sheets, all sheets must agree
        facts = groups.get(()) or tuple(fact for group in groups.values() for fact in group)
    values = tuple(Figure(cell, row, fact.value, fact.unit, fact.decimals, "reported") for fact in facts)
    if len(values) > 1:
        return Figure(cell, row, source="contradictory", parts=values)
    return values[0] if values else Figure(cell, row)


def recompute(figures: Figures, cell: CellKey, key: Key, tables: frozenset[str]) -> Figure:
    """Recompute a missing ratio from figures of `tables`.

    If that is impossible, return a figure "not reported" with the two parts from which the ratio would be computed.
    """
    missing = Figure(cell, read_figure(figures, cell, key).row)
    if not can_recompute(cell, tables):
        return missing
    numerator, denominator, legal = RECOMPUTED[cell]
    parts = read_figure(figures, numerator, key), read_figure(figures, denominator)
    above, below = (part.value for part in parts)
    if not isinstance(above, Decimal) or not isinstance(below, Decimal) or not below or parts[0].unit != parts[1].unit:
        return replace(missing, parts=parts)
    return Figure(cell, missing.row, above / below, "xbrli:pure", RATIO_DECIMALS, "recomputed", parts, legal)


def can_recompute(cell: CellKey, tables: frozenset[str]) -> bool:
    """Return whether a cell is a ratio whose numerator and denominator belong to `tables`."""
    return cell in RECOMPUTED and all(part[0] in tables for part in RECOMPUTED[cell][:2])


def number_of(figure: Figure) -> Number:
    """Return a figure's number with its interval. Raise ZeroDivisionError if the denominator of a recomputed ratio may be 0."""
    if figure.source == "recomputed":
        return combine(truediv, *map(number_of, figure.parts))
    assert isinstance(figure.value, Decimal), figure
    return rounded(figure.value, figure.decimals)


def decimals_needed(unit: str | None) -> int:
    """Return the `decimals` that EBA filing rules 2.18 demand."""
    return RATIO_DECIMALS if unit in PURE else AMOUNT_DECIMALS


def is_accurate(figure: Figure) -> bool:
    """Return whether a figure, or each part of a recomputed ratio, is as accurate as EBA filing rules 2.18 demand."""
    if figure.parts:
        return all(map(is_accurate, figure.parts))
    return not isinstance(figure.decimals, int) or figure.decimals >= decimals_needed(figure.unit)


def numbers_of(figures: Mapping[str, Figure], exact: bool) -> dict[str, Number]:
    """Return the numbers of the figures by name, without figures that have no number.

    With `exact`, figures that are accurate enough count as reported, and so do ratios recomputed from such figures. All other
    figures stand for the interval that their `decimals` allow.
    """
    numbers = {}
    for name, figure in figures.items():
        if figure.source == "read as 0":
            numbers[name] = exactly(Decimal(0))
        elif isinstance(figure.value, Decimal):
            numbers[name] = exactly(figure.value) if exact and is_accurate(figure) else number_of(figure)
    return numbers


def why_unreadable(figures: Mapping[str, Figure], texts: Collection[str]) -> str:
    """Return why a formula cannot be computed from its figures; "" if it can. It reads the figures named in `texts` as text."""
    reasons = []
    for name, figure in figures.items():
        if figure.source == "contradictory":
            values = " and ".join(f"as {format_value(part)}" for part in figure.parts[:4])
            reasons.append(f"{name_of(figure)} is reported {values}")
        elif figure.source == "not reported":
            reasons.append(f"{name_of(figure)} is not reported{_why_not_recomputed(figure)}")
        elif figure.source == "reported" and name not in texts and not isinstance(figure.value, Decimal):
            reasons.append(f"{name_of(figure)} is {format_value(figure)}, not a number")
    parts = [part for figure in figures.values() for part in (figure, *figure.parts)]
    units = [part.unit or "" for part in parts if isinstance(part.value, Decimal) and part.unit not in PURE]
    if len(currencies := dict.fromkeys(unit.removeprefix("iso4217:") for unit in units)) > 1:
        reasons.append(f"its amounts are in different currencies: {', '.join(currencies)}")
    return "; ".join(reasons)


def _why_not_recomputed(figure: Figure) -> str:
    """Name the numerator and denominator from which a missing ratio cannot be recomputed."""
    parts = [f"{name_of(part)} is {part.source if part.value is None else format_value(part)}" for part in figure.parts]
    return f" and cannot be recomputed: {' and '.join(parts)}" if parts else ""


def why_too_coarse(figures: Iterable[Figure]) -> str:
    """Name the figures that are too coarse to decide a rule, with their intervals."""
    reasons = []
    for figure in figures:
        if isinstance(figure.value, Decimal) and not is_accurate(figure):
            number = number_of(figure)
            low, high = (format_value(figure, end) for end in (number.low, number.high))
            accuracy = "recomputed" if figure.parts else f"decimals={figure.decimals}"
            reasons.append(f"{name_of(figure)} is {format_value(figure)} ({accuracy}), between {low} and {high}")
    return f"too coarse to decide: {'; '.join(reasons)}"


def name_of(figure: Figure) -> str:
    return cell_name(figure.cell, figure.row)


def format_value(figure: Figure, replacement: Decimal | None = None) -> str:
    """Format the value of a figure, or `replacement` in the same unit. An amount gets its currency."""
    value = figure.value if replacement is None else replacement
    if not isinstance(value, Decimal):
        return "nothing" if value is None else repr(str(value))
    if figure.source == "recomputed":
        # Six places, or more until it differs from the value rounded to four places, which would look like a limit.
        like_a_limit, _ = round_beside(value, None)
        return format_figure(round_beside(value, like_a_limit, 6)[0], figure.unit)
    text = format_figure(value, figure.unit, figure.decimals)
    return text if figure.unit in PURE else f"{text} {(figure.unit or '').removeprefix('iso4217:')}"
