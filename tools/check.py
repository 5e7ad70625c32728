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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from common.child_process import tied_to_parent
from common.dtypes import DTYPES, has_native_bf16
from common.durable_files import check_can_write, write_json
from common.errors import UserError
from configs.config import Config, as_dict
from configs.load import check_world, override, read_command_line
from distributed.agreement import library_versions
from distributed.disks import NotShared, torchrun_grace
from distributed.process_group import (
    Ranks,
    barrier,
    gather_objects,
    process_group,
    read_on_first,
    world_size_from_environment,
)
from model.architectures import read_model_config
from model.weight_files import INDEX, SINGLE, stored_tensors
from tools.check_data import FAILS, OK, SKIPPED, WARNING, Result
from tools.check_runs import (
    GROUP,
    KILLED_AFTER,
    LOSS,
    NORM,
    RATE,
    STEPS,
    STORED,
    checkpoint_of,
    compare_export,
    compare_runs,
    first_moments,
    judge_checkpoint,
    judge_export,
    judge_first,
    judge_gradient,
    judge_moves,
    judge_steps,
    measure,
    measure_difference,
    measure_moves,
    read_rows,
    read_sample,
    saved_steps,
    trained,
)
from tools.plan import Plan, plan_of
from training.description import counted
from training.owner import LOCK_FILE, own_directory
from training.record import FILE as RECORD
from training.record import METRICS

T = TypeVar("T")


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


@dataclass(frozen=True)
class Check:
    """A check on one rank. script: the user's own train.py. model: a directory with fewer layers, in place of the real one."""

    config: Config
    script: Path
    arguments: tuple[str, ...]  # of the command line, which give `config` again
    ranks: Ranks
    say: Callable[[str], None]  # on rank 0; no-op elsewhere
    model: Path | None = None

    @property
    def scratch(self) -> Path:
        """Where the runs of the check write: on the disk of the real run, beside it."""
        return Path(self.config.run.directory, f".check-{self.config.run.name}")

    def on_first(self, look: Callable[[], T]) -> T:
        """The result of `look()` on rank 0, on all ranks. A collective."""
        return read_on_first(look, self.ranks)

    def line(self, group: str, name: str, look: Callable[[], Result]) -> Result:
        """As `on_first`; a file that cannot be read or compared is a line that fails: the report must come to its end."""

        def guarded() -> Result:
            try:
                return look()
            except Exception as error:
                return Result(group, name, FAILS, f"{type(error).__name__}: {' '.join(str(error).split())}")

        return self.on_first(guarded)

    def of_tensors(self, checkpoint: Path, look: Callable[[list[str]], list[T]]) -> Callable[[], list[T]]:
        """`look(names)` of all trained tensors, each rank with its share of the names. A collective.

        What the function that is returned gives is the list of all results; it raises what went wrong on any rank.
        """
        try:
            names = trained(checkpoint)
            found, problem = look(names[self.ranks.rank :: self.ranks.world_size]), None
        except Exception as error:
            found, problem = list[T](), f"{type(error).__name__}: {error}"
        gathered = gather_objects((found, problem), self.ranks)

        def results() -> list[T]:
            for _, wrong in gathered:
                if wrong:
                    raise RuntimeError(wrong)
            return [one for part, _ in gathered for one in part]

        return results

    def remove(self, *names: str | Path) -> None:
        """Remove what is no longer needed of the scratch directory: checkpoints are large. A collective."""
        self.on_first(lambda: [shutil.rmtree(self.scratch / name, ignore_errors=True) for name in names])


# --- The command ------------------------------------------------------------------------------------------------------


def main(description: str | None) -> int:
    """Do all checks and print one line each. Returns the exit code: 0, 1 if anything fails. Every rank runs this.

    Raises UserError for a config that cannot be run at all, or whose data cannot be read.
    """
    begin = time.monotonic()
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
        results = all_checks(check, options.layers)
        seconds = time.monotonic() - begin
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


def all_checks(check: Check, layers: int | None) -> list[Result]:
    """All results, the same on every rank. A collective. Leaves nothing behind.

    Raises UserError if another check owns the scratch directory, or if the nodes do not share it.
    """
    ranks = check.ranks
    check.say(f"checking {' '.join(check.arguments)}: the runs of the check go to {check.scratch} and are removed")
    is_own = False
    try:
        with own_directory(check.scratch, ranks):
            is_own = True
            return owned_checks(check, layers)
    except NotShared:
        is_own = True
        raise
    finally:
        if ranks.local_rank == 0:
            if is_own:
                shutil.rmtree(check.scratch, ignore_errors=True)
            with suppress(OSError):  # not empty, or gone
                check.scratch.parent.rmdir()


