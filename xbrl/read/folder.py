"""Find and read all report files of a folder in parallel, and join the modules that a bank has filed for one date."""

import multiprocessing
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from xbrl.read.filed_report import Report
from xbrl.read.safety import CLUTTER_FOLDERS, is_clutter
from xbrl.read.xbrl import is_package, merge_reports, read_report

REPORT_SUFFIXES = (".zip", ".xbri", ".xbr", ".xbrl", ".xml", ".xhtml", ".html", ".htm", ".json")


def report_files(path: Path) -> list[Path]:
    """The report itself, or the reports of a folder. Raises UserError if it has none."""
    files = find_reports(path)[0] if path.is_dir() and not is_package(path) else [path]
    if not files:
        suffixes = ", ".join(REPORT_SUFFIXES)
        raise UserError(f"{path} contains no reports; a report is a file ending in {suffixes}, or an unpacked package")
    return files


def read_files(
    files: Sequence[Path], workers: int, taxonomy: Sequence[Path] = ()
) -> tuple[list[Report], dict[Path, str]]:
    """(the report of each file, file -> why it was refused). `workers` processes read them."""
    read = list(in_parallel(partial(try_read_report, taxonomy=taxonomy), files, workers, "files"))
    refused = {path: found for path, found in zip(files, read, strict=True) if isinstance(found, str)}
    return [found for found in read if isinstance(found, Report)], refused


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
    """One report for each entity and reference date, in this order, with its `files`.

    `refused`: file -> error message. A report is `incomplete`, too, if the name of a refused file has its entity and date.
    """
    modules: dict[tuple[str, str], list[Report]] = {}
    for report in reports:
        modules.setdefault((report.entity, report.period), []).append(report)
    joined = []
    for case, parts in sorted(modules.items()):
        report = merge_reports(parts)
        missing = tuple(
            f"{error}; obtain the file again" for path, error in refused.items() if is_named_after(path, *case)
        )
        joined.append(replace(report, incomplete=report.incomplete + missing))
    return joined


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
        yield from tqdm(results, total=len(items), desc=unit, unit=unit[:-1], disable=None)
