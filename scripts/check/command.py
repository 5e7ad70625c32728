"""Prove a run on the user's own config, data, model and machine before it is paid for (docs/check.md).

The ranks of a check hold no memory on a GPU and train nothing. They start real runs of the user's train.py as children, kill a
run, and judge the files of all runs. Another child checks data and model (scripts/check/step.py).
"""

import argparse
import json
import math
import os
import platform
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from common.durable_files import check_can_write, write_json
from common.errors import UserError
from configs.config import Config
from configs.load import check_world, override, read_command_line
from distributed.checkpoint_directory import complete_checkpoints
from distributed.process_group import library_versions, process_group, world_size_from_environment
from model.architectures import read_model_config
from scripts.check import children
from scripts.check.children import ROOT, ChildFailed
from scripts.check.cut_model import cut_model
from scripts.check.result import FAILS, OK, SKIPPED, WARNING, Result
from scripts.check.runs import (
    GROUP,
    KILLED_AFTER,
    Check,
    T,
    compare_runs,
    in_words,
    judge_straight,
    router_aux,
    saved_steps,
)
from scripts.check.step import LINES
from scripts.check.updates import STEPS, checkpoint_of
from scripts.plan.planner import Plan, plan_of
from training.checkpointer import FILE as RECORD
from training.checkpointer import METRICS
from training.description import counted
from training.owner import LOCK_FILE, own_directory

STEP_PROGRAM = ROOT / "scripts" / "check" / "step.py"
MACHINE = "machine"
FISHER_DOCUMENTS = 8
WORTH_A_WARNING = 0.5  # hours; a shorter run is over before anybody has found out why it is slow


# --- The command ------------------------------------------------------------------------------------------------------


