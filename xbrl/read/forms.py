"""Every table of the EBA's Data Point Model as text, formatted like a report that fills in every cell.

Labels and codes of all tables are common in a supervisor's archive, but the reports of the invented banks contain only
a few of them. The texts are used to find new tokens (scripts/extend_vocabulary.py --forms). Their figures are
meaningless.
"""

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

from common.errors import UserError
from xbrl.read.dpm import Cell, Cells
from xbrl.read.render import render_report
from xbrl.read.report import Fact, Report


def form_texts(cells: Cells, modules: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield one text per table of `modules`, e.g. `COREP_LCR_DA`, or of all modules.

    Raises UserError for an unknown module.
    """
    tables = [(table.code, table.module) for table in map(cells.table, sorted(cells.codes)) if table]
    if unknown := sorted(set(modules) - {module for _, module in tables}):
        known = ", ".join(sorted({module for _, module in tables}))
        raise UserError(f"the DPM has no module {', '.join(unknown)}; choose from {known}")
    for code, module in tables:
        if not modules or module in modules:
            facts = tuple(map(_filled_in, cells.in_table(code)))
            if facts:
                report = Report(Path(code), "DPM", "", "", None, {}, facts, ())
                yield render_report(report, cells).partition("\n")[2].replace(" | nil", "")


def _filled_in(cell: Cell) -> Fact:
    """A fact for a cell. Figures differ between cells, because a constant number would look like part of the label."""
    number = int(cell.datapoint.removeprefix("dp")) % 100_000
    value, unit, decimals = {
        "monetary": (Decimal(number * 1000), "iso4217:EUR", -3),
        "percentage": (Decimal(number).scaleb(-4), "xbrli:pure", 4),
    }.get(cell.type, (None, None, None))
    return Fact(cell.datapoint, value, unit, decimals, "", "", {}, (cell.table, cell.row, cell.column), type=cell.type)
