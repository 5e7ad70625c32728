"""Generate invented bank reports in the formats that banks file, and training examples from these files.

    python xbrl/scripts/make_reports.py --profile quickstart --out artifacts/quickstart
    python xbrl/scripts/make_reports.py --style short --out artifacts/xbrl_short

The script writes OUT/reports/ (EBA xBRL-CSV packages and xBRL-JSON reports, one per module), OUT/register.csv (the banks),
OUT/findings.csv (the consequences of the banks' notes), OUT/note_facts.jsonl (the facts of the notes), one JSON Lines file per
split (train, validation, test) and OUT/dataset.json (the data card). The same arguments always give the same bytes. OUT appears
only once it is complete.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import os

from common.command_line import add_number, new_parser
from common.errors import UserError, run_script
from xbrl.corpus.card import token_counter
from xbrl.corpus.generate import Request, generate_corpus, is_generated

EXAMPLES = {"full": 5500, "quickstart": 696}  # default number of reports of each profile
# Default splits. The test of the full profile has at most 300 reports: each of its 240 notes once, and reports without a note.
SHARES = {"full": (0.89, 0.055, 0.055), "quickstart": (544 / 696, 40 / 696, 112 / 696)}


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line. Raise UserError for a number below 1, and for --style with another profile."""
    parser = new_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    usual = ", ".join(f"{number} {profile}" for profile, number in EXAMPLES.items())
    add_number(parser, "--examples", f"number of reports in all splits together (default: {usual})", least=1)
    add_number(parser, "--seed", "each seed gives a different population of banks", 0)
    profile = "quickstart: two ratios and a short note, learned in minutes on a CPU (%(default)s)"
    parser.add_argument("--profile", choices=list(EXAMPLES), default="full", help=profile)
    style = "with the profile full only. long: whole reports, for a model of 8B (default); short: the figures that rules and notes need, for a model of 135M"
    parser.add_argument("--style", choices=("long", "short"), help=style)
    shares = "shares of train, validation and test (default: full 0.89 0.055 0.055); reports beyond the test's limit go to train"
    parser.add_argument("--splits", type=float, nargs=3, metavar="SHARE", help=shares)
    tokenizer = "model directory; the data card then also has lengths in its tokens"
    parser.add_argument("--tokenizer", type=Path, help=tokenizer)
    add_number(parser, "--processes", "worker processes", os.cpu_count(), least=1)
    arguments = parser.parse_args()
    if arguments.style and arguments.profile != "full":
        raise UserError(f"--style is of the profile full; leave it out with --profile {arguments.profile}")
    return arguments


def main() -> None:
    """Generate the corpus, unless it exists already, and print the main figures of its data card."""
    arguments = parse_arguments()
    profile = "short" if arguments.style == "short" else arguments.profile
    examples, shares = EXAMPLES[arguments.profile], list(SHARES[arguments.profile])
    request = Request(arguments.examples or examples, arguments.seed, profile, arguments.splits or shares)
    count_tokens = token_counter(arguments.tokenizer)
    if is_generated(arguments.out, request):
        print(f"{arguments.out}: already made with these arguments")
        return
    print_card(generate_corpus(arguments.out, request, arguments.processes, count_tokens))


def print_card(card: dict) -> None:
    """Print the main figures of a data card."""
    for split, counts in card["splits"].items():
        print(
            f"{split:10} {counts['examples']:6} reports of {counts['banks']} banks, {counts['clean']} clean, "
            f"{counts['combinations']} combinations, violations {counts['violations']}"
        )
    for split, scores in card["baselines"].items():
        for name, score in scores.items():
            print(f"baseline on {split}: {name:24} F1 {score['f1']:.3f}, notes {score.get('note_f1', 0):.3f}")
    for name in card["baselines_left_out"]:
        print(f"left out: {name}, which needs a base model (scripts/evaluate.py --probe BASE)")
    for split, shared in card.get("stands_in_training", {}).items():
        print(f"stands in training of {split}: " + ", ".join(f"{name} {count}" for name, count in shared.items()))
    if stated := card.get("statements_of_notes"):
        followed = f"{stated['reports']} reports, not followed: {stated['not_followed'] or 'none'}"
        print(f"notes that state figures of the report: {followed}")
    for split, uses in card.get("notes", {}).items():
        print(
            f"{split}: {uses['notes']} notes in {uses['reports']} reports, each at most {uses['most']} times; "
            f"{uses['without']} reports without a note"
        )


if __name__ == "__main__":
    run_script(main)
