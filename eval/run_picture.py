"""A picture of a run from its metrics.jsonl: what it learned, what it forgot where that was measured, and its events.

    python -m eval.run_picture runs/quickstart docs/quickstart.png

With run.eval_general=True it has a panel for the KL to the base, with run.eval_generate=N and eval.metric one for F1.
"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from common.command_line import new_parser
from common.errors import UserError, run_script
from eval.comparison.arms import curve, metric_rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Curves with a panel of their own, if the run has them, and the words above it.
MEASURED = {
    "validation/f1": "F1 of held-out answers",
    "forgetting/kl": "forgetting: KL to the base,\nnats per token of general text",
}
Curve = tuple[list[int], list[float]]  # steps, values


def draw(run: Path, path: Path) -> None:
    """Draw the run `run` into `path`, whose suffix names the format.

    Raises UserError if the run has no held-out loss, or if `path` cannot be written.
    """
    rows = metric_rows(run)
    held_out, rate = curve(rows, "validation/loss"), curve(rows, "train/learning_rate")
    training = curve(rows, "train/loss/main", "train/loss")  # without what is mixed in
    if not held_out[0] or not training[0]:
        raise UserError(
            f"{run}/metrics.jsonl has no validation/loss or no train/loss; a run with data.validation has both"
        )
    measured = {title: points for name, title in MEASURED.items() if (points := curve(rows, name))[0]}
    widths = [2.0, *(1.0 for _ in measured), 1.0]
    size = (3.4 + 2.5 * len(widths), 3.2)
    figure, (first, *others) = plt.subplots(1, len(widths), figsize=size, layout="constrained", width_ratios=widths)
    _draw_loss(first, training, held_out, curve(rows, "save/total_seconds")[0])
    for axes, (title, points) in zip(others, measured.items(), strict=False):
        axes.plot(*points, "o-", color="C1")
        axes.set_title(title, fontsize=10)
    others[-1].plot(*rate, color="C0", linewidth=1.5)
    others[-1].set_title("learning rate", fontsize=10)
    for axes in others:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6f}".rstrip("0").rstrip("."))
    for axes in (first, *others):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:  # no such folder, or no such kind of picture
        raise UserError(f"{path} cannot be written: {error}; name a file such as picture.png") from error
    plt.close(figure)


def _draw_loss(axes: Axes, training: Curve, held_out: Curve, saves: list[int]) -> None:
    """The loss on a logarithmic axis: of each step, of held-out examples with its first, lowest and last value, and saves."""
    axes.plot(*training, color="C0", linewidth=1, label="training")
    axes.plot(*held_out, "o-", color="C1", label="held out")
    low, high = min(training[1] + held_out[1]) / 2.2, max(training[1] + held_out[1]) * 1.6
    axes.plot(
        saves, [low * 1.12] * len(saves), "^", color="dimgrey", markersize=5, label="checkpoint saved", clip_on=False
    )
    steps, values = held_out
    for i in sorted({0, values.index(min(values)), len(values) - 1}):
        axes.annotate(f"{values[i]:.2g}", (steps[i], values[i]), (3, 8), textcoords="offset points", color="C1")
    ticks = [digit * 10.0**decade for decade in range(-9, 9) for digit in (1, 3)]
    axes.set(yscale="log", ylim=(low, high), ylabel="loss, nats per target token")
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low < tick < high]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9)


def main() -> None:
    """Draw."""
    parser = new_parser(__doc__)
    parser.add_argument("run", type=Path, help="a run, runs/NAME")
    parser.add_argument("picture", type=Path, help="the file to write, e.g. picture.png")
    arguments = parser.parse_args()
    draw(arguments.run, arguments.picture)


if __name__ == "__main__":
    run_script(main)
