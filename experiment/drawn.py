"""The task of settle and pareto: the quickstart's reports, with training drawn for each seed from one pool.

Validation and test are the same for all seeds. Every run has 34 steps of 8 reports, half of the quickstart's, and is scored on 64
others: what a processor of 2 cores without bf16 instructions can do in hours. On a faster machine set DRAWN and TEST twice as high.
The rates of settle are tuned by F1 on the validation reports, with seeds that no experiment uses.
"""

import functools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.durable_files import write_durably
from eval.intervals import Terms, terms_of
from experiment.commands import Command, chosen_of, tuned_grid
from experiment.contrasts import tuning_table

OUT, BASE = Path("runs/drawn"), "artifacts/models/SmolLM2-135M-Instruct"
CONFIG = "configs/quickstart.py"
DTYPE = "fp32"  # so that another processor can go on
SETTINGS: tuple[str, ...] = (f"model.compute_dtype={DTYPE}",)  # of every training
TRAIN, VALIDATION, TEST = 2240, 200, 64  # reports of the pool
DRAWN = 272  # of them for each seed
TUNING_SEEDS = (100, 101)
METHODS = {"full": (), "lora8": ("lora.rank=8",), "lora64": ("lora.rank=64",)}
RATES = {"full": (7.5e-5, 1.5e-4, 3e-4, 6e-4), "lora8": (5e-4, 1e-3, 2e-3, 4e-3)}
EXTENSIONS = 3  # of a grid on each side, where the best is the last
COMPOSED = "engine + note words"  # the strongest program without a language model (xbrl/answers/baselines.py)


def pool() -> Command:
    """Make the reports."""
    examples = TRAIN + VALIDATION + TEST
    shares = [f"{part / examples:.6f}" for part in (TRAIN, VALIDATION, TEST)]
    options = ("--profile", "quickstart", "--seed", "100", "--examples", str(examples), "--splits", *shares)
    made = OUT / "pool" / "dataset.json"
    return Command("pool", "pool", "scripts/make_reports.py", (*options, "--out", str(made.parent)), made)


def draw(seed: int) -> Path:
    """The training reports of a seed, in a file that exists once the pool does."""
    path, source = OUT / "data" / f"train-s{seed}.jsonl", OUT / "pool" / "train.jsonl"
    if not path.is_file() and source.is_file():
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, "".join(random.Random(seed).sample(lines, DRAWN)))
    return path


def train(
    run: Path, kind: str, seed: int, rate: float, settings: Sequence[str] = (), needs: Sequence[Path] = ()
) -> Command:
    """Train one run, without replay unless `settings` have data.mix."""
    mix = () if any(text.startswith("data.mix=") for text in settings) else ("data.mix=none",)
    options = (
        CONFIG,
        f"model.path={BASE}",
        f"data.train={draw(seed)}",
        "data.validation=none",  # scripts/evaluate.py scores the model afterwards
        *("run.eval_every=0", "run.save_every=0", "run.save_minutes=5", "run.keep_last=1"),
        *(f"run.seed={seed}", f"run.directory={run.parent}", f"run.name={run.name}"),
        f"optimizer.learning_rate={rate:g}",
        *mix,
        *settings,
        *SETTINGS,
    )
    needs = (OUT / "pool" / "dataset.json", *needs)
    return Command(f"{run.name}/train", f"train {kind}", "train.py", options, run / "export" / "export.json", needs)


def score(
    model: Path, split: str, result: Path, frees: tuple[Path, ...] = (), baselines_of: int | None = None
) -> Command:
    """Score the answers of a model to the reports of a split; beside the baselines that learn from the training of a seed."""
    options = str(model), "--data", str(OUT / "pool" / f"{split}.jsonl"), "--max-new-tokens", "128", "--show", "0"
    options += ("--dtype", DTYPE, "--json", str(result), "--answers", str(result.with_suffix(".answers.jsonl")))
    if baselines_of is not None:  # some seconds
        options += ("--train", str(draw(baselines_of)), "--validation", str(OUT / "pool" / "validation.jsonl"))
    needs = model / "export.json", OUT / "pool" / "dataset.json"
    return Command(
        result.stem, f"score {split}", "scripts/evaluate.py", options, result, needs, frees, results=(result,)
    )


def weights_of(run: Path) -> tuple[Path, ...]:
    """What of a run nobody needs once it is scored."""
    return run / "checkpoints", run / "export" / "model.safetensors", run / "adapter"


def f1_of(result: Path) -> Terms | None:
    """F1 of the violated rules, by report; None before the result is there."""
    return _read(result)[0] if result.is_file() else None


def composed_f1(results: Sequence[Path]) -> dict[str, dict[int, float]]:
    """The row of COMPOSED: seed -> F1, in the results of the seeds 0, 1, ... that are there."""
    found = {seed: _read(result)[1] for seed, result in enumerate(results) if result.is_file()}
    return {COMPOSED: {seed: f1 for seed, f1 in found.items() if f1 is not None}}


@functools.cache  # the list is made again before each command
def _read(result: Path) -> tuple[Terms, float | None]:
    """F1 by report, and that of COMPOSED; None where it has learned from nothing."""
    found = json.loads(result.read_text(encoding="utf-8"))
    return terms_of(found)["f1"], found["violations"]["baselines"].get(COMPOSED, {}).get("f1")


# ---- What is tuned -------------------------------------------------------------------------------------------------------


def run_of(method: str, rate: float, seed: int) -> Path:
    """The directory of a run without remedies."""
    return OUT / f"{method}-lr{rate:g}-s{seed}"


def trained_and_scored(run: Path, kind: str, seed: int, rate: float, settings: Sequence[str]) -> list[Command]:
    """The commands of one run of a tuning: a run that diverged has no score."""
    diverged = run / "diverged.txt"
    training = replace(train(run, kind, seed, rate, settings), diverged=diverged)
    if diverged.is_file():
        return [training]
    return [training, score(run / "export", "validation", tuned_on(run), weights_of(run))]


def tuned_on(run: Path) -> Path:
    """The file with the validation scores of a run of a tuning."""
    return OUT / "results" / f"{run.name}-validation.json"


def validation_f1(runs: Sequence[Path]) -> float | None:
    """Mean F1 of runs on validation, 0 for one that diverged; None before all are known."""
    found = [0.0 if (run / "diverged.txt").is_file() else f1_of(tuned_on(run)) for run in runs]
    known = [one.value if isinstance(one, Terms) else one for one in found if one is not None]
    return sum(known) / len(known) if len(known) == len(found) else None


def rate_f1(method: str, rate: float) -> float | None:
    """Mean F1 on validation of a method at a rate."""
    return validation_f1([run_of(method, rate, seed) for seed in TUNING_SEEDS])


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
        for command in trained_and_scored(run_of(method, rate, seed), method, seed, rate, METHODS[method])
    ]


def rate_table() -> str:
    """What the tuning of the rates has found, as Markdown."""
    head = ("method", "rate", "F1 on validation, mean of two seeds")
    return tuning_table(head, {method: rates(method) for method in RATES}, rate_f1, chosen_rate)
