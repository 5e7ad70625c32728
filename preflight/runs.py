"""Three steps of the user's own train.py, again with a SIGKILL and a resume, and again on fewer ranks, all compared.

The runs of a check take the real config, data, plan and number of ranks. They differ in their length, in the learning rate,
which is at its peak in all three steps, and in what takes time and proves nothing here: evaluations, and most of EWC's
documents.
"""

import dataclasses
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from configs.loading.checks import check_world
from distributed.process_group import world_size_from_environment
from preflight.compare import checkpoint_bytes, checkpoint_of, difference, moved, read_rows, same_files, saved_steps
from preflight.context import Context
from preflight.result import FAILS, OK, SKIPPED, WARNING, Result

GROUP = "run"
STEPS, KILLED_AFTER = 3, 2  # the kill falls into the last step
FISHER_DOCUMENTS = 8
LOSS, NORM = "train/loss", "train/grad_norm"
# Relative differences that rounding explains, by model.compute_dtype. The first step against the reference, which adds up in
# another order, and a step on another number of ranks against the same step.
ALLOWED = {"fp32": 1e-3, "bf16": 2e-2}
# Of the weights after one more step, relative to the length of that step. AdamW turns a small gradient's rounding into a
# large part of its update; a lost moment changes the update by about its own length.
ALLOWED_UPDATE = {"fp32": 0.05, "bf16": 0.4}
GROWTH = 1.5  # of the loss over three steps, above which it is suspicious


@dataclass(frozen=True)
class Measured:
    """What the straight run has shown, for the checks of the machine. Memory is that of rank 0."""

    seconds_per_step: float
    tokens_per_second: float
    memory: float  # bytes, at the peak
    checkpoint_bytes: int
    save_seconds: float
    micro_batch: int
    start_seconds: float
    export_bytes: int


def train_command(context: Context, name: str) -> tuple[str, ...]:
    """`train.py CONFIG ...` of one of the check's runs."""
    config = context.config
    overrides = {
        "run.directory": context.scratch,
        "run.name": name,
        "run.resume": "auto",
        "run.log_every": 1,
        "run.save_every": KILLED_AFTER,
        "run.keep_last": STEPS,
        "run.eval_every": 0,
        "run.eval_general": False,
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
        context.result_on_first(GROUP, "checkpoint", lambda: judge_checkpoint(context)),
        context.result_on_first(GROUP, "export", lambda: judge_export(context)),
    ]
    steps = context.on_first(lambda: saved_steps(straight))
    if steps[-2:] != [KILLED_AFTER, STEPS]:
        why = f"the plan has fewer than {STEPS} steps" if len(steps) < 2 else f"it saved steps {steps}"
        return [*results, Result(GROUP, "kill and resume", SKIPPED, why)], measured
    results.append(kill_and_resume(context, measured))
    context.remove("killed")
    results.append(fewer_ranks(context))
    return results, measured


def measure(run: Path) -> Measured | None:
    """The figures of a finished run; None if it has not logged what train.py logs."""
    rows, saves = read_rows(run, LOSS), read_rows(run, "save/total_seconds")
    starts = read_rows(run, "start/total")
    config = read_config(run)
    timed = {step: row for step, row in rows.items() if step - 1 in rows and row.get("train/tokens_per_second")}
    if not timed:
        return None
    tokens = [row["train/tokens"] - rows[step - 1]["train/tokens"] for step, row in timed.items()]
    seconds = sum(count / row["train/tokens_per_second"] for count, row in zip(tokens, timed.values(), strict=True))
    return Measured(
        seconds_per_step=seconds / len(timed),
        tokens_per_second=sum(tokens) / seconds,
        memory=max(row["train/memory_gib"] for row in rows.values()) * 2**30,
        checkpoint_bytes=checkpoint_bytes(checkpoint_of(run, saved_steps(run)[-1])),
        save_seconds=max((row["save/total_seconds"] for row in saves.values()), default=math.nan),
        micro_batch=config["batch"]["micro_batch"],
        start_seconds=min((row["start/total"] for row in starts.values()), default=math.nan),
        export_bytes=sum(path.stat().st_size for path in (run / "export").glob("*.safetensors")),
    )


def judge_steps(context: Context, seconds: float) -> Result:
    """Whether each step is logged once, is finite, changes the weights, and the loss does not run away."""
    run = context.scratch / "straight"
    rows = read_rows(run, LOSS)
    losses, norms = ([row.get(key, math.nan) for row in rows.values()] for key in (LOSS, NORM))
    figures = {"losses": losses, "gradient_norms": norms, "seconds": round(seconds, 1)}
    said = f"loss {', '.join(f'{loss:.4f}' for loss in losses)} nats per target, gradient norm {', '.join(f'{norm:.3g}' for norm in norms)}"
    if not rows:
        return Result(GROUP, "three steps", FAILS, f"no row with {LOSS} in metrics.jsonl: log it at every step")
    if not all(math.isfinite(value) for value in losses + norms):
        text = f"{said}: a step is not finite or is logged twice; lower optimizer.learning_rate, and see the checks of the model"
        return Result(GROUP, "three steps", FAILS, text, figures)
    steps = saved_steps(run)
    changed = moved(checkpoint_of(run, steps[-1]), checkpoint_of(run, steps[-2])) if len(steps) > 1 else 1.0
    figures["changed"] = changed
    if changed == 0:
        text = f"{said}: no weight has changed in step {steps[-1]}; call optimizer.step() with a learning rate above 0"
        return Result(GROUP, "three steps", FAILS, text, figures)
    if losses[-1] > GROWTH * losses[0]:
        text = f"{said}: the loss grows at the peak learning rate without warm-up; lower optimizer.learning_rate"
        return Result(GROUP, "three steps", WARNING, text, figures)
    return Result(GROUP, "three steps", OK, f"{said}, in {seconds:.0f} s", figures)


