"""Generate invented bank reports in the format in which banks file them, and training examples from these files.

Writes OUT/reports/ (EBA xBRL-CSV packages and xBRL-JSON reports, one per module), OUT/register.csv (the banks),
OUT/findings.csv (what follows from the banks' notes), one JSON Lines file per split, and OUT/dataset.json (the data
card). The splits of the full profile are train, validation, test_banks, test_quarters and test_combinations; those of
the others are train, validation and test. The same arguments always give the same bytes. OUT appears only once it is
complete.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os

from common.command_line import add_number, new_parser
from common.errors import run_script
from xbrl.corpus.card import token_counter
from xbrl.corpus.generate import Request, generate_corpus, is_generated
from xbrl.corpus.quickstart import generate_quickstart
from xbrl.corpus.splits import DEFAULT_SHARES, FULL_SPLITS, SPLITS

EXAMPLES = {"full": 6800, "laptop": 4000, "quickstart": 696}  # default number of reports of each profile
SHARES = {
    "full": DEFAULT_SHARES[FULL_SPLITS],
    "laptop": DEFAULT_SHARES[SPLITS],
    "quickstart": (544 / 696, 40 / 696, 112 / 696),
}


def parse_arguments() -> argparse.Namespace:
    """Parse the command line. Raises UserError for a number below 1."""
    parser = new_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    usual = ", ".join(f"{number} {profile}" for profile, number in EXAMPLES.items())
    add_number(parser, "--examples", f"number of reports in all splits together (default: {usual})", least=1)
    add_number(parser, "--seed", "each seed gives a different population of banks", 0)
    profile = "laptop, quickstart: few figures, few rules and short letters, for small models (%(default)s)"
    parser.add_argument("--profile", choices=list(EXAMPLES), default="full", help=profile)
    shares = "shares of these splits, in their order (default: full 0.72 0.06 0.08 0.08 0.06, laptop 0.8 0.1 0.1)"
    parser.add_argument("--splits", type=float, nargs="+", metavar="SHARE", help=shares)
    tokenizer = "model directory; the data card then gives lengths in tokens too"
    parser.add_argument("--tokenizer", type=Path, help=tokenizer)
    add_number(parser, "--processes", "worker processes", os.cpu_count(), least=1)
    arguments = parser.parse_args()
    if arguments.examples is None:
        arguments.examples = EXAMPLES[arguments.profile]
    if arguments.splits is None:
        arguments.splits = list(SHARES[arguments.profile])
    return arguments


def main() -> None:
    """Generate the corpus, unless it exists already, and print the main figures of its data card."""
    arguments = parse_arguments()
    request = Request(arguments.examples, arguments.seed, arguments.profile, arguments.splits)
    count_tokens = token_counter(arguments.tokenizer)
    if is_generated(arguments.out, request):
        print(f"{arguments.out}: already made with these arguments")
        return
    if request.profile == "quickstart":
        print_card(generate_quickstart(arguments.out, request, count_tokens))
        return
    # Imported here because the quickstart does without the evaluation library rouge-score.
    from xbrl.answers.nearest_letter import score_nearest_letters

    print_card(generate_corpus(arguments.out, request, arguments.processes, count_tokens, score_nearest_letters))


def print_card(card: dict) -> None:
    """Print the main figures of a data card."""
    for split, counts in card["splits"].items():
        print(
            f"{split:17} {counts['examples']:6} reports of {counts['banks']} banks, {counts['clean']} clean, "
            f"{counts['combinations']} combinations, violations {counts['violations']}"
        )
    for split, shares in card.get("leak_test", {}).items():
        print(f"stands in training of {split}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    for split, scores in card["baselines"].items():
        for name, score in scores.items():
            print(f"baseline on {split}: {name:24} F1 {score['f1']:.3f}, notes {score.get('note_f1', 0):.3f}")
    for split, score in card.get("nearest_training_letter", {}).items():
        print(f"baseline on {split}: nearest training letter  ROUGE-L {score['rouge_l']:.3f} (n={score['n']})")


if __name__ == "__main__":
    run_script(main)
