"""How much work a benchmark is: runs, steps and tokens, beside a rough estimate of its time."""

import math
from collections import Counter
from collections.abc import Sequence

from bench.arms import Arm
from bench.runner import Benchmark
from bench.workload import Workload
from model.flops import step_flops

START_SECONDS = 12.0  # from the start of a process to its first step: imports, model, data; on 2 cores
# Seconds of one of our FLOPs on a CPU: the products at 2/3 of the measured peak, and the rest of a step, which faster products
# do not shorten. Fitted to SmolLM2-135M on three processors with peaks of 0.17, 0.44 and 2.87 TFLOP/s.
PER_PEAK, BESIDE = 1.5, 1.6e-12
# Time of a token relative to ours, by key of the arm, where the tables of docs/performance.md say so.
RELATIVE_TIME = {
    "ours-2": 1.2, "ours-4": 1.5, "trainer": 2.3, "trainer-flat": 1.8, "trl": 3.4, "trl-packed": 2.6, "litgpt": 2.4,
    "olmo-core": 2.0,
}  # fmt: skip
RELATIVE_TIME_IN_DEFAULTS = {"trl-packed": 12.0}  # its steps are larger too


def estimate_seconds(setting: str, arm_key: str, step_flops: Sequence[float], peak: float, limit: float) -> float:
    """Seconds of one run with steps of `step_flops` each, warm-up included.

    peak: FLOP/s. limit: in `defaults` the measured steps end after so many seconds, but not before the second.
    """
    slower = RELATIVE_TIME.get(arm_key, 1.0)
    if setting == "defaults":
        slower = RELATIVE_TIME_IN_DEFAULTS.get(arm_key, slower)
    if setting == "parity":
        slower *= 2  # fp32 products, though the peak may be that of bf16
    seconds = [slower * flops * (PER_PEAK / peak + BESIDE) for flops in step_flops]
    if setting == "defaults":
        needed = 1 + max(2, math.ceil(limit / seconds[0]))
        seconds = seconds[:needed]
    return START_SECONDS + sum(seconds)


def describe_work(
    benchmark: Benchmark, jobs: Sequence[tuple[str, int, Arm]], workloads: dict[str, Workload], peak: float
) -> str:
    """The work of `jobs` (`bench.runner.plan_jobs`), one line per setting, and the time of all. `peak`: FLOP/s."""
    lines, seconds = [], 0.0
    for setting in dict.fromkeys(setting for setting, _, _ in jobs):
        workload, rounds = workloads[setting], Counter(arm.key for name, _, arm in jobs if name == setting)
        steps = workload.steps[: benchmark.num_steps(setting)]
        lengths = [workload.lengths[i] for step in steps for i in step]
        work = [
            step_flops(benchmark.flops, [workload.lengths[i] for i in step], sum(workload.targets[i] for i in step))
            for step in steps
        ]
        for key, count in rounds.items():
            run = estimate_seconds(setting, key, work, peak, benchmark.seconds)
            seconds += run * (1 if run > benchmark.patience else count)
        lines.append(
            f"{setting}: {rounds.total()} runs of {len(steps)} steps, each run {len(lengths)} examples of {min(lengths)} to "
            f"{max(lengths)} tokens, {sum(lengths):,} together"
        )
    return "\n".join([*lines, f"about {seconds / 60:.0f} min at the measured peak of {peak / 1e12:.2f} TFLOP/s"])
