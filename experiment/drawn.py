"""The task of settle and pareto: the quickstart's reports, with training drawn for each seed from one pool.

Validation and test are the same for all seeds. Every run has 34 steps of 8 reports, half of the quickstart's, and is scored on 64
others: what a processor of 2 cores can do in hours. On a faster machine set DRAWN and TEST twice as high.
"""

import functools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.durable_files import write_durably
from eval.intervals import Terms, terms_of
from experiment.commands import Command

BASE = "artifacts/models/SmolLM2-135M-Instruct"
CONFIG = "configs/quickstart.py"
TRAIN, VALIDATION, TEST = 2240, 200, 64  # reports of the pool
DRAWN = 272  # of them for each seed
COMPOSED = "engine + note words"  # the strongest program without a language model (xbrl/answers/baselines.py)


@dataclass
class Task:
    """The task in the directory of an experiment; dtype: in which its models compute, in training and in answering."""

    out: Path
    dtype: str

    def pool(self) -> Command:
        """Make the reports."""
        examples = TRAIN + VALIDATION + TEST
        shares = [f"{part / examples:.6f}" for part in (TRAIN, VALIDATION, TEST)]
        options = ("--profile", "quickstart", "--seed", "100", "--examples", str(examples), "--splits", *shares)
        made = self.out / "pool" / "dataset.json"
        return Command("pool", "pool", "scripts/make_reports.py", (*options, "--out", str(made.parent)), made)

    def draw(self, seed: int) -> Path:
        """The training reports of a seed, in a file that exists once the pool does."""
        path, source = self.out / "data" / f"train-s{seed}.jsonl", self.out / "pool" / "train.jsonl"
        if not path.is_file() and source.is_file():
            lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, "".join(random.Random(seed).sample(lines, DRAWN)))
        return path

    def train(
        self, run: Path, kind: str, seed: int, rate: float, settings: Sequence[str] = (), needs: Sequence[Path] = ()
    ) -> Command:
        """Train one run, without replay unless `settings` have data.mix."""
        mix = () if any(text.startswith("data.mix=") for text in settings) else ("data.mix=none",)
        options = (
            CONFIG,
            f"model.path={BASE}",
            f"data.train={self.draw(seed)}",
            "data.validation=none",  # scripts/evaluate.py scores the model afterwards
            *("run.eval_every=0", "run.save_every=0", "run.save_minutes=5", "run.keep_last=1"),
            *(f"run.seed={seed}", f"run.directory={run.parent}", f"run.name={run.name}"),
            f"optimizer.learning_rate={rate:g}",
            *mix,
            *settings,
            f"model.compute_dtype={self.dtype}",
        )
        needs = (self.out / "pool" / "dataset.json", *needs)
        return Command(f"{run.name}/train", f"train {kind}", "train.py", options, run / "export" / "export.json", needs)

    def score(
        self, model: Path, split: str, result: Path, frees: tuple[Path, ...] = (), baselines_of: int | None = None
    ) -> Command:
        """Score a model's answers to the reports of a split; beside the baselines that learn from the training of a seed."""
        options = str(model), "--data", str(self.out / "pool" / f"{split}.jsonl"), "--max-new-tokens", "128"
        options += ("--show", "0", "--dtype", self.dtype)
        options += ("--json", str(result), "--answers", str(result.with_suffix(".answers.jsonl")))
        if baselines_of is not None:  # some seconds
            options += ("--train", str(self.draw(baselines_of)))
            options += ("--validation", str(self.out / "pool" / "validation.jsonl"))
        needs = model / "export.json", self.out / "pool" / "dataset.json"
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
