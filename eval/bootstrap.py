"""Percentile bootstrap confidence intervals (Efron, 1979): how a metric varies with the sample of documents."""

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

PART = 2**24  # draws that are in memory as floats at a time


@dataclass(frozen=True)
class Interval:
    """A metric over all units, with the bounds of its 95% confidence interval."""

    value: float
    low: float
    high: float


def bootstrap(
    values: np.ndarray,
    metrics: Callable[[np.ndarray], dict[str, np.ndarray]],
    resamples: int = 10_000,
    clusters: Sequence[Hashable] | None = None,
) -> dict[str, Interval]:
    """Return the confidence intervals of metrics that are functions of sums over units (documents, questions).

    values: `(units, columns)`, the contribution of each unit to each sum. metrics: maps sums `(..., columns)` to named
    metrics `(...)`, e.g. the ratio of two columns. Units are resampled with replacement. All columns of a unit stay
    together, so if two models each have their columns, the interval of their difference is a paired one. clusters: one key
    per unit; units with the same key (documents by one author) are drawn together, because they are alike. Resamples in
    which a metric is not a number (the recall of a label that was not drawn) are left out of its interval.
    """
    if clusters is not None:
        values = sum_clusters(values, clusters)
    draws = _draws(len(values), resamples)
    resampled = metrics(np.concatenate([draws[part].astype(float) @ values for part in _parts(draws)]))
    return {
        name: Interval(float(value), *_percentiles(resampled[name]))
        for name, value in metrics(values.sum(axis=0)).items()
    }


def sum_clusters(values: np.ndarray, clusters: Sequence[Hashable]) -> np.ndarray:
    """Return the sums over the units of each cluster, `(clusters, columns)`, in the order in which the clusters occur."""
    number = {key: i for i, key in enumerate(dict.fromkeys(clusters))}
    summed = np.zeros((len(number), values.shape[1]))
    np.add.at(summed, [number[key] for key in clusters], values)
    return summed


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    numbers = values[~np.isnan(values)]
    low, high = np.percentile(numbers, (2.5, 97.5)) if len(numbers) else (np.nan, np.nan)
    return float(low), float(high)


@functools.lru_cache(maxsize=1)  # several metrics of one result are resampled one after the other
def _draws(units: int, resamples: int) -> np.ndarray:
    """Return `(resamples, units)`: how often each resample draws each unit, in one byte each. The seed is fixed.

    A byte is enough: of 256 units or more, a unit is drawn 256 times with a probability below 1e-500.
    """
    draws = np.empty((resamples, units), np.uint8)
    generator = np.random.default_rng(0)
    for part in _parts(draws):
        draws[part] = generator.multinomial(units, np.full(units, 1 / units), size=len(draws[part]))
    return draws


def _parts(draws: np.ndarray) -> list[slice]:
    """Split the resamples into parts whose draws, as numbers of 8 bytes, take at most 8 * PART bytes."""
    rows = max(1, PART // draws.shape[1])
    return [slice(first, first + rows) for first in range(0, len(draws), rows)]
