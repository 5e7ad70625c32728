"""What the runs of a check have left, judged: rows, checkpoints and export, against the reference and against each other.

Every rank reads its share of the tensors; rank 0 judges. The numbers that are compared come from the run's own files: after step t a
checkpoint has the weights w and AdamW's moments m and v, so that w(t) follows from w(t-1), m(t) and v(t), and the gradient of step 1
is m(1) / (1 - beta1).
"""

import functools
import itertools
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.dtypes import DTYPES, has_native_bf16
from configs.config import Config
from distributed.checkpoint_directory import (
    ALSO_KEPT,
    checkpoint_name,
    complete_checkpoints,
    read_manifest,
    torchrun_grace,
)
from distributed.low_memory import make_code_maps
from distributed.optimizer import decays
from distributed.process_group import Ranks, gather_objects, read_on_first
from eval.comparison.arms import metric_rows
from model.architectures import has_experts, read_model_config
from model.experts import auxiliary_factor
from model.language_model import stored_form
from model.weight_files import stored_tensors
from model.weights import Weights, tensors_of_checkpoint
from tools.check_data import FAILS, OK, SKIPPED, WARNING, Result
from tools.check_step import EPS, REFERENCE, ROUNDINGS, Reference
from tools.plan import timed_steps
from training.checkpointer import newest_start
from training.description import counted

T = TypeVar("T")
Rows = Mapping[int, Mapping[str, float]]  # by step
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


@dataclass(frozen=True)
class Check:
    """A check on one rank. script: the user's own train.py. say: prints on rank 0 alone. results: the lines so far, on all ranks."""

    config: Config
    script: Path
    arguments: tuple[str, ...]  # of the command line, which give `config` again
    ranks: Ranks
    say: Callable[[str], None]
    results: list[Result] = field(default_factory=list)

    @property
    def scratch(self) -> Path:
        """Where the runs of the check write: on the disk of the real run, beside it."""
        return Path(self.config.run.directory, f".check-{self.config.run.name}")

    def on_first(self, look: Callable[[], T]) -> T:
        """The result of `look()` on rank 0, on all ranks. A collective."""
        return read_on_first(look, self.ranks)

    def add(self, result: Result, name: str, group: str = GROUP) -> None:
        """Add a line that all ranks have found."""
        self.results.append(replace(result, group=group, name=name))

    def line(
        self,
        name: str,
        judge: Callable[..., Result],
        measure: Callable[[list[str]], list] | None = None,
        checkpoint: Path = Path(),
        skip: str = "",
        group: str = GROUP,
    ) -> None:
        """Add the line that `judge()` makes of files on rank 0. A collective. skip: why there is nothing to judge.

        With `measure` each rank calls it with its share of the names of all trained tensors of `checkpoint`, and `judge` gets the list
        of all results. A file that cannot be read or compared is a line that fails: the report must come to its end.
        """
        if skip:
            return self.add(Result(SKIPPED, skip), name, group)
        measured, problem = list[Any](), ""
        try:
            if measure:
                measured = measure(trained(checkpoint)[self.ranks.rank :: self.ranks.world_size])
        except Exception as error:
            problem = _said(error)
        gathered = gather_objects((measured, problem), self.ranks)

        def look() -> Result:
            if wrong := [words for _, words in gathered if words]:
                return Result(FAILS, wrong[0])
            try:
                return judge([one for part, _ in gathered for one in part]) if measure else judge()
            except Exception as error:
                return Result(FAILS, _said(error))

        self.add(self.on_first(look), name, group)

    def remove(self, *names: str | Path) -> None:
        """Remove directories of the scratch directory that are no longer needed: checkpoints are large. A collective."""
        self.on_first(lambda: [shutil.rmtree(self.scratch / name, ignore_errors=True) for name in names])


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# --- Files ------------------------------------------------------------------------------------------------------------


def read_rows(run: Path) -> Rows:
    """The rows of metrics.jsonl that have a loss, by step. That of a step that occurs twice is NaN."""
    rows: dict[int, Mapping[str, float]] = {}
    for row in metric_rows(run):
        if LOSS in row:
            rows[row["step"]] = row | ({LOSS: math.nan} if row["step"] in rows else {})
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


