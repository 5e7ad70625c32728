"""Differences between training recipes: how they vary with seeds and examples, and the few that are declared as primary.

A recipe's score varies with the seed of its training and with the examples of its test; every seed answers every example, so
the two are crossed. The variance of a difference is the sum of two parts. The part of the examples comes from the bootstrap of
the mean over seeds, in which an example is drawn for both recipes together; the part of the seeds is their sample variance.
Both parts contain the interaction, so the sum is a little too large. A bootstrap that draws both at once contains it three times
(Owen 2007, https://doi.org/10.1214/07-AOAS122), and its percentiles are too narrow with three seeds. The quantiles are
Student's with the degrees of freedom of the seeds alone: three seeds that happen to be alike do not show that seeds matter
little.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import variance
from typing import TypeVar

from scipy import stats

from common.errors import UserError
from eval.bootstrap import Interval
from eval.comparison.arms import Source
from eval.intervals import Terms, Z

MAX_CONTRASTS = 3  # primary contrasts of a comparison
Key = TypeVar("Key")


@dataclass(frozen=True)
class Contrast:
    """A difference that was declared before the data were looked at: row `of` less row `against`, in a metric.

    paired: by seed; the n-th runs of both arms go together. margin: the recipes are equivalent if they differ by less; None
    if equivalence is not tested.
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
    """Return the contrasts of --primary and --primary-paired, each (of, against, metric), with --margin METRIC=NUMBER.

    Raise UserError for a contrast that cannot be tested.
    """
    limits = dict(map(_margin, margins))
    contrasts = [
        Contrast(of, against, metric, by_seed, limits.get(metric))
        for by_seed, entries in ((False, primary), (True, paired))
        for of, against, metric in entries
    ]
    if len(contrasts) > MAX_CONTRASTS:
        raise UserError(
            f"{len(contrasts)} contrasts are declared, and {MAX_CONTRASTS} are the most: what matters most is primary, and the "
            "tables describe the rest"
        )
    for metric in limits.keys() - {contrast.metric for contrast in contrasts}:
        raise UserError(f"--margin {metric} is of no declared contrast; declare one with --primary OF AGAINST {metric}")
    for contrast in contrasts:
        sides = contrast.of, contrast.against
        runs = [arms.get(name, ()) for name in sides]
        for name, runs_of_side in zip(sides, runs, strict=True):
            if len(runs_of_side) == 1:
                raise UserError(
                    f"{name} has one seed, which shows nothing of its recipe: a primary contrast needs two or more, "
                    f"{name}=RUN,RUN"
                )
        if contrast.of == contrast.against or not any(runs):
            raise UserError(f"--primary {' '.join(sides)}: name two rows, of which one is an arm: {', '.join(arms)}")
        seeds = [[source.setting("run", "seed") for source in runs_of_side] for runs_of_side in runs]
        pairs = [pair for pair in zip(*seeds, strict=False) if None not in pair]
        if contrast.paired and (len(runs[0]) != len(runs[1]) or any(first != second for first, second in pairs)):
            listed = [
                ", ".join("?" if seed is None else str(seed) for seed in seeds_of_side) for seeds_of_side in seeds
            ]
            raise UserError(
                f"--primary-paired {' '.join(sides)}: name a run of each seed for both, in the same order; the seeds are "
                f"{listed[0]} and {listed[1] or 'none'}"
            )
    return contrasts


def _margin(text: str) -> tuple[str, float]:
    metric, _, number = text.partition("=")
    with suppress(ValueError):
        if 0 < float(number) < math.inf:
            return metric, float(number)
    raise UserError(f"--margin {text} must be METRIC=NUMBER, the number above 0: f1=0.05")


@dataclass(frozen=True)
class Estimate:
    """A difference between two recipes. below, above: (standard error, degrees of freedom) on either side of the value."""

    value: float
    below: tuple[float, float]
    above: tuple[float, float]
    bounded: bool = False

    def interval(self, level: float = 0.95) -> Interval:
        """Return Student's interval, cut at -1 and 1 for a metric between 0 and 1."""
        low, high = (
            self.value + sign * error * float(stats.t.ppf((1 + level) / 2, df))
            for sign, (error, df) in ((-1, self.below), (1, self.above))
        )
        return Interval(self.value, max(-1.0, low), min(1.0, high)) if self.bounded else Interval(self.value, low, high)

    @property
    def p(self) -> float:
        """The two-sided p-value of no difference: below 0.05 exactly if the interval excludes 0."""
        return 2 * _tail(abs(self.value), self.below if self.value > 0 else self.above)

    def p_equivalence(self, margin: float) -> float:
        """Return the p-value of a difference of `margin` or more, by two one-sided tests.

        It is below 0.05 exactly if the 90% interval lies inside the margin.
        """
        return max(_tail(margin + self.value, self.below), _tail(margin - self.value, self.above))


def _tail(distance: float, side: tuple[float, float]) -> float:
    """Return the probability that chance alone exceeds `distance`. side: (standard error, degrees of freedom)."""
    error, df = side
    if error == 0:
        return 0.5 if distance == 0 else float(distance < 0)
    return float(stats.t.sf(distance / error, df))


def knows_seeds(before: Terms, after: Terms) -> bool:
    """Return whether the spread over seeds is known: at least one side is trained, and no side has a single seed."""
    values = (*before.seeds, *after.seeds)
    return bool(values) and all(map(math.isfinite, values)) and 1 not in (len(before.seeds), len(after.seeds))


def over_seeds(over_examples: Interval, before: Terms, after: Terms, paired: bool = False) -> Estimate:
    """Return the estimated difference between two recipes, which varies with seeds and examples.

    over_examples: how the change between these very runs varies with the examples (`eval.intervals.change`). A side without
    seeds is not trained and does not vary with them. paired: the n-th seeds of both sides go together, and their common part is
    not in the difference's variance. The degrees of freedom are Welch's (1947, https://doi.org/10.2307/2332510), and at most
    those of the examples' clusters.
    """
    of_seeds, df = _spread(before.seeds, after.seeds, paired)
    df = max(1.0, min(df, after.n - 1))
    value = over_examples.value
    below, above = (
        math.hypot((bound - value) / Z, math.sqrt(of_seeds)) for bound in (over_examples.low, over_examples.high)
    )
    return Estimate(value, (below, df), (above, df), before.bounded and after.bounded)


def _spread(before: Sequence[float], after: Sequence[float], paired: bool) -> tuple[float, float]:
    """Return (variance of the difference of two means, its degrees of freedom). A side without values does not vary."""
    sides = [values for values in (before, after) if values]
    if paired:
        sides = [[second - first for first, second in zip(before, after, strict=True)]]
    spreads = [(variance(values) / len(values), len(values) - 1) for values in sides]
    total = sum(part for part, _ in spreads)
    return total, total**2 / sum(part**2 / df for part, df in spreads) if total else sum(df for _, df in spreads)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Correct the p-values of one family of tests: at 0.05 a false finding in the family has a probability of at most 5%.

    Holm (1979, https://www.jstor.org/stable/4615733): the smallest is multiplied by the number of tests, the next by that number
    less 1, and so on; none is smaller than its predecessor, and none exceeds 1. The tests may depend on each other in any way.
    """
    corrected, largest = dict(p_values), 0.0
    for rank, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        corrected[key] = largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[key]))
    return corrected
