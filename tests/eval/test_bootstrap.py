import numpy as np
import pytest

from eval.bootstrap import bootstrap


def mean_and_difference(sums):
    return {"a": sums[..., 0] / sums[..., 2], "difference": sums[..., 1] / sums[..., 2] - sums[..., 0] / sums[..., 2]}


def test_the_interval_of_a_mean_agrees_with_the_central_limit_theorem():
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    ones = np.ones_like(values)
    intervals = bootstrap(np.stack([values, values + 0.1, ones], axis=1), mean_and_difference)
    standard_error = values.std() / 20
    assert intervals["a"].value == pytest.approx(values.mean())
    assert intervals["a"].low == pytest.approx(values.mean() - 1.96 * standard_error, abs=0.1 * standard_error)
    assert intervals["a"].high == pytest.approx(values.mean() + 1.96 * standard_error, abs=0.1 * standard_error)
    # The bootstrap is paired: a difference that is the same for every unit has no uncertainty.
    assert intervals["difference"].low == pytest.approx(0.1) == intervals["difference"].high


def test_ratios_are_of_sums_and_depend_on_the_seed():
    values = np.array([[10.0, 0, 2], [1.0, 0, 8]])
    intervals = bootstrap(values, mean_and_difference, seed=3)
    assert intervals["a"].value == pytest.approx(1.1)  # the mean of the units' ratios would be 2.56
    assert (intervals["a"].low, intervals["a"].high) == (0.125, 5.0)
    more = np.random.default_rng(0).random((30, 3))
    assert bootstrap(more, mean_and_difference, seed=3) == bootstrap(more, mean_and_difference, seed=3)
    assert bootstrap(more, mean_and_difference, seed=3) != bootstrap(more, mean_and_difference, seed=4)


def test_units_of_one_cluster_are_drawn_together():
    values = np.array([[1.0, 0, 1], [1.0, 0, 1], [0.0, 0, 1]])
    together = bootstrap(values, mean_and_difference, clusters=["x", "x", "x"])["a"]
    assert (together.value, together.low, together.high) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert bootstrap(values, mean_and_difference, clusters=[1, 2, 3]) == bootstrap(values, mean_and_difference)
