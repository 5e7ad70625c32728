"""What the runs of a check have left, judged: rows, checkpoints and export, against the reference and against each other.

Every rank reads its share of the tensors; rank 0 judges. The numbers that are compared come from the run's own files: after step t a
checkpoint has the weights w and AdamW's moments m and v, so that w(t) follows from w(t-1), m(t) and v(t), and the gradient of step 1
is m(1) / (1 - beta1).
"""

import functools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from configs.config import Config
from distributed.checkpoint_directory import checkpoint_name, complete_checkpoints, read_manifest
from distributed.low_memory import make_code_maps
from distributed.optimizer import decays
from model.language_model import stored_form
from model.weight_files import stored_tensors
from model.weights import Weights, tensors_of_checkpoint
from tools.check_data import FAILS, OK, SKIPPED, WARNING, Result
from tools.check_step import EPS, ROUNDINGS, ulp
from tools.curves import rows_of, timed_steps
from training.record import newest_start

GROUP = "run"
STEPS, KILLED_AFTER = 3, 2  # the kill falls into the last step
LOSS, NORM, RATE = "train/loss", "train/grad_norm", "train/learning_rate"
WEIGHTS, MOMENTS = "model.", ("exp_avg", "exp_avg_sq")
UNKNOWN = "transformers' loss and gradient of step 1 are not known: see the lines of the model"
GROWTH = 1.5  # of the loss over three steps, above which it is suspicious
ELEMENTS = 2**22  # of a tensor that are looked at, evenly chosen
# Relative error of a gradient from storing it and its moments, by optimizer.memory. It comes on top of the measured rounding.
STORED = {"16N": 1e-4, "14N": 2.0**-8, "12N": 2.0**-8, "8N": 2.0**-7, "6N": 0.05}
NOT_MOVED_BY_ADAMW = 0.01  # relative error of a tensor's step that is not rounding; with moments of 8 bits, 0.1
# Of step 3 of another run, relative: (loss and gradient norm, weights by the length of the step). They are fixed, because AdamW turns
# the rounding of a small gradient into a large part of its update. A moment that is lost changes the update by about its own length.
ALLOWED_LATER = {torch.float32: (1e-3, 0.05), torch.bfloat16: (2e-2, 0.4)}


# --- Files ------------------------------------------------------------------------------------------------------------


def read_rows(run: Path, key: str) -> dict[int, dict[str, float]]:
    """The rows of metrics.jsonl that have `key`, by step. A step that occurs twice is NaN in `key`."""
    rows: dict[int, dict[str, float]] = {}
    for row in rows_of(run):
        if key in row:
            rows[row["step"]] = row | ({key: math.nan} if row["step"] in rows else {})
    return rows


