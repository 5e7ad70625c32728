"""Whether full fine-tuning finds more violations than LoRA on the quickstart's task.

Declared before the runs. Primary, and the only contrast: F1 on the test, full less LoRA of rank 8, twelve seeds each, learning rates
tuned alike (experiment/drawn.py), over seeds crossed with reports. Welch's test, because the seeds of the two do not go together
(their correlation was -0.62); the analysis paired by seed stands beside it. There are four outcomes: full is better, LoRA is better,
they are equivalent (within 0.05), or it stays open. Rank 64 has four seeds at the rate of rank 8, and is descriptive: it trains
14.5% of the parameters of this model; rank 64 of an 8B model trains 2.1%, which is rank 8 or 9 here. The composed program learns
from the same reports as the models of each seed.
"""

from pathlib import Path

from matplotlib.figure import Figure

from eval.intervals import Terms
from experiment import drawn
from experiment.commands import Command
from experiment.contrasts import Contrast, contrast_table, draw_seeds, numbers, summary_table

SEEDS = {"full": 12, "lora8": 12, "lora64": 4}
CONTRASTS = (Contrast("full", "lora8", "F1", margin=0.05),)


def out() -> Path:
    """The directory of runs and results."""
    return drawn.OUT


def result_of(method: str, seed: int) -> Path:
    """The file with the scores on the test."""
    return drawn.OUT / "results" / f"{method}-s{seed}-test.json"


def commands() -> list[Command]:
    """What is known to be needed, seed by seed, so that a part of it is a result."""
    found = [drawn.pool(), *drawn.tuning()]
    chosen = {method: drawn.chosen_rate(method.replace("64", "8")) for method in SEEDS}
    for seed in range(max(SEEDS.values())):
        for method, rate in chosen.items():
            if rate is None or seed >= SEEDS[method]:
                continue
            run = drawn.run_of(method, rate, seed)
            found.append(drawn.train(run, method, seed, rate, drawn.METHODS[method]))
            baselines_of = seed if method == "full" else None
            found.append(
                drawn.score(run / "export", "test", result_of(method, seed), drawn.weights_of(run), baselines_of)
            )
    return found


def values() -> dict[str, dict[int, Terms]]:
    """Method -> seed -> F1 on the test by report, of what is done."""
    return {
        method: {seed: f1 for seed in range(count) if (f1 := drawn.f1_of(result_of(method, seed))) is not None}
        for method, count in SEEDS.items()
    }


def report() -> tuple[str, dict]:
    """The tables as Markdown, and the values. Draws settle.png: each seed as a point."""
    found = values()
    f1 = numbers(found) | drawn.composed_f1([result_of("full", seed) for seed in range(SEEDS["full"])])
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    draw_seeds(axes, f1)
    axes.set_xlabel("F1 of violations on the test: a point for each seed, a line for the mean")
    figure.savefig(drawn.OUT / "settle.png", dpi=110)
    text = [drawn.rate_table(), summary_table(f1, "F1"), contrast_table(CONTRASTS, {"F1": found})]
    return "\n\n".join(text), {"F1": f1}
