"""Draw the curves of one or more runs from their metrics.jsonl: loss, gradient norm, learning rate.

python scripts/plot_run.py runs/laptop --out docs/curve.png
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import json
from pathlib import Path

from common.errors import UserError, run_script


def read_curve(run: Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one curve. Raises UserError where the run has no metrics."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the folder of a run, e.g. runs/laptop")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in found], [value for _, value in found]


def main() -> int:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="a .png or .svg file")
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for run in arguments.runs:
        name = run.name if len(arguments.runs) > 1 else ""
        loss = read_curve(run, "train/loss/main")  # of data.train alone, where other sources are mixed in
        loss = loss if loss[0] else read_curve(run, "train/loss")
        axes[0].plot(*loss, linewidth=1, label=f"{name} training".strip())
        axes[0].plot(*read_curve(run, "validation/loss"), marker="o", markersize=4, label=f"{name} validation".strip())
        axes[1].plot(*read_curve(run, "train/grad_norm"), linewidth=1, label=name)
        axes[2].plot(*read_curve(run, "train/learning_rate"), linewidth=1, label=name)
    axes[0].set(title="loss of target tokens (nats)", xlabel="step", yscale="log")
    axes[1].set(title="gradient norm before clipping", xlabel="step", yscale="log")
    axes[2].set(title="learning rate", xlabel="step")
    axes[0].legend()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=110)
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    run_script(main)
