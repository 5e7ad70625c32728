"""Compare speed and memory with transformers' Trainer and TRL's SFTTrainer: losses first, then A/B/A/B rounds.

    pip install -r requirements-bench.txt          # the other trainers; without them only our own arms run
    python scripts/bench.py --json bench.json      # all settings; --quick takes a few minutes, as a test
    python scripts/bench.py --settings matched --arms ours,trainer --rounds 1      # a short comparison
    python scripts/bench.py --settings skewed --arms ours,ours-2,ours-4 --steps 6      # our own arms alone

Each line of the tables is an arm: one trainer in one configuration. All arms get the same examples, tokenised once by our own
code, with loss on the assistant's tokens only. Each run of an arm is a process of its own (ours: train.py itself; the others:
tools/bench_peers.py, which says how they are configured), which is killed after its last measured step, because saving and
exporting are not compared.

parity: in fp32, with the same examples in each step, the loss of every step must agree with ours to 1e-3 (absolute below
a loss of 1, relative above).
matched: the same examples in each step, bf16 matrix products over fp32 weights (ours through FSDP2's mixed precision, the
others through autocast, which keeps the residual stream in fp32), the same AdamW, no activation checkpointing. Examples
are packed if the trainer can pack without cross-document attention.
skewed: as matched, with 16 examples per step whose lengths are spread 1:100. Those who pad, pad.
defaults: each trainer as in its own quick start. The steps differ, so the losses cannot be compared.

    tokens/s    real tokens per second, without padding, counted in the same way for every arm, after --warmup steps
    spread      (max - min) / median over the rounds; smaller differences between arms are noise
    ours is     our tokens/s divided by those of the line: 2.00x means that ours takes half the time
    MFU         necessary FLOPs (head for target tokens only, attention within documents, no recomputation) per second,
                divided by those of the fastest matrix product measured in this run, with all threads. All lines use the
                same peak
    GiB         peak memory: resident memory of all processes of the arm together; on CUDA what rank 0 allocated
    1st step    seconds from the start of the process to the end of its first step: imports, loading, tokenising, warm-up
    loss        at the step in the next column

The exit code is 1 if an arm of ours failed or a loss differs. Linux only.
"""

import bisect
import importlib.util
import json
import math
import os
import platform
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from common.dtypes import DTYPES
from data.batches import plan_training
from data.examples import load_documents
from data.tokens import load_tokenizer
from model.architectures import read_model_config
from model.flops import Work, count_work, measured_flops, step_flops
from model.language_model import build_on_meta
from tools.launched import Launch, torchrun

SETTINGS = ("parity", "matched", "skewed", "defaults")
SAME_STEPS = ("parity", "matched", "skewed")
TRL = ("trl", "datasets", "accelerate")
NOT_INSTALLED = "not installed: pip install -r requirements-bench.txt"
PARITY_TOLERANCE = 1e-3
POLL = 0.1  # seconds


@dataclass(frozen=True)
class Arm:
    """One trainer in one configuration."""

    key: str  # for --arms
    name: str
    packages: tuple[str, ...] = ()  # that it needs; none: it is our own train.py
    settings: tuple[str, ...] = SETTINGS
    ranks: int = 1
    packed: bool = False  # the documents of a forward pass in one row
    on_request: bool = False  # runs only if --arms names it


OURS = "ours"  # the reference of every comparison
ARMS = (
    Arm("ours", OURS),
    Arm("ours-2", "ours, 2 ranks", ranks=2),
    Arm("ours-4", "ours, 4 ranks", ranks=4, on_request=True),
    Arm("trainer", "transformers.Trainer", ("accelerate",)),
    Arm("trainer-flat", "transformers.Trainer, flattened", ("accelerate",), SAME_STEPS, packed=True),
    # In skewed Trainer stands for those that pad; TRL would pad as much and take as long again.
    Arm("trl", "TRL SFTTrainer", TRL, ("parity", "matched", "defaults")),
    Arm("trl-packed", "TRL SFTTrainer, packed", TRL, packed=True),
)


