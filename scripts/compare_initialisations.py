"""Compare initialisations of new tokens: write passages to train on, or print and plot curves of runs (docs/vocabulary.md).

    python scripts/compare_initialisations.py passages artifacts/xbrl --out artifacts/vocabulary
    python scripts/compare_initialisations.py curve runs/vocabulary-subtokens runs/vocabulary-random --out docs/vocabulary.png

Losses are in nats per byte, so that they can be compared between vocabularies.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
from pathlib import Path

from common.errors import run_script
from eval.initialisations import validation_curve, write_passages


def main() -> int:
    """Write the passages, or print and plot the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("passages", "curve"))
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        help="passages: output directory of make_reports.py; curve: directories of runs",
    )
    parser.add_argument("--out", type=Path, required=True, help="passages: output directory; curve: image file")
    arguments = parser.parse_args()
    if arguments.what == "passages":
        write_passages(arguments.folders[0], arguments.out)
        return 0
    curves = {run.name: validation_curve(run) for run in arguments.folders}
    print(f"{'step':>6}" + "".join(f"{name:>24}" for name in curves))
    for step in sorted(set().union(*curves.values())):
        print(f"{step:>6}" + "".join(f"{curve.get(step, float('nan')):>24.4f}" for curve in curves.values()))
    plot(curves, arguments.out)
    return 0


def plot(curves: dict[str, dict[int, float]], out: Path) -> None:
    """Plot the curves to an image file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), marker="o", label=name)
    axes.set(xlabel="step", ylabel="nats per byte, held-out banks")
    axes.legend()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    run_script(main)
