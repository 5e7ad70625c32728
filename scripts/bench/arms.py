"""The benchmark: its arms, settings and examples, a run of an arm, and the tables (scripts/bench.py explains them)."""

import importlib.util
import json
import math
import os
import random
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from data.batches import plan_training
from data.encoding import ExampleEncoder
from data.reader import Reader
from data.tokens import load_tokenizer
from distributed.device import device_name
from eval.comparison.arms import metric_rows
from model.dtypes import has_native_bf16
from scripts.chaos.launch import Launch, torchrun

PARITY_STEPS, PARITY_TOLERANCE = 20, 1e-3
WARMUP = 1  # first steps that are not measured
TRL = ("trl", "datasets", "accelerate")
PACKAGES = ("torch", "transformers", *TRL)


@dataclass(frozen=True)
class Arm:
    """One trainer in one configuration."""

    name: str
    ranks: int = 1
    packages: tuple[str, ...] = ()  # of the other trainer; our own train.py has none here
    packed: bool = False  # all documents of a forward pass are in one row


@dataclass(frozen=True)
class Setting:
    """The work of a setting, and how it is divided into forward passes."""

    examples_per_step: int  # in `defaults` of our own arm alone
    lengths: tuple[int, int]  # tokens of the shortest and of the longest example
    sequence_length: int  # tokens of a packed row of our own arm
    rows: int  # our own arm: packed rows in one forward pass
    micro_batch: int  # other trainers: examples in one forward pass


ARMS = {
    "ours": Arm("ours"),
    "ours-2": Arm("ours, 2 ranks", ranks=2),
    "trainer": Arm("transformers.Trainer", packages=("accelerate",)),
    "trainer-flat": Arm("transformers.Trainer, flattened", packages=("accelerate",), packed=True),
    "trl": Arm("TRL SFTTrainer", packages=TRL),
    "trl-packed": Arm("TRL SFTTrainer, packed", packages=TRL, packed=True),
}
SETTINGS = {
    "parity": Setting(2, (100, 130), 130, rows=8, micro_batch=2),
    "matched": Setting(8, (100, 400), 400, rows=8, micro_batch=8),
    "skewed": Setting(16, (17, 1700), 2048, rows=2, micro_batch=4),
    "defaults": Setting(16, (100, 400), 400, rows=8, micro_batch=8),
}


def find_arm(key: str) -> Arm:
    """Return the arm of a name in --arms. Raise UserError if there is none."""
    name, _, ranks = key.partition("-")
    if name == "ours" and ranks.isdecimal() and int(ranks) > 1:
        return Arm(f"ours, {ranks} ranks", ranks=int(ranks))
    if key not in ARMS:
        raise UserError(f"--arms: {key!r} is unknown; choose from {', '.join(ARMS)}; ours-N has N ranks")
    return ARMS[key]


@dataclass(frozen=True)
class Benchmark:
    """The options of the command."""

    model: str  # model directory
    directory: Path  # for examples and logs
    arms: tuple[Arm, ...]  # all are compared with the first, which is ours on one rank
    settings: tuple[str, ...]
    rounds: int
    steps: int  # measured steps

    def num_steps(self, setting: str) -> int:
        """Return the number of steps of a run, with the warm-up."""
        return PARITY_STEPS if setting == "parity" else WARMUP + self.steps


# ---- the examples ------------------------------------------------------------------------------------------------------

TEXT = """The survey counts 3.42% fewer herons and 9.81% more geese than the year before, which exceeds the mean of 8%. The
water level falls to 97.3 cm, below the mark of 100 cm, and a large flock on one of the northern lakes exceeds 25% of all birds."""


def write_examples(directory: Path, tokenizer: PreTrainedTokenizerBase, steps: int, setting: Setting) -> None:
    """Write the examples of `steps` steps. Lengths are spread evenly on a logarithmic scale; equal arguments give equal bytes.

    train.jsonl has {input_ids, labels} of each example. steps.json lists the examples of each of our steps, for other trainers.
    """
    rng, number, (shortest, longest) = random.Random(0), steps * setting.examples_per_step, setting.lengths
    lengths = [round(shortest * (longest / shortest) ** (i / (number - 1))) for i in range(number)]
    rng.shuffle(lengths)
    words, lines = tokenizer(TEXT)["input_ids"], []
    for length in lengths:
        ids = rng.choices(words, k=length)
        lines.append(json.dumps({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]}) + "\n")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    reader = Reader(ExampleEncoder(tokenizer), len(tokenizer), setting.sequence_length, "error")
    documents = reader.read((str(directory / "train.jsonl"),), "examples")
    plan = plan_training(documents, epochs=1, seed=0, global_examples=setting.examples_per_step)
    # Sorted as in the file: the plan's order would decide how much the other trainers pad.
    order = [sorted(plan.batch(step).items) for step in range(plan.num_steps)]
    (directory / "steps.json").write_text(json.dumps(order), encoding="utf-8")


