"""Judge the runs of a check by their rows, checkpoints and exports, against the reference and against each other.

Every rank reads its share of the tensors, and rank 0 judges. All numbers come from the run's own files; the gradient of step 1
follows from AdamW's first moment m as m(1) / (1 - beta1).
"""

import functools
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from configs.config import Config
from distributed.checkpoint_directory import complete_checkpoints
from distributed.process_group import Ranks, gather_objects, read_on_first
from eval.comparison.arms import metric_rows
from model.architectures import has_experts, read_model_config
from model.dtypes import DTYPES, has_native_bf16
from model.experts import auxiliary_factor
from model.language_model import build_on_meta, tensors_in_files
from model.weight_files import stored_tensors
from scripts.check.reference import REFERENCE, Reference
from scripts.check.tensors import compare_export, is_adamw, load_state, trained
from scripts.check.updates import STEPS, checkpoint_of, judge_moves, measure_moves
from training.check_result import FAILS, OK, SKIPPED, WARNING, Result
from training.checkpointer import newest_start
from training.description import counted
from training.quick_check import ROUNDINGS, has_grown

T = TypeVar("T")
Rows = Mapping[int, Mapping[str, float]]  # by step
GROUP = "run"
KILLED_AFTER = 2  # steps; the kill falls into the last step
LOSS, NORM, RATE = "train/loss", "train/grad_norm", "train/learning_rate"
UNKNOWN = f"the reference of step 1 (see the lines of the model) or a row with {LOSS} and {NORM} is missing"
# Relative error of a gradient because it and its moments are stored, by optimizer.memory. The measured rounding is added.
STORED = {"16N": 1e-4, "14N": 2.0**-8, "12N": 2.0**-8, "8N": 2.0**-7, "6N": 0.05}
# Relative differences that step 3 of another run may have: (loss and gradient norm, weights by the length of the step). They are
# fixed, because AdamW turns the rounding of a small gradient into a large part of its update. A lost moment changes the update by
# about its own length.
ALLOWED_LATER = {torch.float32: (1e-3, 0.05), torch.bfloat16: (2e-2, 0.4)}


@dataclass(frozen=True)
class Check:
    """A check on one rank. script: the user's train.py. say: prints on rank 0 alone. results: the lines so far, on all ranks."""

    config: Config
    script: Path
    arguments: tuple[str, ...]  # of the command line, which give `config` again
    ranks: Ranks
    say: Callable[[str], None]
    results: list[Result] = field(default_factory=list)

    @property
    def scratch(self) -> Path:
        """The directory of the check's runs: beside the real run, on its disk."""
        return Path(self.config.run.directory, f".check-{self.config.run.name}")

    def on_first(self, look: Callable[[], T]) -> T:
        """Call `look()` on rank 0 and return its result on all ranks. A collective."""
        return read_on_first(look, self.ranks)

    def add(self, result: Result, name: str, group: str = GROUP) -> None:
        """Add a line that is the same on all ranks."""
        self.results.append(replace(result, group=group, name=name))

    def line(
        self,
        name: str,
        judge: Callable[..., Result],
        measure: Callable[[list[str]], list] | None = None,
        checkpoint: Path = Path(),
        skip: str = "",
    ) -> None:
        """Add the result of `judge()`, which reads files on rank 0. A collective. skip: the reason why there is nothing to judge.

        With `measure`, each rank calls it with its share of the names of `checkpoint`'s trained tensors, and `judge` gets the
        measurements of all ranks in one list. A file that cannot be read or compared becomes a line that fails, because the report
        must come to its end.
        """
        if skip:
            return self.add(Result(SKIPPED, skip), name)
        measured, problem = list[Any](), ""
        try:
            if measure:
                measured = measure(trained(checkpoint)[self.ranks.rank :: self.ranks.world_size])
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        gathered = gather_objects((measured, problem), self.ranks)

        def look() -> Result:
            if problems := [words for _, words in gathered if words]:
                return Result(FAILS, problems[0])
            try:
                return judge([item for part, _ in gathered for item in part]) if measure else judge()
            except Exception as error:
                return Result(FAILS, f"{type(error).__name__}: {error}")

        self.add(self.on_first(look), name)

    def remove(self, *names: str | Path) -> None:
        """Remove directories of the scratch directory, because checkpoints are large. A collective."""
        self.on_first(lambda: [shutil.rmtree(self.scratch / name, ignore_errors=True) for name in names])


# --- Files ------------------------------------------------------------------------------------------------------------


def read_rows(run: Path) -> Rows:
    """Return the rows of metrics.jsonl that have a loss, by step. The loss of a step that is logged twice is NaN."""
    rows: dict[int, Mapping[str, float]] = {}
    for row in metric_rows(run):
        if LOSS in row:
            rows[row["step"]] = row | ({LOSS: math.nan} if row["step"] in rows else {})
    return rows