@dataclass(frozen=True)
class Shape:
    """How much work a setting is, and how it is cut into forward passes."""

    examples: int  # per step; in `defaults` of our own arm
    lengths: tuple[int, int]  # tokens of the shortest and of the longest example
    sequence_length: int  # tokens of a packed row of ours
    rows: int  # our own arm: rows in one forward pass
    micro_batch: int  # other trainers: examples in one forward pass
    skewed: bool = False  # lengths are spread log-uniformly, instead of uniformly


@dataclass(frozen=True)
class Workload:
    """The examples of one setting."""

    jsonl: Path  # chats, for our own arm
    tokens: Path  # JSON for the others: `examples` [{input_ids, labels}] and `steps` [[example index]]
    lengths: tuple[int, ...]  # tokens of each example
    targets: tuple[int, ...]  # target tokens of each example
    steps: tuple[tuple[int, ...], ...]  # example indices of each of our steps
    shape: Shape


@dataclass(frozen=True)
class Benchmark:
    """What is measured, and how often."""

    model: str  # model directory
    device: str  # cpu | cuda
    dtype: str  # bf16 | fp32, except in `parity`, which always runs in fp32
    directory: Path  # for examples and logs
    threads: int
    arms: tuple[Arm, ...]
    settings: tuple[str, ...]
    rounds: int
    warmup: int  # unmeasured steps
    steps: int  # measured steps
    parity_steps: int
    seconds: float  # a run of a timed setting also ends once its measured steps have taken so long
    timeout: float  # seconds of a run

    def num_steps(self, setting: str) -> int:
        """Steps of a run, warm-up included."""
        return self.parity_steps if setting == "parity" else self.warmup + self.steps


@dataclass
class Run:
    """One run of one arm. rows: `step`, `loss`, `seconds`, `lengths` (real tokens of each document), `targets`, `memory_gib`."""

    rows: list[dict] = field(default_factory=list)
    first_step_seconds: float = math.nan  # from the start of the process to the end of its first step
    peak_rss_gib: float = 0.0  # of all its processes together
    failed: str = ""  # why it has too few rows


# ---- the examples ------------------------------------------------------------------------------------------------------

RATIOS = {"own funds": 8.0, "leverage": 3.0, "liquidity coverage": 100.0, "Tier 1": 6.0, "large exposure": 25.0}


def make_shapes(lengths: tuple[int, int], skewed: tuple[int, int]) -> dict[str, Shape]:
    """Setting -> its shape. `parity` has the shortest examples; in `skewed` a forward pass has at most 4 of the longest."""
    shortest, longest = lengths
    parity = shortest, min(longest, shortest + 30)
    row = 1 << (skewed[1] - 1).bit_length()  # the next power of two
    return {
        "parity": Shape(2, parity, parity[1], rows=8, micro_batch=2),
        "matched": Shape(8, lengths, longest, rows=8, micro_batch=8),
        "skewed": Shape(16, skewed, row, rows=2, micro_batch=4, skewed=True),
        "defaults": Shape(16, lengths, longest, rows=8, micro_batch=8),
    }


def make_chat(rng: random.Random, length: int, num_tokens: Callable[[list[dict]], int]) -> list[dict]:
    """A synthetic report and an answer of as many words, both cut so that the chat has at most `length` tokens.

    The system message is empty, because the default one of some templates is longer than the shortest chats.
    """
    question, answer = ["Which"], ["None"]
    while len(answer) < length:
        name, minimum = rng.choice(list(RATIOS.items()))
        value = minimum * rng.uniform(0.7, 1.6)
        verdict = "is met" if value >= minimum else f"is missed by {minimum - value:.2f} points"
        question += f"The {name} ratio stands at {value:.2f}%.".split()
        answer += f"The minimum of {minimum:g}% for {name} {verdict}.".split()

    def chat(words: int) -> list[dict]:
        contents = {"system": "", "user": " ".join(question[:words]), "assistant": " ".join(answer[:words])}
        return [{"role": role, "content": content} for role, content in contents.items()]

    return chat(max(1, bisect.bisect_right(range(1, length), length, key=lambda words: num_tokens(chat(words)))))


