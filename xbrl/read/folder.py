"""Find and read all report files of a folder in parallel, and join the modules that a bank has filed for one date.

A bank corrects a return by filing the whole return again. The names of EBA files end with the time of creation, as in
`LEI.CON_DE_COREP040200_COREPLCRDA_2026-03-31_20260415120000000.zip`. The latest file of a return counts.
"""

import itertools
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from xbrl.read.filed_report import EBA_NAME, Report, is_named_after, template_of
from xbrl.read.replies import FILES, is_inside, text_files
from xbrl.read.safety import CLUTTER_FOLDERS, is_clutter
from xbrl.read.xbrl import is_package, merge_reports, read_report

REPORT_SUFFIXES = (".zip", ".xbri", ".xbr", ".xbrl", ".xml", ".xhtml", ".html", ".htm", ".json")


def report_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Return (report files, files not named like reports) of a folder or a single report. Raise UserError without a report."""
    files, others = find_reports(path) if path.is_dir() and not is_package(path) else ([path], [])
    texts = {text for file in files for text in text_files(file)}
    ignored = [other for other in others if other not in texts and other.name not in FILES]
    if not files:
        suffixes = ", ".join(REPORT_SUFFIXES)
        raise UserError(f"{path} contains no reports; a report is a file ending in {suffixes}, or an unpacked package")
    return files, ignored


def read_files(
    files: Sequence[Path], workers: int, taxonomy: Sequence[Path] = ()
) -> tuple[list[Report], dict[Path, str]]:
    """Read the files in `workers` processes. Return (reports, {file: why it was refused})."""
    results = list(in_parallel(partial(try_read_report, taxonomy=taxonomy), files, workers, "files"))
    refused = {path: result for path, result in zip(files, results, strict=True) if isinstance(result, str)}
    return [result for result in results if isinstance(result, Report)], refused


def passed_over(ignored: Sequence[Path]) -> str:
    """Return lines for the user that count the files not named like reports, and links; "" without such files."""
    links = [path for path in ignored if path.is_symlink()]
    files = [path for path in ignored if path not in links]
    lines = (
        [f"not read: {len(files)} files that are no reports by their names, the first {files[0]}\n"] if files else []
    )
    lines += (
        [f"not read: {len(links)} links that do not lead to a report in the folder, the first {links[0]}\n"]
        if links
        else []
    )
    return "".join(lines)


def find_reports(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return (report files and unpacked packages, files not named like reports) under a folder, each sorted.

    Hidden entries and files that an operating system has added are skipped. A folder that is reached again through a
    link is read once. A link that points outside the folder is not followed and stands among the files that are no reports.
    """
    reports: list[Path] = []
    ignored: list[Path] = []
    seen: set[Path] = set()

    root = folder

    def walk(folder: Path) -> None:
        if (real := folder.resolve()) in seen:
            return
        seen.add(real)
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or path.name in CLUTTER_FOLDERS or is_clutter(path.name):
                continue
            if path.is_symlink() and not is_inside(path, root):
                ignored.append(path)
            elif path.is_dir() and not is_package(path):
                walk(path)
            else:
                (reports if path.is_dir() or path.suffix.lower() in REPORT_SUFFIXES else ignored).append(path)

    walk(folder)
    return reports, ignored


def try_read_report(path: Path, taxonomy: Sequence[Path] = ()) -> Report | str:
    """Return the report, or a sentence why it is refused. Never raises, so that worker processes survive bad files."""
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
    """Join the reports of each entity and reference date into one, sorted by entity and date. Later files replace corrected ones.

    `refused` maps each refused file to its error message. A report becomes `incomplete` if the name of a refused file has its
    entity and date, if a correction leaves a template out, or if the names do not tell which of two files counts.
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
            if left_out := sorted(_templates(old) - _templates(new)):
                missing.append(
                    f"{new.path} corrects {old.path} and leaves out {', '.join(left_out)}; remove the one that does not count"
                )
        figures = [(path, _figures(part)) for path, part in counting.items()]
        for (first, tables), (second, other_tables) in itertools.combinations(figures, 2):
            common = tables.keys() & other_tables.keys()
            if differing := sorted(table for table in common if tables[table] != other_tables[table]):
                missing.append(
                    f"{first} and {second} both have {differing[0]} and differ; remove the one that does not count"
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
    """Return {superseded file: latest file of the same return}. The names of the two differ only in the time of creation."""
    matches = {path: match for path in paths if (match := EBA_NAME.search(path.name))}
    returns = {path: (path.name[: match.start(2)], match[2]) for path, match in matches.items()}  # (return, time)
    latest = {name: path for path, (name, _) in sorted(returns.items(), key=lambda item: item[1])}
    return {path: latest[name] for path, (name, time) in returns.items() if time < returns[latest[name]][1]}


def _templates(report: Report) -> set[str]:
    filed = {template for template, is_filed in report.filing_indicators.items() if is_filed}
    return filed or {template_of(fact.cell[0]) for fact in report.facts if fact.cell}


def _figures(report: Report) -> dict[str, set[tuple]]:
    """Return {table: figures}, without the tables ..._00.01, which describe the nature of every return."""
    figures: dict[str, set[tuple]] = {}
    for fact in report.facts:
        if fact.cell and not fact.cell[0].endswith("_00.01"):
            figures.setdefault(fact.cell[0], set()).add((fact.cell, fact.value, *sorted(fact.keys.items())))
    return figures


def in_parallel(function, items: Sequence, workers: int, unit: str) -> Iterator:  # noqa: ANN001 (any function)
    """Yield `function(item)` in the order of `items`, computed in worker processes, with a progress bar on a terminal.

    With one item or one worker no process is started. Raise UserError if a worker is killed.
    """
    if len(items) < 2 or workers < 2:
        yield from map(function, items)
        return
    # Spawn: Arelle and the open DPM database must not be shared with forked processes.
    context = multiprocessing.get_context("spawn")
    # A terminal sends Ctrl-C to every process. A worker that dies of Ctrl-C prints a traceback, and the pool may wait forever.
    ignore_interrupt = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=context, **ignore_interrupt) as pool:
        results = pool.map(function, items, chunksize=4)
        try:
            yield from tqdm(results, total=len(items), desc=unit, unit=unit[:-1], disable=None)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, as the system does when memory runs out; run the command again with fewer "
                f"workers, or on fewer {unit}"
            ) from error
