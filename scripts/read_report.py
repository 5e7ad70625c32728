"""Read bank reports in any XBRL syntax and print them as JSON lines.

FILE is xBRL-XML, inline XBRL, xBRL-JSON, or a report package (zip or unpacked folder) of these or of EBA xBRL-CSV. One
fact a line, then one line {"summary": ...}. Several FILEs are the modules that one bank filed for one date, and are read
as one report. A FOLDER of reports is read in parallel; every line then names its file, and a file that is refused is
reported on stderr and does not stop the rest. Exit code 2 if any file was refused.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError, run_script
from data.regulator.dpm import load_cells
from data.regulator.render import STYLES, render_report
from data.regulator.report import Fact, Report
from data.regulator.rules import evaluate
from data.regulator.xbrl import is_package, merge_reports, read_report

SUFFIXES = (".zip", ".xbri", ".xbr", ".xbrl", ".xml", ".xhtml", ".html", ".htm", ".json")


def main() -> int:
    """Read one report, or every report of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a report, or one folder of reports")
    parser.add_argument("--text", action="store_true", help="print what the model will see instead of facts")
    parser.add_argument("--style", choices=STYLES, default="cells", help="the style of --text (%(default)s)")
    parser.add_argument("--rules", action="store_true", help="print what each rule says instead of facts")
    parser.add_argument("--summary", action="store_true", help="print only the summary")
    parser.add_argument("--taxonomy", action="append", default=[], type=Path, metavar="ZIP", help="a taxonomy package")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes for a folder (%(default)s)")
    args = parser.parse_args()
    show = functools.partial(lines, text=args.text, style=args.style, rules=args.rules, brief=args.summary)
    try:
        if len(args.files) == 1 and args.files[0].is_dir() and not is_package(args.files[0]):
            return read_folder(
                args.files[0], functools.partial(read_one, show=show, taxonomy=args.taxonomy), args.workers
            )
        reports = [read_report(file, taxonomy=args.taxonomy) for file in args.files]
        report = merge_reports(reports) if len(reports) > 1 else reports[0]
        for line in show(report):
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def lines(report: Report, text: bool, style: str, rules: bool, brief: bool, **also: str) -> Iterator[str]:
    """The output for one report; `also` is added to each JSON line."""
    if text:
        yield from ([f"== {also['file']}"] if also else []) + [render_report(report, load_cells(), style=style)]
        if not rules:
            return
    if rules:
        yield from (dumps({**also, **asdict(result)}) for result in evaluate(report))
    elif not brief:
        yield from (dumps({**also, **fact_row(fact)}) for fact in report.facts)
    yield dumps({**also, "summary": summary(report)})


def fact_row(fact: Fact) -> dict:
    """One fact as a JSON object; `cell`, `type` and `label` only where they are known."""
    names = ("concept", "value", "unit", "decimals", "entity", "period", "dimensions")
    row = {name: getattr(fact, name) for name in names}
    row |= {name: getattr(fact, name) for name in ("cell", "other_cells", "type", "label") if getattr(fact, name)}
    return row


def summary(report: Report) -> dict:
    """What the report is, and how much of it was understood."""
    return {
        "format": report.format,
        "entity": report.entity,
        "period": report.period,
        "currency": report.currency,
        "filing_indicators": report.filing_indicators,
        "facts": len(report.facts),
        "numeric_facts": sum(isinstance(fact.value, Decimal) for fact in report.facts),
        "facts_with_cell": sum(fact.cell is not None for fact in report.facts),
        "warnings": report.warnings,
    }


def dumps(value: object) -> str:
    """JSON on one line in which a Decimal is a number with all of its digits."""
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)


def read_folder(folder: Path, read: Callable[[Path], tuple[Path, list[str], str]], workers: int) -> int:
    """Read every report below `folder` in parallel; returns the exit code."""
    files = find_reports(folder)
    if not files:
        raise UserError(f"{folder}: no report in it; reports end in {', '.join(SUFFIXES)}, or are unpacked packages")
    refused = 0
    # Fresh processes: Arelle and the open DPM database must not be shared with this one.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(max(workers, 1), len(files)), mp_context=context) as pool:
        for _, output, error in tqdm(pool.map(read, files, chunksize=4), total=len(files), desc="reports", unit="file"):
            if error:
                refused += 1
                tqdm.write(f"error: {error}", file=sys.stderr)
            for line in output:
                print(line)
    sys.stdout.flush()
    print(f"{len(files) - refused} reports read, {refused} refused", file=sys.stderr)
    return 2 if refused else 0


def read_one(path: Path, show: Callable[..., Iterator[str]], taxonomy: list[Path]) -> tuple[Path, list[str], str]:
    """(path, output lines, why it was refused) of one file in a worker process."""
    try:
        return path, list(show(read_report(path, taxonomy=taxonomy), file=str(path))), ""
    except UserError as error:
        return path, [], str(error)
    except Exception as error:  # a bug of ours or of a parser: named, and the other files are still read
        return path, [], f"{path}: {type(error).__name__}: {error}"


def find_reports(folder: Path) -> list[Path]:
    """The report files and unpacked packages below a folder, sorted; hidden ones are passed over."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found += [path] if is_package(path) else find_reports(path)
        elif path.suffix.lower() in SUFFIXES:
            found.append(path)
    return found


if __name__ == "__main__":
    run_script(main)
