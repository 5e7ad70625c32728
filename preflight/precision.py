"""The checks of precision: whether the updates of this learning rate survive in the dtype of the weights.

A number of b bits of precision keeps an update only if it is at least half of the gap to the next number (an ulp), unless it
is rounded stochastically. bf16 has 8 bits: between 2^-6 and 2^-5 its ulp is 2^-13 = 1.2e-4. The first AdamW step moves each
weight by about the learning rate, because g / sqrt(g^2) is 1; later steps are smaller, so the share that is lost at the first
step is a lower bound.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from common.dtypes import DTYPES, has_native_bf16
from configs.config import Optimizer
from distributed.optimizer import adamw, parameter_dtype
from preflight.read import RunInputs
from preflight.reference import Reference
from preflight.result import FAILS, OK, SKIPPED, WARNING, Result

ELEMENTS = 2**15  # of each matrix that are looked at
ALL_ELEMENTS = 2**23  # of the whole model
BITS = {torch.bfloat16: 8, torch.float32: 24}  # of precision, the implicit one included
REALISED = 0.9  # of the intended update: less is lost to rounding
UNMOVED, STUCK = 0.5, 0.95  # shares of weights that cannot reach the next bf16 number: warning, failure
SIGNAL = 3.0  # movement of the whole run over the noise of stochastic rounding, from which on the noise is harmless


@dataclass(frozen=True)
class Part:
    """Some rows of a matrix with their gradient, both fp32 on the CPU or GPU."""

    weight: torch.Tensor
    gradient: torch.Tensor


def check_precision(run: RunInputs, reference: Reference | None) -> list[Result]:
    """All checks of precision. `reference` has the real weights, and the gradient of the first step where memory held it."""
    results = [check_bf16(run)]
    if reference is None:
        return [
            *results,
            Result("precision", "updates", SKIPPED, "memory holds no weights of transformers' model here"),
        ]
    results.append(check_finite(reference))
    if results[-1].status == FAILS:
        return results
    parts = sample_parts(reference)
    if not parts:
        return [
            *results,
            Result(
                "precision",
                "updates",
                SKIPPED,
                "no gradient is computed here (see model, gradient), so no update is known",
            ),
        ]
    settings = run.config.optimizer
    steps, warmup = run.inputs.total_steps, run.inputs.warmup_steps
    return [
        *results,
        check_updates(parts, settings, reference.gradient_norm() or 0.0, run.config.run.seed),
        check_movement(parts, settings, steps, warmup, run.compute_dtype),
    ]


def check_bf16(run: RunInputs) -> Result:
    """Whether the device computes in the dtype of the config."""
    asked = DTYPES[run.config.model.compute_dtype]
    if asked == torch.bfloat16 and not has_native_bf16(run.device):
        text = f"no native bf16 on this device ({run.device.type}): the run computes in fp32, more slowly"
        return Result("precision", "compute dtype", WARNING, text)
    where = "natively" if asked == torch.bfloat16 else "as the config says"
    return Result("precision", "compute dtype", OK, f"{run.config.model.compute_dtype} {where} on {run.device.type}")


def check_finite(reference: Reference) -> Result:
    """Whether all weights, and the gradient of the first step, are finite numbers."""
    named = list(reference.model.named_parameters())
    bad = [name for name, parameter in named if not bool(torch.isfinite(parameter.detach()).all())]
    if bad:
        text = f"{len(bad)} tensors have weights that are not finite, the first is {bad[0]}: download the model again"
        return Result("precision", "finite", FAILS, text, {"tensors": bad[:10]})
    norm = reference.gradient_norm()
    if norm is not None and not math.isfinite(norm):
        text = f"the weights are finite, but the gradient norm of step 1 is {norm}: check the data and the learning rate's stage"
        return Result("precision", "finite", FAILS, text)
    what = "weights" if norm is None else f"weights and the gradient of step 1 (norm {norm:.4g})"
    return Result("precision", "finite", OK, f"{what} are finite in {len(named)} tensors")


def sample_parts(reference: Reference) -> list[Part]:
    """Rows of all matrices, evenly chosen, at most ELEMENTS of each and ALL_ELEMENTS in all; rows without gradient are left out."""
    parts, taken = [], 0
    for parameter in reference.model.parameters():
        if parameter.grad is None or parameter.dim() < 2 or taken >= ALL_ELEMENTS:
            continue
        weight, gradient = parameter.detach().flatten(1), parameter.grad.flatten(1)
        count = min(len(weight), max(1, ELEMENTS // weight.shape[1]))
        rows = torch.linspace(0, len(weight) - 1, count, device=weight.device).long()
        rows = rows[gradient[rows].abs().amax(dim=1) > 0]
        if len(rows):
            parts.append(Part(weight[rows].float(), gradient[rows].float()))
            taken += parts[-1].weight.numel()
    return parts


def check_updates(parts: list[Part], settings: Optimizer, norm: float, seed: int) -> Result:
    """One step of the run's own optimizer at the peak learning rate: how much of the intended update arrives in the weights.

    norm: of the whole gradient, for clipping.
    """
    clip = max(1.0, norm / settings.max_grad_norm)
    lost = lost_share(parts, settings, clip, torch.bfloat16)
    realised, noise = realised_share(parts, settings, clip, seed)
    figures = {"lost_in_bf16": lost, "realised": realised, "noise": noise, "learning_rate": settings.learning_rate}
    rate = f"learning rate {settings.learning_rate:g}"
    nearest = f"bf16 weights rounded to nearest would lose {lost:.1%} of the updates"
    if realised < REALISED - 3 * noise:
        text = f"{rate}: only {realised:.1%} of the intended update arrives in the weights (optimizer.memory={settings.memory}); "
        text += "raise the learning rate, or set optimizer.memory=16N"
        if settings.memory == "16N":
            text = text.removesuffix(", or set optimizer.memory=16N") + ": not even fp32 holds it"
        return Result("precision", "updates", FAILS, f"{text} ({nearest})", figures)
    if noise > REALISED / 3:
        text = f"{rate}: the update of a step is smaller than the noise of rounding {len(parts)} matrices; raise the learning rate"
        return Result("precision", "updates", WARNING, f"{text} ({nearest})", figures)
    how = "fp32 weights keep them" if settings.memory == "16N" else "stochastic rounding keeps their mean"
    text = f"{rate}: {nearest}; {how} (optimizer.memory={settings.memory}, {realised:.1%} of a step arrives)"
    return Result("precision", "updates", OK, text, figures)


def lost_share(parts: list[Part], settings: Optimizer, clip: float, dtype: torch.dtype) -> float:
    """Share of the weights that the first step leaves as they are, if they are stored in `dtype` and rounded to nearest."""
    lost = total = 0
    for part in parts:
        stored = part.weight.to(dtype)
        after = (stored.double() - _intended(stored.float(), part.gradient, settings, clip)).to(dtype)
        lost, total = lost + int((after == stored).sum()), total + stored.numel()
    return lost / max(1, total)


def realised_share(parts: list[Part], settings: Optimizer, clip: float, seed: int) -> tuple[float, float]:
    """(share of the intended first step that the run's optimizer makes, its standard deviation from stochastic rounding).

    The projection of the change of the weights on the intended change: 1 if the mean is kept, 0 if the weights stay.
    """
    dtype = parameter_dtype(settings.memory)
    parameters = {f"part {i}": nn.Parameter(part.weight.to(dtype)) for i, part in enumerate(parts)}
    before = [parameter.detach().clone() for parameter in parameters.values()]
    optimizer = adamw(parameters, settings, seed)
    for parameter, part in zip(parameters.values(), parts, strict=True):
        if parameter.grad is None:
            parameter.grad = part.gradient.to(dtype, copy=True)  # the step divides it in place
        else:
            parameter.grad.copy_(part.gradient)  # 14N keeps an fp32 gradient
    for group in optimizer.param_groups:
        group["noise_step"] = 0
    device = parts[0].weight.device
    optimizer.found_inf = torch.zeros((), device=device)  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.grad_scale = torch.tensor(clip, device=device)  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    along = square = variance = 0.0
    for old, parameter, part in zip(before, parameters.values(), parts, strict=True):
        intended = _intended(old.float(), part.gradient.to(old.dtype), settings, clip)
        made = old.double() - parameter.detach().double()
        along += float((made * intended).sum())
        square += float(intended.square().sum())
        if dtype == torch.bfloat16:
            gap = ulp(old.float(), dtype).double()
            variance += float((intended.square() * intended.abs() * (gap - intended.abs()).clamp(min=0)).sum())
    return along / max(square, 1e-300), math.sqrt(variance) / max(square, 1e-300)


def _intended(weight: torch.Tensor, gradient: torch.Tensor, settings: Optimizer, clip: float) -> torch.Tensor:
    """What the first AdamW step subtracts from each weight, in float64 (arXiv:1711.05101): the moments' bias is corrected away."""
    gradient = gradient.double() / clip
    step = gradient / (gradient.abs() + settings.eps)
    return settings.learning_rate * (step + settings.weight_decay * weight.double())


def check_movement(
    parts: list[Part], settings: Optimizer, steps: int, warmup: int, compute_dtype: torch.dtype
) -> Result:
    """Whether a run of this length can move its weights further than the rounding of bf16, and than its noise.

    No weight moves further than about the sum of all learning rates: that of a gradient that never changes its sign. With
    stochastic rounding, each step adds noise of variance rate x ulp, so the movement over the noise is at most the root of
    (sum of rates / ulp). The noise of a weight is no failure: over many weights it averages out, and the mean is exact.
    """
    total = sum_of_rates(settings, steps, warmup)
    gaps = torch.cat([ulp(part.weight, torch.bfloat16).flatten() for part in parts])
    unmoved = float((total < gaps / 2).double().mean())
    signal = math.sqrt(total / float(gaps.median()))
    figures = {"sum_of_rates": total, "unmoved": unmoved, "signal": signal, "steps": steps}
    limit = f"{steps} steps move a weight by {total:.2g} at most"
    mend = "raise optimizer.learning_rate or the number of steps"
    stored = parameter_dtype(settings.memory)
    if torch.bfloat16 in (compute_dtype, stored) and unmoved > UNMOVED:
        text = f"{limit}, less than half of the gap between two bf16 numbers for {unmoved:.1%} of the weights: bf16 loses it; {mend}"
        return Result("precision", "movement", FAILS if unmoved > STUCK else WARNING, text, figures)
    if stored == torch.bfloat16:
        noise = f"{signal:.1f} times the noise of stochastic rounding at the median weight"
        if signal < SIGNAL:
            text = f"{limit}, {noise}: {mend}, or set optimizer.memory=16N"
            return Result("precision", "movement", WARNING, text, figures)
        return Result("precision", "movement", OK, f"{limit}, {noise}", figures)
    text = f"{limit}; {unmoved:.1%} of the weights cannot reach the next bf16 number"
    return Result("precision", "movement", OK, text, figures)


def sum_of_rates(settings: Optimizer, steps: int, warmup: int) -> float:
    """The learning rates of all steps added up: half of the peak in warm-up, then the mean of the cosine."""
    after = max(0, steps - warmup)
    return settings.learning_rate * (min(steps, warmup) / 2 + after * (1 + settings.min_lr_ratio) / 2)


def ulp(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gap between a number and the next larger one in magnitude, fp32, for numbers of `dtype`. Of 0: the smallest normal one."""
    smallest = torch.finfo(dtype).tiny
    _, exponent = torch.frexp(weight.float().abs().clamp(min=smallest))
    return torch.ldexp(torch.ones_like(weight, dtype=torch.float32), exponent - BITS[dtype])
