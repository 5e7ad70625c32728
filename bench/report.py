"""Tables and JSON report of a benchmark."""

import functools
import os
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from bench.arms import OURS
from bench.runner import Benchmark, Measurements
from bench.table import Result, Summary, parity_difference, render, run_result, summarize
from bench.workload import Workload
from model.flops import step_flops

PARITY_TOLERANCE = 1e-3
ALWAYS_USED = ("torch", "transformers", "torchao")
PACKAGES = ("torch", "transformers", "trl", "litgpt", "lightning", "ai2-olmo-core", "accelerate", "datasets", "torchao")
# What of a processor decides the speed of products; processors of one name may differ in it.
INSTRUCTIONS = {"amx_tile": "AMX", "avx512_bf16": "AVX512-BF16", "avx512_f": "AVX512", "avx2": "AVX2"}


def describe_machine(benchmark: Benchmark) -> dict:
    """Processor, threads, package versions and settings of the benchmark, for the report."""
    return {
        "processor": processor_name(benchmark.device),
        "threads": int(benchmark.environment["OMP_NUM_THREADS"]),
        "dtype": benchmark.dtype,
        "model": Path(benchmark.model).name,
        "versions": {name: version(name) for name in PACKAGES},
        "warmup": benchmark.warmup,
        "steps": benchmark.steps,
        "rounds": benchmark.rounds,
    }


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


def describe_table(benchmark: Benchmark, setting: str, machine: dict, workload: Workload) -> str:
    """The lines below each table, which make it complete on its own: processor, model, dtype, work and versions."""
    dtype = "fp32" if setting == "parity" or benchmark.dtype == "fp32" else "bf16 products over fp32 weights"
    used = {name for arm in benchmark.arms if setting in arm.settings for name in arm.distributions()}
    versions = ", ".join(
        f"{name} {found}"
        for name, found in machine["versions"].items()
        if found and (name in used or name in ALWAYS_USED)
    )
    whose = " (ours)" if setting == "defaults" else ""
    rounds = "" if setting == "parity" else f"; rounds: {machine['rounds']}"
    return (
        f"{machine['processor']}, {machine['threads']} threads; {machine['model']}, {dtype}\n"
        f"{workload.shape.examples} examples per step{whose}, {min(workload.lengths)} to {max(workload.lengths)} tokens each"
        f"{rounds}\n{versions}"
    )


def compare_losses(benchmark: Benchmark, measured: Measurements) -> list[dict]:
    """For each arm its fp32 losses in `parity`, the largest difference from ours, and a verdict; ours comes first."""
    runs = {name: rounds[0] for name, rounds in measured.runs["parity"].items()}
    losses = {name: [row["loss"] for row in run.rows[: benchmark.parity_steps]] for name, run in runs.items()}
    comparisons = []
    for arm in benchmark.arms:
        name = arm.name
        difference = parity_difference(losses.get(OURS, []), losses.get(name, []))
        if measured.unavailable[name] or runs[name].failed:
            verdict = measured.unavailable[name] or f"failed: {runs[name].failed}"
        elif name == OURS:
            verdict = f"from {losses[OURS][0]:.4f} to {losses[OURS][-1]:.4f}"
        elif difference <= PARITY_TOLERANCE:
            verdict = "agrees"
        else:
            verdict = f"excused: {arm.missing_features}" if arm.missing_features else "DIFFERS"
        comparisons.append({"arm": name, "difference": difference, "verdict": verdict, "losses": losses.get(name)})
    return comparisons


def render_parity(benchmark: Benchmark, comparisons: list[dict], description: str) -> str:
    """The table of parity as text, with `description` below it."""
    steps, bound = benchmark.parity_steps, PARITY_TOLERANCE
    text = [f"parity: largest difference of a loss from ours, fp32, {steps} steps, bound {bound:g}"]
    text += [f"  {found['arm']:<34}{found['difference']:>10.1e}  {found['verdict']}" for found in comparisons]
    return "\n".join([*text, description])


def parity_passed(benchmark: Benchmark, comparisons: list[dict]) -> bool:
    """Whether none of our own arms failed and no arm differs without an excuse."""
    verdicts = {found["arm"]: found["verdict"] for found in comparisons}
    own = {arm.name for arm in benchmark.arms if arm.module is None}
    return "DIFFERS" not in verdicts.values() and not any(verdicts[name].startswith("failed") for name in own)


def summarize_setting(
    benchmark: Benchmark, setting: str, measured: Measurements
) -> tuple[dict[str, Summary | str], dict[str, list[Result]]]:
    """(arm name -> summary over its rounds, or why there is none; arm name -> result of each round)."""
    entries, rounds = {}, {}
    flops = functools.partial(step_flops, benchmark.flops)
    for arm in benchmark.arms:
        if setting not in arm.settings:
            continue
        runs = measured.runs[setting].get(arm.name, [])
        failed = next((run.failed for run in runs if run.failed), "")
        if measured.unavailable[arm.name] or failed:
            entries[arm.name] = measured.unavailable[arm.name] or f"failed: {failed}"
            continue
        on_cuda = benchmark.device == "cuda"
        rounds[arm.name] = [run_result(run, benchmark.warmup, flops, on_cuda) for run in runs]
        entries[arm.name] = summarize(rounds[arm.name], max(measured.peaks), benchmark.num_steps(setting))
    return entries, rounds


def setting_report(entries: dict[str, Summary | str], rounds: dict[str, list[Result]]) -> dict:
    """A setting in the JSON report: arm name -> its summary and the result of each round, or why there are none."""
    return {
        name: entry if isinstance(entry, str) else asdict(entry) | {"results": [asdict(r) for r in rounds[name]]}
        for name, entry in entries.items()
    }


def render_setting(
    setting: str, entries: dict[str, Summary | str], description: str, dtype: str, peaks: list[float]
) -> str:
    """The table of a setting as text, with `description` and the peaks (FLOP/s in `dtype`) below it."""
    measured = ", ".join(f"{peak / 1e12:.2f}" for peak in peaks)
    return (
        f"{render(setting, entries, OURS)}\n{description}\n"
        f"peak in {dtype} {max(peaks) / 1e12:.2f} TFLOP/s, the largest of {measured}"
    )


def setting_passed(benchmark: Benchmark, entries: dict[str, Summary | str], measured: Measurements) -> bool:
    """Whether none of our own arms failed."""
    own = {arm.name for arm in benchmark.arms if arm.module is None and not measured.unavailable[arm.name]}
    return not any(isinstance(entries.get(name), str) for name in own)


def version(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
