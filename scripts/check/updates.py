"""The line *updates*: whether every tensor moved in steps 2 and 3 as AdamW predicts from its stored moments.

After step t a checkpoint has the weights w and AdamW's moments m and v, so that w(t) follows from w(t-1), m(t) and v(t), with
decoupled weight decay on matrices (arXiv:1711.05101).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from distributed.checkpoint_directory import checkpoint_name, read_manifest
from distributed.optimizer import decays
from scripts.check.tensors import MOMENTS, WEIGHTS, is_adamw, load_state, stored
from training.check_result import FAILS, OK, Result
from training.quick_check import EPS, ROUNDINGS

STEPS = 3  # of a run of the check
ELEMENTS = 2**22  # of a tensor that are looked at, evenly spaced
# Relative error of a tensor's move that is not rounding. With moments of 8 bits it is larger.
MOVE_ERROR, MOVE_ERROR_6N = 0.01, 0.1


def checkpoint_of(run: Path, step: int) -> Path:
    """Return the directory of the checkpoint of a step, which may not exist."""
    return run / "checkpoints" / checkpoint_name(step)


class Moved(NamedTuple):
    """How far one tensor moved in steps 2 and 3, compared with AdamW's prediction.

    betas: the second moment's estimate of step 1's squared gradient, divided by the first moment's estimate; 1 if the betas are
    right. sums: `(2, 3)` in fp64, sums over the elements of (move x prediction, prediction squared, variance of the first by
    rounding). The first row predicts the whole move from the stored moments, the second a weight decay of 1 alone.
    """

    name: str
    is_matrix: bool
    is_adamw: bool
    changed: int  # elements that moved
    betas: float
    sums: torch.Tensor


def fit(sums: torch.Tensor) -> tuple[float, float]:
    """Return (move as a multiple of the prediction, its standard deviation by rounding) of a row of `Moved.sums`, or of a total."""
    along, square, variance = sums.tolist()
    return (along / square, math.sqrt(variance) / square) if square else (1.0, 0.0)


def measure_moves(run: Path, settings: Mapping, rates: Mapping[int, float], names: Sequence[str]) -> list[Moved]:
    """Measure how the tensors `names` moved. settings: the run's section `optimizer`. rates: the learning rate by step."""
    (beta1, beta2), moves = settings["betas"], list[Moved]()
    checkpoints = [checkpoint_of(run, step) for step in range(1, STEPS + 1)]
    by_adamw = is_adamw(checkpoints[0])
    peaks = read_manifest(checkpoints[0])["values"]["optimizer"]["peaks"]  # by make_optimizer's groups
    for name in names:
        is_matrix = decays(name, len(stored(checkpoints[0]).shapes[WEIGHTS + name]))
        states = [_sampled(load_state(checkpoint, name)) for checkpoint in checkpoints]
        has_moments = by_adamw and all(key in states[0] for key in MOMENTS)
        changed, betas, sums = 0, 1.0, torch.zeros(2, 3, dtype=torch.float64)
        if has_moments and (square := float((states[0]["exp_avg"].double() / (1 - beta1)).square().sum())):
            betas = float(states[0]["exp_avg_sq"].double().sum()) / (1 - beta2) / square
        for step, (before, after) in enumerate(itertools.pairwise(states), 2):
            old, rate = before["weight"].double(), rates[step] * peaks[name] / settings["learning_rate"]
            move = old - after["weight"].double()
            changed += int(move.count_nonzero())
            if not has_moments:
                continue
            first, second = (
                after[key].double() / (1 - beta**step) for key, beta in zip(MOMENTS, (beta1, beta2), strict=True)
            )
            by_moments, by_decay = rate * first / (second.sqrt() + settings["eps"]), rate * old
            predicted = by_moments + settings["weight_decay"] * is_matrix * by_decay
            gap = ulp(before["weight"]).double()
            # The variance of stochastic rounding to a gap. Rounding to nearest has less, unless it loses the whole update.
            variance = gap * torch.minimum(predicted.abs(), gap / 4)
            for row, part, expected in zip(sums, (move, move - by_moments), (predicted, by_decay), strict=True):
                row += torch.stack([part @ expected, expected @ expected, expected.square() @ variance])
        moves.append(Moved(name, is_matrix, has_moments, changed, betas, sums))
    return moves


