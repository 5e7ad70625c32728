"""A report, and a figure of it, as the text that a model reads. Every number in reports, answers and letters is written here."""

from dataclasses import dataclass
from decimal import Decimal

from data.regulator.dpm import Cells
from data.regulator.report import CellKey, Fact, Report
from errors import UserError

STYLES = ("cells", "labels")

# Our own short labels, for the style "labels" and for letters.
SHORT_LABELS: dict[CellKey, str] = {
    ("C_01.00", "r0010", "c0010"): "Own funds",
    ("C_01.00", "r0015", "c0010"): "Tier 1",
    ("C_01.00", "r0020", "c0010"): "CET1",
    ("C_01.00", "r0530", "c0010"): "AT1",
    ("C_01.00", "r0750", "c0010"): "Tier 2",
    ("C_02.00.a", "r0010", "c0010"): "TREA",
    ("C_03.00", "r0010", "c0010"): "CET1 ratio",
    ("C_03.00", "r0030", "c0010"): "Tier 1 ratio",
    ("C_03.00", "r0050", "c0010"): "Total capital ratio",
    ("C_03.00", "r0130", "c0010"): "TSCR",
    ("C_03.00", "r0140", "c0010"): "TSCR CET1",
    ("C_03.00", "r0150", "c0010"): "TSCR Tier 1",
    ("C_03.00", "r0160", "c0010"): "OCR",
    ("C_47.00", "r0300", "c0010"): "Leverage exposure",
    ("C_47.00", "r0340", "c0010"): "Leverage ratio",
    ("C_47.00", "r0440", "c0010"): "OLRR",
    ("C_76.00.a", "r0010", "c0010"): "Liquidity buffer",
    ("C_76.00.a", "r0020", "c0010"): "Net outflow",
    ("C_76.00.a", "r0030", "c0010"): "LCR",
    ("C_84.00.a", "r0220", "c0040"): "NSFR",
}


@dataclass(frozen=True)
class Addressee:
    """One row of a register of banks: what a report does not say about who filed it."""

    entity: str
    name: str
    country: str
    type: str


def render_report(report: Report, cells: Cells, style: str = "cells", bank: Addressee | None = None) -> str:
    """A report as lines of text.

    `style="cells"`: a header, then per table its code and label and a line a cell, `r0010 c0010 CET1 Capital ratio | 4.31%`.
    `style="labels"`: the compact form, `CET1 ratio 4.31%` a line. `cells` gives the labels. Facts that resolve to no cell are written with their concept and dimensions, never left out.
    """
    if style not in STYLES:
        raise UserError(f"there is no report style {style!r}; choose one of {', '.join(STYLES)}.")
    name = bank.name if bank else report.entity
    if style == "labels":
        lines = [f"{name} {report.period}"]
        return "\n".join(
            lines + [f"{_short(fact, cells)} {format_fact(fact, compact=True)}" for fact in _ordered(report.facts)]
        )
    header = [name if not bank else f"{name} ({report.entity})", f"reference date {report.period}"]
    lines = [
        " | ".join(header + ([f"amounts in {report.currency.removeprefix('iso4217:')}"] if report.currency else []))
    ]
    table = None
    for fact in _ordered(report.facts):
        if fact.cell is None:
            lines.append(f"{_short(fact, cells)} | {format_fact(fact)}")
            continue
        cell = cells.by_cell(*fact.cell)
        if fact.cell[0] != table:
            table = fact.cell[0]
            lines.append(f"{table_name(table)} {cell.table_label}".rstrip() if cell else table_name(table))
        where = "".join(f" {key}={value}" for key, value in sorted(fact.dimensions.items()))
        lines.append(f"{fact.cell[1]} {fact.cell[2]} {cell.row_label if cell else ''}{where} | {format_fact(fact)}")
    return "\n".join(lines)


def short_label(cell: CellKey) -> str:
    """The short label of a cell, or its code where it has none."""
    return SHORT_LABELS.get(cell) or cell_name(cell)


def cell_name(cell: CellKey) -> str:
    """`C 03.00 r0010 c0010`."""
    return f"{table_name(cell[0])} {cell[1]} {cell[2]}"


def table_name(table: str) -> str:
    """`C 03.00` for `C_03.00`."""
    return table.replace("_", " ")


def format_fact(fact: Fact, compact: bool = False) -> str:
    """The value of one fact as text; an empty (nil) one is `nil`."""
    if fact.value is None:
        return "nil"
    return (
        format_figure(fact.value, fact.unit, fact.decimals, compact)
        if isinstance(fact.value, Decimal)
        else str(fact.value)
    )


def format_figure(value: Decimal, unit: str | None, decimals: int | str | None = None, compact: bool = False) -> str:
    """A ratio as a percentage, an amount in the unit of its accuracy: `4.31%`, `1340 thousand`.

    Places are those that `decimals` reports. `compact` drops closing zeros and takes the largest unit that loses nothing:
    `104.2%`, `12.4 bn`.
    """
    if unit in (None, "", "pure", "xbrli:pure"):
        percent = value * 100
        if compact or not isinstance(decimals, int):
            return f"{_plain(percent)}%"
        places = max(decimals - 2, 0)
        rounded = percent.quantize(Decimal(1).scaleb(-places))
        return f"{rounded:f}%" if rounded == percent else f"{_plain(percent)}%"
    if compact:
        for name, size in (("bn", 9), ("mn", 6), ("k", 3)):
            if abs(value) >= Decimal(1).scaleb(size - 1) and value == round(value, 1 - size):
                return f"{_plain(value.scaleb(-size))} {name}"
        return _plain(value)
    exponent, name = (6, " million") if _below(decimals, -5) else (3, " thousand") if _below(decimals, -2) else (0, "")
    return f"{_plain(value.scaleb(-exponent))}{name}"


def format_limit(value: Decimal, unit: str | None, decimals: int | str | None = None) -> str:
    """A limit or an expected figure: no false places, `4.5%`, `100%`; an expected one is rounded as the report is."""
    if isinstance(decimals, int):
        value = round(value, max(decimals, 0))
    if unit in (None, "", "pure", "xbrli:pure"):
        return format_figure(value, unit, compact=True)
    return format_figure(value, unit, decimals)


def _below(decimals: int | str | None, bound: int) -> bool:
    return isinstance(decimals, int) and decimals < bound


def _plain(value: Decimal) -> str:
    """Digits without exponent and without closing zeros after the point."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _short(fact: Fact, cells: Cells) -> str:
    where = "".join(f" {key}={value}" for key, value in sorted(fact.dimensions.items()))
    if fact.cell is None:
        return f"{fact.concept}{where}"
    cell = cells.by_cell(*fact.cell)
    return (SHORT_LABELS.get(fact.cell) or (cell.row_label.strip() if cell else cell_name(fact.cell))) + where


def _ordered(facts: tuple[Fact, ...]) -> list[Fact]:
    """By cell, then the facts without one; the same fact in two tables is written in each."""
    return sorted(
        facts, key=lambda fact: (fact.cell is None, fact.cell or (), fact.concept, sorted(fact.dimensions.items()))
    )
