"""Read bank reports in any XBRL syntax and print them as JSON lines.

FILE is xBRL-XML, inline XBRL, xBRL-JSON, or a report package (a zip or an unpacked folder) with one of these or with
EBA xBRL-CSV. Prints one line per fact, then one line {"summary": ...}. Several FILEs are merged into one report; they
must be the modules that one bank filed for one reference date.

If FILE is a folder of reports, its files are read in parallel, the modules of one bank and date are joined, and each
line names the bank and date. A file that cannot be read is reported on stderr and does not stop the others. If its name
has a bank and date, their report is marked as incomplete. The exit code is 2 if any file was refused.

A report with facts that the EBA's Data Point Model in this repository (up to release 4.2) does not have is incomplete, too: a
warning on stderr counts and names them, and says how to fetch a newer release.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import os

from common.command_line import add_number, new_parser, reader_may_leave
from common.errors import run_script
from xbrl.read.folder import read_folder
from xbrl.read.render import STYLES
from xbrl.read.report import Report
from xbrl.read.report_lines import Output, report_lines
from xbrl.read.xbrl import is_package, merge_reports, read_report


def main() -> int:
    """Read one report, or every report of a folder."""
    parser = new_parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a report, or one folder of reports")
    parser.add_argument("--text", action="store_true", help="print the text that the model reads instead of facts")
    parser.add_argument("--style", choices=STYLES, default="cells", help="the style of --text (default: %(default)s)")
    parser.add_argument("--rules", action="store_true", help="print the result of every rule; with --text as a table")
    parser.add_argument("--summary", action="store_true", help="print only the summary")
    parser.add_argument("--taxonomy", action="append", default=[], type=Path, metavar="ZIP", help="a taxonomy package")
    add_number(parser, "--workers", "number of processes for a folder", os.cpu_count(), least=1)
    args = parser.parse_args()
    output = Output(args.text, args.style, args.rules, args.summary)
    with reader_may_leave():
        if len(args.files) == 1 and args.files[0].is_dir() and not is_package(args.files[0]):
            return print_folder(args.files[0], output, args.taxonomy, args.workers)
        reports = [read_report(file, taxonomy=args.taxonomy) for file in args.files]
        print_report(merge_reports(reports) if len(reports) > 1 else reports[0], output)
    return 0


def print_report(report: Report, output: Output, name: str = "") -> None:
    """Print one report, and on stderr why figures of it are missing."""
    for reason in report.incomplete:
        print(f"warning: {reason}", file=sys.stderr)
    for line in report_lines(report, output, name):
        print(line)


def print_folder(folder: Path, output: Output, taxonomy: list[Path], workers: int) -> int:
    """Print the report of each bank and date in a folder. Returns the exit code."""
    reports, refused = read_folder(folder, taxonomy, workers)
    for error in refused:
        print(f"error: {error}", file=sys.stderr)
    for report in reports:
        print_report(report, output, f"{report.entity} {report.period}")
    sys.stdout.flush()
    files, incomplete = sum(len(one.files) for one in reports), sum(bool(one.incomplete) for one in reports)
    print(
        f"{len(reports)} reports of {files} files, {incomplete} incomplete; {len(refused)} files refused",
        file=sys.stderr,
    )
    return 2 if refused else 0


if __name__ == "__main__":
    run_script(main)
