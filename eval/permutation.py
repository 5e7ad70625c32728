"""Paired tests by exchange: is the difference between two results larger than chance, and after many such questions?

Under the null hypothesis it does not matter which of two models gave an answer, so the answers of each cluster (all
reports of a bank) may be exchanged between them. The p-value is the share of the exchanges whose difference is at least as
large as the observed one, in either direction: approximate randomization (Noreen 1989; Yeh 2000,
https://aclanthology.org/C00-2137), which is valid for F1 too, where a t-test on means is not. Of the random exchanges the
observed one counts as one, so that no p-value is 0 (Phipson & Smyth 2010, https://doi.org/10.2202/1544-6115.1585).
"""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from eval.bootstrap import sum_clusters
from eval.intervals import Terms

EXACT = 13  # clusters that differ, up to which all 2^13 exchanges are counted; above, `resamples` random ones
BLOCK = 10_000  # exchanges at once: memory
TIE = 1e-12  # of the larger value: two differences this close are equal, the same sums in another order
Key = TypeVar("Key")


def exchange_test(one: Terms, other: Terms, seed: int = 0, resamples: int = 10_000) -> float:
    """The two-sided p-value of the difference of a metric between two results on the same units and clusters.

    Whole clusters are exchanged. Clusters in which both results are the same are left out: exchanging them changes nothing.
    1.0 if there is no difference at all, or one that is not finite.
    """
    first, second = (sum_clusters(terms.rows, one.clusters) for terms in (one, other))
    differ = (first != second).any(axis=1)
    middle, half = (first + second).sum(axis=0) / 2, (first - second)[differ] / 2
    count = int(differ.sum())
    observed = abs(one.value - other.value)
    tie = TIE * max(1.0, abs(one.value), abs(other.value))

    def as_large(signs: np.ndarray) -> int:
        moved = signs @ half
        return int((np.abs(one.metric(middle + moved) - other.metric(middle - moved)) >= observed - tie).sum())

    if not count or not np.isfinite(observed):
        return 1.0
    if count <= EXACT:
        return as_large(1.0 - 2.0 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)) / 2**count
    rng, found = np.random.default_rng(seed), 0
    for start in range(0, resamples, BLOCK):
        block = min(BLOCK, resamples - start)
        found += as_large(1.0 - 2.0 * rng.integers(0, 2, (block, count), dtype=np.int8))
    return (found + 1) / (resamples + 1)


def enough_exchanges(tests: int) -> int:
    """How many exchanges a family of `tests` needs: the smallest p-value, corrected, must be well below 0.05."""
    return max(10_000, 100 * tests)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """The p-values of one family of tests, corrected so that one false finding in the family has at most 5% at 0.05.

    Holm (1979, https://www.jstor.org/stable/4615733): the smallest is multiplied by the number of tests, the next by one
    less, and so on; none is below the one before it, and none above 1. It assumes nothing of how the tests depend.
    """
    corrected: dict[Key, float] = {}
    largest = 0.0
    for rank, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        corrected[key] = largest
    return {key: corrected[key] for key in p_values}
