"""Plot the curves of one or more runs from their metrics.jsonl: loss, gradient norm, learning rate.

python scripts/plot_run.py runs/quickstart --out docs/curve.png
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
from pathlib import Path

from common.errors import run_script
from eval.plots import plot_runs


def main() -> int:
    """Write the image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs")
    parser.add_argument("--out", type=Path, required=True, help="the .png or .svg file to write")
    arguments = parser.parse_args()
    plot_runs(arguments.runs, arguments.out)
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    run_script(main)