def _sampled(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return at most ELEMENTS elements of each tensor."""
    stride = -(-state["weight"].numel() // ELEMENTS)
    return {key: value.flatten()[::stride].clone() for key, value in state.items()}


def ulp(weight: torch.Tensor) -> torch.Tensor:
    """Return the gap to the next larger magnitude in the dtype of `weight`, in fp32. For 0: the gap of the smallest normal number."""
    smallest = torch.finfo(weight.dtype).tiny
    _, exponent = torch.frexp(weight.float().abs().clamp(min=smallest))
    return torch.ldexp(torch.ones_like(weight, dtype=torch.float32), exponent + int(math.log2(EPS[weight.dtype])))


def judge_moves(settings: Mapping, rates: Mapping[int, float], peak: float, moves: Sequence[Moved]) -> Result:
    """Check that every trained tensor moved, and as AdamW predicts at the learning rate that was logged and set.

    settings: the run's section `optimizer`. rates: the logged learning rate by step. peak: optimizer.learning_rate of the config,
    which all three steps of a check have.
    """
    rate = max(rates.values())
    tolerance = MOVE_ERROR_6N if settings["memory"] == "6N" else MOVE_ERROR
    still = [moved.name for moved in moves if not moved.changed and (moved.sums[0, 1] or not moved.is_adamw)]
    total = sum((moved.sums[0] for moved in moves), torch.zeros(3))
    whole, noise = fit(total) if total[1] else (0.0, 0.0)  # moments that are all zero come from no gradient
    if still:
        text = (
            f"{len(still)} of {len(moves)} trained tensors did not move in steps 2 and 3, the first is {still[0]}: call optimizer.step() "
            "with every trained parameter, and with a learning rate that the dtype of the weights can hold"
        )
        return Result(FAILS, text)
    if rate > peak * (1 + 1e-6):
        return Result(FAILS, f"train/learning_rate is {rate:g}, more than optimizer.learning_rate={peak:g}")
    if not all(moved.is_adamw for moved in moves):
        text = (
            f"all {len(moves)} trained tensors moved, and only that was checked: the optimizer of this train.py is not AdamW, whose "
            "updates follow from the moments that it stores"
        )
        return Result(OK, text)
    betas = max((moved.betas for moved in moves), key=lambda ratio: abs(ratio - 1))
    if abs(betas - 1) > 0.02 + tolerance:
        text = f"the second moment is {betas:.3g} times what the first one says: the optimizer has other betas than optimizer.betas"
        return Result(FAILS, text)
    for is_matrix, expected, kind in (
        (True, settings["weight_decay"], "matrices"),
        (False, 0.0, "vectors (norms, biases)"),
    ):
        sums = sum((moved.sums[1] for moved in moves if moved.is_matrix == is_matrix), torch.zeros(3))
        decay, deviation = fit(sums)
        is_wrong = sums[1] and abs(decay - expected) > 0.005 + 0.2 * expected + ROUNDINGS * deviation
        if is_wrong and abs(whole - 1) < 0.2:  # a wrong learning rate would look like a wrong decay
            text = f"{kind} shrink by a weight decay of {decay:.3g}, where {expected:g} is expected (optimizer.weight_decay, on matrices only)"
            return Result(FAILS, text)
    ratios = {moved.name: fit(moved.sums[0]) for moved in moves}
    wrong = [name for name, (ratio, deviation) in ratios.items() if abs(ratio - 1) > tolerance + ROUNDINGS * deviation]
    if wrong or abs(whole - 1) > tolerance + ROUNDINGS * noise:
        worst = max(wrong or ratios, key=lambda name: abs(ratios[name][0] - 1))
        text = (
            f"{len(wrong)} of {len(moves)} tensors moved otherwise than AdamW's stored moments say at learning rate {rate:g}, {worst} "
            f"{ratios[worst][0]:.3g} times as far: set the rate in every group before optimizer.step(), call it once a step, clip "
            "gradients and not updates, and see that the dtype of the weights holds an update of this size (optimizer.memory=16N)"
        )
        return Result(FAILS, text)
    text = f"all {len(moves)} tensors moved {whole:.3f} times as far as AdamW's stored moments say at learning rate {rate:g}"
    return Result(OK, text)