def registered(checkpoint: Path) -> list[str]:
    """`registered.NAME.` of each thing that has a tensor for every trained one, such as an average of the weights."""
    names = [name.split(".", 2) for name in stored(checkpoint).shapes if name.startswith("registered.")]
    found = dict.fromkeys(f"registered.{thing}." for _, thing, _ in names)
    return [one for one in found if all(one + name in stored(checkpoint).shapes for name in trained(checkpoint))]


def load_state(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    """{"weight", "exp_avg", "exp_avg_sq"} of a trained tensor, whole, the moments in fp32; without those of another optimizer."""
    tensors = stored(checkpoint)
    state = {"weight": tensors.read(WEIGHTS + name)}
    for key in MOMENTS:
        if f"optimizer.{key}.{name}" in tensors.shapes:
            state[key] = tensors.read(f"optimizer.{key}.{name}").float()
        elif f"optimizer.{key}_codes.{name}" in tensors.shapes:  # 6N (distributed/low_memory.py)
            codes, scale = (tensors.read(f"optimizer.{key}_{part}.{name}") for part in ("codes", "scale"))
            value = code_values()[key][codes.int()].view(*scale.shape, -1) * scale[..., None]
            state[key] = (value.square() if key == "exp_avg_sq" else value).view(codes.shape)
    return state


@functools.cache
def code_values() -> dict[str, torch.Tensor]:
    """What the codes of 6N stand for, by moment."""
    return {key: code_map.values for key, code_map in make_code_maps(torch.device("cpu")).items()}


def router_aux(config: Config) -> float:
    """The factor of the routers' auxiliary loss in a run; 0 without one."""
    model = read_model_config(config.model.path)
    return auxiliary_factor(config.model.router_aux, model) if has_experts(model) else 0.0


def optimizer_of(run: Path) -> dict:
    """The settings of a run in the section `optimizer`, as it has recorded them: an edited train.py may have changed them."""
    return newest_start(run).get("config", {}).get("optimizer", {})


def is_adamw(checkpoint: Path) -> bool:
    """Whether the optimizer of a checkpoint is AdamW, whose updates the check can predict from its moments."""
    return read_manifest(checkpoint)["values"]["optimizer"]["type"] in ("AdamW", "LowMemoryAdamW")


# --- Three steps ------------------------------------------------------------------------------------------------------


def judge_straight(check: Check, seconds: float) -> dict:
    """Add all lines about the run that nobody has killed. Returns what it measured. A collective. seconds: how long it took."""
    run, config = check.scratch / "straight", check.config
    measured, steps, settings = check.on_first(lambda: (measure(run), saved_steps(run), optimizer_of(run)))
    rates = check.on_first(lambda: {step: row[RATE] for step, row in read_rows(run).items() if RATE in row})
    check.line("three steps", lambda: judge_steps(read_rows(run), seconds))
    judge_first(check, run, settings)
    check.line(
        "updates",
        functools.partial(judge_moves, run, settings, rates, config.optimizer.learning_rate),
        functools.partial(measure_moves, run, settings, rates),
        checkpoint_of(run, 1),
        skip="" if steps == list(range(1, STEPS + 1)) else f"it saved steps {steps}, and every step is needed",
    )
    keep, last = config.run.keep_last, checkpoint_of(run, steps[-1]) if steps else run
    check.line("checkpoint", lambda: judge_checkpoint(check.scratch, measured, keep, torchrun_grace()))
    compare = lambda names: [*compare_export(run / "export", last, names).items()]  # noqa: E731
    check.line("export", functools.partial(judge_export, run, config), compare, last)
    return measured


def measure(run: Path) -> dict:
    """What the straight run has shown, for the lines of the machine; empty if it has not logged what train.py logs.

    Bytes and seconds; memory is the peak of rank 0.
    """
    rows, steps = metric_rows(run), saved_steps(run)
    timed, saves = timed_steps(rows), [row["save/total_seconds"] for row in rows if "save/total_seconds" in row]
    if not timed or not steps or not saves:
        return {}
    tokens, seconds = (sum(each) for each in zip(*timed, strict=True))
    return {
        "seconds_per_step": seconds / len(timed),
        "tokens_per_second": tokens / seconds,
        "memory": max(row.get("train/memory_gib", 0.0) for row in rows) * 2**30,
        "checkpoint": sum(path.stat().st_size for path in checkpoint_of(run, steps[-1]).iterdir()),
        "save_seconds": max(saves),
        "micro_batch": newest_start(run)["config"]["batch"]["micro_batch"],
        "export": sum(path.stat().st_size for path in (run / "export").glob("*.safetensors")),
    }


def judge_steps(rows: Rows, seconds: float) -> Result:
    """Whether each step is logged once and is finite, and the loss does not run away."""
    losses, norms = ([row.get(key, math.nan) for row in rows.values()] for key in (LOSS, NORM))
    figures = {"losses": losses, "gradient_norms": norms, "seconds": round(seconds, 1)}
    said = f"loss {', '.join(f'{loss:.4f}' for loss in losses)} nats per target, gradient norm {', '.join(f'{norm:.3g}' for norm in norms)}"
    if not rows:
        return Result(FAILS, f"no row with {LOSS} in metrics.jsonl: log it at every step")
    if not all(map(math.isfinite, losses + norms)):
        said += (
            ": a step is not finite or is logged twice; lower optimizer.learning_rate, and see the lines of the model"
        )
        return Result(FAILS, said, figures)
    if losses[-1] > GROWTH * losses[0]:
        said += ": the loss grows at the peak learning rate without warm-up; lower optimizer.learning_rate"
        return Result(WARNING, said, figures)
    return Result(OK, f"{said}, in {seconds:.0f} s", figures)


# --- Step 1 against the reference -------------------------------------------------------------------------------------


def judge_first(check: Check, run: Path, settings: Mapping) -> None:
    """Add the lines about loss, gradient norm and gradient of step 1 against the reference. A collective.

    settings: `optimizer_of` the run.
    """
    config, first = check.config, checkpoint_of(run, 1)

    @functools.cache
    def given() -> tuple[Any, Mapping[str, float]]:
        """The reference, or None, and the row of step 1. On rank 0 alone."""
        return Reference.load(check.scratch / "step" / REFERENCE), read_rows(run).get(1, {})

    def look() -> tuple[str, str, dict[str, tuple[int, int]]]:
        """Why the loss is not compared, and why the gradient; "" where it is. And the tensors of the reference."""
        if any(source.anchor for source in config.data.mix):
            why = "the reference knows no KL to the base, by which a source of data.mix is trained"
            return why, why, {}
        reference, row = given()
        if reference is None or LOSS not in row:
            return UNKNOWN, UNKNOWN, {}
        if NORM not in row:
            return "", f"the run has not logged {NORM} in step 1", {}
        if router_aux(config):
            why = "the reference knows no auxiliary loss of the routers, whose gradient the run adds; model.router_aux=0 shows the rest"
            return "", why, {}
        frozen = sorted(reference.tensors.keys() - set(trained(first))) if first.is_dir() else []
        if frozen:  # by this train.py, which the reference does not know
            why = f"{counted(len(frozen), 'tensor')} such as {frozen[0]} are not trained; the reference has the gradient of all"
            return "", why, {}
        return "", "", reference.tensors

    no_loss, no_gradient, tensors = check.on_first(look)
    floor = STORED[config.optimizer.memory] + (2**-8 if config.sharding.reduce_dtype == "bf16" else 0)
    check.line("loss", lambda: judge_loss(*given()), skip=no_loss)
    check.line("gradient norm", lambda: judge_norm(*given(), floor), skip=no_gradient)
    judge = lambda moments: judge_gradient(first, settings, *given(), floor, moments)  # noqa: E731
    check.line("gradient", judge, functools.partial(first_moments, first, tensors), first, skip=no_gradient)


def judge_loss(reference: Reference, row: Mapping[str, float]) -> Result:
    """The loss of step 1 against that of the same documents, computed one by one without the loop."""
    mend = (
        "a micro-batch is left out or counted twice, documents in a row see each other, the model computes something else in "
        "training (dropout), or train.py trains more than token_losses, which is no fault"
    )
    return _judge_number(row[LOSS], reference.loss, reference.loss_allowed / max(abs(reference.loss), 1e-12), mend)


def judge_norm(reference: Reference, row: Mapping[str, float], floor: float) -> Result:
    """The gradient norm of step 1, the same way."""
    mend = (
        "divide the sum of all losses once, by the targets of the whole step (no mean over micro-batches or ranks), and use every "
        "micro-batch (a term beside token_losses is no fault)"
    )
    return _judge_number(row[NORM], reference.grad_norm, floor + reference.norm_rounding(), mend)


def _judge_number(found: float, expected: float, allowed: float, mend: str) -> Result:
    relative = abs(found - expected) / max(abs(expected), 1e-12)
    figures = {"found": found, "expected": expected, "relative": relative, "allowed": allowed}
    said = f"step 1: {found:.5g}; {expected:.5g} from its documents one by one ({relative:.2g} apart, relative"
    if relative <= allowed:
        return Result(OK, f"{said}; rounding explains {allowed:.2g})", figures)
    return Result(FAILS, f"{said}; rounding explains only {allowed:.2g}): {mend}", figures)


def first_moments(
    checkpoint: Path, tensors: Mapping[str, tuple[int, int]], names: Sequence[str]
) -> list[tuple[str, torch.Tensor | None]]:
    """(name, the elements of AdamW's first moment after step 1 that the reference has, or None where there is none) of `names`."""
    found = []
    for name in set(names) & tensors.keys():
        numel, stride = tensors[name]  # without the rows of padding, which the reference does not have
        moment = load_state(checkpoint, name).get("exp_avg")
        found.append((name, moment if moment is None else moment.flatten()[:numel:stride].clone()))
    return found


def judge_gradient(
    first: Path, settings: Mapping, reference: Reference, row: Mapping[str, float], floor: float, moments: Sequence
) -> Result:
    """Whether AdamW's first moment after step 1 is that of the reference's gradient, tensor by tensor and clipped once.

    first: the checkpoint of step 1. settings: `optimizer_of` the run. row: of step 1. Each tensor may be apart by a multiple of its
    own rounding, or of the median tensor's.
    """
    if not row[NORM] or not reference.grad_norm or not moments:
        return Result(SKIPPED, UNKNOWN)
    if not is_adamw(first) or any(moment is None for _, moment in moments):
        return Result(
            SKIPPED,
            "the optimizer of this train.py is not AdamW, from whose first moment the gradient of step 1 is read",
        )
    clip, found, total = max(1.0, row[NORM] / settings["max_grad_norm"]), dict(moments), reference.gradient
    gradient = torch.cat([found[name] for name in reference.tensors]).double() * clip / (1 - settings["betas"][0])
    if not bool(gradient.any()):
        return Result(FAILS, "AdamW's first moment is zero after step 1: call optimizer.step() after backward()")
    scale = float(gradient @ total / total.norm() ** 2)  # another divisor is the matter of the gradient norm
    length, allowed_length = scale / (row[NORM] / reference.grad_norm), floor + reference.norm_rounding()
    parts = [-(-numel // stride) for numel, stride in reference.tensors.values()]
    vectors = (gradient / scale - total, reference.rounding, total)
    rows = [[float(part.norm()) for part in row] for row in zip(*(x.split(parts) for x in vectors), strict=True)]
    usual = float(torch.tensor([rounding / size for _, rounding, size in rows if size]).median())
    # A gradient that is zero but for rounding, as that of the bias of the keys, is measured by the length of the whole.
    tiny = 1e-6 * float(total.norm())
    limits = [ROUNDINGS * max(rounding, usual * size) + floor * size + tiny for _, rounding, size in rows]
    excess, name, size, apart, limit = max(
        (apart / limit, name, max(size, tiny), apart, limit)
        for name, (apart, _, size), limit in zip(reference.tensors, rows, limits, strict=True)
    )
    figures = {"tensors": len(rows), "worst": name, "apart": apart / size, "allowed": limit / size, "length": length}
    text = (
        f"of {len(rows)} tensors {name} is the farthest from transformers' gradient: {apart / size:.2g} of its length, where rounding "
        f"explains {limit / size:.2g}; all are {length:.3f} times as long as the clipped gradient"
    )
    mend = ""
    if excess > 1:
        mend = (
            ": divide the sum of all losses once, by the targets of the whole step (no mean over micro-batches), lose no part of the "
            "gradient, and compute the same model in training (no dropout; a term beside token_losses is no fault)"
        )
    elif abs(length - 1) > allowed_length:
        mend = f": clip it once, to optimizer.max_grad_norm={settings['max_grad_norm']:g}, by train/grad_norm, if train.py adds no term"
    return Result(FAILS if mend else OK, text + mend, figures)


# --- Every tensor moves as AdamW says ---------------------------------------------------------------------------------


class Moved(NamedTuple):
    """How one tensor moved in steps 2 and 3.

    betas: of step 1: what the second moment says of the squared gradient, over what the first one says. sums: over the elements,
    `(2, 3)` in fp64: change x what is expected, its square, the variance of the first by rounding, where AdamW's stored moments, or
    weight decay of 1, are what is expected.
    """

    name: str
    is_matrix: bool
    is_adamw: bool
    changed: int  # elements that moved
    betas: float
    sums: torch.Tensor


def fit(sums: torch.Tensor) -> tuple[float, float]:
    """(the multiple of what is expected, its standard deviation by rounding) of a row of the sums of a `Moved`, or of several."""
    along, square, variance = sums.tolist()
    return (along / square, math.sqrt(variance) / square) if square else (1.0, 0.0)


def measure_moves(run: Path, settings: Mapping, rates: Mapping[int, float], names: Sequence[str]) -> list[Moved]:
    """How the tensors `names` moved in the steps after the first. settings: `optimizer_of` the run; rates: by step.

    Expected is AdamW with decoupled weight decay on matrices (arXiv:1711.05101).
    """
    (beta1, beta2), moves = settings["betas"], list[Moved]()
    checkpoints = [checkpoint_of(run, i + 1) for i in range(STEPS)]
    by_adamw = is_adamw(checkpoints[0])
    peaks = read_manifest(checkpoints[0])["values"]["optimizer"]["peaks"]  # by make_optimizer's groups
    for name in names:
        is_matrix = decays(name, len(stored(checkpoints[0]).shapes[WEIGHTS + name]))
        states = [_some(load_state(checkpoint, name)) for checkpoint in checkpoints]
        has_moments = by_adamw and all(key in states[0] for key in MOMENTS)
        changed, betas, sums = 0, 1.0, torch.zeros(2, 3, dtype=torch.float64)
        if has_moments and (square := float((states[0]["exp_avg"].double() / (1 - beta1)).square().sum())):
            betas = float(states[0]["exp_avg_sq"].double().sum()) / (1 - beta2) / square
        for step, (before, after) in enumerate(itertools.pairwise(states), 2):
            old, rate = before["weight"].double(), rates[step] * peaks[name] / settings["learning_rate"]
            made = old - after["weight"].double()
            changed += int(made.count_nonzero())
            if not has_moments:
                continue
            first, second = (
                after[key].double() / (1 - beta**step) for key, beta in zip(MOMENTS, (beta1, beta2), strict=True)
            )
            by_moments, by_decay = rate * first / (second.sqrt() + settings["eps"]), rate * old
            intended = by_moments + settings["weight_decay"] * is_matrix * by_decay
            gap = ulp(before["weight"]).double()
            # Of stochastic rounding to a gap; rounding to nearest has less, unless the whole update is lost.
            variance = gap * torch.minimum(intended.abs(), gap / 4)
            for row, change, expected in zip(sums, (made, made - by_moments), (intended, by_decay), strict=True):
                row += torch.stack([change @ expected, expected @ expected, expected.square() @ variance])
        moves.append(Moved(name, is_matrix, has_moments, changed, betas, sums))
    return moves


def _some(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """At most ELEMENTS elements of each tensor."""
    stride = -(-state["weight"].numel() // ELEMENTS)
    return {key: value.flatten()[::stride].clone() for key, value in state.items()}


def ulp(weight: torch.Tensor) -> torch.Tensor:
    """The gap between a number and the next larger one in magnitude, fp32, in the dtype of `weight`. Of 0: the smallest normal one."""
    smallest = torch.finfo(weight.dtype).tiny
    _, exponent = torch.frexp(weight.float().abs().clamp(min=smallest))
    return torch.ldexp(torch.ones_like(weight, dtype=torch.float32), exponent + int(math.log2(EPS[weight.dtype])))


def judge_moves(
    run: Path, settings: Mapping, rates: Mapping[int, float], peak: float, moves: Sequence[Moved]
) -> Result:
    """Whether every trained tensor moved, by what AdamW makes of its moments at the learning rate that was logged and set.

    settings: `optimizer_of` the run. peak: optimizer.learning_rate of the config, which all three steps of a check have.
    """
    rate = max(rates.values())
    fixed = 0.1 if settings["memory"] == "6N" else NOT_MOVED_BY_ADAMW
    still = [moved.name for moved in moves if not moved.changed and (moved.sums[0, 1] or not moved.is_adamw)]
    every = sum((moved.sums[0] for moved in moves), torch.zeros(3))
    whole, noise = fit(every) if every[1] else (0.0, 0.0)  # moments that are all zero are those of no gradient
    figures = {"tensors": len(moves), "still": still[:10], "rate": rate, "whole": whole, "noise": noise}
    if still:
        text = (
            f"{len(still)} of {len(moves)} trained tensors did not move in steps 2 and 3, the first is {still[0]}: call optimizer.step() "
            "with every trained parameter, and with a learning rate that the dtype of the weights can hold"
        )
        return Result(FAILS, text, figures)
    if rate > peak * (1 + 1e-6):
        return Result(FAILS, f"train/learning_rate is {rate:g}, more than optimizer.learning_rate={peak:g}", figures)
    if not all(moved.is_adamw for moved in moves):
        text = (
            f"all {len(moves)} trained tensors moved, and only that was checked: the optimizer of this train.py is not AdamW, whose "
            "updates follow from the moments that it stores"
        )
        return Result(OK, text, figures)
    counter, saved = f"optimizer.step.{moves[0].name}", [stored(checkpoint_of(run, i + 1)) for i in range(STEPS)]
    steps = [int(one.read(counter)) if counter in one.shapes else step for step, one in enumerate(saved, 1)]
    if steps != list(range(1, STEPS + 1)):
        text = f"the optimizer counts {steps} steps after steps 1, 2 and 3: call optimizer.step() once in each step"
        return Result(FAILS, text, figures)
    betas = max((moved.betas for moved in moves), key=lambda beta: abs(beta - 1))
    if abs(betas - 1) > 0.02 + fixed:
        text = f"the second moment is {betas:.3g} times what the first one says: the optimizer has other betas than optimizer.betas"
        return Result(FAILS, text, figures)
    for is_matrix, expected, what in (
        (True, settings["weight_decay"], "matrices"),
        (False, 0.0, "vectors (norms, biases)"),
    ):
        sums = sum((moved.sums[1] for moved in moves if moved.is_matrix == is_matrix), torch.zeros(3))
        found, deviation = fit(sums)
        is_other = sums[1] and abs(found - expected) > 0.005 + 0.2 * expected + ROUNDINGS * deviation
        if is_other and abs(whole - 1) < 0.2:  # another learning rate would look like another decay
            text = f"{what} shrink by a weight decay of {found:.3g}, where {expected:g} is expected (optimizer.weight_decay, on matrices only)"
            return Result(FAILS, text, figures)
    ratios = {moved.name: fit(moved.sums[0]) for moved in moves}
    wrong = [name for name, (ratio, deviation) in ratios.items() if abs(ratio - 1) > fixed + ROUNDINGS * deviation]
    if wrong or abs(whole - 1) > fixed + ROUNDINGS * noise:
        worst = max(wrong or ratios, key=lambda name: abs(ratios[name][0] - 1))
        text = (
            f"{len(wrong)} of {len(moves)} tensors moved otherwise than AdamW's stored moments say at learning rate {rate:g}, {worst} "
            f"{ratios[worst][0]:.3g} times as far: set the rate in every group before optimizer.step(), clip gradients and not updates, and see that the dtype of the weights holds an update of this size (optimizer.memory=16N)"
        )
        return Result(FAILS, text, figures)
    text = f"all {len(moves)} tensors moved {whole:.3f} times as far as AdamW's stored moments say at learning rate {rate:g}"
    if noise > 0.3:
        text += "; the update of a step is smaller than the noise of rounding: raise the learning rate, or set optimizer.memory=16N"
        return Result(WARNING, text, figures)
    return Result(OK, text, figures)


# --- Checkpoints, export, resumes -------------------------------------------------------------------------------------


def judge_checkpoint(scratch: Path, measured: dict, keep: int, grace: float | None) -> Result:
    """Size and time of a save; whether the disk has room for `keep` checkpoints, the best, the last good one, the one being
    written and the export; and whether a save fits three times into the `grace` seconds that torchrun leaves a run after a signal."""
    if not measured:
        return Result(SKIPPED, "the three steps have not logged their saves")
    size, seconds = measured["checkpoint"], measured["save_seconds"]
    needed = (keep + ALSO_KEPT + 1) * size + measured["export"]
    held = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file())  # which the check gives back
    free = shutil.disk_usage(scratch).free + held
    figures = {"bytes": size, "seconds": seconds, "grace": grace, "needed": needed, "free": free}
    text = (
        f"{size / 2**20:,.0f} MiB, saved in {seconds:.1f} s, checksums included; {keep + ALSO_KEPT + 1} of them and the export need "
        f"{needed / 2**30:.1f} of {free / 2**30:.1f} GiB free"
    )
    if needed > free:
        return Result(FAILS, f"{text}: free some space or lower run.keep_last", figures)
    if grace is None or 3 * seconds <= grace:
        return Result(OK, text, figures)
    wanted = 10 * math.ceil(0.3 * seconds + 1)
    text += f"; torchrun leaves {grace:g} s after a signal: start it with --shutdown-timeout={wanted}"
    return Result(WARNING, text, figures)


def compare_export(
    export: Path,
    checkpoint: Path,
    names: Sequence[str],
    bounds: Callable[[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    of: str = WEIGHTS,
) -> dict[str, bool]:
    """The tensors of an export that those of `names` become, and whether each is the checkpoint's in the dtype of the export.

    bounds: (name, tensor of the checkpoint) -> the smallest and the largest that the exported one may be before it is rounded;
    None: it must be that tensor. of: the beginning of its name in the checkpoint.
    """
    files, form, found = stored_tensors(export), stored_form(AutoConfig.from_pretrained(export)), dict[str, bool]()
    for name in names:
        tensor = stored(checkpoint).read(of + name)
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
    others = [] if config.lora.rank else sorted(name for name, same in compared if not same and name in named)
    figures = {"parameters": model.num_parameters(), "problems": wrong, "otherwise": others[:10]}
    if wrong:
        text = f"transformers does not read the exported model as it was trained ({'; '.join(wrong[:3])})"
        return Result(FAILS, text, figures)
    if others:
        text = (
            f"{len(others)} of the exported tensors are not those of the last checkpoint, the first is {others[0]}: export the "
            "weights of the last step"
        )
        return Result(FAILS, text, figures)
    how = (
        "adapters are merged, so values are not compared"
        if config.lora.rank
        else "its tensors are those of the last checkpoint"
    )
    text = f"transformers has a place for all of it: {model.num_parameters():,} parameters, {type(tokenizer).__name__}; {how}"
    return Result(OK, text, figures)


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


def compare_runs(check: Check, run: Path, name: str, said: str, is_exact: bool) -> None:
    """Add the line about step 3 of a run: its row and checkpoint against those of the straight run. A collective.

    is_exact: they should be equal to the bit.
    """
    straight, device = check.scratch / "straight", torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expected, found = checkpoint_of(straight, STEPS), checkpoint_of(run, STEPS)
    before = checkpoint_of(run, KILLED_AFTER)
    computes_in = DTYPES[check.config.model.compute_dtype] if has_native_bf16(device) else torch.float32
    of_row, of_weights = ALLOWED_LATER[computes_in]

    def judge(apart: Sequence[tuple[float, float, bool]]) -> Result:
        row, other = read_rows(run).get(STEPS, {}), read_rows(straight)[STEPS]
        if not math.isfinite(row.get(LOSS, math.nan)):
            return Result(FAILS, f"{said}: step {STEPS} is missing in metrics.jsonl, twice, or not finite")
        loss, norm = (abs(row[key] / other[key] - 1) for key in (LOSS, NORM))
        if is_exact and not loss and not norm and all(same for *_, same in apart):
            text = f"{said}: weights, moments, loss and gradient norm equal those of the other run to the bit"
            return Result(OK, text, {"relative": 0.0})
        square, update = (sum(one[i] for one in apart) for i in (0, 1))
        relative = math.sqrt(square / update) if update else math.inf if square else 0.0
        figures = {"relative": relative, "loss": loss, "gradient_norm": norm}
        text = f"{said}: loss {loss:.2g} and gradient norm {norm:.2g} apart (relative), weights {relative:.2g} of the step's length"
        if run.name == "fewer" and max(loss, norm) > of_row:
            text += ": the data of a step depends on the number of ranks, or gradients are not summed over them as they should be"
            return Result(FAILS, text, figures)
        if max(loss, norm) > of_row or relative > of_weights:
            text += ": not all state is saved and restored: weights, both moments, their step count, and the data's position"
            return Result(FAILS, text, figures)
        if is_exact:
            text += "; on this device a resume should be equal to the bit: something in the loop is not deterministic"
            return Result(WARNING, text, figures)
        return Result(OK, f"{text} (as rounding explains)", figures)

    check.line(name, judge, functools.partial(measure_difference, found, expected, before), expected)
