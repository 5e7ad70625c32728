"""Run all arms in all settings, round by round, and measure the peak of the machine before, between and after."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from bench.arms import NOT_INSTALLED, Arm
from bench.measure import ROOT, Run, watch
from bench.spec import Spec
from bench.table import has_enough_steps
from bench.workload import Shape, Workload, make_workload
from data.tokens import load_tokenizer
from model.flops import Work

SETTINGS = ("parity", "matched", "skewed", "defaults")
PARITY_LEARNING_RATE, MATCHED_LEARNING_RATE = 1e-4, 2e-5


@dataclass(frozen=True)
class Benchmark:
    """The configuration of the whole benchmark."""

    model: str  # model directory
    device: str  # cpu | cuda
    dtype: str  # bf16 | fp32, except in `parity`, which always runs in fp32
    directory: Path  # for examples, logs and the converted model
    environment: dict[str, str]  # of every process that is started
    arms: tuple[Arm, ...]
    settings: tuple[str, ...]  # some of SETTINGS
    rounds: int
    warmup: int  # steps before the measured ones
    steps: int  # measured steps
    parity_steps: int
    seconds: float  # `defaults`: stop after two measured steps that took this long, or one that took four times as long
    patience: float  # seconds; an arm whose first round took longer in a setting is not run again in it
    timeout: float  # seconds per run
    flops: Work  # FLOPs of the model per token, target and query-key pair

    def num_steps(self, setting: str) -> int:
        """Steps of a run, warm-up included; in `defaults` fewer if they are slow."""
        return self.parity_steps if setting == "parity" else self.warmup + self.steps


@dataclass
class Measurements:
    """Everything that the runs of a benchmark measured."""

    runs: dict[str, dict[str, list[Run]]]  # setting -> arm name -> one run per round
    unavailable: dict[str, str]  # arm name -> why it cannot run here, "" if it can
    peaks: list[float]  # FLOP/s of the machine, before the first round and after every round


def process_environment(threads: int | None) -> dict[str, str]:
    """Restrict this process and its children to `threads` cores (default: all), and return the children's environment."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    threads = min(threads or len(cores), len(cores))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores[:threads])
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def make_shapes(lengths: tuple[int, int], skewed_lengths: tuple[int, int]) -> dict[str, Shape]:
    """Setting -> its shape, from the ranges of example lengths; `parity` uses the shortest of `lengths`.

    In `skewed` a forward pass of any arm has at most about four times the longest example, padding included.
    """
    shortest, longest = lengths
    parity = shortest, min(longest, shortest + 30)
    row = 1 << (skewed_lengths[1] - 1).bit_length()  # the next power of two
    return {
        "parity": Shape(2, parity, parity[1], rows=8, micro_batch=2),
        "matched": Shape(8, lengths, longest, rows=8, micro_batch=8),
        "skewed": Shape(16, skewed_lengths, row, rows=2, micro_batch=4, skewed=True),
        "defaults": Shape(16, lengths, longest, rows=8, micro_batch=8),
    }


def make_workloads(benchmark: Benchmark, shapes: dict[str, Shape]) -> dict[str, Workload]:
    """Setting -> its examples. One step more than needed, because ours saves after its last step."""
    tokenizer = load_tokenizer(benchmark.model)
    return {
        name: make_workload(benchmark.directory / "data" / name, tokenizer, benchmark.num_steps(name) + 1, shapes[name])
        for name in benchmark.settings
    }


def plan_jobs(benchmark: Benchmark, unavailable: dict[str, str]) -> list[tuple[str, int, Arm]]:
    """(setting, round, arm) of every run in order: `parity` once, then the other settings in rounds (A/B/A/B).

    unavailable: arm name -> why it cannot run here, "" if it can.
    """
    arms = [arm for arm in benchmark.arms if not unavailable[arm.name]]
    timed = [setting for setting in benchmark.settings if setting != "parity"]
    order = [("parity", 0)] if "parity" in benchmark.settings else []
    order += [(setting, number) for number in range(benchmark.rounds) for setting in timed]
    return [(setting, number, arm) for setting, number in order for arm in arms if setting in arm.settings]