def saved_steps(run: Path) -> list[int]:
    """Return the steps of a run's complete checkpoints, in order."""
    return [int(path.name.removeprefix("step-")) for path in complete_checkpoints(run / "checkpoints")]


def router_aux(config: Config) -> float:
    """Return the factor of the routers' auxiliary loss in a run, 0 without one."""
    model = read_model_config(config.model.path)
    return auxiliary_factor(config.model.router_aux, model) if has_experts(model) else 0.0


def optimizer_of(run: Path) -> dict:
    """Return the section `optimizer` that a run has recorded. An edited train.py may have changed the config's."""
    return newest_start(run).get("config", {}).get("optimizer", {})


# --- Three steps ------------------------------------------------------------------------------------------------------


def judge_straight(check: Check, seconds: float) -> None:
    """Add all lines about the run that is not killed. A collective. seconds: how long it took."""
    run, config = check.scratch / "straight", check.config
    steps, settings = check.on_first(lambda: (saved_steps(run), optimizer_of(run)))
    rates = check.on_first(lambda: {step: row[RATE] for step, row in read_rows(run).items() if RATE in row})
    is_auto = config.optimizer.learning_rate == "auto"  # then the run has computed it
    peak = settings.get("learning_rate", math.inf) if is_auto else config.optimizer.peak
    check.line("three steps", lambda: judge_steps(read_rows(run), seconds))
    judge_first(check, run, settings)
    check.line(
        "updates",
        functools.partial(judge_moves, settings, rates, peak),
        functools.partial(measure_moves, run, settings, rates),
        checkpoint_of(run, 1),
        skip="" if steps == list(range(1, STEPS + 1)) else f"it saved steps {steps}, and every step is needed",
    )
    last = checkpoint_of(run, steps[-1]) if steps else run
    compare = lambda names: [*compare_export(run / "export", last, names).items()]  # noqa: E731
    check.line("export", functools.partial(judge_export, run / "export"), compare, last)


def judge_steps(rows: Rows, seconds: float) -> Result:
    """Check that each step is logged once and is finite."""
    losses, norms = ([row.get(key, math.nan) for row in rows.values()] for key in (LOSS, NORM))
    if not rows:
        return Result(FAILS, f"no row with {LOSS} in metrics.jsonl: log it at every step")
    text = f"loss {', '.join(f'{loss:.4f}' for loss in losses)} nats per target, "
    text += f"gradient norm {', '.join(f'{norm:.3g}' for norm in norms)}"
    if not all(map(math.isfinite, losses + norms)):
        text += (
            ": a step is not finite or is logged twice; lower optimizer.learning_rate, and see the lines of the model"
        )
        return Result(FAILS, text)
    if has_grown(losses[0], losses[-1:]):
        text += ": the loss grows at the peak learning rate without warm-up; lower optimizer.learning_rate"
        return Result(WARNING, text)
    return Result(OK, f"{text}, in {seconds:.0f} s")


# --- Step 1 against the reference -------------------------------------------------------------------------------------


def judge_first(check: Check, run: Path, settings: Mapping) -> None:
    """Add the lines that compare loss, gradient norm and gradient of step 1 with the reference. A collective.

    settings: `optimizer_of` the run.
    """
    config, first = check.config, checkpoint_of(run, 1)

    @functools.cache
    def compared() -> tuple[Any, Mapping[str, float]]:
        """Return the reference, or None, and the row of step 1. For rank 0 alone."""
        return Reference.load(check.scratch / "step" / REFERENCE), read_rows(run).get(1, {})

    def look() -> tuple[str, str, dict[str, tuple[int, int]]]:
        """Return why the loss and why the gradient cannot be compared, "" if they can, and the tensors of the reference."""
        reference, row = compared()
        if reference is None or not {LOSS, NORM} <= row.keys():
            return UNKNOWN, UNKNOWN, {}
        if any(source.anchor for source in config.data.mix):
            why = "the reference knows no KL to the base, by which a source of data.mix is trained"
            return why, why, {}
        if router_aux(config):
            why = "the reference knows no auxiliary loss of the routers, whose gradient the run adds; model.router_aux=0 shows the rest"
            return "", why, {}
        frozen = sorted(reference.tensors.keys() - set(trained(first))) if first.is_dir() else []
        if frozen:  # an edited train.py has frozen them
            why = f"{counted(len(frozen), 'tensor')} such as {frozen[0]} are not trained; the reference has the gradient of all"
            return "", why, {}
        return "", "", reference.tensors

    no_loss, no_gradient, tensors = check.on_first(look)
    floor = STORED[config.optimizer.memory] + (2**-8 if config.sharding.reduce_dtype == "bf16" else 0)
    check.line("loss", lambda: judge_loss(*compared()), skip=no_loss)
    check.line("gradient norm", lambda: judge_norm(*compared(), floor), skip=no_gradient)
    judge = lambda moments: judge_gradient(first, settings, *compared(), floor, moments)  # noqa: E731
    check.line("gradient", judge, functools.partial(first_moments, first, tensors), first, skip=no_gradient)