# ---- one run -----------------------------------------------------------------------------------------------------------

# Our arm runs configs/quickstart.py without its evaluations, its replay and its checkpoints.
ALONE = (
    "data.validation=none",
    "data.mix=none",
    "eval.metric=none",
    "run.eval_every=0",
    "run.save_every=0",
    "data.cache=none",
)
# Of our arm in all settings but `defaults`: a constant learning rate, and parameters that are gathered when they are needed.
CONSTANT = ("optimizer.warmup_ratio=0", "optimizer.min_lr_ratio=1", "sharding.strategy=full")
# Of all arms in all settings but `defaults`, beside the learning rate.
OPTIMIZER = {"weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "max_grad_norm": 1.0}


@dataclass(frozen=True)
class ArmRun:
    """One run of an arm. Lists have a value per step. failed: why there are too few steps."""

    losses: list[float]
    tokens: list[int]
    seconds: list[float]
    memory_gib: float = 0.0
    mfu: float = 0.0  # of the best step; ours only, for scripts/gpu_proof.sh
    first_step_seconds: float = math.nan
    failed: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second after the warm-up."""
        return sum(self.tokens[WARMUP:]) / sum(self.seconds[WARMUP:])


def read_run(run: Path, steps: int, ranks: int) -> ArmRun:
    """Read the first `steps` steps of a run that is still training. metrics.jsonl has the same curves for every trainer."""
    logged = metric_rows(run)
    rows = [row for row in logged if "train/loss" in row][:steps]
    totals = [0, *(row["train/tokens"] for row in rows)]
    tokens = [after - before for before, after in zip(totals, totals[1:], strict=False)]
    return ArmRun(
        losses=[row["train/loss"] for row in rows],
        tokens=tokens,
        seconds=[count / row["train/tokens_per_second"] for count, row in zip(tokens, rows, strict=True)],
        memory_gib=ranks * max((row["train/memory_gib"] for row in rows), default=0.0),
        mfu=max((row.get("train/mfu", 0.0) for row in rows), default=0.0),
        first_step_seconds=next((row["start/total"] for row in logged if "start/total" in row), math.nan),
    )


def run_arm(benchmark: Benchmark, arm: Arm, name: str, number: int) -> ArmRun:
    """Run one arm once in the setting `name`, in round `number`, and keep its output in a directory of its own."""
    directory, steps = benchmark.directory / f"{name}-{number}" / arm.name, benchmark.num_steps(name)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    setting, data = SETTINGS[name], benchmark.directory / name
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "bf16" if name != "parity" and has_native_bf16(device) else "fp32"
    optimizer = {"learning_rate": 1e-4 if name == "parity" else 2e-5, **OPTIMIZER}
    max_steps = steps + 1  # our arm saves after its last step, which is therefore not measured
    if arm.packages:
        spec = asdict(setting) | {
            "setting": name,
            "trl": "trl" in arm.packages,
            "packed": arm.packed,
            "device": device.type,
        }
        spec |= {"model": benchmark.model, "dtype": dtype, "optimizer": optimizer, "max_steps": max_steps}
        spec |= {"data": str(data), "directory": str(directory)}
        (directory / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        command = [sys.executable, "-m", "scripts.bench.peers", directory / "spec.json"]
    else:
        settings = [
            f"data.train={data / 'train.jsonl'}",
            f"model.path={benchmark.model}",
            f"model.compute_dtype={dtype}",
            f"optimizer.max_steps={max_steps}",
            f"data.sequence_length={setting.sequence_length}",
            f"batch.global_examples={setting.examples_per_step}",
            f"batch.micro_batch={setting.rows}",
            "run.name=run",
            "run.check=off",  # the rows are token ids without end tokens
            f"run.directory={directory}",
            *ALONE,
        ]
        if name != "defaults":
            settings += [*CONSTANT, *(f"optimizer.{key}={value}" for key, value in optimizer.items())]
        command = torchrun(arm.ranks, "configs/quickstart.py", *settings)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    threads = str(max(1, len(os.sched_getaffinity(0)) // arm.ranks))
    with Launch(command, directory / "output.txt", OMP_NUM_THREADS=threads, **offline) as launch:
        code = None
        while True:
            run = read_run(directory / "run", steps, arm.ranks)
            if code is not None or len(run.losses) >= steps:
                break
            code = launch.wait(0.1)
    if len(run.losses) < steps:
        run = replace(run, failed=f"exit code {code}, {len(run.losses)} steps; see {launch.output}")
    return run


# ---- all runs ----------------------------------------------------------------------------------------------------------


def why_unavailable(arm: Arm) -> str:
    """Return why an arm cannot run here, or "" if it can."""
    if any(importlib.util.find_spec(name) is None for name in arm.packages):
        return "not installed: pip install -r requirements-bench.txt"
    if torch.cuda.is_available() and arm.ranks > torch.cuda.device_count():
        return f"needs {arm.ranks} GPUs, found {torch.cuda.device_count()}"
    return ""


def run_all(benchmark: Benchmark) -> tuple[dict, bool]:
    """Run every arm and print the tables. Return the report as plain JSON, and whether our arms ran and all losses agree.

    parity runs once. The other settings run in rounds (A/B/A/B), so that a change in the state of the machine affects all arms.
    """
    tokenizer = load_tokenizer(benchmark.model)
    runs_by_setting: dict[str, dict[str, list[ArmRun]]] = {name: {} for name in benchmark.settings}
    for name in benchmark.settings:  # one step more than is measured, as `max_steps` in run_arm
        write_examples(benchmark.directory / name, tokenizer, benchmark.num_steps(name) + 1, SETTINGS[name])
    for number in range(benchmark.rounds):
        for name in benchmark.settings:
            for arm in benchmark.arms:
                if why_unavailable(arm) or (name == "parity" and number):
                    continue
                run = run_arm(benchmark, arm, name, number)
                runs_by_setting[name].setdefault(arm.name, []).append(run)
                print(f"round {number + 1}, {name}, {arm.name}: {run.failed or 'done'}", flush=True)
    report: dict = {"model": Path(benchmark.model).name, "machine": machine(PACKAGES)}
    passed = True
    for name, runs in runs_by_setting.items():
        ours = runs[benchmark.arms[0].name]
        report[name] = {arm.name: why_unavailable(arm) or summarize(runs[arm.name], ours) for arm in benchmark.arms}
        print("\n" + table(name, report[name]))
        for arm in benchmark.arms:
            entry = report[name][arm.name]
            if isinstance(entry, dict):
                passed &= name != "parity" or entry["difference"] <= PARITY_TOLERANCE
            elif not arm.packages and not why_unavailable(arm):
                passed = False
    print(f"\n{report['model']}, {report['machine']}")
    return report, passed


def summarize(runs: Sequence[ArmRun], ours: Sequence[ArmRun]) -> dict | str:
    """Return the medians over an arm's rounds, without warm-up steps, or a sentence if a run failed.

    Without a run of ours the ratios are NaN.
    """
    if failed := next((run.failed for run in runs if run.failed), ""):
        return f"failed: {failed}"
    median = statistics.median
    rates, own = ([run.tokens_per_second for run in some if not run.failed] for some in (runs, ours))
    pairs = zip(runs[0].losses, ours[0].losses, strict=True) if own else [(math.nan, math.nan)]
    return {
        "tokens_per_second": median(rates),
        "spread": (max(rates) - min(rates)) / median(rates),
        "ours_is": median(own) / median(rates) if own else math.nan,
        "memory_gib": median(run.memory_gib for run in runs),
        "first_step_seconds": median(run.first_step_seconds for run in runs),
        "loss": median(run.losses[-1] for run in runs),
        "difference": max(abs(loss - own) / max(1.0, abs(own)) for loss, own in pairs),
        "runs": [asdict(run) for run in runs],
    }


def table(name: str, entries: dict[str, dict | str]) -> str:
    """Format the table of a setting. entries: arm name -> its summary, or why there is none."""
    heads = ("tokens/s", "spread", "ours is", "GiB", "1st step", "loss", "differs by")
    lines = [f"{name:<32}" + "".join(f"{head:>11}" for head in heads)]
    for arm, entry in entries.items():
        if isinstance(entry, str):
            lines.append(f"{arm:<32}  {entry}")
            continue
        line = (
            f"{arm:<32}{entry['tokens_per_second']:>11,.0f}{entry['spread']:>11.1%}{entry['ours_is']:>10.2f}x"
            f"{entry['memory_gib']:>11.2f}{entry['first_step_seconds']:>9.1f} s{entry['loss']:>11.4f}{entry['difference']:>11.1e}"
        )
        lines.append(line + (" TOO FAR" if name == "parity" and not entry["difference"] <= PARITY_TOLERANCE else ""))
    return "\n".join(lines)


def machine(packages: Sequence[str]) -> str:
    """Return the GPU or processor of this machine, and the versions of the installed packages among `packages`."""
    name = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return ", ".join(
        [name, *(f"{package} {metadata.version(package)}" for package in packages if importlib.util.find_spec(package))]
    )
