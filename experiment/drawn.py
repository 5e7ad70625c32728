"""The task of the experiments: the quickstart's reports, with training drawn for each seed from one pool.

Validation and test are the same for all seeds. Every run has 68 steps of 8 reports, and a name that says all of its settings, so
that two experiments share a run. Learning rates are chosen by F1 on the validation reports, with seeds that no experiment uses.
"""

import json
import random
from pathlib import Path

from common.durable_files import write_durably
from experiment.commands import Command

OUT, BASE = Path("runs/drawn"), "artifacts/models/SmolLM2-135M-Instruct"
POOL = OUT / "pool"
TRAIN, VALIDATION, TEST = 2240, 200, 112  # reports of the pool
DRAWN = 544  # of them for each seed
TUNING_SEEDS = (100, 101)
METHODS: dict[str, tuple[str, ...]] = {
    "full": (),
    "lora8": ("lora.rank=8",),
    "lora64": ("lora.rank=64",),
}
RATES = {"full": (7.5e-5, 1.5e-4, 3e-4, 6e-4), "lora8": (5e-4, 1e-3, 2e-3, 4e-3)}


def pool() -> Command:
    """Make the reports."""
    examples = TRAIN + VALIDATION + TEST
    shares = [f"{part / examples:.6f}" for part in (TRAIN, VALIDATION, TEST)]
    options = ("--profile", "quickstart", "--seed", "100", "--examples", str(examples), "--splits", *shares)
    return Command("pool", "pool", "scripts/make_reports.py", (*options, "--out", str(POOL)), POOL / "dataset.json")


def draw(seed: int) -> Path:
    """The training reports of a seed, in a file that exists once the pool does."""
    path = OUT / "data" / f"train-s{seed}.jsonl"
    if not path.is_file() and (POOL / "dataset.json").is_file():
        lines = (POOL / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, "".join(random.Random(seed).sample(lines, DRAWN)))
    return path


def train(
    run: Path, kind: str, seed: int, rate: float, settings: tuple[str, ...], needs: tuple[Path, ...] = ()
) -> Command:
    """Train one run, without replay unless `settings` have data.mix."""
    mix = () if any(text.startswith("data.mix=") for text in settings) else ("data.mix=none",)
    options = (
        "configs/quickstart.py",
        f"data.train={draw(seed)}",
        f"data.validation={POOL / 'validation.jsonl'}",
        *("run.eval_every=0", "run.save_every=0", "run.keep_last=1"),
        *(f"run.seed={seed}", f"run.directory={run.parent}", f"run.name={run.name}"),
        f"optimizer.learning_rate={rate:g}",
        *mix,
        *settings,
    )
    done = run / "export" / "export.json"
    return Command(f"{run.name}/train", f"train {kind}", "train.py", options, done, (POOL / "dataset.json", *needs))


def score(model: Path, split: str, result: Path, frees: tuple[Path, ...] = ()) -> Command:
    """Score the answers of a model to the reports of a split."""
    options = (str(model), "--data", str(POOL / f"{split}.jsonl"), "--max-new-tokens", "128", "--show", "0")
    return Command(
        f"{result.stem}/{split}",
        f"score {split}",
        "scripts/evaluate.py",
        (*options, "--json", str(result), "--answers", str(result.with_suffix(".answers.jsonl"))),
        result,
        (model / "export.json",),
        frees,
    )


def f1_of(result: Path) -> float | None:
    """F1 of the violated rules; None before the result is there."""
    if not result.is_file():
        return None
    return json.loads(result.read_text(encoding="utf-8"))["violations"]["micro"]["f1"]


# ---- the learning rates --------------------------------------------------------------------------------------------------


def run_of(method: str, rate: float, seed: int) -> Path:
    """The directory of a run without remedies."""
    return OUT / f"{method}-lr{rate:g}-s{seed}"


def tuned_on(method: str, rate: float, seed: int) -> Path:
    """The file with the validation scores of a run of the tuning."""
    return OUT / "results" / f"{run_of(method, rate, seed).name}-validation.json"


def tuning(method: str) -> list[Command]:
    """Train and score what is known to be needed to choose the learning rate of a method."""
    commands = []
    for rate in _grid(method):
        for seed in TUNING_SEEDS:
            run = run_of(method, rate, seed)
            frees = (run / "checkpoints", run / "export" / "model.safetensors", run / "adapter")
            commands += [
                train(run, method, seed, rate, METHODS[method]),
                score(run / "export", "validation", tuned_on(method, rate, seed), frees),
            ]
    return commands


def chosen_rate(method: str) -> float | None:
    """The rate with the highest mean F1 on validation; None while it is not known, or is the lowest or highest that was tried."""
    grid, means = _grid(method), _means(method)
    if len(means) < len(grid):
        return None
    best = max(means, key=lambda rate: means[rate])
    return best if grid[0] < best < grid[-1] else None


def _means(method: str) -> dict[float, float]:
    """Rate -> mean F1 on validation, of those that all tuning seeds have."""
    means = {}
    for rate in _grid(method):
        values = [f1_of(tuned_on(method, rate, seed)) for seed in TUNING_SEEDS]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            means[rate] = sum(known) / len(known)
    return means


def _grid(method: str) -> list[float]:
    """The rates to try: those of `RATES`, and twice or half of the best one as long as it is the last one on its side."""
    grid = list(RATES[method])
    while True:
        means = {}
        for rate in grid:
            values = [f1_of(tuned_on(method, rate, seed)) for seed in TUNING_SEEDS]
            if None in values:
                return grid
            means[rate] = sum(value for value in values if value is not None)
        best = max(means, key=lambda rate: means[rate])
        if best == grid[0]:
            grid.insert(0, best / 2)
        elif best == grid[-1]:
            grid.append(best * 2)
        else:
            return grid


def tuning_table() -> str:
    """What the tuning has found, as Markdown."""
    rows = ["| method | rate | F1 on validation, mean of two seeds |", "|---|---|---|"]
    for method in RATES:
        best = chosen_rate(method)
        for rate, mean in sorted(_means(method).items()):
            rows.append(f"| {method} | {rate:g} | {mean:.3f}{', chosen' if rate == best else ''} |")
    return "\n".join(rows)