def main(description: str | None) -> int:
    """Do all checks and print a line for each. Return 0, or 1 if a line fails. Every rank must call this.

    Raise UserError for a config that cannot run, or whose data cannot be read.
    """
    begin = time.monotonic()
    transformers_logging.disable_progress_bar()
    world_size, local_world = world_size_from_environment()
    is_first = int(os.environ.get("RANK", 0)) == 0
    config, options = read_command_line(description, world_size, print if is_first else lambda text: None, add_options)
    command = [options.config, *options.overrides]  # gives this config again
    if options.deepspeed:
        command += ["--deepspeed", options.deepspeed]
    check_world(config, world_size, local_world)
    num_layers = read_model_config(config.model.path, key="model.path").num_hidden_layers
    if options.layers is not None and not 1 <= options.layers < num_layers:
        raise UserError(
            f"--layers {options.layers}: the model has {num_layers} layers; name fewer, or leave the option out to check all"
        )
    if options.json and is_first:  # other nodes may lack the directory
        check_can_write(options.json, "--json")
    with process_group(config.run.timeout_minutes, torch.device("cpu")) as ranks:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as on Ctrl-C, the runs of the check are removed

        def say(text: str) -> None:
            if ranks.rank == 0:
                print(text, flush=True)

        check = Check(config, options.train.resolve(), tuple(command), ranks, say)
        all_checks(check, options.layers)
        results, seconds = check.results, time.monotonic() - begin
        say("\n".join(report_lines(results, seconds)))
        code = int(any(result.status == FAILS for result in results))
        if options.json and ranks.rank == 0:
            content = {
                "command": command,
                "exit_code": code,
                "seconds": round(seconds, 1),
                "results": [vars(result) for result in results],
                "versions": library_versions(),
                "machine": {"host": socket.gethostname(), "system": platform.platform(), "ranks": world_size},
            }
            write_json(options.json, content)
        return code


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of scripts/check.py beside the config and its overrides."""
    parser.add_argument("--layers", type=int, metavar="N", help="a model of the first N decoder layers, at full width")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results with their figures to FILE")
    parser.add_argument("--train", type=Path, metavar="FILE", default=ROOT / "train.py", help="your copy of train.py")


def report_lines(results: Sequence[Result], seconds: float) -> list[str]:
    """Format the report: a line for each result, by group, and the totals."""
    groups = ("data", "model", GROUP, MACHINE)
    width = max(len(result.name) for result in results)
    lines = [
        f"{result.status:<7}  {result.group:<9}  {result.name:<{width}}  {result.text}"
        for result in sorted(results, key=lambda result: groups.index(result.group))
    ]
    count = {status: sum(result.status == status for result in results) for status in (OK, WARNING, FAILS, SKIPPED)}
    counts = ", ".join(f"{number} {status}" for status, number in count.items())
    verdict = "nothing stands in the way of this run" + "; read the warnings" * bool(count[WARNING])
    verdict = "do not start this run before what fails is mended" if count[FAILS] else verdict
    return [*lines, f"{len(results)} checks in {seconds:.0f} s: {counts}; {verdict}"]


def all_checks(check: Check, layers: int | None) -> None:
    """Do all checks in the scratch directory, and remove it. A collective; the results are the same on every rank.

    Raise UserError if another check owns the scratch directory, or if the nodes do not share it.
    """
    ranks = check.ranks
    check.say(f"checking {' '.join(check.arguments)}: the runs of the check go to {check.scratch} and are removed")
    with own_directory(check.scratch, ranks):
        try:
            owned_checks(check, layers)
        finally:
            if ranks.rank == 0:
                shutil.rmtree(check.scratch, ignore_errors=True)
                with suppress(OSError):  # not empty, or gone
                    check.scratch.parent.rmdir()


def owned_checks(check: Check, layers: int | None) -> None:
    """Do all checks in a scratch directory that this check owns. A collective."""
    config = check.config
    check.on_first(lambda: clean(check.scratch))  # an earlier check that was killed may have left files
    if layers:
        check.say(f"  a model of the first {layers} layers")
        out = check.scratch / "model"
        description = check.on_first(lambda: cut_model(Path(config.model.path), layers, out))
        check.add(Result(OK, description), "layers", "model")
        path = f"model.path={out}"
        check = replace(check, config=override(config, [path]), arguments=(*check.arguments, path))
    check.say("  data and model")
    probe(check)
    plan = plan_or_problem(config) if check.ranks.rank == 0 else ""  # the plan holds the data, and stays on rank 0
    check.line("planned memory", lambda: judge_plan(plan, is_cut=bool(layers)), group=MACHINE)
    if check.results[-1].status == FAILS:
        why = "the whole model does not fit this machine (planned memory): add --layers 2"
        return check.add(Result(SKIPPED, why), "three steps")
    measured = run_checks(check)
    if measured and not layers:
        check.line("time", lambda: run_time(plan, config, measured), group=MACHINE)


def clean(directory: Path) -> None:
    """Empty the scratch directory, except for its lock. Raise OSError if that fails."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def probe(check: Check) -> None:
    """Add the lines of data and model, from a child of rank 0, which also writes the reference of step 1. A collective.

    Raise UserError for a config that cannot run, or whose data cannot be read.
    """
    out, problem = check.scratch / "step", ""
    options = ("--out", str(out), "--world-size", str(check.ranks.world_size), "--train", str(check.script))
    try:
        run_children(check, "step", (str(STEP_PROGRAM), *options, *check.arguments), 0)
    except ChildFailed as error:
        problem = f"data and model were not all checked: {error}"

    def read() -> list[dict]:
        return json.loads((out / LINES).read_text(encoding="utf-8")) if (out / LINES).is_file() else []

    check.results.extend(Result(**line) for line in check.on_first(read))
    if problem:
        check.add(Result(FAILS, problem), "probe", "model")


def run_children(
    check: Check, name: str, command: tuple[str, ...], world_size: int, kill_when: Callable[[], bool] | None = None
) -> bool:
    """Call `children.run_children` for a run of this check."""
    folder = check.scratch / "outputs" / name
    return children.run_children(command, world_size, check.ranks, folder, check.say, kill_when)


# --- Three steps, a kill and a resume, fewer ranks --------------------------------------------------------------------


def train_command(check: Check, name: str) -> tuple[str, ...]:
    """Return the command of a run of the check: the real config, data, plan and ranks, for three steps."""
    changes = (f"{key}={value}" for key, value in changed_settings(check, name).items())
    return (str(check.script), *check.arguments, *changes)


