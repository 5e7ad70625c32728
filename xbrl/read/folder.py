"""Find and read all report files of a folder in parallel, and join the modules that a bank has filed for one date.

A bank corrects a return by filing all of it again. The names of EBA files end with the time of creation, as in
`LEI.CON_DE_COREP040200_COREPLCRDA_2026-03-31_20260415120000000.zip`: of one return the latest file counts.
"""

import itertools
import multiprocessing
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from xbrl.read.filed_report import EBA_NAME, Report, template_of
from xbrl.read.safety import CLUTTER_FOLDERS, is_clutter
from xbrl.read.xbrl import is_package, merge_reports, read_report

REPORT_SUFFIXES = (".zip", ".xbri", ".xbr", ".xbrl", ".xml", ".xhtml", ".html", ".htm", ".json")


def report_files(path: Path) -> tuple[list[Path], list[Path]]:
    """(the report itself, or the reports of a folder; its files that are none by their names). Raises UserError without a report."""
    files, others = find_reports(path) if path.is_dir() and not is_package(path) else ([path], [])
    if not files:
        suffixes = ", ".join(REPORT_SUFFIXES)
        raise UserError(f"{path} contains no reports; a report is a file ending in {suffixes}, or an unpacked package")
    return files, others


def read_files(
    files: Sequence[Path], workers: int, taxonomy: Sequence[Path] = ()
) -> tuple[list[Report], dict[Path, str]]:
    """(the report of each file, file -> why it was refused). `workers` processes read them."""
    read = list(in_parallel(partial(try_read_report, taxonomy=taxonomy), files, workers, "files"))
    refused = {path: found for path, found in zip(files, read, strict=True) if isinstance(found, str)}
    return [found for found in read if isinstance(found, Report)], refused


def passed_over(others: Sequence[Path]) -> str:
    """A line on files of a folder that are no reports by their names, for what is printed; "" without any."""
    return (
        f"not read: {len(others)} files that are no reports by their names, the first {others[0]}\n" if others else ""
    )


def find_reports(folder: Path) -> tuple[list[Path], list[Path]]:
    """Sorted (report files and unpacked packages, other files) under a folder, recursively.

    Hidden entries and files that an operating system has added are skipped. A folder that links lead to again is read once.
    """
    found: list[Path] = []
    others: list[Path] = []
    seen: set[Path] = set()

    def walk(folder: Path) -> None:
        if (real := folder.resolve()) in seen:
            return
        seen.add(real)
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or path.name in CLUTTER_FOLDERS or is_clutter(path.name):
                continue
            if path.is_dir() and not is_package(path):
                walk(path)
            else:
                (found if path.is_dir() or path.suffix.lower() in REPORT_SUFFIXES else others).append(path)

    walk(folder)
    return found, others


def try_read_report(path: Path, taxonomy: Sequence[Path] = ()) -> Report | str:
    """The report, or why it is refused. Never raises, so that worker processes survive bad files."""
    try:
        report = read_report(path, taxonomy=taxonomy)
    except UserError as error:
        return str(error)
    except Exception as error:  # a bug in this code or in a parser must not stop the other files
        return f"{path}: {type(error).__name__}: {error}"
    if not report.entity or not report.period:
        return f"{path}: the report has no entity or no reference date"
    if not report.entity.isprintable():
        return f"{path}: the entity {report.entity!a} is no identifier; ask the bank to file the report again"
    return report


def join_modules(reports: Iterable[Report], refused: dict[Path, str]) -> list[Report]:
    """One report for each entity and reference date, in this order, with its `files`. Of a corrected return the latest counts.

    `refused`: file -> error message. A report is `incomplete`, too, if the name of a refused file has its entity and date, if a
    correction leaves a template out, or if it is not known which of two files counts.
    """
    modules: dict[tuple[str, str], list[Report]] = {}
    for report in reports:
        modules.setdefault((report.entity, report.period), []).append(report)
    joined = []
    for case, parts in sorted(modules.items()):
        paths = [part.path for part in parts]
        later, missing = _later_files(paths), []
        for path in refused:
            if is_named_after(path, *case) and path not in _later_files([path, *paths]):
                missing.append(f"{refused[path]}; obtain the file again")
        counting = {part.path: part for part in parts if part.path not in later}
        report = merge_reports(counting.values())
        replaced = [(part, counting[later[part.path]]) for part in parts if part.path in later]
        for old, new in replaced:
            if left := sorted(_templates(old) - _templates(new)):
                what = f"{new.path} corrects {old.path} and leaves out {', '.join(left)}"
                missing.append(f"{what}; remove the one that does not count")
        figures = [(path, _figures(part)) for path, part in counting.items()]
        for (one, mine), (two, others) in itertools.combinations(figures, 2):
            if differing := sorted(table for table in mine.keys() & others.keys() if mine[table] != others[table]):
                missing.append(
                    f"{one} and {two} both have {differing[0]} and differ; remove the one that does not count"
                )
        warnings = tuple(f"{old.path.name} does not count: {new.path.name} was made later" for old, new in replaced)
        joined.append(
            replace(
                report,
                files=tuple(path for part in parts for path in part.files or (part.path,)),
                warnings=(*warnings, *report.warnings),
                incomplete=(*report.incomplete, *missing),
            )
        )
    return joined


def _later_files(paths: Iterable[Path]) -> dict[Path, Path]:
    """File -> the latest one of the same return, if that is another: their names differ in the time of creation alone."""
    names = {path: name for path in paths if (name := EBA_NAME.search(path.name))}
    made = {path: (path.name[: name.start(2)], name[2]) for path, name in names.items()}
    last = {of: path for path, (of, _) in sorted(made.items(), key=lambda one: one[1])}
    return {path: last[of] for path, (of, time) in made.items() if time < made[last[of]][1]}


def _templates(report: Report) -> set[str]:
    """The templates that a file reports."""
    filed = {template for template, is_filed in report.filing_indicators.items() if is_filed}
    return filed or {template_of(fact.cell[0]) for fact in report.facts if fact.cell}


def _figures(report: Report) -> dict[str, set[tuple]]:
    """Table -> its figures. Each return has the table on its nature, ..._00.01, which is left out."""
    found: dict[str, set[tuple]] = {}
    for fact in report.facts:
        if fact.cell and not fact.cell[0].endswith("_00.01"):
            found.setdefault(fact.cell[0], set()).add((fact.cell, fact.value, *sorted(fact.keys.items())))
    return found


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


def in_parallel(function, items: Sequence, workers: int, unit: str) -> Iterator:  # noqa: ANN001 (any function)
    """`map` in worker processes, in the order of `items`, with a progress bar on a terminal. One item or one worker needs no process."""
    if len(items) < 2 or workers < 2:
        yield from map(function, items)
        return
    # Spawn: Arelle and the open DPM database must not be shared with forked processes.
    context = multiprocessing.get_context("spawn")
    # A terminal sends Ctrl-C to every process. Workers that die of it print tracebacks, and the pool may wait for them forever.
    ignored = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=context, **ignored) as pool:
        results = pool.map(function, items, chunksize=4)
        try:
            yield from tqdm(results, total=len(items), desc=unit, unit=unit[:-1], disable=None)
        except BrokenProcessPool as error:
            what = "a worker process was killed, as the system does where memory runs out"
            raise UserError(f"{what}; run the command again with fewer of them, or on fewer {unit}") from error
