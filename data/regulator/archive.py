"""A supervisor's own archive: which report files and which letters belong to one bank and one reference date."""

import csv
import datetime
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from data.regulator.report import Report
from data.regulator.xbrl import is_package, merge_reports, read_report

REPORT_SUFFIXES = (".zip", ".xbri", ".xbr", ".xbrl", ".xml", ".xhtml", ".html", ".htm", ".json")
LETTER_SUFFIXES = (".txt", ".md")
FIRST_LINES = 12  # of a letter, where its file name does not say what it answers
Case = tuple[str, str]  # (entity without the suffix of the scope, reference date YYYY-MM-DD)


@dataclass(frozen=True)
class Letter:
    """One directive letter as text."""

    path: Path
    text: str


def find_reports(folder: Path) -> tuple[list[Path], list[Path]]:
    """(the report files and unpacked packages below a folder, its other files), sorted; hidden ones are passed over."""
    found: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not is_package(path):
            below = find_reports(path)
            found, others = found + below[0], others + below[1]
        else:
            (found if path.is_dir() or path.suffix.lower() in REPORT_SUFFIXES else others).append(path)
    return found, others


def find_letters(folder: Path) -> tuple[list[Letter], list[str]]:
    """(the letters below a folder, why other files are none). Letters are text files in UTF-8."""
    letters, refused = [], []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        if path.suffix.lower() not in LETTER_SUFFIXES:
            refused.append(f"{path}: not a text file; save the letter as .txt")
            continue
        try:
            text = path.read_bytes().decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            refused.append(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8")
            continue
        if text:
            letters.append(Letter(path, text.replace("\r\n", "\n")))
        else:
            refused.append(f"{path}: the letter is empty")
    return letters, refused


def read_one(path: Path) -> tuple[Path, Report | None, str]:
    """(path, report, why it was refused), for worker processes."""
    try:
        report = read_report(path)
    except UserError as error:
        return path, None, str(error)
    except Exception as error:  # a bug of ours or of a parser: named, and the other files are still read
        return path, None, f"{path}: {type(error).__name__}: {error}"
    if not report.entity or not report.period:
        return path, None, f"{path}: the report names no entity or no reference date"
    return path, report, ""


def case_of(report: Report) -> Case:
    """The bank and the date of a report. `LEI.CON` and `LEI.IND` are scopes of consolidation of one bank."""
    return report.entity.partition(".")[0], report.period


def group_reports(reports: Iterable[Report]) -> tuple[dict[Case, Report], list[str]]:
    """(case -> its modules merged into one report, which files could not be merged)."""
    files: dict[Case, list[Report]] = {}
    for report in reports:
        files.setdefault(case_of(report), []).append(report)
    merged, refused = {}, []
    for case, parts in sorted(files.items()):
        first = [part for part in parts if part.entity == parts[0].entity]
        refused += [
            f"{part.path}: another scope ({part.entity}) of a bank that is taken as {first[0].entity}"
            for part in parts
            if part not in first
        ]
        merged[case] = merge_reports(first)
    return merged, refused


def incomplete_cases(refused: Iterable[str], cases: Iterable[Case]) -> dict[Case, str]:
    """Case -> the refused file whose name says that it is a part of it (EBA file names hold entity and date).

    Without that part the rules would miss what stands in it, and the example would be labelled wrongly.
    """
    names = {line: Path(line.split(": ", 1)[0]).name for line in refused}
    return {case: line for case in cases for line, name in names.items() if case[0] in name and case[1] in name}


def match_letters(
    letters: Iterable[Letter], cases: Iterable[Case], names: Mapping[str, str]
) -> tuple[dict[Case, Letter], list[str]]:
    """(case -> the letter on it, why other letters found none).

    The entity, or the name of the bank in `names`, and the reference date are looked for in the file name of a letter and
    then in its first lines.
    """
    periods: dict[str, list[str]] = {}
    for entity, period in cases:
        periods.setdefault(entity, []).append(period)
    matched: dict[Case, Letter] = {}
    refused = []
    for letter in letters:
        head = "\n".join(letter.text.splitlines()[:FIRST_LINES])
        entity = _entity(letter.path.stem, periods, names) or _entity(head, periods, names)
        if entity is None:
            refused.append(f"{letter.path}: names no bank of the reports")
            continue
        found = _periods(letter.path.stem, periods[entity]) or _periods(head, periods[entity])
        if len(found) != 1:
            what = "several reference dates" if found else "no reference date"
            refused.append(f"{letter.path}: names {what} of the reports of {entity}")
        elif (entity, found[0]) in matched:
            other = matched[entity, found[0]].path
            refused.append(f"{letter.path}: {other} is a letter on the same report")
        else:
            matched[entity, found[0]] = letter
    return matched, refused


def read_pairs(path: Path, reports: Path, letters: Path) -> dict[Path, Path]:
    """Report file -> letter, from a CSV with the columns report and letter, whose paths are below the two folders."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of pairs (a CSV with the columns report,letter)")
    pairs = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for column in ("report", "letter"):
            if column not in (reader.fieldnames or []):
                raise UserError(f"{path}, line 1: the column {column!r} is missing")
        for row in reader:
            report, letter = reports / (row["report"] or ""), letters / (row["letter"] or "")
            for file_of in (report, letter):
                if not file_of.exists():
                    raise UserError(f"{path}, line {reader.line_num}: {file_of} does not exist")
            if pairs.get(report, letter) != letter:
                raise UserError(f"{path}, line {reader.line_num}: {report} has a second letter")
            pairs[report] = letter
    return pairs


def _entity(text: str, periods: Mapping[str, list[str]], names: Mapping[str, str]) -> str | None:
    """The one bank that a text names: by its code, or by its name as a whole word (the longest that fits)."""
    coded = [entity for entity in periods if entity.lower() in text.lower()]
    if coded:
        return coded[0] if len(coded) == 1 else None
    words = " ".join(re.sub(r"[_\-]+", " ", text).lower().split())
    named = [entity for entity in periods if re.search(rf"\b{re.escape(names.get(entity, chr(0)).lower())}\b", words)]
    named.sort(key=lambda entity: -len(names[entity]))
    longest = [entity for entity in named if len(names[entity]) == len(names[named[0]])]
    return longest[0] if len(longest) == 1 else None


def _periods(text: str, known: Iterable[str]) -> list[str]:
    return [period for period in known if any(re.search(form, text, re.IGNORECASE) for form in _forms(period))]


def _forms(period: str) -> list[str]:
    """The ways to write a reference date: 2026-03-31, 20260331, 31.03.2026, 31/3/2026, 31 March 2026, Q1 2026, 2026-Q1."""
    day = datetime.date.fromisoformat(period)
    forms = [
        rf"{day:%Y}[-_. ]?{day:%m}[-_. ]?{day:%d}",
        rf"0?{day.day}[./-]0?{day.month}[./-]{day.year}",
        rf"0?{day.day}\.? {day:%B} {day.year}",
        rf"{day:%B} 0?{day.day},? {day.year}",
    ]
    if day.month % 3 == 0:
        quarter = day.month // 3
        forms += [rf"Q{quarter}[-_ /]?{day.year}", rf"{day.year}[-_ /]?Q{quarter}"]
    return [rf"(?<![0-9]){form}(?![0-9])" for form in forms]
