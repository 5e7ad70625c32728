"""What the planner expects of the whole run on these machines, and what the check's three steps have measured."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from configs.config import Config
from distributed.host_memory import resident_bytes
from planner.cluster import Cluster
from planner.memory import Disk, device_memory, disk, full_memory
from planner.shape import ModelShape
from planner.step_time import expected_speed
from planner.subject import from_config
from planner.workload import Workload
from preflight.judge import Measured
from preflight.machine import GROUP
from preflight.result import FAILS, OK, SKIPPED, WARNING, Result
from training.description import counted
from training.forecast import FILE, own_cluster
from training.micro_batch import with_rows

# The planner aims at 10%; AdamW's and the allocator's own habits differ on a CPU, where libraries count as well.
MEMORY_APART = 0.25
SMALL = 0.25  # GiB by which a process may exceed its plan in any case: libraries, the allocator
WORTH_A_WARNING = 0.5  # hours; a shorter run is over before anybody has found out why it is slow
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """The real run, all of its layers and steps. needed: bytes of the fullest rank at the peak, with what its process holds."""

    config: Config
    shape: ModelShape
    cluster: Cluster
    workload: Workload
    needed: int
    disk: Disk

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has so much memory."""
        return self.needed <= self.cluster.device.memory


def read_plan(config: Config, world_size: int, local_world: int, rows: int | None = None) -> Plan:
    """The plan of a config on the devices of this machine; no weights are read. Raises UserError.

    rows: what `batch.micro_batch` says, where that is a word and not a number.
    """
    if not isinstance(config.batch.micro_batch, int):
        config = with_rows(config, rows or 1)
    cluster = own_cluster(world_size * 1e12, world_size, local_world)  # its FLOP/s are measured later
    subject = from_config(config)
    workload = subject.workloads(world_size, cluster.device.kind)(config.batch.rows)
    memory = device_memory(subject.shape, config, cluster, workload.worst)
    process = resident_bytes() if cluster.device.kind == "cpu" else 0
    return Plan(config, subject.shape, cluster, workload, memory.total + process, disk(subject.shape, config))


def memory_fits(plan: Plan) -> Result:
    """Whether the worst micro-batch of the real plan fits, by arithmetic."""
    worst, available = plan.workload.worst, plan.cluster.device.memory
    text = (
        f"{plan.needed / GIB:.1f} of {available / GIB:.1f} GiB on the fullest rank, in step {worst.step + 1} of "
        f"{plan.workload.total_steps} ({worst.tokens:,} tokens in a micro-batch)"
    )
    figures = {
        "needed": plan.needed,
        "available": available,
        "step": worst.step + 1,
        "steps": plan.workload.total_steps,
    }
    if plan.fits:
        return Result(GROUP, "planned memory", OK, text, figures)
    full = full_memory(plan.shape, plan.config, plan.cluster, 1).total
    more = "" if full <= available else ", and not even a micro-batch of one row does"
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
        short, long = expected_speed(plan.shape, plan.config, cluster, plan.workload).hours
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
