"""Prove a run on the user's own config, data, model and machine before it is paid for (docs/check.md).

The ranks of a check hold no memory on a GPU and train nothing. They start real runs of the user's train.py as children, kill one of
them, look at what the runs leave (tools/check_runs.py), and print a line for each thing that was checked. Data, model and precision are
looked at by one more child (tools/check_step.py).
"""

import argparse
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from common.child_process import OF_A_LAUNCHER, environment_of_no_rank, last_words, start_child, tied_to_parent
from common.durable_files import check_can_write, write_json
from common.errors import UserError
from configs.config import Config
from configs.load import check_world, override, read_command_line
from distributed.checkpoint_directory import complete_checkpoints
from distributed.process_group import gather_objects, library_versions, process_group, world_size_from_environment
from model.architectures import read_model_config
from model.weight_files import INDEX, SINGLE, stored_tensors
from tools.check_data import FAILS, OK, SKIPPED, WARNING, Result
from tools.check_runs import (
    GROUP,
    KILLED_AFTER,
    STEPS,
    Check,
    T,
    checkpoint_of,
    compare_runs,
    judge_straight,
    router_aux,
    saved_steps,
)
from tools.check_step import LINES
from tools.plan import Plan, plan_of
from training.checkpointer import FILE as RECORD
from training.checkpointer import METRICS
from training.description import counted
from training.owner import LOCK_FILE, own_directory


class ChildFailed(Exception):
    """A child of the check failed: which rank, and why it says so."""


ROOT = Path(__file__).resolve().parents[1]
STEP_PROGRAM = ROOT / "tools" / "check_step.py"
MACHINE = "machine"
FISHER_DOCUMENTS = 8
POLL, SAY_EVERY = 0.02, 15.0  # seconds between two looks at the children, and between two lines about them
GRACE = 10.0  # seconds that the other children have to end, and to say why, after one has failed
MEMORY_APART, SMALL = 0.25, 2**28  # of a plan, or bytes, by which the measured peak may exceed it
WORTH_A_WARNING = 0.5  # hours; a shorter run is over before anybody has found out why it is slow
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
COPIED_BYTES = 200_000_000  # a larger file is no tokenizer


# --- The command ------------------------------------------------------------------------------------------------------


def main(description: str | None) -> int:
    """Do all checks and print one line each. Returns the exit code: 0, 1 if anything fails. Every rank runs this.

    Raises UserError for a config that cannot be run at all, or whose data cannot be read.
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
    whole = read_model_config(config.model.path, key="model.path").num_hidden_layers
    if options.layers is not None and not 1 <= options.layers < whole:
        raise UserError(
            f"--layers {options.layers}: the model has {whole} layers; name fewer, or leave the option out to check all"
        )
    if options.json and is_first:  # which writes it; other nodes may lack the directory
        check_can_write(options.json, "--json")
    with process_group(config.run.timeout_minutes, torch.device("cpu")) as ranks:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: it removes the runs of the check

        def say(text: str) -> None:
            if ranks.rank == 0:
                print(text, flush=True)

        check = Check(config, options.train.resolve(), tuple(command), ranks, say)
        all_checks(check, options.layers)
        results, seconds = check.results, time.monotonic() - begin
        for line in report_lines(results, seconds):
            say(line)
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
    """The options of scripts/check.py beside the config and its overrides."""
    parser.add_argument("--layers", type=int, metavar="N", help="a model of the first N decoder layers, at full width")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results with their figures to FILE")
    parser.add_argument("--train", type=Path, metavar="FILE", default=ROOT / "train.py", help="your copy of train.py")


def report_lines(results: Sequence[Result], seconds: float) -> list[str]:
    """The report in words. The groups stand in their order, a group's results in the order in which they were found."""
    groups = ("data", "model", GROUP, MACHINE)
    names = max(len(result.name) for result in results)
    said = []
    for result in sorted(results, key=lambda result: groups.index(result.group)):
        more = [" " * (20 + names) + str(line) for line in result.lines]
        said += [f"{result.status:<7}  {result.group:<9}  {result.name:<{names}}  {result.text}", *more]
    count = {status: sum(result.status == status for result in results) for status in (OK, WARNING, FAILS, SKIPPED)}
    counts = ", ".join(f"{number} {status}" for status, number in count.items())
    verdict = "nothing stands in the way of this run" + "; read the warnings" * bool(count[WARNING])
    verdict = "do not start this run before what fails is mended" if count[FAILS] else verdict
    return [*said, f"{len(results)} checks in {seconds:.0f} s: {counts}; {verdict}"]