def judge_loss(reference: Reference, row: Mapping[str, float]) -> Result:
    """Compare step 1's loss with the loss of its documents, each computed alone and without the training loop."""
    advice = (
        "a micro-batch is left out or counted twice, documents in a row see each other, the model computes something else in "
        "training (dropout), or train.py trains more than token_losses, which is no fault"
    )
    return _judge_number(row[LOSS], reference.loss, reference.loss_allowed / max(abs(reference.loss), 1e-12), advice)


def judge_norm(reference: Reference, row: Mapping[str, float], floor: float) -> Result:
    """Compare step 1's gradient norm with the reference. floor: the relative error because gradients are stored (STORED)."""
    advice = (
        "divide the sum of all losses once, by the targets of the whole step (no mean over micro-batches or ranks), and use every "
        "micro-batch (a term beside token_losses is no fault)"
    )
    return _judge_number(row[NORM], reference.grad_norm, floor + reference.norm_rounding(), advice)


def _judge_number(logged: float, expected: float, allowed: float, advice: str) -> Result:
    relative = abs(logged - expected) / max(abs(expected), 1e-12)
    text = f"step 1: {logged:.5g}; {expected:.5g} from its documents one by one ({relative:.2g} apart, relative"
    if relative <= allowed:
        return Result(OK, f"{text}; rounding explains {allowed:.2g})")
    return Result(FAILS, f"{text}; rounding explains only {allowed:.2g}): {advice}")


def first_moments(
    checkpoint: Path, tensors: Mapping[str, tuple[int, int]], names: Sequence[str]
) -> list[tuple[str, torch.Tensor | None]]:
    """Return (name, sampled elements of AdamW's first moment after step 1, or None without a moment) for `names`.

    tensors: `Reference.tensors`, which decide the elements.
    """
    moments = []
    for name in set(names) & tensors.keys():
        numel, stride = tensors[name]  # the reference has no rows of padding, which come last
        moment = load_state(checkpoint, name).get("exp_avg")
        moments.append((name, moment if moment is None else moment.flatten()[:numel:stride].clone()))
    return moments


