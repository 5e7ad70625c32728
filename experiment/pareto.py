"""What a remedy against forgetting costs on the task: F1 against KL to the base, for ways to train, three seeds, and weights averaged.

Every seed draws its training reports from one pool; validation and test are the same for all. Every arm has the same reports in the
same steps, 34 of 8 (experiment/drawn.py). Every trained model is measured whole, and averaged with the base at alpha 0.75 and 0.5.
KL is that of texts that no arm trains on. The learning rate is the quickstart's and not tuned again; `low rate` has a third of it.
No strength is tuned: each is an arm, a point of the picture. The arms of FIRST, seed by seed, come before the others. In replay
5% of the target tokens are general text, in self-replay text that the base wrote; `anchored W` trains that same text by KL to the
base, with weight W, and not by cross-entropy.

Declared before the runs, paired by seed and over seeds crossed with reports or texts: F1 of `anchored 4` less that of plain,
and F1 and KL of the low rate averaged at 0.75 less those of `anchored 4`. The F1 of three seeds of plain
correlated with that of replay, EWC, a low rate and averaging at 0.94 to 1.00, and with that of self-replay at 0.75; Welch's test
stands beside each contrast. If the last two are equivalent or better, a plain low rate with averaging is the default. All else is
descriptive, with intervals. Expected: `anchored 4` has half of plain's KL, at an F1 that three seeds cannot tell from
plain's; of two equal texts the anchor keeps KL lower than cross-entropy; the low rate at 0.75 has the lowest KL and an F1 below
both, because 34 steps are few for it. On a faster machine set SEEDS to 8 and what experiment/drawn.py names.
"""

import json
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from eval.comparison.measures import general_terms
from eval.intervals import Terms
from experiment import drawn
from experiment.commands import Command
from experiment.contrasts import Contrast, contrast_table, difference, in_words, numbers, summary_table, table

TASK = drawn.Task(Path("runs/drawn"), "fp32")  # so that a processor without bf16 instructions can go on
SEEDS = 3
RATE = 3e-4
ALPHAS = ("1", "0.75", "0.5")
BUDGETS = (0.1, 0.2, 0.4)  # nats per token
FAR = sorted(Path("eval/texts").glob("*.jsonl"))
FIRST = ("plain", "anchored 4", "low rate")
ARMS = (*FIRST, "self-replay", "replay", "anchored 1", "anchored 16", "EWC 10", "EWC 100", "L2 0.01", "L2 0.1")
COLORS = (*(f"C{number}" for number in range(10)), "black")  # matplotlib has ten
WHOLE, LOW = "anchored 4, alpha 1", "low rate, alpha 0.75"
CONTRASTS = (
    Contrast(WHOLE, "plain, alpha 1", "F1", paired=True, margin=0.05),
    Contrast(LOW, WHOLE, "F1", paired=True, margin=0.05),
    Contrast(LOW, WHOLE, "KL", paired=True, margin=0.05),
)


def out() -> Path:
    """The directory of runs and results."""
    return TASK.out


def texts() -> tuple[Path, Path]:
    """General text that comes with Python, and text that the base writes."""
    return TASK.out / "replay" / "topics.jsonl", TASK.out / "replay" / "self.jsonl"


def settings(arm: str) -> tuple[str, ...]:
    """The overrides of an arm."""
    topics, own = texts()
    kind, _, strength = arm.partition(" ")
    return {
        "L2": (f"ewc.strength={strength}", "ewc.estimator=l2"),
        "EWC": (f"ewc.strength={strength}", "ewc.documents=64", "ewc.batch=4", f"ewc.data={topics}"),
        "replay": (f"data.mix=topics:0.05:{topics}",),
        "self-replay": (f"data.mix=self:0.05:{own}",),
        "anchored": (f"data.mix=self:0.05:anchor:{own}", f"forgetting.anchor_weight={strength}"),
    }.get(kind, ())


def results_of(arm: str, seed: int, alpha: str) -> tuple[Path, Path]:
    """The files with the scores on the test, and with what was forgotten."""
    name = f"{_short(arm)}-s{seed}-a{alpha}"
    return TASK.out / "results" / f"{name}-test.json", TASK.out / "results" / f"{name}-general.json"


def commands() -> list[Command]:
    """What is needed, the first arms before the others and each seed by seed, so that a part of it is a result."""
    topics, own = texts()
    by_base = ("model", "--model", drawn.BASE, "--documents", "48", "--max-tokens", "256")
    found = [TASK.pool()]
    for name, source, path in (("topics", ("topics",), topics), ("self", by_base, own)):
        options = ("replay", "--source", *source, "--out", str(path))
        kept = (path,) if path == own else ()  # another processor may write another text
        found.append(Command(name, name, "scripts/data.py", options, path, results=kept))
    for arms in (FIRST, [arm for arm in ARMS if arm not in FIRST]):
        for seed in range(SEEDS):
            for arm in arms:
                found += _of_run(arm, seed)
    return found