def all_checks(check: Check, layers: int | None) -> None:
    """Find all results, the same on every rank. A collective. Leaves nothing behind.

    Raises UserError if another check owns the scratch directory, or if the nodes do not share it.
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
    """The same, in a scratch directory that belongs to this check."""
    config = check.config
    check.on_first(lambda: clean(check.scratch))  # an earlier check that was killed may have left something
    if layers:
        check.say(f"  a model of the first {layers} layers")
        out = check.scratch / "model"
        said = check.on_first(lambda: cut_model(Path(config.model.path), layers, out))
        check.add(Result(OK, said), "layers", "model")
        path = f"model.path={out}"
        check = replace(check, config=override(config, [path]), arguments=(*check.arguments, path))
    check.say("  data and model")
    probe(check)
    plan = plan_or_problem(config) if check.ranks.rank == 0 else ""  # it holds the data, and stays on rank 0
    check.line("planned memory", lambda: judge_plan(plan, is_cut=bool(layers)), group=MACHINE)
    if check.results[-1].status == FAILS:
        why = "the whole model does not fit this machine (planned memory): add --layers 2"
        return check.add(Result(SKIPPED, why), "three steps")
    if not (measured := run_checks(check)):
        return
    short = override(check.config, [f"{key}={value}" for key, value in changed_settings(check, "straight").items()])
    rows, memory = measured["micro_batch"], measured["memory"]
    check.line("peak memory", lambda: peak_memory(plan_or_problem(short, rows), memory), group=MACHINE)
    if not layers:
        check.line("time", lambda: run_time(plan, config, measured), group=MACHINE)


def clean(directory: Path) -> None:
    """Remove what is in the scratch directory, except its lock. Raises OSError where it cannot."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def probe(check: Check) -> None:
    """Add the lines of data and model, from a child of rank 0 alone, which also leaves the reference of step 1. A collective.

    Raises UserError for a config that cannot be run, or whose data cannot be read.
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


# --- Three steps, a kill and a resume, fewer ranks --------------------------------------------------------------------


def train_command(check: Check, name: str) -> tuple[str, ...]:
    """`train.py CONFIG ...` of one of the check's runs: the real config, data, plan and ranks; three steps at the peak learning rate,
    without what takes time and proves nothing here."""
    changes = (f"{key}={value}" for key, value in changed_settings(check, name).items())
    return (str(check.script), *check.arguments, *changes)


def changed_settings(check: Check, name: str) -> dict[str, object]:
    """What differs in a run of the check from the real one."""
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
        "lora.dropout": 0.0,  # the reference has none
    }
    if ewc.strength and not ewc.fisher:
        settings["ewc.documents"] = min(ewc.documents, FISHER_DOCUMENTS)
    return settings


def run_checks(check: Check) -> dict:
    """Add all lines of the group `run`. Returns what the straight run measured. A collective."""
    measured = attempt(check, "three steps", lambda: three_steps(check))
    if measured is None:
        return {}
    steps = check.on_first(lambda: saved_steps(check.scratch / "straight"))
    check.remove(checkpoint_of(Path("straight"), 1))
    if steps[-2:] != [KILLED_AFTER, STEPS]:
        why = f"the plan has fewer than {STEPS} steps" if len(steps) < STEPS else f"it saved steps {steps}"
        check.add(Result(SKIPPED, why), "kill and resume")
        return measured
    attempt(check, "kill and resume", lambda: kill_and_resume(check, measured))
    check.remove("killed")
    attempt(check, "other ranks", lambda: fewer_ranks(check))
    return measured


def attempt(check: Check, name: str, do: Callable[[], T]) -> T | None:
    """`do()`; None, and a line, if one of its runs does not come to its end."""
    try:
        return do()
    except (ChildFailed, UserError) as error:
        check.add(Result(FAILS, str(error)), name)


def three_steps(check: Check) -> dict:
    """The straight run, and all lines about it. A collective. Raises ChildFailed or UserError if it does not come to its end."""
    ranks, begin = check.ranks.world_size, time.monotonic()
    check.say(f"  {STEPS} steps on {counted(ranks, 'rank')} of {check.script.name}")
    run_children(check, "straight", train_command(check, "straight"), ranks)
    return judge_straight(check, time.monotonic() - begin)


def kill_and_resume(check: Check, measured: dict) -> None:
    """The same run again, killed in step 3 and started again. A collective. Raises ChildFailed or UserError."""
    name, ranks, run = "kill and resume", check.ranks.world_size, check.scratch / "killed"
    check.say(f"  the same, with SIGKILL in step {STEPS}")
    delay = min(10.0, measured["seconds_per_step"] / 2) if measured else 0.0
    seen: list[float] = []

    def in_last_step() -> bool:
        if not seen and complete_checkpoints(run / "checkpoints"):
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= delay

    command = train_command(check, "killed")
    if not run_children(check, "killed", command, ranks, in_last_step):
        return check.add(Result(SKIPPED, "the run ended before it could be killed"), name)
    check.say("  resume after the kill")
    run_children(check, "resumed", command, ranks)
    is_exact = not torch.cuda.is_available() or check.config.run.deterministic
    compare_runs(check, run, name, f"SIGKILL to {counted(ranks, 'rank')} in step {STEPS}", is_exact)


def fewer_ranks(check: Check) -> None:
    """Continue the straight run from step 2 on half as many ranks, or fewer. A collective. Raises ChildFailed or UserError."""
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
    said = f"step {STEPS} again from the checkpoint of step {KILLED_AFTER}, on {world_size} instead of {check.ranks.world_size} ranks"
    compare_runs(check, run, name, said, is_exact=False)


def half_or_fewer(config: Config, total: int, per_node: int) -> tuple[int, str]:
    """(the largest number of ranks up to half of `total` on which a config runs, on several nodes whole ones; or 0, and why)."""
    errors = []
    for ranks in range(total // 2, 0, -1):
        context = math.gcd(ranks, config.sharding.context)  # fewer may share a micro-batch
        fewer = replace(config, sharding=replace(config.sharding, context=context))
        try:
            check_world(fewer, ranks, min(per_node, ranks))
            if ranks <= per_node or ranks % per_node == 0:
                return ranks, ""
        except UserError as error:
            errors.append(error)
    return 0, f"this config runs on no number of ranks up to {total // 2}: {errors[0] if errors else ''}"


def move_checkpoint(source: Path, target: Path) -> None:
    """Make a new run that stands where `source` stood after step 2, of whose checkpoint it takes the files."""
    folder = checkpoint_of(source, KILLED_AFTER)
    (target / "checkpoints").mkdir(parents=True)
    shutil.move(folder, target / "checkpoints")
    for name in (RECORD, METRICS):  # without them it would be the checkpoint of another run
        shutil.copy(source / name, target)
    for part in ("ewc", "anchor"):
        if (source / part).is_dir():
            shutil.move(source / part, target)


# --- Children ---------------------------------------------------------------------------------------------------------


def run_children(
    check: Check, name: str, command: tuple[str, ...], world_size: int, kill_when: Callable[[], bool] | None = None
) -> bool:
    """Run `python COMMAND` on the first `world_size` ranks, each as a child of its rank, to the end. A collective.

    world_size 0: on rank 0, as if there were no launcher. A child has the rank, the world size and the store of its
    parent's launcher, so that it is what torchrun would have started. When `kill_when()` is true, a rank's child gets
    SIGKILL; when a child fails, so do the others after a while. No child is left, whatever happens.

    Returns whether it was killed. Raises UserError on all ranks for a mistake of the user, and ChildFailed if a child fails.
    """
    ranks = check.ranks
    ranks.watch.at(f"the check's run '{name}'")
    folder = check.scratch / "outputs" / f"{name}.rank{ranks.rank}"
    output, failed, patience = folder / "output", folder.with_name(f"{name}.failed"), GRACE
    folder.mkdir(parents=True, exist_ok=True)
    process, killed, started = None, False, time.monotonic()
    spoke = started
    try:
        if ranks.rank < max(1, world_size):
            process = start_process(list(command), child_environment(world_size, folder), output)
        while process and process.poll() is None and patience > 0 and not killed:
            ranks.watch.tick()
            killed = bool(kill_when and kill_when())
            if time.monotonic() - spoke > SAY_EVERY:
                spoke = time.monotonic()
                check.say(f"    {spoke - started:.0f} s: {said(output)[:100] or 'it starts'}")
            time.sleep(POLL)
            patience -= POLL if failed.exists() else 0
        code = process.poll() if process else None
        if code and not kill_when:
            failed.touch()
    finally:
        if process and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            while process.poll() is None:
                time.sleep(POLL)
    ended = gather_objects((killed, code, socket.gethostname(), said(output) if process else ""), ranks)
    codes = {rank: code for rank, (_, code, *_) in enumerate(ended) if code}
    if not codes or any(one[0] for one in ended):  # the ranks that lost the killed one have ended by themselves
        return any(one[0] for one in ended)
    rank = min(codes, key=lambda rank: (codes[rank] != 2, codes[rank] == 3))  # 2: a mistake; 3: another rank was lost
    code, (_, _, host, words) = codes[rank], ended[rank]
    if code == 2:
        raise UserError(words)
    where = f"rank {rank} on host {host}: " if ranks.world_size > 1 else ""
    why = " (the kernel sends it when memory runs out)" if -code == signal.SIGKILL else ""
    signalled = f"killed by {signal.Signals(-code).name}{why}; its last line: " if code < 0 else ""
    raise ChildFailed(f"{where}{signalled}{words or f'exit code {code}'}")


def child_environment(world_size: int, folder: Path) -> dict[str, str]:
    """The environment of this rank's child. `folder` is its own."""
    mine = environment_of_no_rank()
    # A copy of train.py works from any directory.
    mine["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    if not world_size or "RANK" not in os.environ:
        return mine
    mine |= {key: os.environ[key] for key in OF_A_LAUNCHER if key in os.environ}
    return mine | {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(min(world_size_from_environment()[1], world_size)),
        # The store of the launcher, or that of the parent of rank 0, which a child must not try to open itself.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        # Each child says for itself why it ends (common/errors.py).
        "TORCHELASTIC_ERROR_FILE": str(folder / "errors" / "error.json"),
    }


def start_process(command: list[str], environment: dict[str, str], output: Path) -> subprocess.Popen:
    """Start `python COMMAND`, with all output in one file. It ends when its parent ends."""
    with output.open("wb") as file:
        return start_child(tied_to_parent(command), environment, file)


def said(output: Path) -> str:
    """The last words in a file of output."""
    return last_words(output.read_text(encoding="utf-8", errors="replace"))


# --- A model of the first layers --------------------------------------------------------------------------------------


def cut_model(path: Path, layers: int, out: Path) -> str:
    """Write the first `layers` decoder layers of the model in `path`, with embedding, norm and head, to `out`.

    Only the tensors that are needed are read. Returns a sentence about it for the report. Raises UserError if the weights are not
    there, or damaged; a tensor that is missing stays so.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    of = settings["num_hidden_layers"]
    # What is listed layer by layer (layer_types, no_rope_layers) is cut as well, and not, say, two end tokens of a model of two layers.
    for key, value in settings.items():
        if isinstance(value, list) and len(value) == of and "layer" in key:
            settings[key] = value[:layers]
    settings["num_hidden_layers"] = layers
    if isinstance(settings.get("max_window_layers"), int):  # Qwen 2: the layers before it attend to everything
        settings["max_window_layers"] = min(settings["max_window_layers"], layers)
    write_json(out / "config.json", settings)
    tensors = {}
    for name, tensor in stored_tensors(path).items():
        layer = LAYER.search(name)
        if layer is None or int(layer[1]) < layers:
            with safe_open(tensor.file, framework="pt") as file:  # mapped: other tensors are not read
                tensors[name] = file.get_tensor(name)
    save_file(tensors, out / SINGLE, metadata={"format": "pt"})
    for file in path.iterdir():  # the tokenizer, and what generation reads
        is_other = file.is_file() and file.suffix not in NOT_COPIED and file.name not in ("config.json", INDEX)
        if is_other and file.stat().st_size <= COPIED_BYTES:
            shutil.copyfile(file, out / file.name)
    return f"the first {layers} of {of} decoder layers at full width"


# --- The machine ------------------------------------------------------------------------------------------------------


def plan_or_problem(config: Config, rows: int | None = None) -> Plan | str:
    """The plan of a run on this machine, or why there is none: a check goes on without one. rows: see `plan_of`."""
    try:
        return plan_of(config, rows=rows)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def judge_plan(plan: Plan | str, is_cut: bool) -> Result:
    """Whether the worst micro-batch of the real plan fits, by arithmetic. is_cut: another model is run."""
    if isinstance(plan, str):
        return Result(WARNING, f"there is no plan of this run: {plan}")
    worst, available = plan.workload.worst, plan.cluster.device.memory
    text = (
        f"{_gib(plan.needed)} of {available / 2**30:.1f} GiB on the fullest rank, in step {worst.step + 1} of "
        f"{plan.workload.total_steps} ({worst.tokens:,} tokens in a micro-batch)"
    )
    figures = {"needed": plan.needed, "available": available, "steps": plan.workload.total_steps}
    if plan.needed[0] <= available:  # on a CPU a process may hold more than its tensors
        return Result(OK if plan.fits_device else WARNING, text, figures)
    text = f"it needs {text}, which does not fit: python scripts/plan.py CONFIG lists settings that do"
    return Result(SKIPPED if is_cut else FAILS, text, figures)


def peak_memory(plan: Plan | str, measured: float) -> Result:
    """Planned and measured peak of the three steps."""
    said = f"measured {measured / 2**30:.2f} GiB in three steps"
    if isinstance(plan, str):
        return Result(SKIPPED, f"{said}; there is no plan ({plan})")
    figures, text = {"planned": plan.needed, "measured": measured}, f"planned {_gib(plan.needed)} GiB, {said}"
    if measured <= max((1 + MEMORY_APART) * plan.needed[1], plan.needed[1] + SMALL):
        return Result(OK, text, figures)
    return Result(WARNING, f"{text}: leave room for what the plan does not know", figures)


def _gib(needed: tuple[int, int]) -> str:
    return " to ".join(dict.fromkeys(f"{size / 2**30:.2f}" for size in needed))


def run_time(plan: Plan | str, config: Config, measured: dict) -> Result:
    """The time of the whole run: as planned, and as the steps and saves that were measured go on."""
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