def owned_checks(check: Check, layers: int | None) -> list[Result]:
    """All results, in a scratch directory that belongs to this check. A collective."""
    config, ranks = check.config, check.ranks
    clean(check)  # an earlier check that was killed may have left something
    results = []
    if layers:
        check.say(f"  a model of the first {layers} layers")
        out = check.scratch / "model"
        said = check.on_first(lambda: cut_model(Path(config.model.path), layers, out))
        results.append(Result("model", "layers", OK, said))
        check = replace(check, model=out)
    check.say("  data and model")
    found, reference = probe(check)
    plan = plan_or_problem(config) if ranks.rank == 0 else ""  # it holds the data, and stays on rank 0
    fits = check.line(MACHINE, "planned memory", lambda: judge_plan(plan, bool(check.model)))
    results += [*found, fits]
    if fits.status == FAILS:
        why = "the whole model does not fit this machine (planned memory): add --layers 2"
        return [*results, Result(GROUP, "three steps", SKIPPED, why)]
    found, measured = run_checks(check, reference)
    return [*results, *found, *machine_lines(check, plan, measured)]


def clean(check: Check) -> None:
    """Remove what is in the scratch directory, except its lock. A collective."""
    if check.ranks.local_rank == 0:
        for path in check.scratch.glob("*"):
            if path.name != LOCK_FILE:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    barrier(check.ranks)


def probe(check: Check) -> tuple[list[Result], dict]:
    """The results of data and model, from a child of rank 0 alone, and the reference of step 1. A collective.

    Raises UserError for a config that cannot be run, or whose data cannot be read.
    """
    out = check.scratch / "step.json"
    arguments = (str(STEP_PROGRAM), "--out", str(out), "--world-size", str(check.ranks.world_size))
    arguments += ("--train", str(check.script), *(("--model", str(check.model)) if check.model else ()))
    problem = []
    try:
        run_children(check, "step", (*arguments, *check.arguments), 0)
    except ChildFailed as error:
        problem = [Result("model", "probe", FAILS, f"data and model were not all checked: {error}")]

    def read() -> tuple[list[Result], dict]:
        content = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
        return [Result(**result) for result in content.get("results", [])], content.get("reference", {})

    results, reference = check.on_first(read)
    return results + problem, reference


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
        "run.log_to": "tensorboard",
        "eval.metric": None,
        "run.export": "last",
        "data.validation": "",
        "optimizer.max_steps": STEPS,
        "optimizer.warmup_steps": 0,
        "optimizer.min_lr_ratio": 1.0,
    }
    settings |= {"model.path": check.model} if check.model else {}
    settings |= {"lora.dropout": 0.0} if check.config.lora.dropout else {}  # the reference has none
    if ewc.strength and not ewc.fisher:
        settings["ewc.documents"] = min(ewc.documents, FISHER_DOCUMENTS)
    return settings


def run_checks(check: Check, reference: dict) -> tuple[list[Result], dict]:
    """All lines of the group `run`, and what the straight run measured. A collective. reference: of step 1, from `probe`."""
    try:
        results, measured = three_steps(check, reference)
    except (ChildFailed, UserError) as error:
        return [Result(GROUP, "three steps", FAILS, str(error))], {}
    steps = check.on_first(lambda: saved_steps(check.scratch / "straight"))
    check.remove(checkpoint_of(Path("straight"), 1))
    if steps[-2:] != [KILLED_AFTER, STEPS]:
        why = f"the plan has fewer than {STEPS} steps" if len(steps) < STEPS else f"it saved steps {steps}"
        return [*results, Result(GROUP, "kill and resume", SKIPPED, why)], measured
    has_auxiliary = bool(reference.get("router_aux"))
    for name, look in (
        ("kill and resume", lambda: kill_and_resume(check, measured)),
        ("other ranks", lambda: fewer_ranks(check, has_auxiliary)),
    ):
        try:
            results.append(look())
        except (ChildFailed, UserError) as error:
            results.append(Result(GROUP, name, FAILS, str(error)))
        check.remove("killed")
    return results, measured


