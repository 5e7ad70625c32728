"""Make training examples from a supervisor's archive: report files, and the directive letters that answered them.

A letter belongs to the reports of one bank for one reference date. It names both in its file name or in its first
lines, or a CSV file of pairs assigns it. Each report that has a letter is labelled by the rules and becomes one
example. Findings that a supervisor has annotated correct the labels (--findings). Files that cannot be read, and reports
and letters without a counterpart, are listed, and so are letters that contradict the labels. OUT has one JSON Lines file
per split, dataset.json (the data card), unmatched.txt and disagreements.txt. The archive is not modified, and nothing is
sent over the network.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import os

from common.errors import UserError, run_script
from data.regulator.archive_corpus import Archive, read_archive, write_archive_corpus
from data.regulator.splits import DEFAULT_SHARES, FULL_SPLITS


def parse_arguments() -> argparse.Namespace:
    """Parse the command line. Raises UserError if an input directory is missing or --out exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reports", type=pathlib.Path, required=True, help="directory of report files, in any XBRL syntax"
    )
    parser.add_argument(
        "--letters", type=pathlib.Path, required=True, help="directory of letters, .txt or .md files in UTF-8"
    )
    parser.add_argument(
        "--pairs", type=pathlib.Path, help="CSV with the columns report,letter: paths below the two directories"
    )
    parser.add_argument(
        "--register", type=pathlib.Path, help="CSV of the banks with the columns entity,name,country,type"
    )
    parser.add_argument(
        "--findings",
        type=pathlib.Path,
        help="CSV of annotated findings with the columns entity,period,rule,state,cell,value,limit,legal,kind",
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory to create")
    parser.add_argument("--seed", type=int, default=0, help="seed of the splits (default %(default)s)")
    parser.add_argument(
        "--splits",
        type=float,
        nargs=5,
        default=list(DEFAULT_SHARES[FULL_SPLITS]),
        metavar="SHARE",
        help=f"shares of {', '.join(FULL_SPLITS)} (default %(default)s); a share may be 0",
    )
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="worker processes (default: one per core)"
    )
    arguments = parser.parse_args()
    for name in ("reports", "letters"):
        if not getattr(arguments, name).is_dir():
            raise UserError(f"--{name} {getattr(arguments, name)}: no such directory.")
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists; remove it or choose another --out.")
    return arguments


def main() -> None:
    """Read the archive, write the corpus, and print what was used and what was not."""
    arguments = parse_arguments()
    archive = Archive(arguments.reports, arguments.letters, arguments.pairs, arguments.register, arguments.findings)
    found = read_archive(archive, max(1, arguments.processes or 1))
    recorded = {name: str(value) for name, value in vars(arguments).items() if name != "processes"}
    card = write_archive_corpus(arguments.out, found, arguments.splits, arguments.seed, recorded)
    for line in (*found.unmatched_lines, *(f"letter and labels disagree: {line}" for line in found.disagreements)):
        print(line, file=sys.stderr)
    for split, counts in card["splits"].items():
        print(f"{split:17} {counts['examples']:6} reports of {counts['banks']} banks, {counts['clean']} clean")
    print(
        f"{len(found.examples)} reports with a letter; unmatched: {card['unmatched']}; "
        f"disagreements: {card['disagreements']}; leak test: {card['leak_test']}"
    )


if __name__ == "__main__":
    run_script(main)
