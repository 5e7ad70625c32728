"""The forms of the EBA's Data Point Model as text: every cell of every table, as a report that fills it would show it.

A supervisor's archive holds these labels and codes many times over; the invented banks fill few of them. For finding
tokens (scripts/extend_vocabulary.py --forms): the figures mean nothing.
"""

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

from common.errors import UserError
from data.regulator.dpm import Cell, Cells
from data.regulator.render import render_report
from data.regulator.report import Fact, Report


def form_texts(cells: Cells, modules: tuple[str, ...] = ()) -> Iterator[str]:
    """One text a table: of `modules` (`COREP_LCR_DA`) alone, or of all. Raises UserError for an unknown module."""
    tables = cells.database.execute("select code, module from tables order by code").fetchall()
    if unknown := sorted(set(modules) - {module for _, module in tables}):
        known = ", ".join(sorted({module for _, module in tables}))
        raise UserError(f"the DPM has no module {', '.join(unknown)}; it has {known}")
    for code, module in tables:
        if not modules or module in modules:
            facts = tuple(map(_filled, cells.in_table(code)))
            if facts:
                report = Report(Path(code), "DPM", "", "", None, {}, facts, ())
                yield render_report(report, cells).partition("\n")[2].replace(" | nil", "")


def _filled(cell: Cell) -> Fact:
    """A fact with a figure that differs from cell to cell, as in a real report: a number that stays the same looks like a name."""
    number = int(cell.datapoint.removeprefix("dp")) % 100_000
    value, unit, decimals = {
        "monetary": (Decimal(number * 1000), "iso4217:EUR", -3),
        "percentage": (Decimal(number).scaleb(-4), "xbrli:pure", 4),
    }.get(cell.type, (None, None, None))
    return Fact(cell.datapoint, value, unit, decimals, "", "", {}, (cell.table, cell.row, cell.column), type=cell.type)
