"""Read bank reports in any XBRL syntax and print them as JSON lines.

    python xbrl/scripts/read_report.py --text --rules tests/xbrl/read/eba_lcr_sample

FILE is xBRL-XML, inline XBRL, xBRL-JSON, or a report package (a zip or an unpacked folder) with such a file or with
EBA xBRL-CSV. The script prints one line per fact, then one line {"summary": ...}. Several FILEs are merged into one report;
they must be the modules that one bank filed for one reference date.

If FILE is a folder of reports, its files are read in parallel, the modules of one bank and date are joined, and each
line names the bank and date. A file that cannot be read is reported on stderr, and the script continues. If the name of such a
file has a bank and date, their report is marked as incomplete. The exit code is 2 if any file was refused.

A report is also incomplete if the EBA's Data Point Model in this repository (up to release 4.2) lacks some of its facts. A
warning on stderr counts and names them.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from decimal import Decimal

from common.command_line import add_number, new_parser, reader_may_leave
from common.errors import run_script
from xbrl.read.dpm import load_cells
from xbrl.read.filed_report import Report
from xbrl.read.folder import join_modules, passed_over, read_files, report_files
from xbrl.read.render import STYLES, render_report
from xbrl.read.replies import add_replies
from xbrl.read.xbrl import is_package, merge_reports, read_report
from xbrl.rules.quality import check_quality
from xbrl.rules.rule_lines import all_results, result_fields, rule_table

FIELDS = ("concept", "value", "unit", "decimals", "entity", "period", "dimensions")  # fields of every printed fact
OPTIONAL = ("cell", "other_cells", "type", "label")  # fields that are printed if they are known


def main() -> int:
    """Read one report, or every report of a folder."""
    parser = new_parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a report, or one folder of reports")
    parser.add_argument("--text", action="store_true", help="print the text that the model reads instead of facts")
    parser.add_argument("--style", choices=STYLES, default="cells", help="the style of --text (default: %(default)s)")
    parser.add_argument("--rules", action="store_true", help="print the result of every rule, with --text as a table")
    parser.add_argument("--summary", action="store_true", help="print only the summary")
    parser.add_argument("--taxonomy", action="append", default=[], type=Path, metavar="ZIP", help="a taxonomy package")
    add_number(parser, "--workers", "number of processes for a folder", os.cpu_count(), least=1)
    args = parser.parse_args()
    of_folder = len(args.files) == 1 and args.files[0].is_dir() and not is_package(args.files[0])
    refused = {}
    with reader_may_leave():
        if of_folder:
            files, skipped = report_files(args.files[0])
            read, refused = read_files(files, args.workers, args.taxonomy)
            reports = join_modules(read, refused)
        else:
            files = args.files
            reports = [read_report(file, taxonomy=args.taxonomy) for file in files]
            reports = [merge_reports(reports)] if len(reports) > 1 else reports
        reports, strangers = add_replies(reports, files)
        for error in refused.values():
            print(f"error: {error}", file=sys.stderr)
        for report in reports:
            print_report(report, args, f"{report.entity} {report.period}" if of_folder else "")
        sys.stdout.flush()
        if of_folder:
            count = sum(len(report.files) for report in reports)
            incomplete = sum(bool(report.incomplete) for report in reports)
            counts = f"{len(reports)} reports of {count} files, {incomplete} incomplete; {len(refused)} files refused"
            print(f"{passed_over(skipped)}{counts}", *strangers, sep="\n", file=sys.stderr)
    return 2 if refused else 0


def print_report(report: Report, args: argparse.Namespace, name: str = "") -> None:
    """Print one report in the form of the options, and on stderr the reasons why figures are missing.

    `name`, given for a report of a folder, is added to each JSON line. A text gets a header with the name and the files.
    """
    for reason in report.incomplete:
        print(f"warning: {reason}", file=sys.stderr)
    if args.text:
        if name:
            print(f"== {name} ({', '.join(file.name for file in report.files)})")
            for reason in report.incomplete:
                print(f"== incomplete: {reason}")
        lines = rule_table(report) if args.rules else [render_report(report, load_cells(), style=args.style)]
        print(*lines, sep="\n")
        return
    rows: Iterable[dict] = []
    if args.rules:
        rows = map(result_fields, all_results(report))
    elif not args.summary:
        rows = (
            {key: value for key, value in vars(fact).items() if key in FIELDS or (key in OPTIONAL and value)}
            for fact in report.facts
        )
    extra = {"report": name} if name else {}
    for fields in (*rows, {"summary": summary(report)}):
        print(to_json(extra | fields))


def summary(report: Report) -> dict:
    """Return the metadata of a report, the number of facts of each kind, warnings, and if there are any, notes and files."""
    optional = {
        "notes": [asdict(note) for note in report.notes],
        "files": [str(file) for file in report.files],
        "incomplete": report.incomplete,
    }
    # The readers themselves warn about duplicates and entities.
    doubts = [doubt for doubt in check_quality(report, load_cells()) if doubt.rule_id not in ("DUPLICATE", "ENTITY")]
    return {
        **{name: getattr(report, name) for name in ("format", "entity", "period", "currency", "filing_indicators")},
        "facts": len(report.facts),
        "numeric_facts": sum(isinstance(fact.value, Decimal) for fact in report.facts),
        "facts_with_cell": sum(fact.cell is not None for fact in report.facts),
        "warnings": [*report.warnings, *(f"{doubt.reason} ({doubt.rule_id})" for doubt in doubts)],
    } | {name: value for name, value in optional.items() if value}


def to_json(value: object) -> str:
    """Format a value as JSON on one line. A Decimal becomes a number with all of its digits."""
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {to_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_json, value)) + "]"
    return json.dumps(value)


if __name__ == "__main__":
    run_script(main)
