"""The global gradient norm, clipping and spikes."""

import statistics
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from distributed.sharding import local, sum_over_shards

WINDOW = 128  # gradient norms in the history from which a spike is told
MIN_HISTORY = 64  # norms before the first spike can be told
NORM_ELEMENTS = 2**20  # of a tensor, whose norm is then exact to 1e-5


def gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    """The gradient, which every parameter has after a backward, also on a rank whose micro-batch has no target."""
    assert parameter.grad is not None
    return parameter.grad


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Euclidean norm of all gradients together, fp32 scalar, the same on every rank. A collective; clips nothing.

    torch's `get_total_norm` computes in the dtype of the gradients, which is too coarse in bf16. On a CPU torch adds up the
    squares of a tensor one by one: of 156M elements, an embedding's, the norm would be 2% too small.
    """
    gradients = [gradient_of(parameter) for parameter in parameters]
    parts = [part for gradient in gradients for part in local(gradient).flatten().split(NORM_ELEMENTS)]
    norms = torch._foreach_norm(parts, 2, dtype=torch.float32)
    return sum_over_shards(torch.stack(norms).square().sum(), gradients[0]).sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: float) -> None:
    """Scale this rank's gradients so that their global norm is at most `max_norm`. `norm`: `gradient_norm`, finite."""
    if norm > max_norm:  # divided: torch 2.13 rounds the factor of `_foreach_mul_` to bf16 for bf16 on a CPU
        torch._foreach_div_([local(gradient_of(parameter)) for parameter in parameters], norm / max_norm)


def is_spike(norms: Sequence[float], grad_norm: float, limit: float | None) -> bool:
    """Whether `grad_norm` is more than `limit` standard deviations above the mean of the last `WINDOW` finite norms.

    `limit` is optimizer.skip_spikes; None: never. Skipped spikes belong into the history too, so that a lasting change is followed
    (as in OLMo-core's SkipStepOptimizer, https://github.com/allenai/OLMo-core).
    """
    history = norms[-WINDOW:]
    if limit is None or len(history) < MIN_HISTORY:
        return False
    return grad_norm > statistics.fmean(history) + limit * statistics.pstdev(history)
