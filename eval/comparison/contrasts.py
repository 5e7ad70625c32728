"""Differences between training recipes: how they vary with seeds and examples, and the few that are declared as primary.

A recipe's score varies with the seed of its training and with the examples of its test; every seed answers every example, so
the two are crossed. The variance of a difference is the sum of what either of them makes alone: over examples by the bootstrap
of the mean over seeds, in which an example is drawn for both recipes together, and over seeds by their sample variance. The
interaction of both is in either part, so the sum is a little too large; the bootstrap that draws both at once has it three
times (Owen 2007, https://doi.org/10.1214/07-AOAS122), and its percentiles are too narrow with three seeds. The quantiles are
Student's with the degrees of freedom of the seeds alone: three seeds that happen to be alike do not show that seeds matter
little.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean, variance
from typing import TypeVar

from scipy import stats

from common.errors import UserError
from eval.bootstrap import Interval
from eval.comparison.arms import Source
from eval.intervals import Terms, Z

MOST = 3  # primary contrasts of a comparison
Key = TypeVar("Key")


@dataclass(frozen=True)
class Contrast:
    """A difference that was declared before a look at it: `of` less `against`, names of rows, in a metric.

    paired: by seed; the runs of both arms then go together in the order in which they are named. margin: the recipes are
    equivalent if they differ by less; None: that is not asked.
    """

    of: str
    against: str
    metric: str
    paired: bool = False
    margin: float | None = None


def declare(
    primary: Sequence[Sequence[str]],
    paired: Sequence[Sequence[str]],
    margins: Sequence[str],
    arms: Mapping[str, Sequence[Source]],
) -> list[Contrast]:
    """The contrasts of --primary and --primary-paired, each (of, against, metric), with --margin METRIC=NUMBER.

    Raises UserError for what cannot be tested.
    """
    limits = dict(map(_margin, margins))
    found = [
        Contrast(of, against, metric, by_seed, limits.get(metric))
        for by_seed, asked in ((False, primary), (True, paired))
        for of, against, metric in asked
    ]
    if len(found) > MOST:
        raise UserError(
            f"{len(found)} contrasts are declared, and {MOST} are the most: what matters most is primary, and the tables "
            "describe the rest"
        )
    for metric in limits.keys() - {one.metric for one in found}:
        raise UserError(f"--margin {metric} is of no declared contrast; declare one with --primary OF AGAINST {metric}")
    for one in found:
        runs = [arms.get(name, ()) for name in (one.of, one.against)]
        for name, of_arm in zip((one.of, one.against), runs, strict=True):
            if len(of_arm) == 1:
                raise UserError(
                    f"{name} has one seed, which shows nothing of its recipe: a primary contrast needs two or more, "
                    f"{name}=RUN,RUN"
                )
        if one.of == one.against or not any(runs):
            raise UserError(
                f"--primary {one.of} {one.against}: name two rows, of which one is an arm: {', '.join(arms)}"
            )
        seeds = [[source.setting("run", "seed") for source in of_arm] for of_arm in runs]
        known = [pair for pair in zip(*seeds, strict=False) if None not in pair]
        if one.paired and (len(runs[0]) != len(runs[1]) or any(first != second for first, second in known)):
            listed = [", ".join("?" if seed is None else str(seed) for seed in of_arm) for of_arm in seeds]
            raise UserError(
                f"--primary-paired {one.of} {one.against}: name a run of each seed for both, in the same order; the seeds are "
                f"{listed[0]} and {listed[1] or 'none'}"
            )
    return found


def _margin(text: str) -> tuple[str, float]:
    metric, _, number = text.partition("=")
    with suppress(ValueError):
        if 0 < float(number) < math.inf:
            return metric, float(number)
    raise UserError(f"--margin {text} must be METRIC=NUMBER, the number above 0: f1=0.05")


@dataclass(frozen=True)
class Estimate:
    """A difference between two recipes. below, above: its standard error and degrees of freedom on either side."""

    value: float
    below: tuple[float, float]
    above: tuple[float, float]
    bounded: bool = False

    def interval(self, level: float = 0.95) -> Interval:
        """Student's interval; of a metric between 0 and 1 it ends at -1 and 1."""
        low, high = (
            self.value + sign * error * float(stats.t.ppf((1 + level) / 2, df))
            for sign, (error, df) in ((-1, self.below), (1, self.above))
        )
        return Interval(self.value, max(-1.0, low), min(1.0, high)) if self.bounded else Interval(self.value, low, high)

    @property
    def p(self) -> float:
        """Two-sided, of no difference: below 0.05 exactly where the interval is without 0."""
        return 2 * _tail(abs(self.value), self.below if self.value > 0 else self.above)

    def p_equivalence(self, margin: float) -> float:
        """Of a difference of `margin` or more, by two one-sided tests: below 0.05 where the 90% interval is inside the margin."""
        return max(_tail(margin + self.value, self.below), _tail(margin - self.value, self.above))


def _tail(distance: float, side: tuple[float, float]) -> float:
    """The probability that chance alone is larger than `distance`."""
    error, df = side
    if error == 0:
        return 0.5 if distance == 0 else float(distance < 0)
    return float(stats.t.sf(distance / error, df))


def knows_seeds(before: Terms, after: Terms) -> bool:
    """Whether the spread over seeds is known: for each side that is trained, of which there is at least one."""
    values = (*before.seeds, *after.seeds)
    return bool(values) and all(map(math.isfinite, values)) and 1 not in (len(before.seeds), len(after.seeds))


def over_seeds(found: Interval, before: Terms, after: Terms, paired: bool = False) -> Estimate:
    """The difference between two recipes.

    found: how the change between these very runs varies with the examples (`eval.intervals.change`). A side without seeds is
    not trained and does not vary with them. paired: the n-th seeds of both sides go together, and what they share is no part
    of the difference's variance. The degrees of freedom are Welch's (1947, https://doi.org/10.2307/2332510), and at most those
    of the examples' clusters.
    """
    over, df = _spread(before.seeds, after.seeds, paired)
    df = max(1.0, min(df, after.n - 1))
    below, above = (math.hypot((bound - found.value) / Z, math.sqrt(over)) for bound in (found.low, found.high))
    return Estimate(found.value, (below, df), (above, df), before.bounded and after.bounded)


def between_seeds(before: Sequence[float], after: Sequence[float], paired: bool) -> Estimate:
    """The difference between the means of two recipes by their seeds alone: the paired t-test, or Welch's."""
    over, df = _spread(before, after, paired)
    side = math.sqrt(over), df
    return Estimate(fmean(after) - fmean(before), side, side)


def _spread(before: Sequence[float], after: Sequence[float], paired: bool) -> tuple[float, float]:
    """(variance of the difference of two means, its degrees of freedom). A side without values does not vary."""
    values = [one for one in (before, after) if one]
    if paired:
        values = [[second - first for first, second in zip(before, after, strict=True)]]
    spreads = [(variance(of_side) / len(of_side), len(of_side) - 1) for of_side in values]
    over = sum(part for part, _ in spreads)
    return over, over**2 / sum(part**2 / df for part, df in spreads) if over else sum(df for _, df in spreads)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """The p-values of one family of tests, corrected so that one false finding in the family has at most 5% at 0.05.

    Holm (1979, https://www.jstor.org/stable/4615733): the smallest is multiplied by the number of tests, the next by one
    less, and so on; none is below the one before it, and none above 1. It assumes nothing of how the tests depend.
    """
    corrected, largest = dict(p_values), 0.0
    for rank, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        corrected[key] = largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[key]))
    return corrected
