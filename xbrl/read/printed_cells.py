"""The cells of a report as they are printed, read back from its text."""

import re

_TABLE = re.compile(r"[CF] \d\d\.\d\d\S*")
_CELL = re.compile(r"((?:r\d+ )?c\d+) .*\| (.*)")


def printed_cells(report: str) -> dict[str, str]:
    """Name of a cell -> its value, as printed by `render.render_report` in the style "cells".

    A cell of an open table has no row; its value is that of the last row.
    """
    table, figures = "", {}
    for line in report.splitlines():
        if match := _TABLE.match(line):
            table = match[0]
        elif match := _CELL.fullmatch(line):
            figures[f"{table} {match[1]}"] = match[2]
    return figures
