"""The figures that a report as text shows, each with its label: what a program without any knowledge of banks can read."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TABLE = re.compile(r"[A-Z] \d\d\.\d\d(?:\.[a-z])?(?= |$)")
_NOTE = re.compile(r"note(?::| on )", re.IGNORECASE)
_FIGURE = re.compile(r"(?<![\w.])(-?)(\d[\d,]*(?:\.\d+)?)(%| (?:thousand|million|bn|mn|k)\b|)")


@dataclass(frozen=True)
class PrintedFigure:
    """One figure of a report.

    `label` identifies the cell and has digits only in the code of a cell. `sign` is `-` or empty. `unit` is `%`, `thousand`
    and so on, or empty. `percent` is the value of a percentage, None for any other figure.
    """

    label: str
    sign: str
    unit: str
    percent: float | None


def printed_figures(report: str) -> Iterator[PrintedFigure]:
    """Yield the figures of a report in both styles of `render.render_report`, in the order of the text.

    In the style "cells" the label is the table and the text before ` | `; in other lines it is the text before the figure,
    without digits. The figures of a note have the label `note`.
    """
    table = ""
    for line in report.splitlines():
        heading = _TABLE.match(line)
        name, bar, value = line.rpartition(" | ")
        if _NOTE.match(line):
            yield from (_printed("note", match) for match in _FIGURE.finditer(value if bar else line))
        elif bar:
            match = _FIGURE.search(value)
            yield _printed(f"{table} {name}", match) if match else PrintedFigure(f"{table} {name}", "", value, None)
        elif heading:
            table = heading[0]
        else:
            end = 0
            for match in _FIGURE.finditer(line):
                yield _printed(" ".join(re.sub(r"\d", "", line[end : match.start()]).split()).strip(" ,;:"), match)
                end = match.end()


def _printed(label: str, match: re.Match) -> PrintedFigure:
    sign, digits, unit = match.groups()
    value = float(f"{sign}{digits.replace(',', '')}") if unit == "%" else None
    return PrintedFigure(label, sign, unit.strip(), value)