def make_workload(directory: Path, tokenizer: PreTrainedTokenizerBase, steps: int, shape: Shape) -> Workload:
    """Write the examples of `steps` steps into `directory`. The arguments determine the bytes."""
    rng, number, (shortest, longest) = random.Random(0), steps * shape.examples, shape.lengths
    # One length from each of `number` equal parts of the scale: any seed has the same spread.
    shares = [(i + rng.random()) / number for i in rng.sample(range(number), number)]
    wanted = [
        shortest * (longest / shortest) ** share if shape.skewed else shortest + (longest - shortest) * share
        for share in shares
    ]

    def num_tokens(chat: list[dict]) -> int:
        return len(tokenizer.apply_chat_template(chat, return_dict=False))

    directory.mkdir(parents=True, exist_ok=True)
    jsonl, tokens = directory / "train.jsonl", directory / "tokens.json"
    chats = [make_chat(rng, round(length), num_tokens) for length in wanted]
    jsonl.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    documents = load_documents((str(jsonl),), tokenizer, shape.sequence_length, "error")
    plan = plan_training(documents, epochs=1, seed=0, global_examples=shape.examples)
    # Within a step the order is that of the file, and not that of the plan: it decides how much the other trainers pad.
    order = tuple(tuple(sorted(plan.batch(step).items)) for step in range(plan.num_steps))
    examples = [
        {"input_ids": ids.tolist(), "labels": np.where(flags, ids, -100).tolist()}
        for ids, flags in zip(documents.ids, documents.weights, strict=True)
    ]
    tokens.write_text(json.dumps({"examples": examples, "steps": order}), encoding="utf-8")
    return Workload(jsonl, tokens, tuple(documents.lengths.tolist()), tuple(documents.targets.tolist()), order, shape)


# ---- one run -----------------------------------------------------------------------------------------------------------

CONFIG = """\
from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding

config = Config(
    model=Model(path={model!r}, compute_dtype={dtype!r}),
    data=Data(train=({jsonl!r},), sequence_length={sequence_length}, cache=None),
    batch=Batch(global_examples={examples_per_step}, micro_batch={rows}),
    optimizer=Optimizer(
        learning_rate={learning_rate}, epochs=1, max_steps={max_steps}, warmup_ratio={warmup_ratio}, min_lr_ratio={min_lr_ratio},
        weight_decay={weight_decay}, betas={betas}, eps={eps}, max_grad_norm={max_grad_norm},
    ),
    sharding=Sharding(strategy={strategy!r}),
    run=Run(name="run", directory={directory!r}),
)
"""
# The settings of configs/quickstart.py except for the batch: a cosine schedule, and parameters that are gathered once per step.
DEFAULTS = {"learning_rate": 3e-4, "warmup_ratio": 0.05, "min_lr_ratio": 0.1, "strategy": "grad_op"}
CONSTANT = {"warmup_ratio": 0.0, "min_lr_ratio": 1.0, "strategy": "full"}


