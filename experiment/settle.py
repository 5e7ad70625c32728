"""Whether full fine-tuning finds more violations than LoRA on the quickstart's task.

Declared before the runs. Primary, and the only contrast: F1 on the test, full less LoRA of rank 8, twelve seeds each, learning rates
tuned alike by F1 on 200 validation reports, over seeds crossed with reports. Welch's test: a seed trains both on the same reports, but
three earlier seeds did not go together (correlation -0.62, which so few hardly tell from another); the analysis paired by seed stands
beside it. There are four outcomes: full is better, LoRA is better, they are equivalent (within 0.05), or it stays open, as it will
where they hardly differ: 64 reports have 54 violations. The intervals are for the chosen rates: another pair of tuning seeds may choose
others. Rank 64 has four seeds at the rate of rank 8, and is descriptive: it trains 14.5% of the parameters of this model; rank 64 of an
8B model trains 2.1%, which is rank 8 or 9 here. The composed program learns from the same reports as the models of each seed. All
compute in bf16, as the quickstart does on processors with bf16 instructions.
"""

import math
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from eval.intervals import Terms
from experiment import drawn
from experiment.commands import Command, chosen_of, tuned_grid
from experiment.contrasts import Contrast, contrast_table, draw_seeds, numbers, summary_table, tuning_table

TASK = drawn.Task(Path("runs/settle"), "bf16")
METHODS = {"full": (), "lora8": ("lora.rank=8",), "lora64": ("lora.rank=64",)}
TUNING_SEEDS = (100, 101)
RATES = {"full": (7.5e-5, 1.5e-4, 3e-4, 6e-4), "lora8": (5e-4, 1e-3, 2e-3, 4e-3)}
EXTENSIONS = 3  # of a grid on each side, where the best is the last
SEEDS = {"full": 12, "lora8": 12, "lora64": 4}
CONTRASTS = (Contrast("full", "lora8", "F1", margin=0.05),)


def out() -> Path:
    """The directory of runs and results."""
    return TASK.out


def result_of(method: str, seed: int) -> Path:
    """The file with the scores on the test."""
    return TASK.out / "results" / f"{method}-s{seed}-test.json"


def commands() -> list[Command]:
    """What is known to be needed: seed by seed, so that a part of it is a result, and last what is descriptive."""
    found = [TASK.pool(), *tuning()]
    runs = [(seed, method) for method, count in SEEDS.items() for seed in range(count)]
    for seed, method in sorted(runs, key=lambda run: (run[1] == "lora64", *run)):
        rate = chosen_rate(method.replace("64", "8"))
        if rate is None:
            continue
        run, baselines_of = run_of(method, rate, seed), seed if method == "full" else None
        found += [
            TASK.train(run, method, seed, rate, METHODS[method]),
            TASK.score(run / "export", "test", result_of(method, seed), drawn.weights_of(run), baselines_of),
        ]
    return found


# ---- What is tuned -------------------------------------------------------------------------------------------------------


def run_of(method: str, rate: float, seed: int) -> Path:
    """The directory of a run."""
    return TASK.out / f"{method}-lr{rate:g}-s{seed}"


def trained_and_scored(method: str, rate: float, seed: int) -> list[Command]:
    """The commands of one run of the tuning: a run that diverged has no score."""
    run = run_of(method, rate, seed)
    diverged = run / "diverged.txt"
    training = replace(TASK.train(run, method, seed, rate, METHODS[method]), diverged=diverged)
    if diverged.is_file():
        return [training]
    return [training, TASK.score(run / "export", "validation", tuned_on(run), drawn.weights_of(run))]


def tuned_on(run: Path) -> Path:
    """The file with the validation scores of a run of a tuning."""
    return TASK.out / "results" / f"{run.name}-validation.json"


def rate_f1s(method: str, rate: float) -> list[float | None]:
    """F1 on validation of a method at a rate for each seed of the tuning: -inf where it diverged, None where it is not known."""
    runs = [run_of(method, rate, seed) for seed in TUNING_SEEDS]
    found = [-math.inf if (run / "diverged.txt").is_file() else drawn.f1_of(tuned_on(run)) for run in runs]
    return [one.value if isinstance(one, Terms) else one for one in found]


def rate_f1(method: str, rate: float) -> float | None:
    """Their mean, in which a run that diverged is 0; None before all seeds are known."""
    known = [max(0.0, one) for one in rate_f1s(method, rate) if one is not None]
    return sum(known) / len(known) if len(known) == len(TUNING_SEEDS) else None


def rates(method: str) -> list[float]:
    """The learning rates to try."""
    return tuned_grid(RATES[method], lambda rate: rate_f1(method, rate), EXTENSIONS)


def chosen_rate(method: str) -> float | None:
    """The rate with the highest mean F1 on validation; None while it is not known."""
    return chosen_of(rates(method), lambda rate: rate_f1(method, rate))


def tuning() -> list[Command]:
    """Train and score what is known to be needed to choose the learning rates, seed by seed, so that a part of it is a result."""
    return [
        command
        for seed in TUNING_SEEDS
        for method in RATES
        for rate in rates(method)
        for command in trained_and_scored(method, rate, seed)
    ]


# ---- What is found -------------------------------------------------------------------------------------------------------


def values() -> dict[str, dict[int, Terms]]:
    """Method -> seed -> F1 on the test by report, of what is done."""
    return {
        method: {seed: f1 for seed in range(count) if (f1 := drawn.f1_of(result_of(method, seed))) is not None}
        for method, count in SEEDS.items()
    }


def rate_table() -> str:
    """What the tuning of the rates has found, as Markdown."""
    head = ("method", "rate", *(f"F1 on validation, seed {seed}" for seed in TUNING_SEEDS), "mean, diverged is 0")
    return tuning_table(head, {method: rates(method) for method in RATES}, _tried, chosen_rate)


def _tried(method: str, rate: float) -> list[str]:
    """The cells of a rate: F1 by seed, and the mean."""
    f1s, mean = rate_f1s(method, rate), rate_f1(method, rate)
    each = ["not run" if one is None else "diverged" if one < 0 else f"{one:.4f}" for one in f1s]
    return [*each, "" if mean is None else f"{mean:.4f}"] if f1s.count(None) < len(f1s) else []


def report() -> tuple[str, dict]:
    """The tables as Markdown, and the values. Draws settle.png: each seed as a point."""
    found = values()
    f1 = numbers(found) | drawn.composed_f1([result_of("full", seed) for seed in range(SEEDS["full"])])
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    draw_seeds(axes, f1)
    axes.set_xlabel("F1 of violations on the test\na point for each seed, a line for the mean")
    figure.savefig(TASK.out / "settle.png", dpi=110)
    text = [rate_table(), summary_table(f1, "F1"), contrast_table(CONTRASTS, {"F1": found}, SEEDS["full"])]
    return "\n\n".join(text), {"F1": f1}
