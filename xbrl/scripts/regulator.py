"""Prepare the supervisor's corpora: texts of the EBA's data model, and examples from a real archive."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import os

from common.command_line import add_number, check_new, main_of
from common.errors import UserError, run_script


def cpt(parser: argparse.ArgumentParser) -> None:
    """Make a corpus for continual pre-training from the EBA's Data Point Model.

    The command writes OUT/train.jsonl, validation.jsonl and test.jsonl with one document per line, and the data card
    OUT/dataset.json. A document is a table, the meaning of its rows and columns, a validation rule, or a list of definitions.
    Tables are held out whole, together with all similar tables. general.jsonl has general English text to mix into training, and
    general_held_out.jsonl the general text that evaluation uses. The same arguments produce the same bytes.
    """
    from xbrl.corpus.cpt_corpus import SOURCE, make_corpus
    from xbrl.read.dpm_database import open_dpm_database

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

    A letter belongs to the reports of one bank for one reference date. Its file name or first lines name both, or a CSV file
    assigns the letter (--pairs). The rules label each report that has a letter, and --findings corrects the labels.
    unmatched.txt lists files that cannot be read or have no counterpart, and disagreements.txt letters that contradict the
    labels. The archive is not modified, and nothing is sent over the network.
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
    settings = (arguments.splits, arguments.seed, arguments.processes)
    make_archive_corpus(vars(arguments), arguments.out, *settings, recorded)


if __name__ == "__main__":
    run_script(main_of(__doc__, cpt, examples))
