"""The figure of a comparison of training methods, drawn with matplotlib into an image file."""

from pathlib import Path

import matplotlib

from eval.compare_methods import Method, metrics_with_intervals

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_methods(methods: list[Method], path: Path) -> None:
    """Learning against forgetting: the loss on held-out answers over KL and over perplexity, with 95% intervals.

    Learning is shown by the loss, because F1 saturates.
    """
    base = methods[0].general["perplexity_per_byte"]["base"]["value"]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    for i, method in enumerate(methods):
        metrics = metrics_with_intervals(method)
        y, label = metrics["loss"], method.name + (f" (F1 {metrics['f1'].value:.3f})" if "f1" in metrics else "")
        yerr = [[min(y.value - y.low, 0.9 * y.value)], [y.high - y.value]]  # the axis is logarithmic
        style = {"fmt": "os^Dv<>*P"[i % 9], "color": f"C{i % 10}", "capsize": 2, "label": label}
        for axes, x in zip(panels, (metrics.get("kl"), metrics["perplexity"]), strict=True):
            if x:
                axes.errorbar(x.value, y.value, yerr, [[x.value - x.low], [x.high - x.value]], **style)
    panels[0].set(
        xlabel="forgetting: KL(base || tuned) on general text, nats per token",
        ylabel="learning: loss on held-out answers, nats per token",
        yscale="log",
    )
    panels[0].invert_yaxis()
    panels[1].set(xlabel="forgetting: perplexity per byte of general text (line: base)")
    panels[1].axvline(base, color="grey", linewidth=0.8)
    panels[1].legend(fontsize=8)
    figure.suptitle("better is up and to the left")
    figure.savefig(path, dpi=110)
    plt.close(figure)