def judge_first(context: Context, reference: dict | None, key: str) -> Result:
    """The loss or the gradient norm of step 1 against the same documents, computed one by one without the loop."""
    name = "loss" if key == LOSS else "gradient norm"
    found = read_rows(context.scratch / "straight", LOSS).get(1, {}).get(key)
    expected = (reference or {}).get("loss" if key == LOSS else "grad_norm")
    if found is None or expected is None:
        return Result(GROUP, name, SKIPPED, "there is no reference: see the checks of the model")
    if not (reference or {}).get("complete", True):
        done, of = (reference or {}).get("documents"), (reference or {}).get("of_documents")
        why = f"the reference had time for {done} of the {of} documents of step 1"
        return Result(GROUP, name, SKIPPED, why)
    allowed = ALLOWED[context.config.model.compute_dtype]
    relative = abs(found - expected) / max(abs(expected), 1e-12)
    figures = {"found": found, "expected": expected, "relative": relative, "allowed": allowed}
    said = f"step 1: {found:.5g}; {expected:.5g} from its documents one by one ({relative:.2%} apart"
    if relative <= allowed:
        return Result(GROUP, name, OK, f"{said}, {allowed:.2%} allowed)", figures)
    what = {
        LOSS: "a micro-batch is left out or counted twice, or documents in a row see each other",
        NORM: "divide the sum of all losses once, by the targets of the whole step (no mean over micro-batches or ranks), and "
        "use every micro-batch",
    }[key]
    return Result(GROUP, name, FAILS, f"{said}, only {allowed:.2%} allowed): {what}", figures)


def judge_checkpoint(context: Context) -> Result:
    """Size and time of a save."""
    measured = measure(context.scratch / "straight")
    if measured is None:
        return Result(GROUP, "checkpoint", SKIPPED, "the three steps have not logged their saves")
    size, seconds = measured.checkpoint_bytes, measured.save_seconds
    figures = {"bytes": size, "seconds": seconds}
    text = (
        f"{size / 2**20:,.0f} MiB, saved in {seconds:.1f} s ({size / 2**20 / seconds:,.0f} MiB/s, checksums included)"
    )
    return Result(GROUP, "checkpoint", OK, text, figures)


def judge_export(context: Context) -> Result:
    """Whether transformers reads what the run has exported: every weight, and the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = context.scratch / "straight" / "export"
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model, information = loaded
    wrong = {key: sorted(map(str, names)) for key, names in information.items() if names}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    count = model.num_parameters()
    figures = {"bytes": size, "parameters": count, "problems": wrong}
    if wrong:
        return Result(GROUP, "export", FAILS, f"transformers finds {wrong} in the exported model", figures)
    bad = [name for name, parameter in model.state_dict().items() if not bool(torch.isfinite(parameter).all())]
    if bad:
        return Result(GROUP, "export", FAILS, f"{bad[0]} is not finite in the exported model", figures)
    text = f"transformers loads it: {count:,} parameters, {size / 2**20:,.0f} MiB, {type(tokenizer).__name__}"
    return Result(GROUP, "export", OK, text, figures)


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


def compare_runs(context: Context, run: str, name: str, said: str, is_exact: bool) -> Result:
    """Step 3 of a run against step 3 of the straight run: its row, and the checkpoint after it."""
    straight, other = context.scratch / "straight", context.scratch / run
    rows, expected = read_rows(other, LOSS), read_rows(straight, LOSS)
    if rows.get(STEPS) is None or not math.isfinite(rows[STEPS][LOSS]):
        return Result(GROUP, name, FAILS, f"{said}: step {STEPS} is missing in metrics.jsonl, twice, or not finite")
    apart = {key: abs(rows[STEPS][key] / expected[STEPS][key] - 1) for key in (LOSS, NORM)}
    files = [checkpoint_of(place, STEPS) for place in (other, straight)]
    if is_exact and same_files(*files) and not any(apart.values()):
        text = f"{said}: weights, moments, loss and gradient norm equal those of the other run to the bit"
        return Result(GROUP, name, OK, text, {"largest": 0.0, "relative": 0.0})
    found = difference(files[0], files[1], checkpoint_of(straight, KILLED_AFTER))
    allowed, dtype = ALLOWED_UPDATE, context.config.model.compute_dtype
    figures = dataclasses.asdict(found) | {"loss": apart[LOSS], "gradient_norm": apart[NORM]}
    text = f"{said}: loss {apart[LOSS]:.2g} and gradient norm {apart[NORM]:.2g} apart (relative), weights {found.relative:.2g} of the step's length"
    if max(apart.values()) > ALLOWED[dtype] or found.relative > allowed[dtype]:
        what = (
            "the data of a step depends on the number of ranks, or gradients are not summed over them as they should be"
            if run == "fewer" and max(apart.values()) > ALLOWED[dtype]
            else "not all state is saved and restored: weights, both moments, their step count, and the data's position"
        )
        return Result(GROUP, name, FAILS, f"{text}: {what}", figures)
    if is_exact:
        text = f"{text}; on this device a resume should be equal to the bit: something in the loop is not deterministic"
        return Result(GROUP, name, WARNING, text, figures)
    return Result(GROUP, name, OK, f"{text} (as rounding explains)", figures)


def read_config(run: Path) -> dict:
    """The resolved config of a run, by section."""
    return json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]
