"""`train.py CONFIG --check`: prove a run on the user's own config, data, model and machine before it is paid for.

The ranks of the check hold no memory on a GPU and train nothing. They start real runs of the same train.py as children
(preflight/launch.py), look at what these leave, and print a line for each result.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import torch

from common.errors import UserError
from configs.loading.checks import check_world
from configs.loading.command_line import Command
from data.files import check_paths_exist
from distributed.disks import NotShared
from distributed.optimizer import check_memory
from distributed.process_group import (
    Ranks,
    StopSignal,
    barrier,
    gather_objects,
    process_group,
    world_size_from_environment,
)
from model.architectures import check_model_directory, read_model_config
from preflight import machine, report
from preflight.context import Context
from preflight.judge import Measured
from preflight.launch import Interrupted
from preflight.layers import cut_model
from preflight.plan import Plan, memory_fits, peak_memory, read_plan, run_time
from preflight.result import FAILS, OK, SKIPPED, Result
from preflight.runs import run_checks
from training.owner import LOCK_FILE, own_directory

SHARED = "shared disk"
REFERENCE_SECONDS = 45  # for the losses and the gradient of step 1, document by document


def check_run(command: Command, world_size: int) -> int:
    """Do all checks and print one line each. Returns the exit code: 0, 1 if anything fails. Every rank runs this.

    Raises UserError for a config that cannot be run at all.
    """
    begin = time.monotonic()
    check_inputs(command, world_size)
    with process_group(command.config.run.timeout_minutes, torch.device("cpu")) as ranks:

        def say(text: str) -> None:
            if ranks.rank == 0:
                print(text, flush=True)

        stop = StopSignal(ranks)
        try:
            results = all_checks(command, ranks, stop, say)
        except Interrupted as error:
            say(f"stopped by {error}: the check is not complete; its runs are ended and removed")
            return 128 + error.number
        finally:
            stop.close()
        seconds = time.monotonic() - begin
        for line in report.lines(results, seconds):
            say(line)
        if command.json and ranks.rank == 0:
            report.write_report(Path(command.json), results, command.arguments, world_size, seconds)
        return report.exit_code(results)


def check_inputs(command: Command, world_size: int) -> None:
    """Raise UserError where the config names what is not there, or cannot run on these ranks at all."""
    config = command.config
    check_world(config, world_size, world_size_from_environment()[1])
    check_memory(config.optimizer.memory)
    check_model_directory(config.model.path, "model.path")
    mixed_in = [path for source in config.data.mix for path in (*source.paths, *source.validation)]
    check_paths_exist([*config.data.train, *config.data.validation, *config.ewc.data, *mixed_in])
    whole = read_model_config(config.model.path).num_hidden_layers
    if command.layers and command.layers >= whole:
        raise UserError(
            f"--layers {command.layers}: the model has {whole} layers; leave the option out to check them all"
        )


def all_checks(command: Command, ranks: Ranks, stop: StopSignal, say: Callable[[str], None]) -> list[Result]:
    """All results, the same on every rank. A collective. Leaves nothing behind."""
    config = command.config
    script = Path(sys.argv[0]).resolve()
    context = Context(config, script, command.arguments, ranks, stop, say)
    say(f"checking {' '.join(command.arguments)}: the runs of the check go to {context.scratch} and are removed")
    results = [machine.agreement(config, script, ranks), machine.clocks(ranks), *machine.free_memory(ranks)]
    owned = True
    existed = gather_objects(Path(config.run.directory).exists(), ranks)[0]
    try:
        with ExitStack() as stack:
            try:
                stack.enter_context(own_directory(context.scratch, ranks))
                shared = Result("machine", SHARED, OK, f"every node sees {config.run.directory}")
            except NotShared as error:
                shared = Result("machine", SHARED, FAILS, str(error))
            except UserError:  # another check owns it, whose files stay, or it cannot be written
                owned = False
                raise
            results.append(shared)
            clean(context.scratch, ranks)
            context = prepared(context, command)
            plan, fits = planned(context)
            results.append(fits)
            say("  data, model and precision")
            found, reference = probe(context, command)
            results += found
            if shared.status == FAILS:
                results.append(
                    Result("run", "three steps", SKIPPED, f"see {SHARED}: all ranks must see the same files")
                )
                measured = None
            elif fits.status == FAILS and not context.model:
                why = "the whole model does not fit this machine (planned memory): add --layers 2"
                results.append(Result("run", "three steps", SKIPPED, why))
                measured = None
            else:
                found, measured = run_checks(context, reference)
                results += found
            results.append(machine.all_reduce(context))
            results += machine_results(context, plan, measured)
    finally:
        if owned:
            remove(context.scratch, ranks, existed)
    return results


def prepared(context: Context, command: Command) -> Context:
    """The context with a model of the first layers, if `--layers` asks for one. A collective."""
    if not command.layers:
        return context
    layers, out = command.layers, context.scratch / "model"
    context.say(f"  a model of the first {layers} layers")
    context.on_first(lambda: cut_model(Path(context.config.model.path), layers, out) and None)
    return replace(context, model=out)


def probe(context: Context, command: Command) -> tuple[list[Result], dict | None]:
    """The results of data, model and precision, from a child of rank 0 alone, and the reference of step 1. A collective."""
    out = context.scratch / "probe.json"
    arguments = ("-m", "preflight.probe", "--out", str(out), "--world-size", str(context.ranks.world_size))
    arguments += ("--seconds", str(REFERENCE_SECONDS))
    arguments += ("--layers-model", str(context.model)) if context.model else ()
    ended = context.run("probe", (*arguments, *command.arguments), 0)

    def read() -> tuple[list[Result], dict | None]:
        content = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
        return [Result(**result) for result in content.get("results", [])], content.get("reference")

    results, reference = context.on_first(read)
    if ended.problem:
        results.append(
            Result("model", "probe", FAILS, f"data, model and precision were not all checked: {ended.problem}")
        )
    return results, reference


def planned(context: Context) -> tuple[Plan | None, Result]:
    """The plan of the real run, on rank 0, and on all ranks whether it fits. A collective."""
    plans: list[Plan] = []

    def look() -> Result:
        local_world = world_size_from_environment()[1]
        plans.append(read_plan(context.config, context.ranks.world_size, local_world))
        fits = memory_fits(plans[0])
        return replace(fits, status=SKIPPED) if fits.status == FAILS and context.model else fits

    result = context.result_on_first("machine", "planned memory", look)
    return (plans[0] if plans else None), result


def machine_results(context: Context, plan: Plan | None, measured: Measured | None) -> list[Result]:
    """The checks that need the measurements of the runs. A collective. plan: on rank 0."""
    run = context.scratch / "straight"
    results = []
    if measured:
        results.append(context.result_on_first("machine", "peak memory", lambda: peak_memory(run)))
    if measured and not context.model:
        results.append(context.result_on_first("machine", "time", lambda: run_time(plan, run, measured)))
    clean(context.scratch, context.ranks)  # the disk as the real run finds it
    room = None
    if measured and not context.model:
        room = machine.Room(measured.checkpoint_bytes, measured.export_bytes, "measured")
    else:
        room = context.on_first(lambda: plan and machine.Room(plan.disk.checkpoint, plan.disk.export, "planned"))
    return [*results, machine.disk(context.config, room, context.ranks), machine.save_in_time(measured)]


def clean(scratch: Path, ranks: Ranks) -> None:
    """Remove what is in the scratch directory, except its lock: an earlier check that was killed may have left it."""
    if ranks.local_rank == 0:
        for path in scratch.glob("*") if scratch.is_dir() else ():
            if path.name != LOCK_FILE:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    barrier(ranks)


def remove(scratch: Path, ranks: Ranks, existed: bool) -> None:
    """Remove the scratch directory on every node, and run.directory if this check has created it. No collective."""
    if ranks.local_rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        if not existed:
            with suppress(OSError):  # not empty, or gone
                scratch.parent.rmdir()
