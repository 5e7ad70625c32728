"""What the runs of a check have left, judged: rows, checkpoints and export, against the reference and against each other.

Every rank reads its share of the tensors; rank 0 judges. The numbers that are compared come from the run's own files: after step t a
checkpoint has the weights w and AdamW's moments m and v, so that w(t) follows from w(t-1), m(t) and v(t), and the gradient of step 1
is m(1) / (1 - beta1).
"""

import functools
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from configs.config import Config
from distributed.checkpoint_directory import checkpoint_name, complete_checkpoints
from distributed.moments import make_code_maps
from model.weight_files import stored_tensors
from tools.check_data import FAILS, OK, SKIPPED, WARNING, Result
from tools.check_step import EPS, ROUNDINGS, ulp

GROUP = "run"
STEPS, KILLED_AFTER = 3, 2  # the kill falls into the last step
LOSS, NORM, RATE = "train/loss", "train/grad_norm", "train/learning_rate"
WEIGHTS, MOMENTS = "model.", ("exp_avg", "exp_avg_sq")
GROWTH = 1.5  # of the loss over three steps, above which it is suspicious
LOADED, ELEMENTS = 2**28, 2**22  # bytes that are read at once; elements of a tensor that are looked at, evenly chosen
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
    try:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError:
        return {}
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
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
def stored(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """The tensors of a checkpoint, by name."""
    found = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {name: meta for name, meta in found.items() if isinstance(meta, TensorStorageMetadata)}


def load(checkpoint: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Whole tensors of a checkpoint, without a process group. Those that are not stored are left out."""
    metas = {name: stored(checkpoint)[name] for name in names if name in stored(checkpoint)}
    tensors = {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in metas.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no process group, which is what no_dist says
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    return tensors


def trained(checkpoint: Path) -> list[str]:
    """The names of all trained tensors."""
    return [name.removeprefix(WEIGHTS) for name in stored(checkpoint) if name.startswith(WEIGHTS)]


def load_state(checkpoint: Path, names: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
    """name -> {"weight", "exp_avg", "exp_avg_sq"}, fp32 and whole; without moments for an optimizer that stores others."""
    parts = ("", "_codes", "_scale")
    found = load(checkpoint, [f"{key}{part}.{name}" for name in names for key in MOMENTS for part in parts])
    weights = load(checkpoint, [WEIGHTS + name for name in names])
    states = {name: {"weight": weights[WEIGHTS + name].float()} for name in names}
    for name, state in states.items():
        for key in MOMENTS:
            if f"{key}.{name}" in found:
                state[key] = found[f"{key}.{name}"].float()
            elif f"{key}_codes.{name}" in found:  # 6N (distributed/moments.py)
                codes, scale = found[f"{key}_codes.{name}"], found[f"{key}_scale.{name}"]
                value = _code_values()[key][codes.int()].view(*scale.shape, -1) * scale[..., None]
                state[key] = (value.square() if key == "exp_avg_sq" else value).view(codes.shape)
    return states


@functools.cache
def _code_values() -> dict[str, torch.Tensor]:
    return {key: code_map.values for key, code_map in make_code_maps(torch.device("cpu")).items()}


def groups(checkpoint: Path, names: Sequence[str]) -> list[list[str]]:
    """The names in groups whose weights have about LOADED bytes, so that memory stays small."""
    found, size = [[]], 0
    for name in names:
        meta = stored(checkpoint)[WEIGHTS + name]
        if size > LOADED:
            found.append([])
            size = 0
        found[-1].append(name)
        size += meta.size.numel() * meta.properties.dtype.itemsize
    return found


def read_config(run: Path) -> dict:
    """The resolved config of a run, by section."""
    return json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]


# --- Three steps ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What the straight run has shown, for the lines of the machine. Memory is that of rank 0."""

    seconds_per_step: float
    tokens_per_second: float
    memory: float  # bytes, at the peak
    checkpoint_bytes: int
    save_seconds: float
    micro_batch: int
    export_bytes: int


def measure(run: Path) -> Measured | None:
    """The figures of a finished run; None if it has not logged what train.py logs."""
    rows, saves = read_rows(run, LOSS), read_rows(run, "save/total_seconds")
    timed = {step: row for step, row in rows.items() if step - 1 in rows and row.get("train/tokens_per_second")}
    steps = saved_steps(run)
    if not timed or not steps:
        return None
    tokens = [row["train/tokens"] - rows[step - 1]["train/tokens"] for step, row in timed.items()]
    seconds = sum(count / row["train/tokens_per_second"] for count, row in zip(tokens, timed.values(), strict=True))
    return Measured(
        seconds_per_step=seconds / len(timed),
        tokens_per_second=sum(tokens) / seconds,
        memory=max(row["train/memory_gib"] for row in rows.values()) * 2**30,
        checkpoint_bytes=sum(path.stat().st_size for path in checkpoint_of(run, steps[-1]).iterdir()),
        save_seconds=max((row["save/total_seconds"] for row in saves.values()), default=math.nan),
        micro_batch=read_config(run)["batch"]["micro_batch"],
        export_bytes=sum(path.stat().st_size for path in (run / "export").glob("*.safetensors")),
    )


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
    micro_batches: torch.Tensor  # (micro-batches, elements): the gradient of each
    rounding: torch.Tensor  # (elements,): the error of their sum in the compute dtype, as it was measured

    @property
    def total(self) -> torch.Tensor:
        """The gradient of the step, `(elements,)`."""
        return self.micro_batches.sum(0)

    def norm_rounding(self) -> float:
        """How far rounding may move the norm, relative to it."""
        length = self.total.norm()
        along, across = abs(self.rounding @ self.total) / length**2, self.rounding.norm() / length
        return float(ROUNDINGS * (along + across**2))


def read_sample(path: Path, eps: float) -> Sample | None:
    """eps: of the run's compute dtype; the file has the rounding of bf16. None if the reference was not complete."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        tensors = {name: tuple(pair) for name, pair in json.loads(file.metadata()["tensors"]).items()}
        gradients, rounding = file.get_tensor("gradients").double(), file.get_tensor("rounding").double()
    return Sample(tensors, gradients, rounding * eps / EPS[torch.bfloat16])


def first_moments(checkpoint: Path, tensors: Mapping[str, tuple[int, int]], names: Sequence[str]) -> list:
    """(name, sampled elements of AdamW's first moment after step 1, or None where the checkpoint has none) of `names`."""
    found = []
    for group in groups(checkpoint, names):
        for name, state in load_state(checkpoint, group).items():
            numel, stride = tensors[name]  # without the rows of padding, which the reference does not have
            moment = state.get("exp_avg")
            found.append((name, moment if moment is None else moment.flatten()[:numel:stride].clone()))
    return found


def judge_first(run: Path, reference: dict | None, sample: Sample | None, floor: float, key: str) -> Result:
    """The loss or the gradient norm of step 1 against the same documents, computed one by one without the loop."""
    name = "loss" if key == LOSS else "gradient norm"
    found = read_rows(run, LOSS).get(1, {}).get(key)
    expected = (reference or {}).get("loss" if key == LOSS else "grad_norm")
    if reference and not reference["complete"]:
        why = f"the reference had time for {reference['documents']} of the {reference['of_documents']} documents of step 1"
        return Result(GROUP, name, SKIPPED, why)
    if reference is None or found is None or expected is None or (key == NORM and sample is None):
        why = "transformers' loss or gradient is not known: memory does not hold it, or lora.dropout makes it random"
        return Result(GROUP, name, SKIPPED, why)
    allowed = reference["loss_allowed"] / expected if key == LOSS or sample is None else floor + sample.norm_rounding()
    relative = abs(found - expected) / max(abs(expected), 1e-12)
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


def judge_gradient(
    run: Path, reference: dict | None, sample: Sample | None, floor: float, moments: list
) -> list[Result]:
    """*shares*: all micro-batches of step 1 count by their targets in AdamW's first moment, which is clipped once. *gradient*:
    tensor by tensor the moment has the direction and length of the reference's gradient."""
    names = ("shares", "gradient")
    norm, expected = read_rows(run, LOSS).get(1, {}).get(NORM), (reference or {}).get("grad_norm")
    if sample is None or not norm or not expected or not moments:
        text = "there are no gradients of all documents of step 1 to compare with"
        return [Result(GROUP, name, SKIPPED, text) for name in names]
    settings = read_config(run)["optimizer"]
    if any(moment is None for _, moment in moments):
        text = "the optimizer stores no first moments to compare"
        return [Result(GROUP, name, SKIPPED, text) for name in names]
    found = dict(moments)
    clip = max(1.0, norm / settings["max_grad_norm"])
    gradient = torch.cat([found[name] for name in sample.tensors]).double() * clip / (1 - settings["betas"][0])
    if not bool(gradient.any()):
        text = "AdamW's first moment is zero after step 1: call optimizer.step() after backward()"
        return [Result(GROUP, "shares", FAILS, text), Result(GROUP, "gradient", SKIPPED, "see shares")]
    # Least squares: how often each micro-batch counts, and how far rounding moves these numbers. Micro-batches without targets and
    # equal ones cannot be told apart, so the pseudo-inverse of their products is taken.
    sums = sample.micro_batches
    inverse = torch.linalg.pinv(sums @ sums.T, hermitian=True, rtol=1e-10)
    fitted, rounded = inverse @ (sums @ gradient), inverse @ (sums @ sample.rounding)
    counted = sums.norm(dim=1) > 0
    mean = float(fitted[counted].mean())
    shares = (fitted[counted] / mean).tolist()
    allowed = float(floor + ROUNDINGS * rounded.square().mean().sqrt())
    length = mean / (norm / expected)  # 1, whatever the gradient was divided by
    figures = {"shares": shares, "allowed": allowed, "length": length}
    said = f"{len(shares)} micro-batches of step 1 count {min(shares):.3f} to {max(shares):.3f} times their targets"
    if max(abs(share - 1) for share in shares) > allowed:
        what = (
            "divide the sum of all losses once, by the targets of the whole step: no mean over micro-batches or ranks"
        )
        first = Result(
            GROUP, "shares", FAILS, f"{said} in the gradient, where rounding explains {allowed:.2g}: {what}", figures
        )
    elif abs(length - 1) > allowed:
        text = f"AdamW's first moment is {length:.3g} times (1 - beta1) x the clipped gradient"
        what = f"clip it once, to optimizer.max_grad_norm={settings['max_grad_norm']:g}, by the norm that train/grad_norm shows, and lose no part of the gradient"
        first = Result(GROUP, "shares", FAILS, f"{text}: {what}", figures)
    else:
        text = f"{said}, {length:.3f} times the clipped gradient in all (rounding explains {allowed:.2g})"
        first = Result(GROUP, "shares", OK, text, figures)
    return [first, _judge_tensors(sample, gradient / mean, floor)]


def _judge_tensors(sample: Sample, gradient: torch.Tensor, floor: float) -> Result:
    """Whether the gradient of each tensor is the reference's, up to a multiple of the rounding of this tensor, or of the median one."""
    total, worst, start = sample.total, (0.0, "", 0.0, 0.0), 0
    rows = []
    for name, (numel, stride) in sample.tensors.items():
        part = slice(start, start + -(-numel // stride))
        start = part.stop
        rows.append((name, *(float(x[part].norm()) for x in (gradient - total, sample.rounding, total))))
    usual = float(torch.tensor([rounding / size for *_, rounding, size in rows if size]).median())
    # A gradient that is zero but for rounding, as that of the bias of the keys, is measured by the length of the whole.
    tiny = 1e-6 * float(total.norm())
    for name, apart, rounding, size in rows:
        allowed = ROUNDINGS * max(rounding, usual * size) + floor * size + tiny
        worst = max(worst, (apart / allowed, name, apart / max(size, tiny), allowed / max(size, tiny)))
    excess, name, apart, allowed = worst
    figures = {"tensors": len(rows), "worst": name, "apart": apart, "allowed": allowed, "usual_rounding": usual}
    text = f"of {len(rows)} tensors {name} is the farthest from transformers' gradient: {apart:.2g} of its length"
    if excess <= 1:
        return Result(GROUP, "gradient", OK, f"{text}, rounding explains {allowed:.2g}", figures)
    what = (
        "the model computes something else in training (dropout, another attention), or a part of the gradient is lost"
    )
    return Result(GROUP, "gradient", FAILS, f"{text}, where rounding explains {allowed:.2g}: {what}", figures)


# --- Every tensor moves as AdamW says ---------------------------------------------------------------------------------


@dataclass
class Moved:
    """Sums over the elements of one tensor and over the steps that were looked at.

    `made` is the change of the weights, `intended` what AdamW makes of the stored moments; variances are those of rounding.
    """

    name: str
    is_matrix: bool
    changed: int = 0  # elements that moved
    along: float = 0.0  # made x intended
    square: float = 0.0  # intended^2
    variance: float = 0.0  # of `along`
    decay: float = 0.0  # (what the moments do not explain) x weight x rate
    decay_square: float = 0.0  # (weight x rate)^2
    decay_variance: float = 0.0
    lost: int = 0  # elements whose update bf16 would lose if it rounded to nearest
    elements: int = 0
    squares: list[float] = field(default_factory=list)  # of each step: second moment of the gradient / (first moment)^2
    has_moments: bool = True

    @property
    def ratio(self) -> float:
        """How far the tensor moved, as a multiple of what AdamW intended."""
        return self.along / self.square if self.square else float(self.changed > 0)

    @property
    def noise(self) -> float:
        """The standard deviation of `ratio` that rounding makes."""
        return math.sqrt(self.variance) / self.square if self.square else 0.0


def measure_moves(run: Path, settings: Mapping, rates: Mapping[int, float], names: Sequence[str]) -> list[Moved]:
    """How the tensors `names` moved in the steps after the first. settings: `optimizer` of the config; rates: by step."""
    (beta1, beta2), moves = settings["betas"], []
    for group in groups(checkpoint_of(run, 1), names):
        found = {name: Moved(name, len(stored(checkpoint_of(run, 1))[WEIGHTS + name].size) >= 2) for name in group}
        before: dict[str, dict[str, torch.Tensor]] = {}
        for step in range(1, STEPS + 1):
            states = load_state(checkpoint_of(run, step), group)
            for name, state in states.items():
                dtype = stored(checkpoint_of(run, step))[WEIGHTS + name].properties.dtype
                stride = -(-state["weight"].numel() // ELEMENTS)
                now = states[name] = {key: value.flatten()[::stride].double() for key, value in state.items()}
                moved, past = found[name], before.get(name)
                if not all(key in now for key in MOMENTS):
                    moved.has_moments = False
                else:
                    m, v = (
                        now[key] - (past[key] * beta if past else 0)
                        for key, beta in zip(MOMENTS, (beta1, beta2), strict=True)
                    )
                    is_exact = step == 1 or _has_exact_moments(checkpoint_of(run, step), name)
                    if is_exact and (first := float(m.square().sum())):
                        moved.squares.append(float(v.sum()) / (1 - beta2) / (first / (1 - beta1) ** 2))
                if past:
                    _add_step(moved, past["weight"], now, dtype, settings, rates[step], step)
            before = states
        moves += found.values()
    return moves


def _has_exact_moments(checkpoint: Path, name: str) -> bool:
    meta = stored(checkpoint).get(f"exp_avg_sq.{name}")
    return meta is not None and meta.properties.dtype == torch.float32


def _add_step(
    moved: Moved, before: torch.Tensor, now: Mapping, dtype: torch.dtype, settings: Mapping, rate: float, step: int
) -> None:
    """Add one step of a tensor: AdamW with decoupled weight decay on matrices (arXiv:1711.05101)."""
    made = before - now["weight"]
    moved.changed += int(made.count_nonzero())
    moved.elements += made.numel()
    if not moved.has_moments:
        return
    (beta1, beta2), weight_decay = settings["betas"], settings["weight_decay"] if moved.is_matrix else 0.0
    first, second = now["exp_avg"] / (1 - beta1**step), now["exp_avg_sq"] / (1 - beta2**step)
    by_moments = rate * first / (second.sqrt() + settings["eps"])
    intended = by_moments + rate * weight_decay * before
    gap = ulp(before.float(), dtype).double()
    # Of stochastic rounding to a gap; rounding to nearest has less, unless the whole update is lost.
    variance = gap * torch.minimum(intended.abs(), gap / 4)
    moved.along += float(made @ intended)
    moved.square += float(intended @ intended)
    moved.variance += float(intended.square() @ variance)
    moved.decay += float((made - by_moments) @ before) * rate
    moved.decay_square += float(before @ before) * rate**2
    moved.decay_variance += float(before.square() @ variance) * rate**2
    nearest = before.bfloat16()
    moved.lost += int(((nearest.double() - intended).bfloat16() == nearest).sum())


def judge_moves(run: Path, moves: Sequence[Moved], peak: float) -> Result:
    """Whether every trained tensor moved, by what AdamW makes of its moments at the learning rate that was logged and set.

    peak: optimizer.learning_rate, which all three steps of a check have.
    """
    name, rows = "updates", read_rows(run, RATE)
    settings = read_config(run)["optimizer"]
    rates = [row[RATE] for row in rows.values()]
    still = [moved.name for moved in moves if not moved.changed and moved.square]
    still += [moved.name for moved in moves if not moved.changed and not moved.has_moments]
    ratios = {moved.name: moved.ratio for moved in moves if moved.square and moved.noise < 0.25}
    figures: dict[str, object] = {"tensors": len(moves), "still": still[:10], "rates": rates}
    if still:
        text = (
            f"{len(still)} of {len(moves)} trained tensors did not move in steps 2 and 3, the first is {still[0]}: call optimizer.step() "
            "with every trained parameter, and with a learning rate that the dtype of the weights can hold"
        )
        return Result(GROUP, name, FAILS, text, figures)
    steps = [int(load(checkpoint_of(run, step), ["optimizer.step"])["optimizer.step"]) for step in range(1, STEPS + 1)]
    if steps != list(range(1, STEPS + 1)):
        text = f"the optimizer counts {steps} steps after steps 1, 2 and 3: call optimizer.step() once in each step"
        return Result(GROUP, name, FAILS, text, figures)
    if any(rate > peak * (1 + 1e-6) for rate in rates):
        text = f"train/learning_rate is {max(rates):g}, more than optimizer.learning_rate={peak:g}"
        return Result(GROUP, name, FAILS, text, figures)
    if not all(moved.has_moments for moved in moves):
        text = f"all {len(moves)} tensors moved; the optimizer stores other moments than AdamW, so no more is compared"
        return Result(GROUP, name, OK, text, figures)
    fixed = 0.1 if settings["memory"] == "6N" else NOT_MOVED_BY_ADAMW
    whole = sum(moved.along for moved in moves) / max(1e-300, sum(moved.square for moved in moves))
    whole_noise = math.sqrt(sum(moved.variance for moved in moves)) / max(1e-300, sum(moved.square for moved in moves))
    lost = sum(moved.lost for moved in moves) / max(1, sum(moved.elements for moved in moves))
    figures |= {
        "whole": whole,
        "noise": whole_noise,
        "ratios": [min(ratios.values(), default=1.0), max(ratios.values(), default=1.0)],
    }
    figures |= {"lost_in_bf16": lost}
    betas = [square for moved in moves for square in moved.squares]
    worst_beta = max(betas, key=lambda square: abs(square - 1), default=1.0)
    if abs(worst_beta - 1) > 0.02 + fixed:
        text = f"the second moment is {worst_beta:.3g} times what the first one says: the optimizer has other betas than optimizer.betas"
        return Result(GROUP, name, FAILS, text, figures)
    decay = _judge_decay(moves, settings["weight_decay"])
    if decay and abs(whole - 1) < 0.2:  # another learning rate would look like another decay
        return Result(GROUP, name, FAILS, decay, figures)
    wrong = [moved for moved in moves if abs(moved.ratio - 1) > fixed + ROUNDINGS * moved.noise]
    if wrong or abs(whole - 1) > fixed + ROUNDINGS * whole_noise:
        worst = max(wrong or moves, key=lambda moved: abs(moved.ratio - 1))
        text = (
            f"{len(wrong)} of {len(moves)} tensors moved otherwise than AdamW's stored moments say at learning rate {rates[-1]:g}, "
            f"{worst.name} {worst.ratio:.3g} times as far: set the rate in every group before optimizer.step(), clip gradients and not "
            "updates, and see that the dtype of the weights holds an update of this size (optimizer.memory=16N)"
        )
        return Result(GROUP, name, FAILS, text, figures)
    low, high = min(ratios.values(), default=whole), max(ratios.values(), default=whole)
    how = "fp32 weights keep them" if settings["memory"] == "16N" else "stochastic rounding keeps their mean"
    text = (
        f"all {len(moves)} tensors moved {low:.3f} to {high:.3f} times as far as AdamW's stored moments say at learning rate "
        f"{rates[-1]:g}; bf16 weights rounded to nearest would lose {lost:.1%} of the updates; {how} (optimizer.memory={settings['memory']})"
    )
    if min(rates) < peak * (1 - 1e-6):
        text += (
            f"; warning: the schedule of this train.py starts at {min(rates):g}, below optimizer.learning_rate={peak:g}"
        )
        return Result(GROUP, name, WARNING, text, figures)
    if whole_noise > 0.3:
        text += "; the update of a step is smaller than the noise of rounding: raise the learning rate"
        return Result(GROUP, name, WARNING, text, figures)
    return Result(GROUP, name, OK, text, figures)


def _judge_decay(moves: Sequence[Moved], weight_decay: float) -> str | None:
    """A sentence if matrices do not shrink by optimizer.weight_decay, or vectors shrink."""
    for is_matrix, expected in ((True, weight_decay), (False, 0.0)):
        chosen = [moved for moved in moves if moved.is_matrix == is_matrix and moved.decay_square]
        total = sum(moved.decay_square for moved in chosen)
        if not total:
            continue
        found = sum(moved.decay for moved in chosen) / total
        noise = math.sqrt(sum(moved.decay_variance for moved in chosen)) / total
        if abs(found - expected) > 0.005 + 0.2 * expected + ROUNDINGS * noise:
            what = "matrices" if is_matrix else "vectors (norms, biases)"
            return f"{what} shrink by a weight decay of {found:.3g}, where {expected:g} is expected (optimizer.weight_decay, on matrices only)"
    return None


# --- Checkpoints, export, resumes -------------------------------------------------------------------------------------


def judge_checkpoint(measured: Measured | None, grace: float | None) -> Result:
    """Size and time of a save, and whether it fits three times into the `grace` seconds that torchrun leaves a run after a signal."""
    if measured is None:
        return Result(GROUP, "checkpoint", SKIPPED, "the three steps have not logged their saves")
    size, seconds = measured.checkpoint_bytes / 2**20, measured.save_seconds
    figures = {"bytes": measured.checkpoint_bytes, "seconds": seconds, "grace": grace}
    text = f"{size:,.0f} MiB, saved in {seconds:.1f} s ({size / seconds:,.0f} MiB/s, checksums included)"
    if grace is None or 3 * seconds <= grace:
        return Result(GROUP, "checkpoint", OK, text, figures)
    wanted = 10 * math.ceil(0.3 * seconds + 1)
    text += f", and torchrun leaves {grace:g} s after a signal: start it with --shutdown-timeout={wanted}"
    return Result(GROUP, "checkpoint", WARNING, text, figures)


def exported_otherwise(export: Path, checkpoint: Path, names: Sequence[str]) -> list[str]:
    """Those of `names` whose exported weights are not the checkpoint's in the dtype of the export."""
    files, wrong = stored_tensors(export), []
    for group in groups(checkpoint, names):
        tensors = load(checkpoint, [WEIGHTS + name for name in group])
        for name in (name for name in group if name in files):  # transformers has loaded what the model needs
            with safe_open(files[name].file, framework="pt") as file:
                weight = file.get_tensor(name)
            expected = tensors[WEIGHTS + name][: len(weight)]  # rows of padding are not exported
            if not torch.equal(weight, expected.to(weight.dtype)):
                wrong.append(name)
    return wrong


def judge_export(run: Path, config: Config, others: Sequence[str]) -> Result:
    """Whether transformers can read what the run has exported: the tokenizer, and every weight by its name and shape.

    others: the tensors that `exported_otherwise` found. The model is built without memory, so that one of any size is compared.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = run / "export"
    tokenizer, size = (
        AutoTokenizer.from_pretrained(folder),
        sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = {name: tuple(tensor.shape) for name, tensor in stored_tensors(folder).items()}
    named = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = [f"{name} is {shapes.get(name, 'missing')}" for name, shape in named.items() if shapes.get(name) != shape]
    figures = {"bytes": size, "parameters": model.num_parameters(), "problems": wrong, "otherwise": list(others[:10])}
    if wrong:
        text = f"transformers does not read the exported model as it was trained ({'; '.join(wrong[:3])})"
        return Result(GROUP, "export", FAILS, text, figures)
    how = "adapters are merged, so its tensors are not compared with the checkpoint's"
    if not config.lora.rank:
        how = "its tensors are those of the last checkpoint"
        if others:
            text = (
                f"{len(others)} of the exported tensors are not those of the last checkpoint, the first is {others[0]}: export the "
                "weights of the last step"
            )
            return Result(GROUP, "export", FAILS, text, figures)
    text = f"transformers has a place for all of it: {model.num_parameters():,} parameters, {size / 2**20:,.0f} MiB, {type(tokenizer).__name__}; {how}"
    return Result(GROUP, "export", OK, text, figures)


@dataclass(frozen=True)
class Difference:
    """Of a tensor in two checkpoints of the same step: squares of the weights' difference, and of the step's own length."""

    square: float
    update: float
    same: bool  # weights and moments are equal to the bit


def measure_difference(found: Path, expected: Path, before: Path, names: Sequence[str]) -> list[Difference]:
    """How far the tensors `names` of `found` are from `expected`, and these from `before`, a step earlier."""
    differences = []
    for group in groups(expected, names):
        ones, others, olds = (load_state(checkpoint, group) for checkpoint in (found, expected, before))
        for name in group:
            one, other = ones[name], others[name]
            square = (one["weight"] - other["weight"]).double().square().sum().item()
            update = (other["weight"] - olds[name]["weight"]).double().square().sum().item()
            same = all(torch.equal(one[key], other[key]) for key in other)
            differences.append(Difference(square if math.isfinite(square) else math.inf, update, same))
    return differences


def compare_runs(
    straight: Path,
    other: Path,
    name: str,
    said: str,
    differences: Sequence[Difference],
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
    if is_exact and all(one.same for one in differences) and not any(apart.values()):
        text = f"{said}: weights, moments, loss and gradient norm equal those of the other run to the bit"
        return Result(GROUP, name, OK, text, {"relative": 0.0})
    square, update = (sum(getattr(one, key) for one in differences) for key in ("square", "update"))
    relative = math.sqrt(square / update) if update else math.inf if square else 0.0
    figures = {"relative": relative, "loss": apart[LOSS], "gradient_norm": apart[NORM]}
    text = f"{said}: loss {apart[LOSS]:.2g} and gradient norm {apart[NORM]:.2g} apart (relative), weights {relative:.2g} of the step's length"
    of_row, of_weights = ALLOWED_LATER[dtype]
    row_differs = max(apart.values()) > of_row
    if row_differs or relative > of_weights:
        what = (
            "the data of a step depends on the number of ranks, or gradients are not summed over them as they should be"
            if other.name == "fewer" and row_differs
            else "not all state is saved and restored: weights, both moments, their step count, and the data's position"
        )
        return Result(GROUP, name, FAILS, f"{text}: {what}", figures)
    if is_exact:
        text = f"{text}; on this device a resume should be equal to the bit: something in the loop is not deterministic"
        return Result(GROUP, name, WARNING, text, figures)
    return Result(GROUP, name, OK, f"{text} (as rounding explains)", figures)
