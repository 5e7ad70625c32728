"""The global gradient norm, clipping and the detection of spikes."""

import statistics
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from common.torch_private import private
from distributed.sharding import local, sum_over_shards

foreach_norm = private("_foreach_norm")  # on a GPU, one launch for many tensors

NORM_HISTORY = 128  # gradient norms in the history to which a norm is compared
MIN_HISTORY = 64  # norms before the first spike can be detected
NORM_ELEMENTS = 2**20  # elements per partial norm, which is exact to 1e-5


def gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    """Return the gradient. After a backward every parameter has one, also on a rank whose micro-batch has no target."""
    assert parameter.grad is not None
    return parameter.grad


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Return the Euclidean norm of all gradients together, fp32 scalar, equal on every rank. A collective. It does not clip.

    torch's `get_total_norm` computes in the dtype of the gradients, which is too coarse in bf16. On a CPU torch sums the squares
    of a tensor sequentially: the norm of an embedding with 156M elements would be 2% too small. Hence partial norms of
    `NORM_ELEMENTS` elements.
    """
    gradients = [gradient_of(parameter) for parameter in parameters]
    parts = [part for gradient in gradients for part in local(gradient).flatten().split(NORM_ELEMENTS)]
    norms = foreach_norm(parts, 2, dtype=torch.float32)
    return sum_over_shards(torch.stack(norms).square().sum(), gradients[0]).sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: float) -> None:
    """Scale this rank's gradients so that the global norm is at most `max_norm`. `norm` is a finite `gradient_norm`."""
    if norm > max_norm:
        for parameter in parameters:
            local(gradient_of(parameter)).div_(norm / max_norm)


def is_spike(norms: Sequence[float], grad_norm: float, limit: float | None) -> bool:
    """Return whether `grad_norm` is more than `limit` standard deviations above the mean of the last `NORM_HISTORY` finite norms.

    `limit` is optimizer.skip_spikes; None disables the check. `norms` must also have the norms of skipped steps, so that the mean
    follows a lasting change (as in OLMo-core's SkipStepOptimizer, https://github.com/allenai/OLMo-core).
    """
    history = norms[-NORM_HISTORY:]
    if limit is None or len(history) < MIN_HISTORY:
        return False
    return grad_norm > statistics.fmean(history) + limit * statistics.pstdev(history)