def checkpoint_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is, if there is one."""
    return run / "checkpoints" / checkpoint_name(step)


def saved_steps(run: Path) -> list[int]:
    """The steps of the complete checkpoints of a run, in order."""
    return [int(path.name.removeprefix("step-")) for path in complete_checkpoints(run / "checkpoints")]


@functools.cache
def stored(checkpoint: Path) -> Weights:
    """The tensors of a checkpoint, by their whole names."""
    return tensors_of_checkpoint(checkpoint, "")


def trained(checkpoint: Path) -> list[str]:
    """The names of all trained tensors."""
    return [name.removeprefix(WEIGHTS) for name in stored(checkpoint).shapes if name.startswith(WEIGHTS)]


def load_state(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    """{"weight", "exp_avg", "exp_avg_sq"} of a trained tensor, whole, the moments in fp32; without those of another optimizer."""
    tensors = stored(checkpoint)
    state = {"weight": tensors.read(WEIGHTS + name)}
    for key in MOMENTS:
        if f"optimizer.{key}.{name}" in tensors.shapes:
            state[key] = tensors.read(f"optimizer.{key}.{name}").float()
        elif f"optimizer.{key}_codes.{name}" in tensors.shapes:  # 6N (distributed/low_memory.py)
            codes, scale = (tensors.read(f"optimizer.{key}_{part}.{name}") for part in ("codes", "scale"))
            value = _code_values()[key][codes.int()].view(*scale.shape, -1) * scale[..., None]
            state[key] = (value.square() if key == "exp_avg_sq" else value).view(codes.shape)
    return state


@functools.cache
def _code_values() -> dict[str, torch.Tensor]:
    return {key: code_map.values for key, code_map in make_code_maps(torch.device("cpu")).items()}


def optimizer_of(run: Path) -> dict:
    """The settings of a run in the section `optimizer`."""
    return newest_start(run)["config"]["optimizer"]


def is_adamw(checkpoint: Path) -> bool:
    """Whether the optimizer of a checkpoint is AdamW, whose updates the check can predict from its moments."""
    return read_manifest(checkpoint)["values"]["optimizer"]["type"] in ("AdamW", "LowMemoryAdamW")


# --- Three steps ------------------------------------------------------------------------------------------------------


def measure(run: Path) -> dict:
    """What the straight run has shown, for the lines of the machine; empty if it has not logged what train.py logs.

    Bytes and seconds; memory is the peak of rank 0.
    """
    rows, saves, steps = rows_of(run), read_rows(run, "save/total_seconds"), saved_steps(run)
    timed = timed_steps(rows)
    if not timed or not steps or not saves:
        return {}
    tokens, seconds = (sum(each) for each in zip(*timed, strict=True))
    return {
        "seconds_per_step": seconds / len(timed),
        "tokens_per_second": tokens / seconds,
        "memory": max(row.get("train/memory_gib", 0.0) for row in rows) * 2**30,
        "checkpoint": sum(path.stat().st_size for path in checkpoint_of(run, steps[-1]).iterdir()),
        "save_seconds": max(row["save/total_seconds"] for row in saves.values()),
        "micro_batch": newest_start(run)["config"]["batch"]["micro_batch"],
        "export": sum(path.stat().st_size for path in (run / "export").glob("*.safetensors")),
    }


def judge_steps(run: Path, seconds: float) -> Result:
    """Whether each step is logged once and is finite, and the loss does not run away."""
    rows = read_rows(run, LOSS)
    losses, norms = ([row.get(key, math.nan) for row in rows.values()] for key in (LOSS, NORM))
    figures = {"losses": losses, "gradient_norms": norms, "seconds": round(seconds, 1)}
    said = f"loss {', '.join(f'{loss:.4f}' for loss in losses)} nats per target, gradient norm {', '.join(f'{norm:.3g}' for norm in norms)}"
    if not rows:
        return Result(GROUP, "three steps", FAILS, f"no row with {LOSS} in metrics.jsonl: log it at every step")
    if not all(math.isfinite(value) for value in losses + norms):
        text = f"{said}: a step is not finite or is logged twice; lower optimizer.learning_rate, and see the lines of the model"
        return Result(GROUP, "three steps", FAILS, text, figures)
    if losses[-1] > GROWTH * losses[0]:
        text = f"{said}: the loss grows at the peak learning rate without warm-up; lower optimizer.learning_rate"
        return Result(GROUP, "three steps", WARNING, text, figures)
    return Result(GROUP, "three steps", OK, f"{said}, in {seconds:.0f} s", figures)


# --- Step 1 against the reference -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Some elements of the reference's gradient of step 1, tensor by tensor, fp64 on the CPU (tools/check_step.py wrote them)."""

    tensors: dict[str, tuple[int, int]]  # name -> (elements of the tensor, the stride in which they are looked at)
    total: torch.Tensor  # (elements,)
    rounding: torch.Tensor  # (elements,): its error in the compute dtype, as it was measured
    eps: float  # of the compute dtype

    def norm_rounding(self) -> float:
        """How far rounding may move the norm, relative to it: what was measured, and a little more, as it is one random number."""
        length = self.total.norm()
        along, across = abs(self.rounding @ self.total) / length**2, self.rounding.norm() / length
        return float(ROUNDINGS * (along + across**2)) + self.eps / 4


