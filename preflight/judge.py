"""What the runs of a check have left, judged: rows, checkpoints and export, against the reference and against each other."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distributed.host_memory import free_bytes
from model.weight_files import stored_tensors
from preflight.compare import (
    checkpoint_bytes,
    checkpoint_of,
    difference,
    exported_otherwise,
    moved,
    read_rows,
    same_files,
    saved_steps,
)
from preflight.context import Context
from preflight.result import FAILS, OK, SKIPPED, WARNING, Result
from preflight.shares import find_shares

GROUP = "run"
STEPS, KILLED_AFTER = 3, 2  # the kill falls into the last step
LOSS, NORM = "train/loss", "train/grad_norm"
# Relative differences that rounding explains, by model.compute_dtype. The first step against the reference, which adds up in
# another order, and a step on another number of ranks against the same step.
ALLOWED = {"fp32": 1e-3, "bf16": 2e-2}
# Of the weights after one more step, relative to the length of that step. AdamW turns a small gradient's rounding into a
# large part of its update; a lost moment changes the update by about its own length.
ALLOWED_UPDATE = {"fp32": 0.05, "bf16": 0.4}
# Of a micro-batch's share of the gradient (preflight/shares.py), beside what the rounding of this gradient explains.
ALLOWED_SHARE = {"fp32": 0.01, "bf16": 0.02}
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


def judge_shares(context: Context, reference: dict | None) -> Result:
    """Whether all micro-batches of step 1 count by their targets in the gradient that AdamW has seen, which is clipped once."""
    name, run = "shares", context.scratch / "straight"
    norm, expected = read_rows(run, LOSS).get(1, {}).get(NORM), (reference or {}).get("grad_norm")
    checkpoint = checkpoint_of(run, 1)
    if not (context.sample.exists() and norm and expected and checkpoint.is_dir()):
        return Result(GROUP, name, SKIPPED, "there are no gradients of all documents of step 1 to compare with")
    settings = read_config(run)["optimizer"]
    clip = max(1.0, norm / settings["max_grad_norm"])
    shares = find_shares(context.sample, checkpoint, (1 - settings["betas"][0]) / clip)
    if shares is None:
        return Result(GROUP, name, SKIPPED, f"optimizer.memory={settings['memory']} stores no moments to compare")
    if not shares.mean:
        return Result(
            GROUP, name, FAILS, "AdamW's first moment is zero after step 1: call optimizer.step() after backward()"
        )
    allowed = ALLOWED_SHARE[context.config.model.compute_dtype]
    figures = dataclasses.asdict(shares) | {"mean": shares.mean, "allowed": allowed}
    found = [share / shares.mean for share in shares.micro_batches.values()]
    said = f"{len(found)} micro-batches of step 1 count {min(found):.3f} to {max(found):.3f} times their targets"
    if any(abs(share - 1) > allowed + noise for share, noise in zip(found, shares.noise.values(), strict=True)):
        what = (
            "divide the sum of all losses once, by the targets of the whole step: no mean over micro-batches or ranks"
        )
        return Result(GROUP, name, FAILS, f"{said} in the gradient: {what}", figures)
    length = shares.mean / (norm / expected)  # 1, whatever the gradient was divided by
    figures["length"] = length
    if abs(length - 1) > allowed + max(shares.noise.values()):
        text = f"AdamW's first moment is {length:.3g} times (1 - beta1) x the clipped gradient"
        what = f"clip it once, to optimizer.max_grad_norm={settings['max_grad_norm']:g}, by the norm that train/grad_norm shows"
        return Result(GROUP, name, FAILS, f"{text}: {what}", figures)
    return Result(GROUP, name, OK, f"{said}, {length:.3f} times the clipped gradient in all", figures)


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
    """Whether transformers reads what the run has exported: every weight, and the tokenizer.

    A model that takes more than half of the free host memory is not loaded: the names and shapes in its files are compared.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = context.scratch / "straight" / "export"
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if size > free_bytes(torch.device("cpu"), 1) // 2:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        wrong, how = _other_shapes(model, folder), "its files have all weights of the model"
    else:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        model, information = loaded
        wrong = [f"{key}: {sorted(map(str, names))[0]}" for key, names in information.items() if names]
        bad = (name for name, weight in model.state_dict().items() if not bool(torch.isfinite(weight).all()))
        wrong += [f"not finite: {name}" for name in list(bad)[:1]]
        how = "transformers loads it"
    figures = {"bytes": size, "parameters": model.num_parameters(), "problems": wrong}
    if wrong:
        text = f"transformers does not read the exported model as it was trained ({'; '.join(wrong[:3])})"
        return Result(GROUP, "export", FAILS, text, figures)
    if context.config.lora.rank:
        how += ", adapters merged (so its tensors are not compared with the checkpoint's)"
    steps = saved_steps(context.scratch / "straight")
    if steps and (others := exported_otherwise(folder, checkpoint_of(context.scratch / "straight", steps[-1]))):
        figures["otherwise"] = others[:10]
        text = (
            f"{len(others)} of the exported tensors are not those of step {steps[-1]}, the last checkpoint, the first is "
            f"{others[0]}: export the weights of the last step"
        )
        return Result(GROUP, "export", FAILS, text, figures)
    text = f"{how}: {model.num_parameters():,} parameters, {size / 2**20:,.0f} MiB, {type(tokenizer).__name__}"
    return Result(GROUP, "export", OK, text, figures)


def _other_shapes(model: torch.nn.Module, folder: Path) -> list[str]:
    """Parameters of `model` that the files in `folder` do not have, or have in another shape. Tied ones are stored once."""
    stored = {name: tuple(tensor.shape) for name, tensor in stored_tensors(folder).items()}
    return [
        f"{name} is {stored.get(name, 'missing')}"
        for name, parameter in model.named_parameters()
        if stored.get(name) != tuple(parameter.shape)
    ]


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
