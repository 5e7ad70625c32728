"""Prove a run on the user's own config, data, model and machine before it is paid for (docs/check.md).

The ranks of a check hold no memory on a GPU and train nothing. They start real runs of the user's train.py as children, kill a
run, and judge the files of all runs. Another child checks data and model (scripts/check/step.py).
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from common.durable_files import check_can_write, write_json
from common.errors import UserError
from configs.load import check_world, override, read_command_line
from distributed.checkpoint_directory import complete_checkpoints
from distributed.process_group import process_group, world_size_from_environment
from model.architectures import read_model_config
from model.weight_files import INDEX, SINGLE, stored_tensors
from scripts.check import children
from scripts.check.children import ROOT, ChildFailed
from scripts.check.runs import (
    KILLED_AFTER,
    Check,
    compare_runs,
    judge_straight,
    router_aux,
    saved_steps,
)
from scripts.check.step import LINES
from scripts.check.updates import STEPS, checkpoint_of
from training.check_result import FAILS, OK, SKIPPED, WARNING, Result
from training.checkpointer import FILE as RECORD
from training.checkpointer import METRICS
from training.description import counted
from training.owner import LOCK_FILE, own_directory

STEP_PROGRAM = ROOT / "scripts" / "check" / "step.py"
FISHER_DOCUMENTS = 8
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


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

        def say_phase(text: str) -> None:
            say(f"{text} (after {time.monotonic() - begin:.0f} s)" if text.startswith("  ") else text)

        check = Check(config, options.train.resolve(), tuple(command), ranks, say_phase)
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
            }
            write_json(options.json, content)
        return code


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of scripts/check.py beside the config and its overrides."""
    parser.add_argument("--layers", type=int, metavar="N", help="a model of the first N decoder layers, at full width")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all lines to FILE")
    parser.add_argument("--train", type=Path, metavar="FILE", default=ROOT / "train.py", help="your copy of train.py")


def report_lines(results: Sequence[Result], seconds: float) -> list[str]:
    """Format the report: a line for each result, and the totals."""
    width = max(len(result.name) for result in results)
    lines = [f"{result.status:<7}  {result.group:<5}  {result.name:<{width}}  {result.text}" for result in results]
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
    resumed = "" if ranks.world_size == 1 else f", and once on {counted(ranks.world_size // 2, 'rank')}"
    check.say(f"it starts train.py 3 times{resumed}, for at most {STEPS} steps each")
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
    left = lambda: [path for path in check.scratch.iterdir() if path.name != LOCK_FILE]  # noqa: E731  by a killed check
    check.on_first(lambda: [shutil.rmtree(path) for path in left()])
    if layers:
        check.say(f"  a model of the first {layers} layers")
        out = check.scratch / "model"
        description = check.on_first(lambda: cut_model(Path(check.config.model.path), layers, out))
        check.add(Result(OK, description), "layers", "model")
        path = f"model.path={out}"
        check = replace(check, config=override(check.config, [path]), arguments=(*check.arguments, path))
    check.say("  data and model")
    probe(check)
    run_checks(check)


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
    return children.run_children(command, world_size, check.ranks, folder, kill_when)


# --- A smaller model --------------------------------------------------------------------------------------------------


