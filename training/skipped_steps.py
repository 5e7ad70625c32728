"""Whether a step's gradient norm is a spike: far above those of the steps before it."""

import statistics
from collections.abc import Sequence

WINDOW = 128  # gradient norms in the history from which a spike is told
MIN_HISTORY = 64  # norms before the first spike can be told


def is_spike(norms: Sequence[float], grad_norm: float, limit: float | None) -> bool:
    """Whether `grad_norm` is more than `limit` standard deviations above the mean of the last `WINDOW` finite norms.

    `limit` is optimizer.skip_spikes; None: never. The norms of skipped spikes belong into the history too, so that a lasting
    change of the norm is followed (as in OLMo-core's SkipStepOptimizer, https://github.com/allenai/OLMo-core).
    """
    history = norms[-WINDOW:]
    if limit is None or len(history) < MIN_HISTORY:
        return False
    return grad_norm > statistics.fmean(history) + limit * statistics.pstdev(history)