def changed_settings(check: Check, name: str) -> dict[str, object]:
    """Return the settings of a run of the check that differ from the real run: the peak learning rate, and no evaluations."""
    ewc = check.config.ewc
    settings: dict[str, object] = {
        "run.directory": check.scratch,
        "run.name": name,
        "run.resume": "auto",
        "run.log_every": 1,
        "run.save_every": 1 if name == "straight" else KILLED_AFTER,
        "run.keep_last": STEPS,
        "run.eval_every": 0,
        "run.eval_general": False,
        "forgetting.max_kl": None,
        "forgetting.strict": False,
        "run.eval_generate": 0,
        "run.best_by": "validation/loss",
        "run.stop_after_no_gain": 0,
        "run.stop_at": None,
        "run.log_to": "tensorboard",
        "eval.metric": None,
        "run.export": "last",
        "data.validation": "",
        "optimizer.max_steps": STEPS,
        "optimizer.warmup_steps": 0,
        "optimizer.min_lr_ratio": 1.0,
        "lora.dropout": 0.0,  # as in the reference
    }
    if ewc.strength and not ewc.fisher:
        settings["ewc.documents"] = min(ewc.documents, FISHER_DOCUMENTS)
    return settings


def run_checks(check: Check) -> dict:
    """Add all lines of the group `run`, and return the measurements of the straight run. A collective."""
    measured = attempt(check, "three steps", lambda: three_steps(check))
    if measured is None:
        return {}
    steps = check.on_first(lambda: saved_steps(check.scratch / "straight"))
    check.remove(checkpoint_of(Path("straight"), 1))
    if steps[-2:] != [KILLED_AFTER, STEPS]:
        why = f"the plan has fewer than {STEPS} steps" if len(steps) < STEPS else f"it saved steps {steps}"
        check.add(Result(SKIPPED, why), "kill and resume")
        return measured
    attempt(check, "kill and resume", lambda: kill_and_resume(check))
    check.remove("killed")
    attempt(check, "other ranks", lambda: fewer_ranks(check))
    return measured


def attempt(check: Check, name: str, do: Callable[[], T]) -> T | None:
    """Return `do()`, or add a line that fails if a run in it fails."""
    try:
        return do()
    except (ChildFailed, UserError) as error:
        check.add(Result(FAILS, str(error)), name)


def three_steps(check: Check) -> dict:
    """Train the straight run, and add all lines about it. A collective. Raise ChildFailed or UserError if it fails."""
    ranks, begin = check.ranks.world_size, time.monotonic()
    check.say(f"  {STEPS} steps on {counted(ranks, 'rank')} of {check.script.name}")
    run_children(check, "straight", train_command(check, "straight"), ranks)
    return judge_straight(check, time.monotonic() - begin)


def kill_and_resume(check: Check) -> None:
    """Train the same run, kill it in step 3, and resume it. A collective. Raise ChildFailed or UserError."""
    name, ranks, run = "kill and resume", check.ranks.world_size, check.scratch / "killed"
    check.say(f"  the same, with SIGKILL in step {STEPS}")
    command = train_command(check, "killed")
    if not run_children(check, "killed", command, ranks, lambda: bool(complete_checkpoints(run / "checkpoints"))):
        return check.add(Result(SKIPPED, "the run ended before it could be killed"), name)
    check.say("  resume after the kill")
    run_children(check, "resumed", command, ranks)
    is_exact = not torch.cuda.is_available() or check.config.run.deterministic
    compare_runs(check, run, name, f"SIGKILL to {counted(ranks, 'rank')} in step {STEPS}", is_exact)


def fewer_ranks(check: Check) -> None:
    """Resume the straight run from step 2 on half as many ranks, or fewer. A collective. Raise ChildFailed or UserError."""
    name, run = "other ranks", check.scratch / "fewer"
    total, per_node = world_size_from_environment()
    world_size, why = half_or_fewer(check.config, total, per_node)
    if total == 1:
        why = "there is one rank; start with torchrun to check a resume on another number of ranks"
    elif world_size and router_aux(check.config):
        why = (
            "the routers' auxiliary loss counts choices of the micro-batches so far, and other ranks get other "
            "micro-batches, so gradients differ; model.router_aux=0 shows the rest"
        )
    if why:
        return check.add(Result(SKIPPED, why), name)
    check.say(f"  resume on {counted(world_size, 'rank')}")
    check.on_first(lambda: move_checkpoint(check.scratch / "straight", run))
    context = math.gcd(world_size, check.config.sharding.context)
    run_children(check, "fewer", (*train_command(check, "fewer"), f"sharding.context={context}"), world_size)
    description = (
        f"step {STEPS} again from the checkpoint of step {KILLED_AFTER}, on {world_size} instead of {total} ranks"
    )
    compare_runs(check, run, name, description, is_exact=False)


