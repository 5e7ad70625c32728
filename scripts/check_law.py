"""Audit a corpus of bank reports with an independent check of the law.

    python scripts/check_law.py --data artifacts/xbrl/train.jsonl artifacts/xbrl/test_banks.jsonl

Prints how many reports without violations contradict a requirement that they print, how many letters call a breach of
Pillar 1 a small matter, and the first contradictions in words. Examples whose report carries a note of the bank are left
out: a note can lift a requirement. The exit code is 1 if anything was found.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import json

from common.errors import UserError, run_script
from data.examples import read_examples
from data.regulator.examples import letter_of, report_of
from data.regulator.law_check import audit, contradictions


def main() -> int:
    """Print the audit as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="example files (JSON Lines)")
    args = parser.parse_args()
    examples = [example for path in args.data for example in read_examples(path)]
    if any("violations" not in example for example in examples):
        raise UserError(
            f"{', '.join(args.data)}: an example has no violations; name files of scripts/make_reports.py or make_examples.py"
        )
    silent = [example for example in examples if not example.get("kind")]
    counts = audit((report_of(one), letter_of(one), one["violations"]) for one in silent)
    print(json.dumps(counts | {"with_notes_left_out": len(examples) - len(silent)}))
    shown = (line for one in silent if not one["violations"] for line in contradictions(report_of(one)))
    for line, _ in zip(shown, range(10), strict=False):
        print(line, file=sys.stderr)
    return int(counts["contradicted"] + counts["belittled"] > 0)


if __name__ == "__main__":
    run_script(main)