def three_steps(check: Check, reference: dict) -> tuple[list[Result], dict]:
    """The straight run, and all lines about it. A collective. Raises ChildFailed or UserError if it does not come to its end."""
    ranks, straight, begin = check.ranks.world_size, check.scratch / "straight", time.monotonic()
    check.say(f"  {STEPS} steps on {counted(ranks, 'rank')} of {check.script.name}")
    run_children(check, "straight", train_command(check, "straight"), ranks)
    seconds = time.monotonic() - begin
    results = [check.line(GROUP, "three steps", lambda: judge_steps(straight, seconds))]
    results += judge_first_step(check, reference)
    measured = check.on_first(lambda: measure(straight))
    steps = check.on_first(lambda: saved_steps(straight))
    results.append(judge_updates(check, steps))
    last = checkpoint_of(straight, steps[-1]) if steps else straight
    exported = check.of_tensors(last, lambda names: [*compare_export(straight / "export", last, names).items()])
    keep = check.config.run.keep_last
    results += [
        check.line(GROUP, "checkpoint", lambda: judge_checkpoint(check.scratch, measured, keep, torchrun_grace())),
        check.line(GROUP, "export", lambda: judge_export(straight, check.config, exported())),
    ]
    return results, measured


def judge_first_step(check: Check, reference: dict) -> list[Result]:
    """Loss, gradient norm and gradient of step 1 against the reference. A collective."""
    straight, config = check.scratch / "straight", check.config
    file, eps = check.scratch / "step.safetensors", reference.get("eps", 0.0)
    sample = read_sample(file, eps) if check.ranks.rank == 0 else None
    tensors = check.on_first(lambda: sample.tensors if sample else {})
    floor = STORED[config.optimizer.memory] + (2**-8 if config.sharding.reduce_dtype == "bf16" else 0)
    first, skipped = checkpoint_of(straight, 1), ("gradient norm", "gradient")
    frozen = check.on_first(lambda: sorted(tensors.keys() - set(trained(first))) if first.is_dir() else [])
    why = ""
    if any(source.anchor for source in config.data.mix):
        skipped = ("loss", *skipped)
        why = "the reference knows no KL to the base, by which a source of data.mix is trained"
    elif reference.get("router_aux"):
        why = "the reference knows no auxiliary loss of the routers, whose gradient the run adds; model.router_aux=0 shows the rest"
    elif frozen:  # by this train.py, which the reference does not know
        why = f"{counted(len(frozen), 'tensor')} such as {frozen[0]} are not trained; the reference has the gradient of all"
    lines = [Result(GROUP, name, SKIPPED, why) for name in skipped if why]
    if "loss" not in skipped:
        lines.insert(0, check.line(GROUP, "loss", lambda: judge_first(straight, reference, sample, floor, LOSS)))
    if why:
        return lines
    look = lambda names: first_moments(first, tensors, [name for name in names if name in tensors])  # noqa: E731
    moments = check.of_tensors(first, look)
    return [
        *lines,
        check.line(GROUP, "gradient norm", lambda: judge_first(straight, reference, sample, floor, NORM)),
        check.line(GROUP, "gradient", lambda: judge_gradient(straight, reference, sample, floor, moments())),
    ]


def judge_updates(check: Check, steps: Sequence[int]) -> Result:
    """The line *updates*: every tensor moves, and as AdamW says if that is the optimizer. A collective."""
    straight = check.scratch / "straight"
    if list(steps) != list(range(1, STEPS + 1)):
        return Result(GROUP, "updates", SKIPPED, f"it saved steps {list(steps)}, and every step is needed")
    settings = as_dict(check.config)["optimizer"]
    rates = check.on_first(lambda: {step: row[RATE] for step, row in read_rows(straight, RATE).items()})
    look = lambda names: measure_moves(straight, settings, rates, names)  # noqa: E731
    moves = check.of_tensors(checkpoint_of(straight, 1), look)
    return check.line(GROUP, "updates", lambda: judge_moves(straight, moves(), settings["learning_rate"]))


def kill_and_resume(check: Check, measured: dict) -> Result:
    """The same run again, killed in step 3 and started again. A collective. Raises ChildFailed or UserError."""
    name, ranks, run = "kill and resume", check.ranks.world_size, check.scratch / "killed"
    check.say(f"  the same, with SIGKILL in step {STEPS}")
    delay = min(10.0, measured["seconds_per_step"] / 2) if measured else 0.0
    seen: list[float] = []

    def in_last_step() -> bool:
        if not seen and (run / "checkpoints" / "latest").exists():
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= delay

    command = train_command(check, "killed")
    if not run_children(check, "killed", command, ranks, in_last_step):
        return Result(GROUP, name, SKIPPED, "the run ended before it could be killed")
    check.say("  resume after the kill")
    run_children(check, "resumed", command, ranks)
    is_exact = not torch.cuda.is_available() or check.config.run.deterministic
    return compared(check, run, name, f"SIGKILL to {counted(ranks, 'rank')} in step {STEPS}", is_exact)


