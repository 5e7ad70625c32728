"""Three steps of the user's own train.py, again with a SIGKILL and a resume, and again on fewer ranks, all compared.

The runs of a check take the real config, data, plan and number of ranks. They differ in their length, in the learning rate,
which is at its peak in all three steps, and in what takes time and proves nothing here: evaluations, and most of EWC's
documents.
"""

import os
import shutil
import time
from pathlib import Path

import torch

from common.errors import UserError
from configs.loading.checks import check_world
from distributed.process_group import world_size_from_environment
from preflight.compare import checkpoint_of, saved_steps
from preflight.context import Context
from preflight.judge import (
    GROUP,
    KILLED_AFTER,
    LOSS,
    NORM,
    STEPS,
    Measured,
    compare_runs,
    judge_checkpoint,
    judge_export,
    judge_first,
    judge_shares,
    judge_steps,
    measure,
)
from preflight.result import FAILS, SKIPPED, Result

FISHER_DOCUMENTS = 8


def train_command(context: Context, name: str) -> tuple[str, ...]:
    """`train.py CONFIG ...` of one of the check's runs."""
    config = context.config
    overrides = {
        "run.directory": context.scratch,
        "run.name": name,
        "run.resume": "auto",
        "run.log_every": 1,
        "run.save_every": 1 if name == "straight" and context.sample.exists() else KILLED_AFTER,
        "run.keep_last": STEPS,
        "run.eval_every": 0,
        "run.eval_general": False,
        "run.eval_generate": 0,
        "run.best_by": "validation/loss",
        "run.stop_after_no_gain": 0,
        "run.log_to": "tensorboard",
        "eval.metric": None,
        "run.export": "last",
        "data.validation": "",
        "optimizer.max_steps": STEPS,
        "optimizer.warmup_steps": 0,
        "optimizer.min_lr_ratio": 1.0,
    }
    if context.model:
        overrides["model.path"] = context.model
    if config.ewc.strength and not config.ewc.fisher:
        overrides["ewc.documents"] = min(config.ewc.documents, FISHER_DOCUMENTS)
    return (str(context.script), *context.arguments, *(f"{key}={value}" for key, value in overrides.items()))


def run_checks(context: Context, reference: dict | None) -> tuple[list[Result], Measured | None]:
    """All checks of the group `run`. A collective. reference: of the first step, from the probe."""
    world_size = context.ranks.world_size
    context.say(f"  {STEPS} steps on {world_size} rank{'s' if world_size > 1 else ''} of {context.script.name}")
    ended = context.run("straight", train_command(context, "straight"), world_size)
    if ended.problem:
        names = ("kill and resume", "other ranks", "export")
        rest = [Result(GROUP, name, SKIPPED, "the three steps must succeed first") for name in names]
        return [Result(GROUP, "three steps", FAILS, ended.problem), *rest], None
    straight = context.scratch / "straight"
    measured = context.on_first(lambda: measure(straight))
    results = [
        context.result_on_first(GROUP, "three steps", lambda: judge_steps(context, ended.seconds)),
        context.result_on_first(GROUP, "loss", lambda: judge_first(context, reference, LOSS)),
        context.result_on_first(GROUP, "gradient norm", lambda: judge_first(context, reference, NORM)),
        context.result_on_first(GROUP, "shares", lambda: judge_shares(context, reference)),
        context.result_on_first(GROUP, "checkpoint", lambda: judge_checkpoint(context)),
        context.result_on_first(GROUP, "export", lambda: judge_export(context)),
    ]
    context.remove(str(checkpoint_of(straight, 1)))
    steps = context.on_first(lambda: saved_steps(straight))
    if steps[-2:] != [KILLED_AFTER, STEPS]:
        why = f"the plan has fewer than {STEPS} steps" if len(steps) < 2 else f"it saved steps {steps}"
        return [*results, Result(GROUP, "kill and resume", SKIPPED, why)], measured
    results.append(kill_and_resume(context, measured))
    context.remove("killed")
    results.append(fewer_ranks(context))
    return results, measured


def kill_and_resume(context: Context, measured: Measured | None) -> Result:
    """The same run again, killed in step 3 and started again. A collective."""
    name, ranks = "kill and resume", context.ranks.world_size
    run = context.scratch / "killed"
    context.say(f"  the same, with SIGKILL in step {STEPS}")
    delay = min(10.0, measured.seconds_per_step / 2) if measured else 0.0
    latest = run / "checkpoints" / "latest"
    seen: list[float] = []

    def in_last_step() -> bool:
        if not seen and latest.exists():
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= delay

    command = train_command(context, "killed")
    ended = context.run("killed", command, ranks, in_last_step)
    if ended.problem:
        return Result(GROUP, name, FAILS, f"the run before the kill: {ended.problem}")
    if not ended.killed:
        return Result(GROUP, name, SKIPPED, "the run ended before it could be killed")
    context.say("  resume after the kill")
    ended = context.run("resumed", command, ranks)
    if ended.problem:
        return Result(GROUP, name, FAILS, f"the resume after a SIGKILL: {ended.problem}")
    is_exact = not torch.cuda.is_available() or context.config.run.deterministic
    said = f"SIGKILL to all {ranks} ranks in step {STEPS}" if ranks > 1 else f"SIGKILL in step {STEPS}"
    return context.result_on_first(GROUP, name, lambda: compare_runs(context, "killed", name, said, is_exact))


def fewer_ranks(context: Context) -> Result:
    """Continue the straight run from step 2 on half as many ranks. A collective."""
    name = "other ranks"
    world_size, why = fewer(context)
    if not world_size:
        return Result(GROUP, name, SKIPPED, why)
    context.say(f"  resume on {world_size} rank{'s' if world_size > 1 else ''}")
    context.on_first(lambda: link_checkpoint(context.scratch / "straight", context.scratch / "fewer"))
    ended = context.run("fewer", train_command(context, "fewer"), world_size)
    said = f"step {STEPS} again from the checkpoint of step {KILLED_AFTER}, on {world_size} instead of {context.ranks.world_size} ranks"
    if ended.problem:
        return Result(GROUP, name, FAILS, f"{said}: {ended.problem}")
    return context.result_on_first(GROUP, name, lambda: compare_runs(context, "fewer", name, said, is_exact=False))


def fewer(context: Context) -> tuple[int, str]:
    """(half of the ranks, whole nodes only if there are several; or 0, and why there is no such number)."""
    total, per_node = context.ranks.world_size, world_size_from_environment()[1]
    if total == 1:
        return 0, "there is one rank; start with torchrun to check a resume on another number of ranks"
    half = total // 2
    if half > per_node:
        half -= half % per_node
    if context.config.sharding.shard_size:
        half -= half % context.config.sharding.shard_size
    try:
        check_world(context.config, max(1, half), min(per_node, max(1, half)))
    except UserError as error:
        return 0, f"this config does not run on {half} ranks: {error}"
    return half, "sharding.shard_size needs all ranks" if not half else ""


def link_checkpoint(source: Path, target: Path) -> None:
    """A new run that stands where `source` stood after step 2. Files are linked where the disk can, and never changed."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    folder = checkpoint_of(source, KILLED_AFTER)
    shutil.copytree(folder, target / "checkpoints" / folder.name, copy_function=link)
    (target / "checkpoints" / "latest").write_text(folder.name, encoding="utf-8")
    if (source / "ewc").is_dir():
        shutil.copytree(source / "ewc", target / "ewc", copy_function=link)