def judge_gradient(
    first: Path, settings: Mapping, reference: Reference, row: Mapping[str, float], floor: float, moments: Sequence
) -> Result:
    """Compare AdamW's first moment after step 1 with the reference's gradient, tensor by tensor, clipped once.

    first: the checkpoint of step 1. settings: `optimizer_of` the run. row: of step 1. moments: by `first_moments`. The allowed
    error of a tensor is a multiple of its own rounding, or of the median tensor's if that is larger.
    """
    if not row[NORM] or not reference.grad_norm or not moments:
        return Result(SKIPPED, UNKNOWN)
    if not is_adamw(first) or any(moment is None for _, moment in moments):
        text = "the optimizer of this train.py is not AdamW, from whose first moment the gradient of step 1 is read"
        return Result(SKIPPED, text)
    clip, by_name, expected = max(1.0, row[NORM] / settings["max_grad_norm"]), dict(moments), reference.gradient
    gradient = torch.cat([by_name[name] for name in reference.tensors]).double() * clip / (1 - settings["betas"][0])
    if not bool(gradient.any()):
        return Result(FAILS, "AdamW's first moment is zero after step 1: call optimizer.step() after backward()")
    parts = [-(-numel // stride) for numel, stride in reference.tensors.values()]
    vectors = (gradient - expected, reference.rounding, expected)
    rows = [[float(part.norm()) for part in row] for row in zip(*(x.split(parts) for x in vectors), strict=True)]
    usual = float(torch.tensor([rounding / size for _, rounding, size in rows if size]).median())
    # The gradient of the keys' bias is zero but for rounding. Such a gradient is compared with the length of the whole gradient.
    tiny = 1e-6 * float(expected.norm())
    limits = [ROUNDINGS * max(rounding, usual * size) + floor * size + tiny for _, rounding, size in rows]
    excess, name, size, apart, limit = max(
        (apart / limit, name, max(size, tiny), apart, limit)
        for name, (apart, _, size), limit in zip(reference.tensors, rows, limits, strict=True)
    )
    text = (
        f"of {len(rows)} tensors {name} is the farthest from transformers' gradient: {apart / size:.2g} of its length, where rounding "
        f"explains {limit / size:.2g}"
    )
    if excess <= 1:
        return Result(OK, text)
    text += (
        ": divide the sum of all losses once, by the targets of the whole step (no mean over micro-batches), lose no part of the "
        f"gradient, clip it once, to optimizer.max_grad_norm={settings['max_grad_norm']:g}, and compute the same model in training "
        "(no dropout; a term beside token_losses is no fault)"
    )
    return Result(FAILS, text)


# --- Checkpoints, export, resumes -------------------------------------------------------------------------------------


def judge_export(export: Path, compared: Sequence[tuple[str, bool]]) -> Result:
    """Check that the export has every weight of transformers' model by name, with the values of the last checkpoint.

    compared: by `compare_export`. It has no weight into which adapters were merged. The model is built on meta, so that any size
    fits into memory.
    """
    model = build_on_meta(read_model_config(str(export)))
    tensors = {name: tensor.detach() for name, tensor in tensors_in_files(model).items()}
    expected = model.stored_form(tensors).keys()
    if missing := sorted(expected - stored_tensors(export).keys()):
        return Result(FAILS, f"transformers' model has tensors that are not in the export, such as {missing[0]}")
    is_equal = {name: same for name, same in compared if name in expected}
    if differing := sorted(name for name, same in is_equal.items() if not same):
        text = (
            f"{len(differing)} of the exported tensors are not those of the last checkpoint, the first is {differing[0]}: export the "
            "weights of the last step"
        )
        return Result(FAILS, text)
    text = f"transformers has a place for all {len(expected)} tensors; {len(is_equal)} are those of the last checkpoint"
    return Result(OK, text)


def measure_difference(
    resumed: Path, expected: Path, before: Path, names: Sequence[str]
) -> list[tuple[float, float, bool]]:
    """Compare the tensors `names` of a resumed checkpoint with the expected one, and with the checkpoint a step earlier.

    Return for each tensor: the squared distance of the two, the squared length of the step, and whether weights and moments are
    equal to the bit.
    """
    differences = []
    for name in names:
        states = [load_state(checkpoint, name) for checkpoint in (resumed, expected, before)]
        weight, expected_weight, old = (state["weight"].float() for state in states)
        square = (weight - expected_weight).double().square().sum().item()
        update = (expected_weight - old).double().square().sum().item()
        same = all(torch.equal(states[0][key], value) for key, value in states[1].items())
        differences.append((square if math.isfinite(square) else math.inf, update, same))
    return differences


def compare_runs(check: Check, run: Path, name: str, description: str, is_exact: bool) -> None:
    """Add the line that compares step 3 of a run, its row and its checkpoint, with the straight run. A collective.

    is_exact: the two should be equal to the bit.
    """
    straight, device = check.scratch / "straight", torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expected, resumed = checkpoint_of(straight, STEPS), checkpoint_of(run, STEPS)
    before = checkpoint_of(run, KILLED_AFTER)
    compute_dtype = DTYPES[check.config.model.compute_dtype] if has_native_bf16(device) else torch.float32
    allowed_of_row, allowed_of_weights = ALLOWED_LATER[compute_dtype]

    def judge(differences: Sequence[tuple[float, float, bool]]) -> Result:
        row, expected_row = read_rows(run).get(STEPS, {}), read_rows(straight)[STEPS]
        if not math.isfinite(row.get(LOSS, math.nan)):
            return Result(FAILS, f"{description}: step {STEPS} is missing in metrics.jsonl, twice, or not finite")
        loss, norm = (abs(row[key] / expected_row[key] - 1) for key in (LOSS, NORM))
        if is_exact and not loss and not norm and all(same for *_, same in differences):
            text = f"{description}: weights, moments, loss and gradient norm equal those of the other run to the bit"
            return Result(OK, text)
        square, update = (sum(difference[i] for difference in differences) for i in (0, 1))
        relative = math.sqrt(square / update) if update else math.inf if square else 0.0
        text = f"{description}: loss {loss:.2g} and gradient norm {norm:.2g} apart (relative), "
        text += f"weights {relative:.2g} of the step's length"
        if run.name == "fewer" and max(loss, norm) > allowed_of_row:
            text += ": the data of a step depends on the number of ranks, or gradients are not summed over them as they should be"
            return Result(FAILS, text)
        if max(loss, norm) > allowed_of_row or relative > allowed_of_weights:
            text += ": not all state is saved and restored: weights, both moments, their step count, and the data's position"
            return Result(FAILS, text)
        if is_exact:
            text += "; on this device a resume should be equal to the bit: something in the loop is not deterministic"
            return Result(WARNING, text)
        return Result(OK, f"{text} (as rounding explains)")

    check.line(name, judge, functools.partial(measure_difference, resumed, expected, before), expected)