def cut_model(path: Path, layers: int, out: Path) -> str:
    """Write the first `layers` decoder layers of the model in `path`, with embedding, norm and head, to `out`.

    Read only the tensors that are needed. Return a sentence for the report. Raise UserError if the weights are missing or damaged;
    a single missing tensor is missing in `out` too.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if "text_config" in settings:
        raise UserError(f"{path} has other parts than text, and only a text model can be cut; leave out --layers")
    num_layers = settings["num_hidden_layers"]
    # Cut lists with a value for each layer (layer_types, no_rope_layers), but no other list that happens to be as long.
    for key, value in settings.items():
        if isinstance(value, list) and len(value) == num_layers and "layer" in key:
            settings[key] = value[:layers]
    settings["num_hidden_layers"] = layers
    if isinstance(settings.get("max_window_layers"), int):  # Qwen 2: the layers before it attend to everything
        settings["max_window_layers"] = min(settings["max_window_layers"], layers)
    write_json(out / "config.json", settings)
    tensors = {}
    for name, tensor in stored_tensors(path).items():
        layer = LAYER.search(name)
        if layer is None or int(layer[1]) < layers:
            with safe_open(tensor.file, framework="pt") as file:  # mapped, so that other tensors are not read
                tensors[name] = file.get_tensor(name)
    save_file(tensors, out / SINGLE, metadata={"format": "pt"})
    for file in path.iterdir():  # the tokenizer, and the settings of generation
        if file.is_file() and file.suffix != ".safetensors" and file.name not in ("config.json", INDEX):
            (out / file.name).symlink_to(file.resolve())
    return f"the first {layers} of {num_layers} decoder layers at full width"


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
        "forgetting.min_gain": 0.0,
        "forgetting.keep": None,
        "forgetting.max_drop": None,
        "forgetting.general_text": True,
        "run.eval_generate": 0,
        "run.best_by": "validation/loss",
        "run.stop_after_no_gain": 0,
        "run.stop_at": None,
        "run.log_to": "tensorboard",
        "eval.metric": None,
        "run.export": "last",
        "run.check": "off",
        "data.validation": "",
        # As resolved: without its data.validation, a config such as sft.py would hold out a share of the examples.
        "data.validation_share": check.config.data.validation_share,
        "optimizer.max_steps": STEPS,
        "optimizer.warmup_steps": 0,
        "optimizer.min_lr_ratio": 1.0,
        "lora.dropout": 0.0,  # as in the reference
    }
    if ewc.strength and not ewc.fisher:
        settings["ewc.documents"] = min(ewc.documents, FISHER_DOCUMENTS)
    return settings


def run_checks(check: Check) -> None:
    """Add all lines of the group `run`. A collective."""
    if not attempt(check, "three steps", lambda: three_steps(check)):
        return
    steps = check.on_first(lambda: saved_steps(check.scratch / "straight"))
    check.remove(checkpoint_of(Path("straight"), 1))
    if steps[-2:] != [KILLED_AFTER, STEPS]:
        why = f"the plan has fewer than {STEPS} steps" if len(steps) < STEPS else f"it saved steps {steps}"
        return check.add(Result(SKIPPED, why), "kill and resume")
    attempt(check, "kill and resume", lambda: kill_and_resume(check))
    check.remove("killed")
    attempt(check, "other ranks", lambda: fewer_ranks(check))


def attempt(check: Check, name: str, do: Callable[[], object]) -> bool:
    """Call `do()`. If a run in it fails, add a line that fails, and return False."""
    try:
        do()
    except (ChildFailed, UserError) as error:
        check.add(Result(FAILS, str(error)), name)
        return False
    return True


def three_steps(check: Check) -> None:
    """Train the straight run, and add all lines about it. A collective. Raise ChildFailed or UserError if it fails."""
    ranks, begin = check.ranks.world_size, time.monotonic()
    check.say(f"  {STEPS} steps on {counted(ranks, 'rank')} of {check.script.name}")
    run_children(check, "straight", train_command(check, "straight"), ranks)
    judge_straight(check, time.monotonic() - begin)


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
    """Resume the straight run from step 2 on half of the ranks. A collective. Raise ChildFailed or UserError."""
    name, run, why = "other ranks", check.scratch / "fewer", ""
    total, per_node = world_size_from_environment()
    if (world_size := total // 2) == 0:
        why = "there is one rank; start with torchrun to check a resume on another number of ranks"
        return check.add(Result(SKIPPED, why), name)
    context = math.gcd(world_size, check.config.sharding.context)  # fewer ranks may share a micro-batch
    half = replace(check.config, sharding=replace(check.config.sharding, context=context))
    try:
        check_world(half, world_size, min(per_node, world_size))
    except UserError as error:
        why = f"this config does not run on {world_size} ranks: {error}"
    if world_size > per_node and world_size % per_node:
        why = f"half of the ranks are no whole number of nodes with {per_node} ranks each"
    elif router_aux(check.config):
        why = (
            "the routers' auxiliary loss counts choices of the micro-batches so far, and other ranks get other "
            "micro-batches, so gradients differ; model.router_aux=0 shows the rest"
        )
    if why:
        return check.add(Result(SKIPPED, why), name)
    check.say(f"  resume on {counted(world_size, 'rank')}")
    check.on_first(lambda: move_checkpoint(check.scratch / "straight", run))
    run_children(check, "fewer", (*train_command(check, "fewer"), f"sharding.context={context}"), world_size)
    description = (
        f"step {STEPS} again from the checkpoint of step {KILLED_AFTER}, on {world_size} instead of {total} ranks"
    )
    compare_runs(check, run, name, description, is_exact=False)


def move_checkpoint(source: Path, target: Path) -> None:
    """Make a new run from the checkpoint of step 2 of the run `source`, which loses it."""
    (target / "checkpoints").mkdir(parents=True)
    shutil.move(checkpoint_of(source, KILLED_AFTER), target / "checkpoints")
    for name in (RECORD, METRICS):  # a run refuses a checkpoint that its record does not have
        shutil.copy(source / name, target)
    for part in ("ewc", "anchor"):
        if (source / part).is_dir():
            shutil.move(source / part, target)