def half_or_fewer(config: Config, total: int, per_node: int) -> tuple[int, str]:
    """Return the largest number of ranks up to half of `total` on which a config runs, in whole nodes, or (0, the reason)."""
    errors = []
    for ranks in range(total // 2, 0, -1):
        context = math.gcd(ranks, config.sharding.context)  # fewer ranks may share a micro-batch
        fewer = replace(config, sharding=replace(config.sharding, context=context))
        try:
            check_world(fewer, ranks, min(per_node, ranks))
            if ranks <= per_node or ranks % per_node == 0:
                return ranks, ""
        except UserError as error:
            errors.append(error)
    return 0, f"this config runs on no number of ranks up to {total // 2}: {errors[0] if errors else ''}"


def move_checkpoint(source: Path, target: Path) -> None:
    """Make a new run from the checkpoint of step 2 of the run `source`, which loses it."""
    (target / "checkpoints").mkdir(parents=True)
    shutil.move(checkpoint_of(source, KILLED_AFTER), target / "checkpoints")
    for name in (RECORD, METRICS):  # a run refuses a checkpoint that its record does not have
        shutil.copy(source / name, target)
    for part in ("ewc", "anchor"):
        if (source / part).is_dir():
            shutil.move(source / part, target)


# --- The machine ------------------------------------------------------------------------------------------------------


def plan_or_problem(config: Config) -> Plan | str:
    """Return the plan of a run on this machine, or why there is none. A check goes on without a plan."""
    try:
        return plan_of(config)
    except Exception as error:
        return in_words(error)


def judge_plan(plan: Plan | str, is_cut: bool) -> Result:
    """Check by arithmetic that the largest micro-batch of the whole run fits. is_cut: the check runs a smaller model."""
    if isinstance(plan, str):
        return Result(WARNING, f"there is no plan of this run: {plan}")
    worst, available = plan.workload.worst, plan.cluster.device.memory
    needed = " to ".join(dict.fromkeys(f"{size / 2**30:.2f}" for size in plan.needed))
    text = (
        f"{needed} of {available / 2**30:.1f} GiB on the fullest rank, in step {worst.step + 1} of "
        f"{plan.workload.total_steps} ({worst.tokens:,} tokens in a micro-batch)"
    )
    figures = {"needed": plan.needed, "available": available, "steps": plan.workload.total_steps}
    if plan.needed[0] <= available:  # on a CPU a process may hold more than its tensors
        return Result(OK if plan.fits else WARNING, text, figures)
    text = f"it needs {text}, which does not fit: python scripts/plan.py CONFIG lists settings that do"
    return Result(SKIPPED if is_cut else FAILS, text, figures)


def run_time(plan: Plan | str, config: Config, measured: dict) -> Result:
    """Return the time of the whole run at the measured speed of steps and saves, beside the planned time."""
    if isinstance(plan, str):
        return Result(SKIPPED, "there is no plan of the run (planned memory)")
    every, steps, (short, long) = config.run.save_every, plan.workload.total_steps, plan.speed.hours
    saves = 1 + (steps - 1) // every if every else 1
    speed = measured["tokens_per_second"]
    hours = (plan.workload.tokens / speed + saves * measured["save_seconds"]) / 3600
    figures = {"steps": steps, "hours": hours, "planned_hours": [short, long], "saves": saves}
    text = (
        f"{counted(steps, 'step')} of {plan.workload.mean_tokens:,.0f} tokens at {speed:,.0f} tokens/s, "
        f"{counted(saves, 'save')}: {hours:.2f} h without evaluations; {short:.2f} to {long:.2f} h planned"
    )
    if hours <= max(1.5 * long, WORTH_A_WARNING):
        return Result(OK, text, figures)
    return Result(WARNING, f"{text}: look for what slows the steps down (docs/performance.md)", figures)
