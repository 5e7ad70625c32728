"""An upper bound of a mean that holds for every number of independent samples, from a bet against larger means.

A gambler against a mean of m or more, of values in [-1, 1], starts with 1 and multiplies the capital by 1 + bet * (m - value) at each
value. If the mean is m or more, the expected capital is at most 1, so it exceeds 1 / (1 - LEVEL) with a probability of at most 1 - LEVEL
(Waudby-Smith and Ramdas, arXiv:2010.09686, with constant bets). The smallest m of 0 or more at which it does is the bound. The
values may have any distributions, even different ones, but must be independent. The same holds for the mean capital of several bets.

Nothing bounds a KL, so a value above `cap` counts as `cap`, and the bound is that of the mean of min(value, cap). Values above the
cap that are rarer than 3 in `count` may be missing from the sample.
"""

import math
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95  # probability that the mean is within its bound, for each mean alone
BET = 0.95  # near 1, because a budget is a small share of the cap; below 1, so that no value ruins the gambler
# For values that spread widely around their mean: only a small bet wins against such a spread.
BETS = (0.05, 0.1, 0.2, 0.4, 0.95)
CAP = 4  # times the budget: a KL above it counts as this much
METHOD = "betting bound of the mean (arXiv:2010.09686); alphas tested in a fixed order (arXiv:2110.01052)"


@dataclass(frozen=True)
class BoundedMean:
    """The mean of some values, its upper bound at LEVEL (at least the mean), their number, and how many exceed the cap."""

    mean: float
    bound: float
    count: int
    above_cap: int


def bounded_mean(values: np.ndarray, cap: float, bets: tuple[float, ...] = (BET,)) -> BoundedMean:
    """Return the mean of `values`, -cap or more, with its bound. Without values, and if one is not a number, it is NaN."""
    shares = np.clip(values / cap, -1, 1)

    def capital(share: float) -> float:
        """Return the logarithm of the mean capital, over the bets, against means of `share` of the cap or more."""
        logs = [np.log1p(bet * (share - shares)).sum() - math.log(len(bets)) for bet in bets]
        with np.errstate(invalid="ignore"):  # a value that is not a number makes a mean that is none
            return float(np.logaddexp.reduce(logs))

    low, high = 0.0, 1.0  # if the capital does not suffice even at 1, the bound is the cap
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if capital(middle) >= -math.log(1 - LEVEL) else (middle, high)
    mean = float(values.mean()) if len(values) else math.nan
    return BoundedMean(mean, float(np.maximum(mean, high * cap)), len(values), int((values > cap).sum()))
