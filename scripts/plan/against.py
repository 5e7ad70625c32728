"""A plan beside a run: planned and measured memory and speed (scripts/plan.py --against)."""

from pathlib import Path

from common.errors import UserError
from configs.config import Config
from eval.comparison.arms import metric_rows
from scripts.plan.machines import GIB, cluster_of, cpu_cluster, this_machine
from scripts.plan.planner import Plan, plan_of
from scripts.plan.report import gib
from training.checkpointer import newest_start


def compare_with_run(config: Config, run: Path) -> str:
    """Return one line with the planned and the measured memory and speed of a run. Raise UserError for mistakes."""
    return beside(plan_of_run(config, run), measured(run))


def plan_of_run(config: Config, run: Path) -> Plan:
    """Plan a config on the machine of the run's last start, which the run's config.json records. Raise UserError if it does not."""
    record = newest_start(run)
    if not {"world_size", "devices"} <= record.keys():
        raise UserError(f"{run}/config.json says nothing of the run's machine; give a run of train.py")
    ranks, devices = record["world_size"], record["devices"]
    nodes, name = len({device["host"] for device in devices}), devices[0]["device"]
    rows = record["config"]["batch"]["micro_batch"] if config.batch.micro_batch == "auto" else None
    if name.startswith("cpu"):
        config, here = this_machine(config)
        # The run's processes shared this machine, on which torchrun may have started another number now.
        flops, memory = here.devices * here.device.flops, here.devices * here.device.memory
        return plan_of(config, cpu_cluster(ranks, flops, memory), rows)
    return plan_of(config, cluster_of(ranks, nodes, name), rows)


def measured(run: Path) -> dict[str, float]:
    """Return steps, tokens per second and the GiB of rank 0's peak from a run's metrics.jsonl.

    Raise UserError if it has fewer than two steps: the first one is left out, because some work happens only there.
    """
    rows = [row for row in metric_rows(run) if "train/tokens_per_second" in row]
    if len(rows) < 2:
        raise UserError(
            f"{run}/metrics.jsonl has {len(rows)} rows of steps, and the comparison needs two; give the directory of a run"
        )
    tokens, seconds = (sum(column) for column in zip(*timed_steps(rows), strict=True))
    return {
        "steps": rows[-1]["step"] - rows[0]["step"],
        "tokens_per_second": tokens / seconds,
        "memory_gib": max(row["train/memory_gib"] for row in rows),
    }


def timed_steps(rows: list[dict]) -> list[tuple[int, float]]:
    """Return (tokens, seconds) of each metrics row of a training step after the first."""
    timed = [row for row in rows if row.get("train/tokens_per_second")]
    tokens = [after["train/tokens"] - before["train/tokens"] for before, after in zip(timed, timed[1:], strict=False)]
    return [(count, count / row["train/tokens_per_second"]) for count, row in zip(tokens, timed[1:], strict=True)]


def beside(plan: Plan, measured: dict[str, float]) -> str:
    """Return the plan of a run beside its measurement (`measured`), as one line."""
    low, high = (plan.cluster.devices * value for value in plan.speed.tokens_per_second)
    speed, peak = measured["tokens_per_second"], measured["memory_gib"]
    where = "in" if low <= speed <= high else "outside of"
    if plan.layout.on_cuda:
        tensors = plan.memory.tensors
        planned, error = gib(tensors), f" ({tensors / GIB / peak - 1:+.0%})"
    else:
        planned, error = " to ".join(map(gib, plan.needed)), ""
    return (
        f"planned against measured ({measured['steps']:,} steps): peak memory {planned} and {peak:.1f} GiB{error}; {low:,.0f} to "
        f"{high:,.0f} and {speed:,.0f} tokens/s, {where} the range"
    )
