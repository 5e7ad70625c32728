"""The tables of the experiment: what the sweep chose, what every arm learned, forgot and cost, and the learning curve."""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.durable_files import write_durably
from experiment.cost import duration
from experiment.launch import Job
from experiment.run_files import read_rows
from experiment.setup import METHODS, Experiment
from experiment.steps import Choices, final_loss, read_choices, result_file

COLUMNS = {"F1": 3, "fact F1": 3, "ROUGE-L": 3, "answer loss": 4, "perplexity/byte": 3, "KL": 3, "questions, %": 1}


@dataclass(frozen=True)
class Model:
    """A model of one seed. directory: where its results are. run: where it was trained; None for the base."""

    arm: str
    words: str
    seed: int
    directory: Path
    run: Path | None


def models(experiment: Experiment, choices: Choices) -> Iterator[Model]:
    """The models of all arms and seeds, whether they exist or not, as far as their directories are known."""
    arms = experiment.arms()
    for arm in arms:
        if arm.method not in choices.rates:
            continue
        rate = experiment.rate_of(arm, choices.rates[arm.method])
        for seed in range(experiment.seeds):
            run = experiment.run(arm, rate, seed)
            yield Model(arm.name, f"{arm.words}, lr {rate}", seed, run, run)
    if choices.alpha is not None:
        for seed in range(experiment.seeds):
            words = f"full, weights averaged with the base, {choices.alpha} of the tuned"
            run = experiment.run(arms[0], choices.rates["full"], seed)
            yield Model("average", words, seed, experiment.average(choices.alpha, seed), run)


def comparison_job(experiment: Experiment) -> Job | None:
    """scripts/compare.py over everything that has been scored, the arms first; None if that is fewer than two.

    Every arm has the seeds that have been scored. `full` comes first: it is the reference.
    """
    choices, test = read_choices(experiment), experiment.split(experiment.size.test)
    arms: dict[str, list[Path]] = {}
    for model in models(experiment, choices):
        result = result_file(model.directory, test)
        if result.is_file():
            arms.setdefault(model.arm, []).append(result)
    for asked in ("fewshot", "constrained"):
        result = result_file(experiment.out / "base", test)
        result = result.with_stem(f"{result.stem}-{asked}")
        if result.is_file():
            arms[f"base, {asked}"] = [result]
    if len(arms) < 2:
        return None
    named = [f"{name}={','.join(map(str, files))}" for name, files in arms.items()]
    options = (
        "--data",
        str(test),
        "--train",
        str(experiment.split("train")),
        "--out",
        str(experiment.out / "comparison"),
    )
    return Job("scripts/compare.py", (*named, *options), experiment.out / "logs" / "comparison.log")


def figures(directory: Path, test: Path, asked: str = "") -> dict[str, float]:
    """Those of COLUMNS that have been measured."""
    file, general = result_file(directory, test), directory / "eval" / "general.json"
    found = {}
    if asked:
        file = file.with_stem(f"{file.stem}-{asked}")
    if file.is_file():
        result = json.loads(file.read_text(encoding="utf-8"))
        found = {"F1": result["violations"]["micro"]["f1"], "ROUGE-L": result["rouge_l"]["f"]}
        found |= {"fact F1": result["facts"]["f1"]} if result.get("facts") else {}
        found["answer loss"] = result["loss"]["mean"]
    if general.is_file():
        result = json.loads(general.read_text(encoding="utf-8"))
        found["perplexity/byte"] = result["perplexity_per_byte"]["tuned"]["value"]
        found |= {"KL": result["kl"]["value"]} if "kl" in result else {}
        found["questions, %"] = 100 * result["questions"]["all"]["tuned"]["value"]
    return found


def base_figures(experiment: Experiment, choices: Choices) -> dict[str, float]:
    """General language of the base model, which every measurement of a tuned one has beside it. Empty without any."""
    for model in models(experiment, choices):
        file = model.directory / "eval" / "general.json"
        if file.is_file():
            result = json.loads(file.read_text(encoding="utf-8"))
            perplexity, questions = result["perplexity_per_byte"]["base"], result["questions"]["all"]["base"]
            return {"perplexity/byte": perplexity["value"], "KL": 0.0, "questions, %": 100 * questions["value"]}
    return {}


def cost(run: Path) -> tuple[int, float, float]:
    """(tokens, seconds of the optimizer steps, peak memory in GiB) of a run, from its curves."""
    rows = [row for row in read_rows(run) if "train/tokens" in row]
    seconds, before = 0.0, 0
    for row in rows:
        seconds += (row["train/tokens"] - before) / max(1e-9, row["train/tokens_per_second"])
        before = row["train/tokens"]
    return before, seconds, max((row["train/memory_gib"] for row in rows), default=0.0)


