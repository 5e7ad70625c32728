"""Differences between training recipes: the spread over seeds is part of their uncertainty."""

import math
from statistics import variance

from scipy import stats

from eval.bootstrap import Interval
from eval.intervals import Terms, Z


def knows_seeds(before: Terms, after: Terms) -> bool:
    """Whether the spread over seeds is known: for each side that is trained, of which there is at least one."""
    values = (*before.seeds, *after.seeds)
    return bool(values) and all(map(math.isfinite, values)) and 1 not in (len(before.seeds), len(after.seeds))


def over_seeds(found: Interval, p: float, before: Terms, after: Terms) -> tuple[Interval, float]:
    """The interval and the two-sided p-value of a change between two recipes.

    found, p: how the change between these very models varies with the reports (`change`, `exchange_test`). The variance of the
    mean over the seeds of each side is added to that of the reports. A side without seeds is not trained and has none. All
    variances are estimates, so the quantiles are of Student's t with the degrees of freedom of Satterthwaite (1946,
    https://doi.org/10.2307/3002019). The interaction of seed and report is in both variances, so the result is
    conservative where seeds hardly differ. The p-value is at least the given one.
    """
    spreads = [(variance(one.seeds) / len(one.seeds), len(one.seeds) - 1) for one in (before, after) if one.seeds]

    def side(bound: float) -> tuple[float, float]:
        """(standard error, degrees of freedom), as seen from one bound of the interval over the reports."""
        parts = [(((bound - found.value) / Z) ** 2, max(1, after.n - 1)), *spreads]
        total = sum(part for part, _ in parts)
        return math.sqrt(total), total**2 / max(sum(part**2 / df for part, df in parts), 1e-300)

    below, above = side(found.low), side(found.high)
    half = [error * float(stats.t.ppf(0.975, df)) if error else 0.0 for error, df in (below, above)]
    low, high = found.value - half[0], found.value + half[1]
    if after.bounded:
        low, high = max(-1.0, low), min(1.0, high)
    error, df = below if found.value > 0 else above
    if error:
        p = max(p, float(2 * stats.t.sf(abs(found.value) / error, df)))
    return Interval(found.value, low, high), p