def run_arm(benchmark: Benchmark, arm: Arm, setting: str, workload: Workload, number: int) -> Run:
    """Run one arm once, in round `number`. Its files stay in its own directory under `benchmark.directory`."""
    directory = benchmark.directory / "runs" / f"{setting}-{number}" / arm.key
    directory.mkdir(parents=True)
    steps, shape = benchmark.num_steps(setting), workload.shape
    spec = {
        "setting": setting,
        "trl": "trl" in arm.packages,
        "packed": arm.packed,
        "device": benchmark.device,
        "model": benchmark.model,
        "dtype": "fp32" if setting == "parity" else benchmark.dtype,
        "jsonl": str(workload.jsonl),
        "tokens": str(workload.tokens),
        "directory": str(directory),
        "rows_file": str(directory / "rows.jsonl"),
        "sequence_length": shape.sequence_length,
        "examples_per_step": shape.examples,
        "rows": shape.rows,
        "micro_batch": shape.micro_batch,
        "max_steps": steps + 1,  # ours saves after its last step
        "learning_rate": 1e-4 if setting == "parity" else 2e-5,
        "weight_decay": 0.1,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "max_grad_norm": 1.0,
    }
    if arm.packages:
        path, rows_file = directory / "spec.json", Path(spec["rows_file"])
        path.write_text(json.dumps(spec), encoding="utf-8")
        command, read = [sys.executable, "-m", "tools.bench_peers", path], json.loads
    else:
        path, rows_file = directory / "config.py", directory / "run" / "metrics.jsonl"
        path.write_text(CONFIG.format(**spec | (DEFAULTS if setting == "defaults" else CONSTANT)), encoding="utf-8")
        command, read = torchrun(arm.ranks, path), lambda line: own_row(line, workload)

    def is_done(rows: Sequence[dict]) -> bool:
        measured = sum(row["seconds"] for row in rows[benchmark.warmup :])
        return len(rows) >= steps or (setting != "parity" and measured >= benchmark.seconds)

    threads = max(1, benchmark.threads // arm.ranks)
    return watch(command, directory / "output.txt", threads, rows_file, read, is_done, benchmark.timeout)


def own_row(line: str, workload: Workload) -> dict | None:
    """A training row of metrics.jsonl with the keys of `Run.rows`; None for other rows."""
    row = json.loads(line)
    if "train/loss" not in row:
        return None
    examples = workload.steps[row["step"] - 1]
    lengths = [workload.lengths[i] for i in examples]
    return {
        "step": row["step"],
        "loss": row["train/loss"],
        "seconds": sum(lengths) / row["train/tokens_per_second"],
        "lengths": lengths,
        "targets": sum(workload.targets[i] for i in examples),
        "memory_gib": row["train/memory_gib"],
    }


def watch(
    command: list,
    output: Path,
    threads: int,
    rows_file: Path,
    read_row: Callable[[str], dict | None],
    is_done: Callable[[list[dict]], bool],
    timeout: float,
) -> Run:
    """Run `command` until `is_done(rows)`, its own end, or `timeout` seconds; then kill all processes that it started.

    `rows_file` gets a line per step. Rows after the one that made `is_done` true are dropped, because how many more a fast arm
    writes before it is killed depends on chance.
    """
    run, start, read, done = Run(), time.monotonic(), 0, False
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with Launch(command, output, OMP_NUM_THREADS=str(threads), **offline) as launch:
        while True:
            code = launch.wait(POLL)  # before reading, so that the last row is not missed
            text = rows_file.read_text(encoding="utf-8") if rows_file.is_file() else ""
            lines = text.split("\n")[:-1]  # what stands behind the last line break is not written yet
            for row in map(read_row, lines[read:]):
                if row is not None and not done:
                    run.rows.append(row)
                    done = is_done(run.rows)
            read = len(lines)
            if run.rows and math.isnan(run.first_step_seconds):
                run.first_step_seconds = time.monotonic() - start
            run.peak_rss_gib = max(run.peak_rss_gib, launch.resident_bytes() / 2**30)
            if done or code is not None or time.monotonic() - start > timeout:
                break
    if not done:
        reason = f"exit code {code}" if code is not None else f"not finished after {timeout:.0f} s"
        run.failed = f"{reason}, {len(run.rows)} steps; see {output}"
    return run


# ---- all runs ----------------------------------------------------------------------------------------------------------


def why_unavailable(benchmark: Benchmark, arm: Arm) -> str:
    """Why an arm cannot run here, or "" if it can."""
    if any(importlib.util.find_spec(name) is None for name in arm.packages):
        return NOT_INSTALLED
    if benchmark.device == "cuda" and arm.ranks > torch.cuda.device_count():
        return f"needs {arm.ranks} GPUs, found {torch.cuda.device_count()}"
    return ""


def measured_peak(device: str, dtype: str) -> float:
    """FLOP/s of the fastest product of two square matrices, with the threads of this process: the denominator of MFU.

    It is measured on CUDA too, because a card at its power limit does not reach the peak of its data sheet.
    """
    sizes = {8192: 100, 4096: 100} if device == "cuda" else {1024: 32, 2048: 8}
    return max(measured_flops(torch.device(device), DTYPES[dtype], size, repeats) for size, repeats in sizes.items())


def run_all(benchmark: Benchmark, shapes: dict[str, Shape]) -> tuple[dict, bool]:
    """Run every arm and print the tables. Returns the report as plain JSON, and whether our arms ran and all losses agree.

    parity runs once, then the other settings run in rounds (A/B/A/B), so that a change in the state of the machine affects all arms.
    """
    tokenizer = load_tokenizer(benchmark.model)
    workloads = {  # one step more than is run, as `max_steps`
        name: make_workload(benchmark.directory / "data" / name, tokenizer, benchmark.num_steps(name) + 1, shapes[name])
        for name in benchmark.settings
    }
    missing = {arm.key: why_unavailable(benchmark, arm) for arm in benchmark.arms}
    jobs = [
        (setting, number, arm)
        for number in range(benchmark.rounds)
        for setting in benchmark.settings
        for arm in benchmark.arms
        if not missing[arm.key] and setting in arm.settings and (setting != "parity" or number == 0)
    ]
    for setting, workload in workloads.items():
        runs, steps = sum(job[0] == setting for job in jobs), benchmark.num_steps(setting)
        tokens = sum(workload.lengths[i] for step in workload.steps[:steps] for i in step)
        print(f"{setting}: {runs} runs of {steps} steps, {tokens:,} tokens in a run", flush=True)
    shutil.rmtree(benchmark.directory / "runs", ignore_errors=True)
    torch.set_num_threads(benchmark.threads)
    peaks = [measured_peak(benchmark.device, benchmark.dtype)]
    found: dict[str, dict[str, list[Run]]] = {setting: {} for setting in benchmark.settings}
    for i, (setting, number, arm) in enumerate(bar := tqdm(jobs, unit="run", dynamic_ncols=True)):
        bar.set_description(f"{setting}, {arm.name}")
        run = run_arm(benchmark, arm, setting, workloads[setting], number)
        found[setting].setdefault(arm.key, []).append(run)
        if run.failed:
            tqdm.write(f"{setting}, {arm.name}: {run.failed}", file=sys.stderr)
        if i + 1 == len(jobs) or jobs[i + 1][1] != number:
            peaks.append(measured_peak(benchmark.device, benchmark.dtype))
    report, passed = {"machine": processor_name(benchmark.device), "versions": versions(PACKAGES), "peaks": peaks}, True
    config = read_model_config(benchmark.model)
    work = count_work(build_on_meta(config), config)
    for setting, runs in found.items():
        if setting == "parity":
            entries = compare_losses(benchmark, missing, {key: some[0] for key, some in runs.items()})
            text = render_parity(entries, benchmark.parity_steps)
            passed &= all(entry["verdict"] != "DIFFERS" for entry in entries.values())
        else:
            entries = {
                arm.name: missing[arm.key] or summarize(benchmark, runs[arm.key], work, max(peaks))
                for arm in benchmark.arms
                if setting in arm.settings
            }
            text = render(setting, entries)
        print(f"\n{text}\n{describe(benchmark, setting, workloads[setting], report)}", flush=True)
        report[setting] = entries
        own = [arm.key for arm in benchmark.arms if not arm.packages and not missing[arm.key]]
        passed &= not any(run.failed for key in own for run in runs[key])
    return report, passed


# ---- the tables --------------------------------------------------------------------------------------------------------

# What of a processor decides the speed of products; processors of one name may differ in it.
INSTRUCTIONS = {"amx_tile": "AMX", "avx512_bf16": "AVX512-BF16", "avx512_f": "AVX512", "avx2": "AVX2"}
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets")


def summarize(benchmark: Benchmark, runs: Sequence[Run], work: Work, peak: float) -> dict | str:
    """Medians over the rounds of an arm, without warm-up steps, or why there are none.

    Rates count real work only: no padding, the head for target tokens, attention within documents. peak: FLOP/s.
    """
    if failed := next((run.failed for run in runs if run.failed), ""):
        return f"failed: {failed}"
    rates, utilization = [], []
    for run in runs:
        rows = run.rows[benchmark.warmup :]
        seconds = sum(row["seconds"] for row in rows)
        rates.append(sum(sum(row["lengths"]) for row in rows) / seconds)
        utilization.append(sum(step_flops(work, row["lengths"], row["targets"]) for row in rows) / seconds / peak)
    last = min(len(run.rows) for run in runs)
    memory = [
        max(r["memory_gib"] for r in run.rows) if benchmark.device == "cuda" else run.peak_rss_gib for run in runs
    ]
    return {
        "tokens_per_second": statistics.median(rates),
        "spread": (max(rates) - min(rates)) / statistics.median(rates),
        "mfu": statistics.median(utilization),
        "memory_gib": statistics.median(memory),
        "first_step_seconds": statistics.median(run.first_step_seconds for run in runs),
        "loss": statistics.median(run.rows[last - 1]["loss"] for run in runs),
        "loss_step": last,
        "runs": [asdict(run) for run in runs],
    }


def render(setting: str, entries: dict[str, dict | str]) -> str:
    """The table of a setting. entries: arm name -> `summarize`, or why there are no numbers."""
    head = f"{setting:<34}{'tokens/s':>9}{'spread':>8}{'ours is':>9}{'MFU':>7}{'GiB':>7}{'1st step':>10}{'loss':>9}{'at step':>9}"
    lines, base = [head, "-" * len(head)], entries.get(OURS)
    for name, entry in entries.items():
        if isinstance(entry, str):
            lines.append(f"{name:<34}  {entry}")
            continue
        ratio = f"{base['tokens_per_second'] / entry['tokens_per_second']:.2f}x" if isinstance(base, dict) else "-"
        spread = f"{entry['spread']:.1%}" if len(entry["runs"]) > 1 else "-"
        lines.append(
            f"{name:<34}{entry['tokens_per_second']:>9,.0f}{spread:>8}{ratio:>9}{entry['mfu']:>7.1%}"
            f"{entry['memory_gib']:>7.2f}{entry['first_step_seconds']:>8.1f} s{entry['loss']:>9.4f}{entry['loss_step']:>9}"
        )
    return "\n".join(lines)


def parity_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest |a - b| / max(1, |a|) over the steps of two series of losses; NaN if their lengths differ."""
    if not ours or len(ours) != len(theirs):
        return math.nan
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(ours, theirs, strict=True))


def compare_losses(benchmark: Benchmark, missing: dict[str, str], runs: dict[str, Run]) -> dict[str, dict]:
    """For each arm its fp32 losses in `parity`, the largest difference from ours, and a verdict."""
    losses, found = {key: [row["loss"] for row in run.rows] for key, run in runs.items()}, {}
    for arm in benchmark.arms:
        difference = parity_difference(losses.get(OURS, []), losses.get(arm.key, []))
        if missing[arm.key] or runs[arm.key].failed:
            verdict = missing[arm.key] or f"failed: {runs[arm.key].failed}"
        elif arm.key == OURS:
            verdict = f"from {losses[OURS][0]:.4f} to {losses[OURS][-1]:.4f}"
        else:
            verdict = "agrees" if difference <= PARITY_TOLERANCE else "DIFFERS"
        found[arm.name] = {"difference": difference, "verdict": verdict, "losses": losses.get(arm.key)}
    return found


def render_parity(entries: dict[str, dict], steps: int) -> str:
    """The table of parity."""
    head = f"parity: largest difference of a loss from ours, fp32, {steps} steps, bound {PARITY_TOLERANCE:g}"
    rows = [f"  {name:<34}{entry['difference']:>10.1e}  {entry['verdict']}" for name, entry in entries.items()]
    return "\n".join([head, *rows])


def describe(benchmark: Benchmark, setting: str, workload: Workload, report: dict) -> str:
    """The lines below a table, which make it complete on its own: processor, model, dtype, work, versions and peak."""
    in_fp32, peaks = setting == "parity" or benchmark.dtype == "fp32", report["peaks"]
    lines = [
        f"{report['machine']}, {benchmark.threads} threads; {Path(benchmark.model).name}, "
        + ("fp32" if in_fp32 else "bf16 products over fp32 weights"),
        f"{workload.shape.examples} examples per step{' (ours)' if setting == 'defaults' else ''}, {min(workload.lengths)} to "
        f"{max(workload.lengths)} tokens each; rounds: {1 if setting == 'parity' else benchmark.rounds}",
        ", ".join(f"{name} {found}" for name, found in report["versions"].items()),
        f"peak in {benchmark.dtype} {max(peaks) / 1e12:.2f} TFLOP/s, the largest of {len(peaks)}",
    ]
    return "\n".join(lines[:3] if setting == "parity" else lines)


def processor_name(device: str) -> str:
    """The name of the GPU, or of the processor with the best of INSTRUCTIONS that it has. `device`: cpu | cuda."""
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    name = platform.processor() or platform.machine()
    if os.path.isfile("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), name)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    best = next((text for key, text in INSTRUCTIONS.items() if capabilities.get(key)), "")
    return f"{name} with {best}" if best else name


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages:
        if importlib.util.find_spec(name):
            found[name] = metadata.version(name)
    return found
