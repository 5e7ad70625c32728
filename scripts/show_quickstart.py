"""Print the quickstart's result: the tuned model beside the base model, n-grams, learned thresholds and the rules.

python scripts/show_quickstart.py runs/quickstart --data artifacts/quickstart
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
from pathlib import Path

from common.errors import run_script
from eval.regulator.quickstart import screen


def main() -> None:
    """Print the screen of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the directory of the run, with the results in eval/")
    parser.add_argument("--data", type=Path, required=True, help="the directory of the corpus")
    arguments = parser.parse_args()
    print(screen(arguments.run, arguments.data))


if __name__ == "__main__":
    run_script(main)
