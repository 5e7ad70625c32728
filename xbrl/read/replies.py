"""Read the explanations that arrive beside reports: replies to queries and cover letters. Their text is not trusted.

The EBA's filing rules (2.25) have no place for explanations in a report. They stand in the folder of the reports:

- `replies.csv` has the columns entity, period, text and, if known, query (its name, which is not read) and cell (one or several,
  `C 76.00.a r0030 c0010; C 01.00 r0020 c0010`; in an open table the row is its key). `replies.jsonl` has a JSON object with the same
  keys per line.
- `NAME.txt` beside `NAME.zip`, `NAME.xbrl` or `NAME.json` is a text on that report.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from xbrl.read.filed_report import CellKey, Note, Report, is_day, is_named_after
from xbrl.read.render import cell_name
from xbrl.read.report_notes import MAX_FILED_CHARACTERS, join_notes, make_notes
from xbrl.read.xbrl_csv import read_table_of

FILES = ("replies.csv", "replies.jsonl")
REQUIRED = ("entity", "period", "text")
COLUMNS = ("entity", "period", "query", "cell", "text")
CELL = re.compile(r"([A-Z] \S+) (.+) (c\d+)")


@dataclass(frozen=True)
class BankReply:
    """One reply. `entity` may lack its scope if the bank has one report as of the date."""

    entity: str
    period: str
    note: Note
    where: str = ""  # "FILE, line N"
    folder: Path = Path()


def add_replies(
    reports: Iterable[Report], files: Iterable[Path], reads_texts: bool = True
) -> tuple[list[Report], list[str]]:
    """Return (the reports with the replies beside their `files` as notes, a sentence for each reply that has no report).

    With `reads_texts=False`, a text beside a report is not read: in an archive it may be the supervisor's letter. Raise UserError
    for a replies file that cannot be read.
    """
    reports = list(reports)
    folders = dict.fromkeys(path.parent for path in files)
    replies = [reply for folder in folders for name in FILES for reply in read_replies(folder / name)]
    scopes: dict[tuple[str, str], list[Report]] = {}
    for report in reports:
        for entity in {report.entity, report.entity.partition(".")[0]}:
            scopes.setdefault((entity, report.period), []).append(report)
    # A reply on a report of the folder that was not asked for is no mistake.
    named = {folder: list(folder.iterdir()) for folder in {reply.folder for reply in replies}}
    by_report: dict[int, list[Note]] = {}
    unknown = []
    for reply in replies:
        known = scopes.get((reply.entity, reply.period), [])
        if len(known) == 1:
            by_report.setdefault(id(known[0]), []).append(reply.note)
        elif known or not any(is_named_after(path, reply.entity, reply.period) for path in named[reply.folder]):
            why = "has several reports as of that date; add the scope, as in LEI.CON" if known else "has no such report"
            unknown.append(f"{reply.where}: a reply of {reply.entity} as of {reply.period} is not read: the bank {why}")
    return [
        with_notes(report, [*by_report.get(id(report), ()), *(_texts(report) if reads_texts else ())])
        for report in reports
    ], unknown


def with_notes(report: Report, notes: Sequence[Note]) -> Report:
    """Return the report with more notes, each cut and cleaned as a footnote is."""
    more, warnings = make_notes(notes)
    return replace(report, notes=join_notes((*report.notes, *more)), warnings=(*report.warnings, *warnings))


def read_replies(path: Path) -> Iterator[BankReply]:
    """Yield the replies of a file, none if there is no such file. Raise UserError with line and column of a mistake."""
    if not path.is_file():
        return
    if not is_inside(path, path.parent):
        raise UserError(f"{path} is a link that points outside its folder; put the file itself there")
    rows = read_table_of(path, REQUIRED, COLUMNS) if path.suffix == ".csv" else _read_lines(path)
    for where, row in rows:
        if not row["entity"]:
            raise UserError(f"{where}, column entity: it is empty; name the bank that replied")
        if not is_day(row["period"]):
            raise UserError(f"{where}, column period: {row['period']!r} is not a date (YYYY-MM-DD)")
        if not row["text"]:
            raise UserError(f"{where}, column text: it is empty; write the reply, or remove the line")
        yield BankReply(
            row["entity"], row["period"], Note(row["text"], _cells(where, row.get("cell", ""))), where, path.parent
        )


def write_replies(path: Path, replies: Iterable[BankReply]) -> None:
    """Write a replies.csv."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for reply in replies:
            writer.writerow(
                (reply.entity, reply.period, "", "; ".join(map(cell_name, reply.note.cells)), reply.note.text)
            )


def text_files(report: Path) -> tuple[Path, ...]:
    """Return the names that a text on a report file may have."""
    return (report.with_name(f"{report.name}.txt"),) if report.is_dir() else (report.with_suffix(".txt"),)


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether a path lies in a folder after links are followed."""
    return path.resolve().is_relative_to(folder.resolve())


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid UTF-8 at byte {error.start}; save the file as UTF-8") from error
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({error}); write one object per line") from error
        if not row and not line.strip():
            continue
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in REQUIRED):
            raise UserError(f"{where}: expected a JSON object with the texts {', '.join(REQUIRED)}")
        if wrong := [name for name in row if name not in COLUMNS or not isinstance(row[name], str)]:
            raise UserError(f"{where}: the key {wrong[0]!r} is unknown or no text; the keys are {', '.join(COLUMNS)}")
        yield where, {name: text.strip() for name, text in row.items()}


def _cells(where: str, text: str) -> tuple[CellKey, ...]:
    cells = []
    for name in filter(None, map(str.strip, text.split(";"))):
        if not (match := CELL.fullmatch(name)):
            raise UserError(f"{where}, column cell: {name!r} is no cell such as C 76.00.a r0030 c0010")
        cells.append((match[1].replace(" ", "_"), match[2], match[3]))
    return tuple(cells)


def _texts(report: Report) -> Iterator[Note]:
    """Yield the texts beside the files of a report. A byte that is not UTF-8 becomes a question mark in a box."""
    for path in (text for file in report.files or (report.path,) for text in text_files(file)):
        if path.is_file() and is_inside(path, path.parent):
            with path.open(encoding="utf-8-sig", errors="replace") as file:
                yield Note(file.read(MAX_FILED_CHARACTERS))