def fewer_ranks(check: Check, has_auxiliary: bool) -> Result:
    """Continue the straight run from step 2 on half as many ranks. A collective. Raises ChildFailed or UserError."""
    name, run = "other ranks", check.scratch / "fewer"
    world_size, why = half_of_ranks(check.config, *world_size_from_environment())
    if world_size and has_auxiliary:
        why = (
            "the routers' auxiliary loss counts choices of the micro-batches so far, and other ranks get other "
            "micro-batches, so gradients differ; model.router_aux=0 shows the rest"
        )
    if why:
        return Result(GROUP, name, SKIPPED, why)
    check.say(f"  resume on {counted(world_size, 'rank')}")
    check.on_first(lambda: move_checkpoint(check.scratch / "straight", run))
    context = math.gcd(world_size, check.config.sharding.context)
    run_children(check, "fewer", (*train_command(check, "fewer"), f"sharding.context={context}"), world_size)
    said = f"step {STEPS} again from the checkpoint of step {KILLED_AFTER}, on {world_size} instead of {check.ranks.world_size} ranks"
    return compared(check, run, name, said, is_exact=False)


def compared(check: Check, run: Path, name: str, said: str, is_exact: bool) -> Result:
    """Step 3 of a run against that of the straight run. A collective."""
    straight = check.scratch / "straight"
    expected, device = checkpoint_of(straight, STEPS), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found, before = checkpoint_of(run, STEPS), checkpoint_of(run, KILLED_AFTER)
    apart = check.of_tensors(expected, lambda names: measure_difference(found, expected, before, names))
    dtype = DTYPES[check.config.model.compute_dtype] if has_native_bf16(device) else torch.float32
    return check.line(GROUP, name, lambda: compare_runs(straight, run, name, said, apart(), dtype, is_exact))


def half_of_ranks(config: Config, total: int, per_node: int) -> tuple[int, str]:
    """(half of the ranks, whole nodes only if there are several; or 0, and why there is no such number)."""
    if total == 1:
        return 0, "there is one rank; start with torchrun to check a resume on another number of ranks"
    half = total // 2
    if half > per_node:
        half -= half % per_node
    if config.sharding.shard_size:
        half -= half % config.sharding.shard_size
    context = math.gcd(max(1, half), config.sharding.context)  # fewer may share a micro-batch
    try:
        fewer = replace(config, sharding=replace(config.sharding, context=context))
        check_world(fewer, max(1, half), min(per_node, max(1, half)))
    except UserError as error:
        return 0, f"this config does not run on {half} ranks: {error}"
    return half, "sharding.shard_size needs all ranks" if not half else ""


