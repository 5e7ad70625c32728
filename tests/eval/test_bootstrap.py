import numpy as np
import pytest

from eval.bootstrap import bootstrap


def mean_and_difference(sums):
    return {"a": sums[..., 0] / sums[..., 2], "difference": sums[..., 1] / sums[..., 2] - sums[..., 0] / sums[..., 2]}


def test_the_interval_of_a_mean_is_that_of_the_central_limit():
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    ones = np.ones_like(values)
    found = bootstrap(np.stack([values, values + 0.1, ones], axis=1), mean_and_difference)
    error = values.std() / 20
    assert found["a"].value == pytest.approx(values.mean())
    assert found["a"].low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found["a"].high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    # Paired: what all units have in common leaves no uncertainty in the difference.
    assert found["difference"].low == pytest.approx(0.1) == found["difference"].high


def test_ratios_are_of_sums_and_seeded():
    values = np.array([[10.0, 0, 2], [1.0, 0, 8]])
    found = bootstrap(values, mean_and_difference, seed=3)
    assert found["a"].value == pytest.approx(1.1)  # the mean of the units' ratios would be 2.56
    assert (found["a"].low, found["a"].high) == (0.125, 5.0)
    more = np.random.default_rng(0).random((30, 3))
    assert bootstrap(more, mean_and_difference, seed=3) == bootstrap(more, mean_and_difference, seed=3)
    assert bootstrap(more, mean_and_difference, seed=3) != bootstrap(more, mean_and_difference, seed=4)
