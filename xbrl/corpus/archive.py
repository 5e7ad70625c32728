"""A supervisor's own archive: match report files and directive letters by bank and reference date."""

import csv
import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from xbrl.read.report import Report
from xbrl.read.safety import CLUTTER_FOLDERS, is_clutter
from xbrl.read.xbrl import is_package, merge_reports, read_report

REPORT_SUFFIXES = (".zip", ".xbri", ".xbr", ".xbrl", ".xml", ".xhtml", ".html", ".htm", ".json")
LETTER_SUFFIXES = (".txt", ".md")
HEAD_LINES = 12  # lines of a letter that are searched when its file name does not identify the report
Case = tuple[str, str]  # (entity without its scope suffix, reference date YYYY-MM-DD)


@dataclass(frozen=True)
class Letter:
    """The text of one directive letter."""

    path: Path
    text: str


def find_reports(folder: Path) -> tuple[list[Path], list[Path]]:
    """Sorted (report files and unpacked packages, other files) under a folder, recursively.

    Hidden entries and files that an operating system has added are skipped.
    """
    found: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in CLUTTER_FOLDERS or is_clutter(path.name):
            continue
        if path.is_dir() and not is_package(path):
            nested_reports, nested_others = find_reports(path)
            found, others = found + nested_reports, others + nested_others
        else:
            (found if path.is_dir() or path.suffix.lower() in REPORT_SUFFIXES else others).append(path)
    return found, others


def find_letters(folder: Path) -> tuple[list[Letter], list[str]]:
    """(letters under a folder, error messages for all other files). A letter is a non-empty UTF-8 .txt or .md file."""
    letters, rejected = [], []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        if is_clutter(path.relative_to(folder).as_posix()):
            continue
        if path.suffix.lower() not in LETTER_SUFFIXES:
            rejected.append(f"{path}: not a text file; save the letter as .txt in UTF-8")
            continue
        try:
            text = path.read_bytes().decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            rejected.append(f"{path}: not valid UTF-8 at byte {error.start}; save the file as UTF-8")
            continue
        if text:
            letters.append(Letter(path, text.replace("\r\n", "\n")))
        else:
            rejected.append(f"{path}: the letter is empty")
    return letters, rejected


def try_read_report(path: Path, taxonomy: Sequence[Path] = ()) -> tuple[Path, Report | None, str]:
    """(path, report or None, error message). Never raises, so that worker processes survive bad files."""
    try:
        report = read_report(path, taxonomy=taxonomy)
    except UserError as error:
        return path, None, str(error)
    except Exception as error:  # a bug in this code or in a parser must not stop the other files
        return path, None, f"{path}: {type(error).__name__}: {error}"
    if not report.entity or not report.period:
        return path, None, f"{path}: the report has no entity or no reference date"
    return path, report, ""


def case_of(report: Report) -> Case:
    """Bank and reference date of a report. `LEI.CON` and `LEI.IND` are two consolidation scopes of the same bank."""
    return report.entity.partition(".")[0], report.period


def group_reports(reports: Iterable[Report]) -> tuple[dict[Case, Report], list[str]]:
    """(case -> its modules merged into one report, error messages for files that could not be merged)."""
    files: dict[Case, list[Report]] = {}
    for report in reports:
        files.setdefault(case_of(report), []).append(report)
    merged, rejected = {}, []
    for case, parts in sorted(files.items()):
        entity = parts[0].entity
        rejected += [
            f"{part.path}: its scope {part.entity} differs from {entity}, the scope of the first report of this bank"
            for part in parts
            if part.entity != entity
        ]
        merged[case] = merge_reports(part for part in parts if part.entity == entity)
    return merged, rejected


def incomplete_cases(rejected: Iterable[str], cases: Iterable[Case]) -> dict[Case, str]:
    """Case -> error message of a rejected file that belongs to it.

    The rules cannot check figures of a missing module, so an example from an incomplete case would be mislabelled.
    """
    paths = {line: Path(line.split(": ", 1)[0]) for line in rejected}
    return {case: line for case in cases for line, path in paths.items() if is_named_after(path, *case)}


def is_named_after(path: Path, entity: str, period: str) -> bool:
    """Whether the name of a file says that it belongs to a bank and date: EBA file names begin `LEI.CON_DE_...` and
    contain the date (EBA filing rules).

    An `entity` with a scope suffix does not match a name with another one.
    """
    bank, _, scope = entity.partition(".")
    if bank not in path.name or period not in path.name:
        return False
    named = re.search(rf"{re.escape(bank)}(?:\.([A-Z]+))?(?![A-Z0-9])", path.name)
    return bool(named) and (not scope or named[1] in (None, scope))