def read_sample(path: Path, eps: float) -> Sample | None:
    """eps: of the run's compute dtype; the file has the rounding of bf16. None if the reference was not complete."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        tensors = {name: tuple(pair) for name, pair in json.loads(file.metadata()["tensors"]).items()}
        total, rounding = file.get_tensor("gradient").double(), file.get_tensor("rounding").double()
    return Sample(tensors, total, rounding * eps / EPS[torch.bfloat16], eps)


def first_moments(checkpoint: Path, tensors: Mapping[str, tuple[int, int]], names: Sequence[str]) -> list:
    """(name, sampled elements of AdamW's first moment after step 1, or None where the checkpoint has none) of `names`."""
    found = []
    for name in names:
        numel, stride = tensors[name]  # without the rows of padding, which the reference does not have
        moment = load_state(checkpoint, name).get("exp_avg")
        found.append((name, moment if moment is None else moment.flatten()[:numel:stride].clone()))
    return found


def judge_first(run: Path, reference: dict, sample: Sample | None, floor: float, key: str) -> Result:
    """The loss or the gradient norm of step 1 against the same documents, computed one by one without the loop."""
    name, field = ("loss", "loss") if key == LOSS else ("gradient norm", "grad_norm")
    found, expected = read_rows(run, LOSS).get(1, {}).get(key), reference.get(field)
    if found is None or expected is None or sample is None:
        return Result(GROUP, name, SKIPPED, UNKNOWN)
    size = max(abs(expected), 1e-12)
    allowed = reference["loss_allowed"] / size if key == LOSS else floor + sample.norm_rounding()
    relative = abs(found - expected) / size
    figures = {"found": found, "expected": expected, "relative": relative, "allowed": allowed}
    said = f"step 1: {found:.5g}; {expected:.5g} from its documents one by one ({relative:.2g} apart, relative"
    if relative <= allowed:
        return Result(GROUP, name, OK, f"{said}; rounding explains {allowed:.2g})", figures)
    what = {
        LOSS: "a micro-batch is left out or counted twice, documents in a row see each other, or the model computes something else "
        "in training (dropout)",
        NORM: "divide the sum of all losses once, by the targets of the whole step (no mean over micro-batches or ranks), and "
        "use every micro-batch",
    }[key]
    return Result(GROUP, name, FAILS, f"{said}; rounding explains only {allowed:.2g}): {what}", figures)


def judge_gradient(run: Path, reference: dict, sample: Sample | None, floor: float, moments: list) -> Result:
    """Whether AdamW's first moment after step 1 is that of the reference's gradient, tensor by tensor and clipped once.

    Each tensor may be apart by a multiple of its own rounding, or of the median tensor's.
    """
    norm, expected = read_rows(run, LOSS).get(1, {}).get(NORM), reference.get("grad_norm")
    if sample is None or not norm or not expected or not moments:
        return Result(GROUP, "gradient", SKIPPED, UNKNOWN)
    if not is_adamw(checkpoint_of(run, 1)) or any(moment is None for _, moment in moments):
        text = "the optimizer of this train.py is not AdamW, from whose first moment the gradient of step 1 is read"
        return Result(GROUP, "gradient", SKIPPED, text)
    settings, found, total = optimizer_of(run), dict(moments), sample.total
    clip = max(1.0, norm / settings["max_grad_norm"])
    gradient = torch.cat([found[name] for name in sample.tensors]).double() * clip / (1 - settings["betas"][0])
    if not bool(gradient.any()):
        text = "AdamW's first moment is zero after step 1: call optimizer.step() after backward()"
        return Result(GROUP, "gradient", FAILS, text)
    scale = float(gradient @ total / total.norm() ** 2)  # an other divisor is the matter of the gradient norm
    length, allowed_length = scale / (norm / expected), floor + sample.norm_rounding()
    parts = [-(-numel // stride) for numel, stride in sample.tensors.values()]
    rows = [
        tuple(float(part.norm()) for part in tensors)
        for tensors in zip(*(x.split(parts) for x in (gradient / scale - total, sample.rounding, total)), strict=True)
    ]
    usual = float(torch.tensor([rounding / size for _, rounding, size in rows if size]).median())
    # A gradient that is zero but for rounding, as that of the bias of the keys, is measured by the length of the whole.
    tiny = 1e-6 * float(total.norm())
    limits = [ROUNDINGS * max(rounding, usual * size) + floor * size + tiny for _, rounding, size in rows]
    excess, name, size, apart, limit = max(
        (apart / limit, name, max(size, tiny), apart, limit)
        for name, (apart, _, size), limit in zip(sample.tensors, rows, limits, strict=True)
    )
    figures = {"tensors": len(rows), "worst": name, "apart": apart / size, "allowed": limit / size, "length": length}
    text = (
        f"of {len(rows)} tensors {name} is the farthest from transformers' gradient: {apart / size:.2g} of its length, where rounding "
        f"explains {limit / size:.2g}; all are {length:.3f} times as long as the clipped gradient"
    )
    if excess > 1:
        text += (
            ": divide the sum of all losses once, by the targets of the whole step (no mean over micro-batches), lose no part of the "
            "gradient, and compute the same model in training (no dropout)"
        )
        return Result(GROUP, "gradient", FAILS, text, figures)
    if abs(length - 1) > allowed_length:
        text += f": clip it once, to optimizer.max_grad_norm={settings['max_grad_norm']:g}, by the norm that train/grad_norm shows"
        return Result(GROUP, "gradient", FAILS, text, figures)
    return Result(GROUP, "gradient", OK, text, figures)


# --- Every tensor moves as AdamW says ---------------------------------------------------------------------------------


@dataclass
class Moved:
    """How one tensor moved in steps 2 and 3, in sums over its elements.

    by_adamw, by_decay: (change x what is expected, its square, the variance of the first by rounding), fp64, where AdamW's
    stored moments, or weight decay of 1, are what is expected.
    """

    name: str
    is_matrix: bool
    is_adamw: bool
    changed: int = 0  # elements that moved
    betas: float = 1.0  # of step 1: what the second moment says of the squared gradient, over what the first one says
    by_adamw: torch.Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    by_decay: torch.Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))


def fit(sums: torch.Tensor) -> tuple[float, float]:
    """(the multiple of what is expected, its standard deviation by rounding) of the sums in a `Moved`, or of several."""
    along, square, variance = sums.tolist()
    return (along / square, math.sqrt(variance) / square) if square else (1.0, 0.0)


def measure_moves(run: Path, settings: Mapping, rates: Mapping[int, float], names: Sequence[str]) -> list[Moved]:
    """How the tensors `names` moved in the steps after the first. settings: `optimizer` of the config; rates: by step.

    Expected is AdamW with decoupled weight decay on matrices (arXiv:1711.05101).
    """
    (beta1, beta2), moves, by_adamw = settings["betas"], list[Moved](), is_adamw(checkpoint_of(run, 1))
    for name in names:
        state = load_state(checkpoint_of(run, 1), name)
        shape, dtype = state["weight"].shape, state["weight"].dtype
        has_moments = by_adamw and all(key in state for key in MOMENTS)
        moves.append(moved := Moved(name, decays(name, len(shape)), has_moments))
        stride = -(-shape.numel() // ELEMENTS)
        now = _looked_at(state, stride)
        if has_moments and (square := float((now["exp_avg"] / (1 - beta1)).square().sum())):
            moved.betas = float(now["exp_avg_sq"].sum()) / (1 - beta2) / square
        for step in range(2, STEPS + 1):
            old, now, rate = now["weight"], _looked_at(load_state(checkpoint_of(run, step), name), stride), rates[step]
            made = old - now["weight"]
            moved.changed += int(made.count_nonzero())
            if not has_moments:
                continue
            first, second = now["exp_avg"] / (1 - beta1**step), now["exp_avg_sq"] / (1 - beta2**step)
            by_moments, by_decay = rate * first / (second.sqrt() + settings["eps"]), rate * old
            intended = by_moments + settings["weight_decay"] * moved.is_matrix * by_decay
            gap = ulp(old.float(), dtype).double()
            # Of stochastic rounding to a gap; rounding to nearest has less, unless the whole update is lost.
            variance = gap * torch.minimum(intended.abs(), gap / 4)
            for sums, change, expected in (
                (moved.by_adamw, made, intended),
                (moved.by_decay, made - by_moments, by_decay),
            ):
                sums += torch.stack([change @ expected, expected @ expected, expected.square() @ variance])
    return moves


def _looked_at(state: dict[str, torch.Tensor], stride: int) -> dict[str, torch.Tensor]:
    return {key: value.flatten()[::stride].double() for key, value in state.items()}


def judge_moves(run: Path, moves: Sequence[Moved], peak: float) -> Result:
    """Whether every trained tensor moved, by what AdamW makes of its moments at the learning rate that was logged and set.

    peak: optimizer.learning_rate, which all three steps of a check have.
    """
    settings, rate = optimizer_of(run), max(row[RATE] for row in read_rows(run, RATE).values())
    still = [moved.name for moved in moves if not moved.changed and (moved.by_adamw[1] or not moved.is_adamw)]
    every = sum((moved.by_adamw for moved in moves), torch.zeros(3))
    whole, noise = fit(every) if every[1] else (0.0, 0.0)  # moments that are all zero are those of no gradient
    counter = f"optimizer.step.{moves[0].name}"
    saved = [stored(checkpoint_of(run, step)) for step in range(1, STEPS + 1)]
    steps = [int(one.read(counter)) if counter in one.shapes else step for step, one in enumerate(saved, 1)]
    betas = max((moved.betas for moved in moves), key=lambda beta: abs(beta - 1))
    fixed = 0.1 if settings["memory"] == "6N" else NOT_MOVED_BY_ADAMW
    decay = ""
    for is_matrix, expected, what in (
        (True, settings["weight_decay"], "matrices"),
        (False, 0.0, "vectors (norms, biases)"),
    ):
        sums = sum((moved.by_decay for moved in moves if moved.is_matrix == is_matrix), torch.zeros(3))
        found, deviation = fit(sums)
        if sums[1] and abs(found - expected) > 0.005 + 0.2 * expected + ROUNDINGS * deviation:
            decay = decay or (
                f"{what} shrink by a weight decay of {found:.3g}, where {expected:g} is expected (optimizer.weight_decay, on matrices "
                "only)"
            )
    ratios = {moved.name: fit(moved.by_adamw) for moved in moves}
    wrong = [name for name, (ratio, deviation) in ratios.items() if abs(ratio - 1) > fixed + ROUNDINGS * deviation]
    status = FAILS
    if still:
        text = (
            f"{len(still)} of {len(moves)} trained tensors did not move in steps 2 and 3, the first is {still[0]}: call optimizer.step() "
            "with every trained parameter, and with a learning rate that the dtype of the weights can hold"
        )
    elif rate > peak * (1 + 1e-6):
        text = f"train/learning_rate is {rate:g}, more than optimizer.learning_rate={peak:g}"
    elif not all(moved.is_adamw for moved in moves):
        status = OK
        text = (
            f"all {len(moves)} trained tensors moved, and only that was checked: the optimizer of this train.py is not AdamW, whose "
            "updates follow from the moments that it stores"
        )
    elif steps != list(range(1, STEPS + 1)):
        text = f"the optimizer counts {steps} steps after steps 1, 2 and 3: call optimizer.step() once in each step"
    elif abs(betas - 1) > 0.02 + fixed:
        text = f"the second moment is {betas:.3g} times what the first one says: the optimizer has other betas than optimizer.betas"
    elif decay and abs(whole - 1) < 0.2:  # another learning rate would look like another decay
        text = decay
    elif wrong or abs(whole - 1) > fixed + ROUNDINGS * noise:
        worst = max(wrong or ratios, key=lambda name: abs(ratios[name][0] - 1))
        text = (
            f"{len(wrong)} of {len(moves)} tensors moved otherwise than AdamW's stored moments say at learning rate {rate:g}, {worst} "
            f"{ratios[worst][0]:.3g} times as far: set the rate in every group before optimizer.step(), clip gradients and not updates, "
            "and see that the dtype of the weights holds an update of this size (optimizer.memory=16N)"
        )
    else:
        status = WARNING if noise > 0.3 else OK
        text = f"all {len(moves)} tensors moved {whole:.3f} times as far as AdamW's stored moments say at learning rate {rate:g}"
        if status == WARNING:
            text += "; the update of a step is smaller than the noise of rounding: raise the learning rate, or set optimizer.memory=16N"
    figures = {"tensors": len(moves), "still": still[:10], "rate": rate, "whole": whole, "noise": noise}
    return Result(GROUP, "updates", status, text, figures)


# --- Checkpoints, export, resumes -------------------------------------------------------------------------------------


def judge_checkpoint(scratch: Path, measured: dict, keep: int, grace: float | None) -> Result:
    """Size and time of a save; whether the disk has room for `keep` checkpoints, the best, the one being written and the export; and
    whether a save fits three times into the `grace` seconds that torchrun leaves a run after a signal."""
    if not measured:
        return Result(GROUP, "checkpoint", SKIPPED, "the three steps have not logged their saves")
    size, seconds = measured["checkpoint"], measured["save_seconds"]
    needed = (keep + 2) * size + measured["export"]
    held = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file())  # which the check gives back
    free = shutil.disk_usage(scratch).free + held
    text = (
        f"{size / 2**20:,.0f} MiB, saved in {seconds:.1f} s, checksums included; {keep + 2} of them and the export need "
        f"{needed / 2**30:.1f} of {free / 2**30:.1f} GiB free"
    )
    status = OK
    if needed > free:
        status, text = FAILS, f"{text}: free some space or lower run.keep_last"
    elif grace is not None and 3 * seconds > grace:
        wanted = 10 * math.ceil(0.3 * seconds + 1)
        status = WARNING
        text += f"; torchrun leaves {grace:g} s after a signal: start it with --shutdown-timeout={wanted}"
    figures = {"bytes": size, "seconds": seconds, "grace": grace, "needed": needed, "free": free}
    return Result(GROUP, "checkpoint", status, text, figures)


def compare_export(
    export: Path,
    checkpoint: Path,
    names: Sequence[str],
    bounds: Callable[[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> dict[str, bool]:
    """The tensors of an export that those of `names` become, and whether each is the checkpoint's in the dtype of the export.

    bounds: (name, tensor of the checkpoint) -> the smallest and the largest that the exported one may be before it is rounded;
    None: it must be that tensor.
    """
    files, form, found = stored_tensors(export), stored_form(AutoConfig.from_pretrained(export)), dict[str, bool]()
    for name in names:
        tensor = stored(checkpoint).read(WEIGHTS + name)
        low, high = (form(name, end) for end in (bounds(name, tensor) if bounds else (tensor, tensor)))
        for part in low:
            found[part] = part in files
            if found[part]:
                with safe_open(files[part].file, framework="pt") as file:
                    weight = file.get_tensor(part)
                # Rows of padding are not exported.
                least, most = (ends[part][: len(weight)].to(weight.dtype) for ends in (low, high))
                found[part] = weight.shape == least.shape and bool(((least <= weight) & (weight <= most)).all())
    return found


def judge_export(run: Path, config: Config, compared: Sequence[tuple[str, bool]]) -> Result:
    """Whether transformers can read what the run has exported: the tokenizer, and every weight by its name and shape.

    compared: by `compare_export`; after LoRA, whose adapters are merged, values do not count. The model is
    built without memory, so that one of any size is compared.
    """
    folder = run / "export"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = {name: tuple(tensor.shape) for name, tensor in stored_tensors(folder).items()}
    form, parameters = stored_form(model.config), [(name, one.detach()) for name, one in model.named_parameters()]
    named = {stored: tuple(part.shape) for name, one in parameters for stored, part in form(name, one).items()}
    wrong = [f"{name} is {shapes.get(name, 'missing')}" for name, shape in named.items() if shapes.get(name) != shape]
    others = [] if config.lora.rank else sorted(name for name, is_same in compared if not is_same)
    status, how = OK, "its tensors are those of the last checkpoint"
    if config.lora.rank:
        how = "adapters are merged, so values are not compared"
    text = f"transformers has a place for all of it: {model.num_parameters():,} parameters, {type(tokenizer).__name__}; {how}"
    if wrong:
        status = FAILS
        text = f"transformers does not read the exported model as it was trained ({'; '.join(wrong[:3])})"
    elif others:
        status = FAILS
        text = (
            f"{len(others)} of the exported tensors are not those of the last checkpoint, the first is {others[0]}: export the "
            "weights of the last step"
        )
    figures = {"parameters": model.num_parameters(), "problems": wrong, "otherwise": others[:10]}
    return Result(GROUP, "export", status, text, figures)


def measure_difference(
    found: Path, expected: Path, before: Path, names: Sequence[str]
) -> list[tuple[float, float, bool]]:
    """How far the tensors `names` of `found` are from `expected`, and these from `before`, a step earlier.

    Of each tensor: squares of the two lengths, and whether weights and moments are equal to the bit.
    """
    differences = []
    for name in names:
        states = [load_state(checkpoint, name) for checkpoint in (found, expected, before)]
        one, other, old = (state["weight"].float() for state in states)
        square = (one - other).double().square().sum().item()
        update = (other - old).double().square().sum().item()
        same = all(torch.equal(states[0][key], value) for key, value in states[1].items())
        differences.append((square if math.isfinite(square) else math.inf, update, same))
    return differences


def compare_runs(
    straight: Path,
    other: Path,
    name: str,
    said: str,
    differences: Sequence[tuple[float, float, bool]],
    dtype: torch.dtype,
    is_exact: bool,
) -> Result:
    """Step 3 of a run against step 3 of the straight run: its row, and the checkpoint after it.

    dtype: in which the run computes. is_exact: whether they should be equal to the bit.
    """
    rows, expected = read_rows(other, LOSS), read_rows(straight, LOSS)
    if rows.get(STEPS) is None or not math.isfinite(rows[STEPS][LOSS]):
        return Result(GROUP, name, FAILS, f"{said}: step {STEPS} is missing in metrics.jsonl, twice, or not finite")
    apart = {key: abs(rows[STEPS][key] / expected[STEPS][key] - 1) for key in (LOSS, NORM)}
    if is_exact and all(same for *_, same in differences) and not any(apart.values()):
        text = f"{said}: weights, moments, loss and gradient norm equal those of the other run to the bit"
        return Result(GROUP, name, OK, text, {"relative": 0.0})
    square, update = (sum(one[i] for one in differences) for i in (0, 1))
    relative = math.sqrt(square / update) if update else math.inf if square else 0.0
    of_row, of_weights = ALLOWED_LATER[dtype]
    row_differs = max(apart.values()) > of_row
    status, what = OK, " (as rounding explains)"
    if row_differs or relative > of_weights:
        status, what = (
            FAILS,
            ": not all state is saved and restored: weights, both moments, their step count, and the data's position",
        )
        if other.name == "fewer" and row_differs:
            what = ": the data of a step depends on the number of ranks, or gradients are not summed over them as they should be"
    elif is_exact:
        status = WARNING
        what = "; on this device a resume should be equal to the bit: something in the loop is not deterministic"
    text = f"{said}: loss {apart[LOSS]:.2g} and gradient norm {apart[NORM]:.2g} apart (relative), weights {relative:.2g} of the step's length"
    figures = {"relative": relative, "loss": apart[LOSS], "gradient_norm": apart[NORM]}
    return Result(GROUP, name, status, text + what, figures)
