"""What the planner expects of the whole run on these machines, and what the check's three steps have measured."""

import dataclasses
import json
import math
from pathlib import Path

from configs.config import Config
from preflight.judge import Measured
from preflight.machine import GROUP
from preflight.result import FAILS, OK, SKIPPED, WARNING, Result
from tools.plan import Plan, plan_of
from tools.step_time import expected_speed
from training.description import counted

# The planner aims at 10%; AdamW's and the allocator's own habits differ on a CPU, where libraries count as well.
MEMORY_APART = 0.25
SMALL = 0.25  # GiB by which a process may exceed its plan in any case: libraries, the allocator
WORTH_A_WARNING = 0.5  # hours; a shorter run is over before anybody has found out why it is slow
GIB = 2**30
FILE = "plan.json"


def read_plan(config: Config, world_size: int, local_world: int, rows: int | None = None) -> Plan:
    """The plan of a config on the devices of this machine; no weights are read. Raises UserError.

    rows: what `batch.micro_batch` says, where that is a word and not a number.
    """
    return plan_of(config, rows=rows)


def memory_fits(plan: Plan) -> Result:
    """Whether the worst micro-batch of the real plan fits, by arithmetic."""
    worst, available = plan.workload.worst, plan.cluster.device.memory
    text = (
        f"{plan.needed[1] / GIB:.1f} of {available / GIB:.1f} GiB on the fullest rank, in step {worst.step + 1} of "
        f"{plan.workload.total_steps} ({worst.tokens:,} tokens in a micro-batch)"
    )
    figures = {
        "needed": plan.needed[1],
        "available": available,
        "step": worst.step + 1,
        "steps": plan.workload.total_steps,
    }
    if plan.fits:
        return Result(GROUP, "planned memory", OK, text, figures)
    more = ""
    text = f"it needs {text}, which does not fit{more}: python scripts/plan.py CONFIG lists settings that do"
    return Result(GROUP, "planned memory", FAILS, text, figures)


def peak_memory(run: Path) -> Result:
    """Planned and measured peak of the three steps, which train.py writes down."""
    name = "peak memory"
    try:
        both = json.loads((run / FILE).read_text(encoding="utf-8"))
        planned, measured = both["planned"]["memory_bytes"]["peak"] / GIB, both["measured"]["memory_gib"]
    except (OSError, KeyError, ValueError):
        return Result(GROUP, name, SKIPPED, f"{run.name}/{FILE} is missing: train.py does not compare them")
    figures = {"planned_gib": planned, "measured_gib": measured}
    text = f"planned {planned:.2f} GiB, measured {measured:.2f} GiB in three steps ({measured / planned - 1:+.0%})"
    if measured <= max((1 + MEMORY_APART) * planned, planned + SMALL):
        return Result(GROUP, name, OK, text, figures)
    return Result(GROUP, name, WARNING, f"{text}: leave room for what the plan does not know", figures)


def run_time(plan: Plan | None, run: Path, measured: Measured) -> Result:
    """The time of the whole run: as planned, and as the steps and saves that were measured go on."""
    name = "time"
    if plan is None:
        return Result(GROUP, name, SKIPPED, "there is no plan of the run (planned memory)")
    try:
        device = json.loads((run / FILE).read_text(encoding="utf-8"))["planned"]["cluster"]["device"]
        cluster = dataclasses.replace(
            plan.cluster, device=dataclasses.replace(plan.cluster.device, flops=device["flops"])
        )
        workload = plan.workload
        short, long = expected_speed(plan.shape, plan.config, cluster, workload.steps, workload.total_steps).hours
        planned = f"{_time(short)} to {_time(long)} planned"
    except (OSError, KeyError, ValueError):
        short, long, planned = 0.0, math.inf, "no plan of the time"
    steps = plan.workload.total_steps
    tokens = steps * sum(step.tokens for step in plan.workload.steps) / len(plan.workload.steps)
    every = plan.config.run.save_every
    saves = 1 + (steps - 1) // every if every else 1
    hours = (tokens / measured.tokens_per_second + saves * measured.save_seconds) / 3600
    figures = {"steps": steps, "tokens": tokens, "hours": hours, "planned_hours": [short, long], "saves": saves}
    text = (
        f"{counted(steps, 'step')} of {tokens / steps:,.0f} tokens at {measured.tokens_per_second:,.0f} tokens/s, {counted(saves, 'save')}: "
        f"{_time(hours)} without evaluations; {planned}"
    )
    if hours <= max(1.5 * long, WORTH_A_WARNING):
        return Result(GROUP, name, OK, text, figures)
    return Result(GROUP, name, WARNING, f"{text}: look for what slows the steps down (docs/performance.md)", figures)


def _time(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1.5 else f"{60 * hours:,.1f} min"
