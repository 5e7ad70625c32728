"""Percentile intervals by the bootstrap (Efron, 1979): how far a figure would move if other documents had been drawn."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A figure of all units, and where it lies in 95% of the resamples."""

    value: float
    low: float
    high: float


def bootstrap(
    values: np.ndarray, figures: Callable[[np.ndarray], dict[str, np.ndarray]], seed: int = 0, draws: int = 10_000
) -> dict[str, Interval]:
    """Intervals of figures that are functions of sums over units (documents, questions).

    values: `(units, columns)`, what each unit adds to each sum. figures: from sums `(..., columns)` to `(...)` by name, e.g.
    a ratio of two columns. Units are drawn with replacement, whole: columns of two models stay paired, so the interval of
    a difference is that of the paired difference.
    """
    units = len(values)
    weights = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=draws)
    resampled = figures(weights @ values)
    return {
        name: Interval(float(value), *(float(edge) for edge in np.percentile(resampled[name], (2.5, 97.5))))
        for name, value in figures(values.sum(axis=0)).items()
    }
