import itertools
import math

import numpy as np
import pytest
from scipy import stats

from eval.intervals import Terms, ratio
from eval.permutation import enough_exchanges, exchange_test, holm


def scores(values, clusters=None):
    """The mean of one score per report."""
    rows = np.array([[value, 1.0] for value in values])
    return Terms(rows, range(len(values)) if clusters is None else clusters, ratio)


def f1(counts):
    """F1 from (found, predicted, true) of each report."""
    rows = np.array([[2 * found, said + true] for found, said, true in counts], dtype=float)
    return Terms(rows, range(len(counts)), ratio)


def test_few_clusters_are_enumerated():
    assert exchange_test(scores([1, 1, 1]), scores([0, 0, 0])) == 2 / 8  # only the two with all signs equal
    # Differences 3, 1, 1: |sum| is at least 3 for +++ and ---, ++- and --+, +-+ and -+-.
    assert exchange_test(scores([3, 1, 1]), scores([0, 0, 0])) == 2 / 8
    assert exchange_test(scores([3, 1, -1]), scores([0, 0, 0])) == 6 / 8
    assert exchange_test(scores([1, 0, 1]), scores([1, 0, 1])) == 1
    assert exchange_test(scores([1] * 8 + [5] * 400), scores([0] * 8 + [5] * 400)) == 2 / 2**8  # equal ones say nothing


def test_the_p_value_of_a_mean_is_that_of_scipys_exact_test():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=9), rng.normal(size=9) + 0.6
    expected = stats.permutation_test((one, other), lambda x, y: np.mean(x - y), permutation_type="samples").pvalue
    assert exchange_test(scores(one), scores(other)) == pytest.approx(expected)


def test_f1_is_computed_anew_for_every_exchange():
    one = [(1, 1, 1), (0, 2, 1), (2, 2, 3), (1, 1, 2), (0, 1, 0)]
    other = [(0, 1, 1), (1, 1, 1), (3, 3, 3), (2, 2, 2), (0, 0, 0)]
    found = []
    for swaps in itertools.product((False, True), repeat=5):
        sides = [(b, a) if swap else (a, b) for a, b, swap in zip(one, other, swaps, strict=True)]
        found.append(abs(f1([side[0] for side in sides]).value - f1([side[1] for side in sides]).value))
    expected = sum(value >= found[0] - 1e-12 for value in found) / 32
    assert 0.1 < expected < 1
    assert exchange_test(f1(one), f1(other)) == expected


def test_reports_of_one_bank_are_exchanged_together():
    right, wrong = [1.0] * 12, [0.0] * 12
    banks = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    assert exchange_test(scores(right), scores(wrong)) == 2 / 2**12
    assert exchange_test(scores(right, banks), scores(wrong, banks)) == 2 / 2**3


def test_many_clusters_are_sampled():
    assert exchange_test(scores([1] * 40), scores([0] * 40)) == 1 / 10_001  # never 0
    sign_test = stats.binomtest(15, 20).pvalue  # 15 of 20 differences of equal size are positive
    found = exchange_test(scores([1] * 15 + [0] * 5), scores([0] * 15 + [1] * 5))
    assert found == pytest.approx(sign_test, abs=0.006)
    assert found == exchange_test(scores([1] * 15 + [0] * 5), scores([0] * 15 + [1] * 5))  # the same on every call
    assert exchange_test(scores([1] * 15 + [0] * 5), scores([0] * 15 + [1] * 5), resamples=25_000) != found


def test_holms_correction():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert list(holm({"b": 0.5, "a": 0.6})) == ["b", "a"] and holm({"b": 0.5, "a": 0.6}) == {"b": 1, "a": 1}
    assert holm({}) == {} and holm({"alone": 0.03}) == {"alone": 0.03}


def test_a_large_family_gets_enough_exchanges_to_show_anything():
    for tests in (1, 24, 840, 5000):
        smallest = 1 / (enough_exchanges(tests) + 1)
        assert smallest * tests <= 0.0101


def test_a_result_that_is_not_finite_shows_nothing():
    assert exchange_test(scores([1.0] * 8), scores([math.nan] * 8)) == 1.0
    assert exchange_test(scores([1.0] * 20), scores([0.0] * 19 + [math.inf])) == 1.0


def test_the_observed_exchange_counts_whatever_the_size_of_the_values():
    """Sums of large values in another order differ in their last digits."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        one, other = ([[value, 3.0] for value in 1e6 * (rng.normal(size=8) + shift)] for shift in (0, 20))
        assert exchange_test(*(Terms(np.array(rows), range(8), ratio, False) for rows in (one, other))) == 2 / 2**8


def test_equal_recipes_are_found_to_differ_in_at_most_5_of_100_tests():
    """Reports of one bank are alike, which a test over reports would take for evidence: it finds 16 differences in 100."""
    rng, found = np.random.default_rng(0), {"banks": 0, "reports": 0}
    banks = np.repeat(np.arange(12), 6)
    for _ in range(300):
        one, other = (rng.normal(size=72) + rng.normal(size=12)[banks] for _ in range(2))
        found["banks"] += exchange_test(scores(one, list(banks)), scores(other, list(banks))) < 0.05
        found["reports"] += exchange_test(scores(one), scores(other), resamples=400) < 0.05
    assert 4 <= found["banks"] <= 25 < 45 <= found["reports"]  # of 300: 15 are expected