def run_all(
    benchmark: Benchmark,
    jobs: Sequence[tuple[str, int, Arm]],
    workloads: dict[str, Workload],
    unavailable: dict[str, str],
    peak: float,
) -> Measurements:
    """Run all jobs in order. `peak`: FLOP/s before the first of them."""
    shutil.rmtree(benchmark.directory / "runs", ignore_errors=True)
    runs: dict[str, dict[str, list[Run]]] = {setting: {} for setting in benchmark.settings}
    peaks, seconds = [peak], {}
    bar = tqdm(jobs, unit="run", dynamic_ncols=True)
    for i, (setting, number, arm) in enumerate(bar):
        bar.set_description(f"{setting}, {arm.name}")
        if seconds.get((setting, arm.key), 0.0) <= benchmark.patience:
            start = time.monotonic()
            run = run_arm(benchmark, arm, setting, workloads[setting], number)
            seconds[setting, arm.key] = time.monotonic() - start
            runs[setting].setdefault(arm.name, []).append(run)
            if run.failed:
                tqdm.write(f"{setting}, {arm.name}: {run.failed}", file=sys.stderr)
        if i + 1 == len(jobs) or jobs[i + 1][1] != number:
            peaks.append(measure_peak(benchmark))
    return Measurements(runs, unavailable, peaks)


def run_arm(benchmark: Benchmark, arm: Arm, setting: str, workload: Workload, number: int) -> Run:
    """Run one arm once, in round `number`. Its output stays in its own directory under `benchmark.directory`."""
    directory = benchmark.directory / "runs" / f"{setting}-{number}" / arm.key
    directory.mkdir(parents=True)
    steps = benchmark.num_steps(setting)
    spec = Spec(
        setting=setting,
        packed=arm.packed,
        with_missing_features=arm.with_missing_features,
        device=benchmark.device,
        model=str(litgpt_directory(benchmark)) if arm.module == "litgpt" else benchmark.model,
        dtype="fp32" if setting == "parity" else benchmark.dtype,
        jsonl=str(workload.jsonl),
        tokens=str(workload.tokens),
        directory=str(directory),
        steps=workload.steps,
        lengths=workload.lengths,
        targets=workload.targets,
        sequence_length=workload.shape.sequence_length,
        batch=workload.shape.examples,
        rows=workload.shape.rows,
        micro_batch=workload.shape.micro_batch,
        max_steps=steps + 1,
        learning_rate=PARITY_LEARNING_RATE if setting == "parity" else MATCHED_LEARNING_RATE,
    )
    if setting == "defaults":
        limits = {
            "warmup": benchmark.warmup,
            "steps": benchmark.steps,
            "seconds": benchmark.seconds,
        }
    else:
        limits = {"warmup": 0, "steps": steps, "seconds": math.inf}
    is_done = functools.partial(has_enough_steps, **limits)
    rows_file, read_row = arm.step_rows(spec)
    log_file = directory / "output.txt"
    return watch(arm.command(spec), benchmark.environment, rows_file, read_row, is_done, log_file, benchmark.timeout)


def litgpt_directory(benchmark: Benchmark) -> Path:
    """The converted model for LitGPT, which infers the architecture from the name of the directory."""
    return benchmark.directory / "litgpt" / Path(benchmark.model).name


def why_unavailable(benchmark: Benchmark, arm: Arm) -> str:
    """Why an arm cannot run here, or "" if it can. Converts the model for LitGPT if necessary."""
    if arm.lacks_packages():
        return NOT_INSTALLED
    if benchmark.device == "cuda" and arm.ranks > torch.cuda.device_count():
        return f"needs {arm.ranks} GPUs, found {torch.cuda.device_count()}"
    directory = litgpt_directory(benchmark)
    if arm.module == "litgpt" and not (directory / "lit_model.pth").is_file():
        command = [sys.executable, "-m", "bench.litgpt", "--convert", benchmark.model, str(directory)]
        done = subprocess.run(command, cwd=ROOT, env=benchmark.environment, capture_output=True, text=True)
        if done.returncode:
            return f"LitGPT cannot convert the model: {done.stderr.strip().splitlines()[-1]}"
    return ""


def measure_peak(benchmark: Benchmark) -> float:
    """FLOP/s of the fastest matrix product (bench/peak.py), in a separate process with as many threads as an arm."""
    command = [sys.executable, "-m", "bench.peak", benchmark.device, benchmark.dtype]
    return json.loads(subprocess.check_output(command, cwd=ROOT, env=benchmark.environment, text=True))


def run_ladder(benchmark: Benchmark) -> dict:
    """Run bench/ladder.py, which prints its own table, in a separate process; returns its measurements."""
    sys.stdout.flush()  # before the other process prints
    path = benchmark.directory / "ladder.json"
    command = [sys.executable, "-m", "bench.ladder", str(path), "--device", benchmark.device]
    subprocess.run(command, cwd=ROOT, env=benchmark.environment, check=True)
    return json.loads(path.read_text(encoding="utf-8"))
