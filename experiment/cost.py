"""What a sweep has cost, and what is left: tokens, steps, wall time and process hours.

`train.py --dry-run` plans a run. Runs whose settings differ only in what does not change the plan share one.
"""

import json
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from configs.config import as_dict
from experiment.grid import Grid, Run, options
from experiment.launch import Ended, Job, run_jobs

# Sections and keys that change neither the number of tokens nor the work per token.
_NOT_PLANNED = ("run.",) + tuple(
    f"optimizer.{key}"
    for key in (
        *("learning_rate", "warmup_ratio", "warmup_steps", "min_lr_ratio"),
        *("weight_decay", "betas", "eps", "max_grad_norm", "skip_spikes"),
    )
)


@dataclass(frozen=True)
class Plan:
    """What a whole run takes. hours: from, to, as planned for one child's share of this machine; None: not known.

    disk: bytes of the checkpoints that are kept and of the export.
    """

    steps: int
    tokens: int
    hours: tuple[float, float] | None
    disk: int


@dataclass
class Spent:
    """What a run has cost. tokens and steps count up to the newest row of metrics.jsonl; seconds are those of all starts."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    process_seconds: float = 0.0
    speed: float = 0.0  # tokens/s of the newest row, without the start, evaluations and saves
    is_done: bool = False  # finished or diverged
    is_finished: bool = False
    is_running: bool = False


def plan_runs(grid: Grid, processes: int, parallel: int, known: dict[str, dict]) -> dict[str, Plan]:
    """Run name -> its plan. `known` keeps plans between starts, as JSON, and gets the new ones. Raises UserError.

    Each different plan takes one `train.py --dry-run`, which reads and tokenises the data. It has the share of the machine
    that a run will have.
    """
    keys = {run.name: plan_key(run, processes, parallel) for run in grid.runs}
    missing = {keys[run.name]: run for run in reversed(grid.runs) if keys[run.name] not in known}
    with tempfile.TemporaryDirectory() as folder:
        for key, run in missing.items():
            print(f"planning {' '.join(run.overrides) or 'the runs'} with train.py --dry-run", flush=True)
            known[key] = _dry_run(run, grid, processes, parallel, Path(folder) / key)
    return {
        name: Plan(found["steps"], found["tokens"], tuple(found["hours"]) if found["hours"] else None, found["disk"])
        for name, key in keys.items()
        for found in [known[key]]
    }


def plan_key(run: Run, processes: int, parallel: int) -> str:
    """The same for runs whose tokens and speed are planned to be the same."""
    sections = as_dict(run.config)
    settings = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    planned = {key: value for key, value in settings.items() if not key.startswith(_NOT_PLANNED)}
    text = json.dumps([planned, processes, parallel], sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def _dry_run(run: Run, grid: Grid, processes: int, parallel: int, file: Path) -> dict:
    ends: list[Ended] = []
    arguments = (*options(run, grid), "--dry-run", "--json", f"{file}.json")
    job = Job("train.py", (grid.config_file, *arguments), file.with_suffix(".log"), processes)
    run_jobs([job], parallel, on_end=ends.append)
    if ends[0].code:
        raise UserError(f"train.py --dry-run failed: {ends[0].last_words}")
    report = json.loads(Path(f"{file}.json").read_text(encoding="utf-8"))
    workload, speed = report["workload"], report["own"]["speed"]
    steps = workload["steps"]
    tokens = sum(step["tokens"] for step in steps) * workload["total_steps"] / max(1, len(steps))
    hours, disk = speed and speed["hours"], report["disk"]["run"]
    return {"steps": workload["total_steps"], "tokens": round(tokens), "hours": hours, "disk": disk}


def cost_lines(plans: Mapping[str, Plan], spent: Mapping[str, Spent], parallel: int, wall: float) -> list[str]:
    """What the sweep has cost so far and what is left, one line each. `spent` by the same names as `plans`.

    wall: seconds of the sweep so far. The disk that is left to fill is that of the runs which have not started.
    """
    done, total = sum(cost.is_done for cost in spent.values()), len(plans)
    steps, tokens = (sum(getattr(cost, name) for cost in spent.values()) for name in ("steps", "tokens"))
    hours = sum(cost.process_seconds for cost in spent.values()) / 3600
    lines = [
        f"so far: {done} of {total} runs, {steps:,} steps, {tokens:,} tokens, {duration(wall)}, {hours:.2f} "
        "process hours"
    ]
    left = {name: plan for name, plan in plans.items() if not spent[name].is_done}
    left_steps = sum(max(0, plan.steps - spent[name].steps) for name, plan in left.items())
    left_tokens = sum(max(0, plan.tokens - spent[name].tokens) for name, plan in left.items())
    if left:
        time, source = time_left(plans, spent, parallel)
        disk = sum(plan.disk for name, plan in left.items() if not spent[name].steps)
        lines.append(
            f"left: {len(left)} of {total} runs, {left_steps:,} steps, {left_tokens:,} tokens, {disk / 2**30:.1f} GiB of disk, "
            f"{time} ({source})"
        )
    return lines


def time_left(plans: Mapping[str, Plan], spent: Mapping[str, Spent], parallel: int) -> tuple[str, str]:
    """(wall time of what is left in words, where its speed is from). `parallel` runs advance at once."""
    left = {name: plan for name, plan in plans.items() if not spent[name].is_done}
    tokens = {name: max(0, plan.tokens - spent[name].tokens) for name, plan in left.items()}
    at_once = min(parallel, len(left)) or 1
    finished = [cost for cost in spent.values() if cost.is_finished and cost.seconds and cost.tokens]
    running = [cost.speed for cost in spent.values() if cost.is_running and cost.speed]
    if finished:
        speed = sum(cost.tokens for cost in finished) / sum(cost.seconds for cost in finished)
        source = f"at {speed:,.0f} tokens/s, as the finished runs, their starts and evaluations included"
    elif running:
        speed = sum(running) / len(running)
        source = f"at {speed:,.0f} tokens/s of the running runs, without their starts and evaluations"
    else:
        ranges = [(plan.hours, tokens[name] / plan.tokens) for name, plan in left.items() if plan.tokens]
        if not ranges or any(hours is None for hours, _ in ranges):
            return "an unknown time", "nothing is measured yet"
        low, high = (sum(hours[side] * part for hours, part in ranges if hours) for side in (0, 1))
        words = f"{duration(3600 * low / at_once)} to {duration(3600 * high / at_once)}"
        return words, "planned, without starts and evaluations; nothing is measured yet"
    return f"about {duration(sum(tokens.values()) / speed / at_once)}", source


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