def match_letters(
    letters: Iterable[Letter], cases: Iterable[Case], names: Mapping[str, str]
) -> tuple[dict[Case, Letter], list[str]]:
    """(case -> its letter, error messages for letters without a match).

    Looks for the entity code, or the bank's name from `names`, and for the reference date: first in the file name of a
    letter, then in its first `HEAD_LINES` lines.
    """
    periods: dict[str, list[str]] = {}
    for entity, period in cases:
        periods.setdefault(entity, []).append(period)
    matched: dict[Case, Letter] = {}
    rejected = []
    for letter in letters:
        head = "\n".join(letter.text.splitlines()[:HEAD_LINES])
        entity = _find_entity(letter.path.stem, periods, names) or _find_entity(head, periods, names)
        if entity is None:
            rejected.append(f"{letter.path}: mentions none of the banks that have reports")
            continue
        found = _find_periods(letter.path.stem, periods[entity]) or _find_periods(head, periods[entity])
        if len(found) != 1:
            what = "several reference dates" if found else "no reference date"
            rejected.append(f"{letter.path}: mentions {what} for which {entity} filed a report")
        elif (entity, found[0]) in matched:
            other = matched[entity, found[0]].path
            rejected.append(f"{letter.path}: {other} is already the letter for the same report")
        else:
            matched[entity, found[0]] = letter
    return matched, rejected


def read_pairs(path: Path, reports: Path, letters: Path) -> dict[Path, Path]:
    """Report file -> letter file, from a CSV with the columns `report` and `letter`.

    Paths in the CSV are relative to the folders `reports` and `letters`.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; --pairs needs a CSV with the columns report,letter")
    pairs = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for column in ("report", "letter"):
            if column not in (reader.fieldnames or []):
                raise UserError(f"{path}, line 1: the column {column!r} is missing")
        for row in reader:
            report, letter = reports / (row["report"] or ""), letters / (row["letter"] or "")
            for listed in (report, letter):
                if not listed.exists():
                    raise UserError(f"{path}, line {reader.line_num}: {listed} does not exist")
            if pairs.get(report, letter) != letter:
                raise UserError(f"{path}, line {reader.line_num}: {report} is listed with a second letter")
            pairs[report] = letter
    return pairs


def _find_entity(text: str, periods: Mapping[str, list[str]], names: Mapping[str, str]) -> str | None:
    """The only bank that a text mentions, by entity code or else by name (whole words; the longest name wins)."""
    coded = [entity for entity in periods if entity.lower() in text.lower()]
    if coded:
        return coded[0] if len(coded) == 1 else None
    words = " ".join(re.sub(r"[_\-]+", " ", text).lower().split())
    named = [entity for entity in periods if re.search(rf"\b{re.escape(names.get(entity, chr(0)).lower())}\b", words)]
    named.sort(key=lambda entity: -len(names[entity]))
    longest = [entity for entity in named if len(names[entity]) == len(names[named[0]])]
    return longest[0] if len(longest) == 1 else None


def _find_periods(text: str, known: Iterable[str]) -> list[str]:
    """The known reference dates that a text mentions."""
    return [period for period in known if re.search("|".join(_date_patterns(period)), text, re.IGNORECASE)]


def _date_patterns(period: str) -> list[str]:
    """Regular expressions for the ways to write a date.

    Examples: 2026-03-31, 20260331, 31.03.2026, 31/3/2026, 31 March 2026, Q1 2026, 2026-Q1.
    """
    day = datetime.date.fromisoformat(period)
    patterns = [
        rf"{day:%Y}[-_. ]?{day:%m}[-_. ]?{day:%d}",
        rf"0?{day.day}[./-]0?{day.month}[./-]{day.year}",
        rf"0?{day.day}\.? {day:%B} {day.year}",
        rf"{day:%B} 0?{day.day},? {day.year}",
    ]
    if day.month % 3 == 0:
        quarter = day.month // 3
        patterns += [rf"Q{quarter}[-_ /]?{day.year}", rf"{day.year}[-_ /]?Q{quarter}"]
    return [rf"(?<![0-9]){pattern}(?![0-9])" for pattern in patterns]