def move_checkpoint(source: Path, target: Path) -> None:
    """Make a new run that stands where `source` stood after step 2, of whose checkpoint it takes the files."""
    folder = checkpoint_of(source, KILLED_AFTER)
    (target / "checkpoints").mkdir(parents=True)
    shutil.move(folder, target / "checkpoints")
    (target / "checkpoints" / "latest").write_text(folder.name, encoding="utf-8")
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
    said = started
    try:
        if ranks.rank < max(1, world_size):
            process = start_process(list(command), child_environment(world_size, folder), output)
        while process and process.poll() is None and patience > 0 and not killed:
            ranks.watch.tick()
            killed = bool(kill_when and kill_when())
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                check.say(f"    {said - started:.0f} s: {last_words(output)[:100] or 'it starts'}")
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
    ended = gather_objects((killed, code, socket.gethostname(), last_words(output) if process else ""), ranks)
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
    elastic = ("TORCHELASTIC_", "TORCH_ELASTIC_", "PET_")
    mine = {key: value for key, value in os.environ.items() if not key.startswith(elastic)}
    # A copy of train.py works from any directory.
    mine["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
    if not world_size or "RANK" not in os.environ:
        return {key: value for key, value in mine.items() if key not in launcher}
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
    """Start `python COMMAND` in a session of its own, with all output in one file. It ends when its parent ends."""
    with output.open("wb") as file:
        return subprocess.Popen(
            tied_to_parent(command),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def last_words(output: Path) -> str:
    """Why a process says that it ended: its `error:` line, else the exception of a traceback, else its last line so far."""
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    for pattern in (r"error: (.*)", r"((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b.*)", r"(.*\S.*)"):
        found = [match[1] for line in lines if (match := re.match(pattern, line))]
        if found:
            return found[-1]
    return ""


# --- A model of the first layers --------------------------------------------------------------------------------------


def cut_model(path: Path, layers: int, out: Path) -> str:
    """Write the first `layers` decoder layers of the model in `path`, with embedding, norm and head, to `out`.

    Only the tensors that are needed are read. A directory without weights (config.json and tokenizer only) gets random initial
    weights. Returns a sentence about it for the report. Raises UserError if a file is damaged.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    of = settings["num_hidden_layers"]
    for file in path.iterdir():
        if (
            file.is_file()
            and file.suffix not in NOT_COPIED
            and file.name != INDEX
            and file.stat().st_size <= COPIED_BYTES
        ):
            shutil.copyfile(file, out / file.name)
    # What is listed layer by layer (layer_types, no_rope_layers) is cut as well, and not, say, two end tokens of a model of two layers.
    for key, value in settings.items():
        if isinstance(value, list) and len(value) == of and "layer" in key:
            settings[key] = value[:layers]
    settings["num_hidden_layers"] = layers
    if isinstance(settings.get("max_window_layers"), int):  # Qwen 2: the layers before it attend to everything
        settings["max_window_layers"] = min(settings["max_window_layers"], layers)
    write_json(out / "config.json", settings)
    kind = "real weights"
    if (path / SINGLE).is_file() or (path / INDEX).is_file():
        tensors = {}
        for name, tensor in stored_tensors(path).items():
            layer = LAYER.search(name)
            if layer is None or int(layer[1]) < layers:
                with safe_open(tensor.file, framework="pt") as file:  # mapped: other tensors are not read
                    tensors[name] = file.get_tensor(name)
        save_file(tensors, out / SINGLE, metadata={"format": "pt"})
    else:
        kind = "random initial weights, so losses and updates are not those of the run"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = AutoConfig.from_pretrained(out)
            AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.bfloat16).save_pretrained(out)
    return f"the first {layers} of {of} decoder layers at full width, {kind}"


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
        return Result(MACHINE, "planned memory", WARNING, f"there is no plan of this run: {plan}")
    worst, available = plan.workload.worst, plan.cluster.device.memory
    text = (
        f"{_gib(plan.needed)} of {available / 2**30:.1f} GiB on the fullest rank, in step {worst.step + 1} of "
        f"{plan.workload.total_steps} ({worst.tokens:,} tokens in a micro-batch)"
    )
    figures = {"needed": plan.needed, "available": available, "steps": plan.workload.total_steps}
    if plan.needed[0] <= available:
        status = OK if plan.fits_device else WARNING  # on a CPU a process may hold more than its tensors
        return Result(MACHINE, "planned memory", status, text, figures)
    text = f"it needs {text}, which does not fit: python scripts/plan.py CONFIG lists settings that do"
    return Result(MACHINE, "planned memory", SKIPPED if is_cut else FAILS, text, figures)


def machine_lines(check: Check, plan: Plan | str, measured: dict) -> list[Result]:
    """The lines that compare the plan with what the runs measured. A collective. plan: that of rank 0 counts."""
    if not measured:
        return []
    settings = [f"{key}={value}" for key, value in changed_settings(check, "straight").items()]
    short, rows = override(check.config, settings), measured["micro_batch"]
    look = lambda: peak_memory(plan_or_problem(short, rows), measured["memory"])  # noqa: E731
    results = [check.line(MACHINE, "peak memory", look)]
    if not check.model:
        results.append(check.line(MACHINE, "time", lambda: run_time(plan, check.config, measured)))
    return results


def peak_memory(plan: Plan | str, measured: float) -> Result:
    """Planned and measured peak of the three steps."""
    said = f"measured {measured / 2**30:.2f} GiB in three steps"
    if isinstance(plan, str):
        return Result(MACHINE, "peak memory", SKIPPED, f"{said}; there is no plan ({plan})")
    figures, text = {"planned": plan.needed, "measured": measured}, f"planned {_gib(plan.needed)} GiB, {said}"
    if measured <= max((1 + MEMORY_APART) * plan.needed[1], plan.needed[1] + SMALL):
        return Result(MACHINE, "peak memory", OK, text, figures)
    return Result(MACHINE, "peak memory", WARNING, f"{text}: leave room for what the plan does not know", figures)


def _gib(needed: tuple[int, int]) -> str:
    return " to ".join(dict.fromkeys(f"{size / 2**30:.2f}" for size in needed))


def run_time(plan: Plan | str, config: Config, measured: dict) -> Result:
    """The time of the whole run: as planned, and as the steps and saves that were measured go on."""
    if isinstance(plan, str):
        return Result(MACHINE, "time", SKIPPED, "there is no plan of the run (planned memory)")
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
        return Result(MACHINE, "time", OK, text, figures)
    text += ": look for what slows the steps down (docs/performance.md)"
    return Result(MACHINE, "time", WARNING, text, figures)
