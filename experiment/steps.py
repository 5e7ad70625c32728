"""The steps of the experiment, in their order: what each runs, and whether it is done.

The list is made anew from what lies on the disk before every step, so the experiment can be interrupted anywhere. A step
whose command rests on a choice that is not made yet (a learning rate, a weight of an average) has no job.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from experiment.launch import Job
from experiment.run_files import check_settings, exported_step, read_rows, value_at
from experiment.setup import METHODS, Arm, Experiment

RESULT = "export/export.json"
WITHIN = 0.01  # of F1 on validation: what an average with the base may lose


@dataclass(frozen=True)
class Step:
    """One step. kind: steps of one kind take about as long. output: the file that exists when it is done.
    needs: files of other steps that must exist. diverges: whether it is a training of the sweep, which may diverge.
    """

    name: str
    kind: str
    output: Path
    job: Job | None = None
    needs: tuple[Path, ...] = ()
    diverges: bool = False

    @property
    def diverged(self) -> Path:
        """The file that says that a training of the sweep has diverged, in the directory of the run."""
        return self.output.parents[1] / "diverged.txt"

    @property
    def is_ready(self) -> bool:
        """Whether it can be run now."""
        return not self.is_done and self.job is not None and all(path.exists() for path in self.needs)

    @property
    def is_done(self) -> bool:
        """Whether its output is complete, or a learning rate of the sweep turned out to be too high."""
        return self.output.is_file() or (self.diverges and self.diverged.is_file())


@dataclass(frozen=True)
class Choices:
    """What validation data have decided so far: method -> learning rate, and the weight of the tuned model in an average."""

    rates: dict[str, str]
    alpha: str | None
    steps: int  # of the chosen run of `full`; 0 before


def all_steps(experiment: Experiment) -> list[Step]:
    """Every step, done or not. Raises UserError if a run in `out` was started with other settings."""
    choices = read_choices(experiment)
    arms = {arm.name: arm for arm in experiment.arms()}
    steps = [*_prepare(experiment), *_sweep(experiment, arms)]
    # One seed of everything first, then the question itself, then the rest: a part of the experiment is a result, too.
    for arm in arms.values():
        steps += _arm(experiment, choices, arm, 0)
    steps += _search_alpha(experiment, choices, arms["full"])
    steps += _average(experiment, choices, arms["full"], 0)
    steps += _base(experiment)
    later = range(1, experiment.seeds)
    for seed in later:
        question = [*_arm(experiment, choices, arms["full"], seed), *_arm(experiment, choices, arms["lora"], seed)]
        steps += [step for step in question if step.kind != "general"]  # what a seed forgets comes with the rest
    steps += _curve(experiment, choices, arms, 0)
    for seed in later:
        for arm in arms.values():
            steps += _arm(experiment, choices, arm, seed)
        steps += _average(experiment, choices, arms["full"], seed)
    for seed in later:
        steps += _curve(experiment, choices, arms, seed)
    # The chosen run of a sweep is also the arm's: the first of two steps with one name counts.
    unique = {step.name: step for step in reversed(steps)}
    return [unique[name] for name in dict.fromkeys(step.name for step in steps)]


def read_choices(experiment: Experiment) -> Choices:
    """The choices that the finished steps allow."""
    arms = {arm.name: arm for arm in experiment.arms()}
    rates = {}
    for method, tried in experiment.size.rates.items():
        losses = {rate: final_loss(experiment.run(arms[method], rate, 0)) for rate in tried}
        known = [loss for loss in losses.values() if loss is not None]
        if len(known) == len(tried) and min(known) < math.inf:
            rates[method] = min(losses, key=lambda rate: losses[rate] or math.inf)
    steps = 0
    if "full" in rates:
        steps = exported_step(experiment.run(arms["full"], rates["full"], 0)) or 0
    return Choices(rates, _choose_alpha(experiment, arms["full"], rates.get("full")), steps)


def final_loss(run: Path) -> float | None:
    """The validation loss of a finished run's export; infinite if it diverged; None if it has not finished."""
    step = exported_step(run)
    if step is None:
        return math.inf if (run / "diverged.txt").is_file() else None
    value = value_at(read_rows(run), "validation/loss", step)
    return math.inf if value is None or not math.isfinite(value) else value