def write_results(experiment: Experiment) -> str:
    """Write results.md and results.json of what is done, and return the Markdown."""
    choices = read_choices(experiment)
    parts = [
        "## The learning rates, chosen on validation",
        _table(_sweep_rows(experiment, choices)),
        "## The arms, on the test",
        "Means over the seeds that have run; in brackets the value of each seed.",
        _table(_arm_rows(experiment, choices)),
        "## The cost of one run",
        _table(_cost_rows(experiment, choices)),
        "## The learning curve: F1 by the share of the training examples, at equal steps",
        _table(_curve_rows(experiment, choices)),
    ]
    text = "\n\n".join(parts)
    experiment.out.mkdir(parents=True, exist_ok=True)
    write_durably(experiment.out / "results.md", text + "\n")
    return text


def _sweep_rows(experiment: Experiment, choices: Choices) -> Iterator[list[str]]:
    yield ["method", "learning rate", "validation loss after the last step", ""]
    arms = {arm.name: arm for arm in experiment.arms()}
    for method in METHODS:
        for rate in experiment.size.rates[method]:
            loss = final_loss(experiment.run(arms[method], rate, 0))
            value = "not run" if loss is None else f"{loss:.4f}"
            yield [method, rate, value, "chosen" if choices.rates.get(method) == rate else ""]


def _arm_rows(experiment: Experiment, choices: Choices) -> Iterator[list[str]]:
    yield ["arm", "seeds", *COLUMNS]
    test, base = experiment.split(experiment.size.test), base_figures(experiment, choices)
    for asked, words in (
        ("fewshot", f"base, {experiment.size.shots} examples before the prompt"),
        ("constrained", f"base, {experiment.size.shots} examples, answers inside the grammar"),
    ):
        yield [words, "", *_cells([base | figures(experiment.out / "base", test, asked)])]
    for name, f1 in _baselines(experiment, choices).items():
        yield [f"without a model: {name}", "", f"{f1:.3f}", *[""] * (len(COLUMNS) - 1)]
    for words, found in _by_arm(experiment, choices).items():
        measured = [one for one in found if one]
        yield [words, str(len(measured)), *_cells(measured)]


def _baselines(experiment: Experiment, choices: Choices) -> dict[str, float]:
    """F1 of the programs without a language model, from any score on the test."""
    test = experiment.split(experiment.size.test)
    for model in models(experiment, choices):
        file = result_file(model.directory, test)
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))["violations"].get("baselines", {})
            return {name: one["f1"] for name, one in found.items()}
    return {}


def _by_arm(experiment: Experiment, choices: Choices) -> dict[str, list[dict[str, float]]]:
    test = experiment.split(experiment.size.test)
    found: dict[str, list[dict[str, float]]] = {}
    for model in models(experiment, choices):
        found.setdefault(model.words, []).append(figures(model.directory, test))
    return found


def _cells(measured: Sequence[dict[str, float]]) -> list[str]:
    return [_cell([one[name] for one in measured if name in one], digits) for name, digits in COLUMNS.items()]


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return "not run"
    each = f" ({', '.join(f'{value:.{digits}f}' for value in values)})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{each}"


def _cost_rows(experiment: Experiment, choices: Choices) -> Iterator[list[str]]:
    yield ["arm", "tokens", "time of the steps", "tokens/s", "peak memory, GiB"]
    seen = set()
    for model in models(experiment, choices):
        if model.run and model.arm != "average" and model.arm not in seen and (model.run / "export").is_dir():
            seen.add(model.arm)
            tokens, seconds, memory = cost(model.run)
            yield [
                model.words,
                f"{tokens:,}",
                duration(seconds),
                f"{tokens / max(seconds, 1e-9):,.0f}",
                f"{memory:.1f}",
            ]


def _curve_rows(experiment: Experiment, choices: Choices) -> Iterator[list[str]]:
    shares = [*experiment.size.shares, 1.0]
    yield ["", *(f"{100 * share:g}%" for share in shares)]
    test = experiment.split(experiment.size.test)
    for arm in experiment.arms():
        if arm.name not in METHODS or arm.method not in choices.rates:
            continue
        cells = []
        for share in shares:
            runs = [experiment.run(arm, choices.rates[arm.method], seed, share) for seed in range(experiment.seeds)]
            found = [figures(run, test) for run in runs]
            cells.append(_cell([one["F1"] for one in found if "F1" in one], 3))
        yield [arm.words, *cells]


def _table(rows: Iterator[list[str]]) -> str:
    heading, *others = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [heading, ["---"] * len(heading), *others])