def _of_run(arm: str, seed: int) -> list[Command]:
    """Train an arm, and measure it at each alpha."""
    name = f"{_short(arm)}-s{seed}"
    run = TASK.out / name
    rate = RATE / 3 if arm == "low rate" else RATE
    needs = tuple(path for path in texts() if any(str(path) in text for text in settings(arm)))
    found = [TASK.train(run, arm, seed, rate, settings(arm), needs)]
    before = run / "export" / "export.json"
    for alpha in ALPHAS:
        model = run / "export"
        task, general = results_of(arm, seed, alpha)
        if alpha != "1":
            model = TASK.out / "models" / f"{name}-a{alpha}"
            options = (str(run), "--average-with-base", alpha, "--out", str(model))
            last = (run / "checkpoints",) if alpha == ALPHAS[-1] else ()
            done = model / "export.json"
            needs = (run / "export" / "export.json", before)  # one after the other: the last one frees the checkpoints
            found.append(Command(f"{name}/a{alpha}", "average", "scripts/export.py", options, done, needs, last))
            before = done
        forgotten = ("forgetting", drawn.BASE, str(model), "--texts", *map(str, FAR), "--json", str(general))
        weights, needs = (model / "model.safetensors",), (task, model / "export.json")  # which frees the weights
        found += [
            TASK.score(model, "test", task, baselines_of=seed if arm == "plain" and alpha == "1" else None),
            Command(
                general.stem, "general", "scripts/measure.py", forgotten, general, needs, weights, results=(general,)
            ),
        ]
    return found


def values() -> dict[str, dict[str, dict[int, Terms]]]:
    """F1 on the test, and KL to the base in nats per token -> arm with alpha -> seed -> value by report or text, of what is done."""
    found: dict[str, dict[str, dict[int, Terms]]] = {"F1": {}, "KL": {}}
    for arm in ARMS:
        for alpha in ALPHAS:
            for seed in range(SEEDS):
                task, general = results_of(arm, seed, alpha)
                f1 = drawn.f1_of(task)
                if f1 is not None and general.is_file():
                    kl = general_terms(json.loads(general.read_text(encoding="utf-8")), "tuned")["kl"]
                    for measure, value in (("F1", f1), ("KL", kl)):
                        found[measure].setdefault(f"{arm}, alpha {alpha}", {})[seed] = value
    return found


def report() -> tuple[str, dict]:
    """The tables as Markdown, and the values. Draws pareto.png."""
    found = values()
    shown = {measure: numbers(arms) for measure, arms in found.items()}
    budgets = [f"seeds with KL of at most {budget}" for budget in BUDGETS]
    rows = [["arm", "seeds", "F1", "KL", "F1 less plain's, 95%", *budgets]]
    plain = found["F1"].get("plain, alpha 1", {})
    for arm, f1 in shown["F1"].items():
        kl = shown["KL"][arm]
        change = difference(found["F1"][arm], plain, paired=True) if arm != "plain, alpha 1" else None
        words = f"{change.value:+.3f} ({in_words(change.interval())})" if change else ""
        kept = [" ".join(str(seed) for seed in kl if kl[seed] <= budget) or "none" for budget in BUDGETS]
        rows.append([arm, str(len(f1)), *(f"{fmean(one.values()):.3f}" for one in (f1, kl)), words, *kept])
    composed = drawn.composed_f1([results_of("plain", seed, "1")[0] for seed in range(SEEDS)])
    _draw(shown, composed)
    text = (table(rows), summary_table(composed, "F1"), contrast_table(CONTRASTS, found, SEEDS))
    return "\n\n".join(text), shown | {"without a model": composed}


def _draw(found: dict[str, dict[str, dict[int, float]]], composed: dict[str, dict[int, float]]) -> None:
    """F1 against KL: a colour for each arm, a point for each seed, a line through the means of the alphas.

    composed: the F1 of programs without a model, dashed lines.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for arm, color in zip(ARMS, COLORS, strict=False):
        means, seeds = [], 0
        for alpha in ALPHAS:
            f1, kl = (found[measure].get(f"{arm}, alpha {alpha}", {}) for measure in ("F1", "KL"))
            if f1:
                seeds = max(seeds, len(f1))
                points = np.array([(kl[seed], f1[seed]) for seed in f1])
                axes.scatter(*points.T, s=14, color=color, alpha=0.5, linewidths=0)
                means.append(points.mean(axis=0))
        if means:
            label = f"{arm}, {seeds} seed{'s' * (seeds > 1)}"
            axes.plot(*np.array(means).T, marker="o", color=color, label=label)
    for name, f1 in composed.items():
        if f1:
            axes.axhline(fmean(f1.values()), color="black", linewidth=0.8, linestyle="--", label=name)
    for budget in BUDGETS:
        axes.axvline(budget, color="grey", linewidth=0.5, linestyle=":")
    axes.set_xlabel("KL to the base on far text, nats per token")
    axes.set_ylabel("F1 of violations on the test")
    if any(found["F1"].values()):
        figure.legend(title="alpha 1, 0.75, 0.5 from right to left", fontsize=8, loc="outside right upper")
    figure.savefig(TASK.out / "pareto.png", dpi=110)


def _short(arm: str) -> str:
    """An arm in the name of a file."""
    return arm.replace(" ", "-").lower()