def result_file(directory: Path, data: Path) -> Path:
    """Where the scores of a model on a data file are kept; see scripts/compare.py."""
    digest = hashlib.sha256(data.read_bytes()).hexdigest()[:8] if data.is_file() else "not-made"
    return directory / "eval" / f"{data.stem}-{digest}.json"


def _job(experiment: Experiment, name: str, script: str, *options: object, processes: int | None = None) -> Job:
    log = experiment.out / "logs" / f"{name.replace('/', '-')}.log"
    return Job(script, tuple(map(str, options)), log, processes or experiment.processes)


def _prepare(experiment: Experiment) -> Iterator[Step]:
    size, base = experiment.size, experiment.base
    reports = ("--profile", size.profile, "--style", size.style, "--examples", size.examples, "--splits", *size.splits)
    out = ("--out", experiment.data)
    job = _job(experiment, "reports", "scripts/make_reports.py", *reports, "--tokenizer", base, *out, processes=1)
    yield Step("reports", "reports", experiment.data / "dataset.json", job)
    topics = ("--source", "topics", "--out", experiment.topics)
    job = _job(experiment, "topics", "scripts/data.py", "replay", *topics, processes=1)
    yield Step("topics", "topics", experiment.topics, job)
    samples = ("--source", "model", "--model", base, "--documents", size.replay_documents, "--out", experiment.samples)
    job = _job(experiment, "self", "scripts/data.py", "replay", *samples, "--max-tokens", size.replay_tokens)
    yield Step("self", "self", experiment.samples, job)
    words = ("--corpus", experiment.split("train"), "--new-tokens", size.new_tokens, "--loss-bytes", 0)
    job = _job(
        experiment,
        "vocabulary",
        "scripts/extend_vocabulary.py",
        *(base, *words, "--out", experiment.vocabulary),
        processes=1,
    )
    needs = (experiment.split("train"),)
    yield Step("vocabulary", "vocabulary", experiment.vocabulary / "config.json", job, needs)


def _train(experiment: Experiment, arm: Arm, rate: str, seed: int, share: float = 1.0, steps: int = 0) -> Step:
    overrides = experiment.overrides(arm, rate, seed, share, steps)
    run = experiment.run(arm, rate, seed, share)
    config = experiment.config(arm, overrides)
    check_settings(run, config)
    job = _job(experiment, run.name, "train.py", experiment.size.configs[arm.method], *overrides)
    files = [
        *config.data.train,
        *config.data.validation,
        *config.ewc.data,
        *(p for m in config.data.mix for p in m.paths),
    ]
    needs = tuple(map(Path, files)) + (
        (experiment.vocabulary,) if config.model.path == str(experiment.vocabulary) else ()
    )
    return Step(run.name, f"train {arm.name}", run / RESULT, job, needs)


def _sweep(experiment: Experiment, arms: dict[str, Arm]) -> Iterator[Step]:
    for method, rates in experiment.size.rates.items():
        for rate in rates:
            yield replace(_train(experiment, arms[method], rate, 0), diverges=True)


def _arm(experiment: Experiment, choices: Choices, arm: Arm, seed: int, share: float = 1.0) -> Iterator[Step]:
    """Train, score on the test, measure forgetting."""
    chosen = choices.rates.get(arm.method)
    if chosen is None or (share < 1 and not choices.steps):
        part = "" if share == 1 else f" on {100 * share:g}%"
        kinds = {"train": f"train {arm.name}", "test": "score"} | ({"general": "general"} if share == 1 else {})
        for word, kind in kinds.items():
            yield Step(f"{word} {arm.name}{part}, seed {seed}", kind, experiment.out / "no rate is chosen yet")
        return
    rate = experiment.rate_of(arm, chosen)
    yield _train(experiment, arm, rate, seed, share, choices.steps)
    run = experiment.run(arm, rate, seed, share)
    yield _score(experiment, run.name, run / "export", run, experiment.split(experiment.size.test))
    if share == 1:
        yield _forgetting(experiment, run.name, run / "export", run)


def _curve(experiment: Experiment, choices: Choices, arms: dict[str, Arm], seed: int) -> Iterator[Step]:
    for share in experiment.size.shares:
        for method in METHODS:
            yield from _arm(experiment, choices, arms[method], seed, share)


def _score(experiment: Experiment, name: str, model: Path | str, directory: Path, data: Path, *more: object) -> Step:
    output = result_file(directory, data)
    if more:  # another way of asking the same model
        output = output.with_stem(f"{output.stem}-{name.rpartition(' ')[2]}")
    options = ("--data", data, "--train", experiment.split("train"), "--json", output, "--show", 0)
    job = _job(experiment, f"{data.stem} {name}", "scripts/evaluate.py", model, *options, *more)
    made = () if model == experiment.base else (Path(model, "config.json"),)  # no step makes the base model
    return Step(f"{data.stem} {name}", "score", output, job, (data, *made))


def _forgetting(experiment: Experiment, name: str, model: Path, directory: Path) -> Step:
    output = directory / "eval" / "general.json"
    options = ("forgetting", experiment.base, model, "--json", output)
    job = _job(experiment, f"general {name}", "scripts/measure.py", *options)
    return Step(f"general {name}", "general", output, job, (model / "config.json",))


def _base(experiment: Experiment) -> Iterator[Step]:
    """The base model, asked as fairly as it can be: with examples before the prompt, also inside the answers' grammar."""
    test, shots = experiment.split(experiment.size.test), ("--shots", experiment.size.shots)
    directory = experiment.out / "base"
    yield _score(experiment, "base fewshot", experiment.base, directory, test, *shots)
    yield _score(experiment, "base constrained", experiment.base, directory, test, *shots, "--constrained")


def _search_alpha(experiment: Experiment, choices: Choices, full: Arm) -> Iterator[Step]:
    """Score the averages of the first seed, and the tuned model itself, on validation."""
    rate = choices.rates.get("full")
    if rate is None:
        yield Step("averages on validation", "score", experiment.out / "no rate is chosen yet")
        return
    validation, run = experiment.split("validation"), experiment.run(full, rate, 0)
    yield _score(experiment, run.name, run / "export", run, validation)
    for alpha in experiment.size.alphas:
        yield _make_average(experiment, alpha, run, 0)
        average = experiment.average(alpha, 0)
        yield _score(experiment, average.name, average, average, validation)


def _average(experiment: Experiment, choices: Choices, full: Arm, seed: int) -> Iterator[Step]:
    if choices.alpha is None:
        yield Step(f"average, seed {seed}", "score", experiment.out / "no alpha is chosen yet")
        return
    average = experiment.average(choices.alpha, seed)
    yield _make_average(experiment, choices.alpha, experiment.run(full, choices.rates["full"], seed), seed)
    yield _score(experiment, average.name, average, average, experiment.split(experiment.size.test))
    yield _forgetting(experiment, average.name, average, average)


def _make_average(experiment: Experiment, alpha: str, run: Path, seed: int) -> Step:
    out = experiment.average(alpha, seed)
    options = (run, "--average-with-base", alpha, "--out", out)
    job = _job(experiment, f"make {out.name}", "scripts/export.py", *options, processes=1)
    return Step(f"make {out.name}", "average", out / "config.json", job, (run / RESULT,))


def _choose_alpha(experiment: Experiment, full: Arm, rate: str | None) -> str | None:
    """The smallest weight of the tuned model whose F1 on validation is within a point of the tuned model's own.

    It is nearest to the base, so it forgets least. None as long as a score is missing.
    """
    if rate is None:
        return None
    validation = experiment.split("validation")
    files = {"1": result_file(experiment.run(full, rate, 0), validation)}
    files |= {alpha: result_file(experiment.average(alpha, 0), validation) for alpha in experiment.size.alphas}
    if not all(file.is_file() for file in files.values()):
        return None
    scores = {alpha: f1_of(file) for alpha, file in files.items()}
    return min((alpha for alpha, f1 in scores.items() if f1 >= scores["1"] - WITHIN), key=float)


def f1_of(file: Path) -> float:
    """F1 over all rules of a result of scripts/evaluate.py. Raises UserError for another file."""
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["violations"]["micro"]["f1"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged; remove it, and start again") from None


def choose_steps(steps: Sequence[Step], only: Sequence[str] | None, is_checked: bool = False) -> list[Step]:
    """The steps whose names contain one of the words in `only`, or all. Raises UserError if a word is in none, unless checked."""
    for word in only or ():
        if not is_checked and not any(word in step.name for step in steps):
            raise UserError(f"--only {word}: no step has this in its name; --list prints them")
    return [step for step in steps if not only or any(word in step.name for word in only)]
