"""Intervals of one evaluation, and of the change between two."""

import math
from dataclasses import astuple

import numpy as np
import pytest
from scipy import stats

from eval import bootstrap
from eval.intervals import Terms, change, interval, intervals, paired_change, ratio


def answer(true, predicted, rouge=0.5):
    return {"true": true, "predicted": predicted, "rouge_l": rouge}


def result(answers, losses=None):
    return {"answers": answers, "losses": losses or [[1.0, 2]] * len(answers)}


def test_changes_are_micro_averages_over_same_examples():
    before = [answer(["A", "B"], ["A"]), answer([], ["A"], 0.1), answer(["C"], None, 0.0)]
    after = [answer(["A", "B"], ["A", "B"], 0.9), answer([], [], 0.4), answer(["C"], ["A", "C"], 1.0)]
    losses = [[2.0, 4], [3.0, 1], [1.0, 5]], [[1.0, 4], [1.0, 1], [1.0, 5]]
    changes = paired_change(result(before, losses[0]), result(after, losses[1]))
    # before: TP 1 of 3 true and 2 predicted; after: TP 3 of 3 true and 4 predicted.
    assert changes["f1"].value == pytest.approx(6 / 7 - 2 / 5)
    assert changes["rouge_l"].value == pytest.approx((0.9 + 0.4 + 1.0) / 3 - (0.5 + 0.1 + 0.0) / 3)
    assert changes["loss"].value == pytest.approx(3 / 10 - 6 / 10)
    for bounds in changes.values():
        assert bounds.low <= bounds.value <= bounds.high


def test_identical_results_have_no_uncertainty():
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.7
    before = result([answer(["A"], ["A"] if r else [], float(r)) for r in right])
    assert paired_change(before, before)["f1"] == paired_change(before, before)["rouge_l"]
    assert (paired_change(before, before)["f1"].low, paired_change(before, before)["f1"].high) == (0, 0)
    other = rng.random(400) < 0.7
    after = result([answer(["A"], ["A"] if r else [], float(r)) for r in other])
    interval = paired_change(before, after)["rouge_l"]
    standard_error = np.std(other.astype(float) - right) / math.sqrt(400)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * standard_error, rel=0.05)


def test_only_metrics_that_both_results_have_are_compared():
    chats = result([{"rouge_l": 0.5, "answer": "yes"}])
    assert set(paired_change(chats, chats)) == {"rouge_l", "loss"}
    assert paired_change({"loss": 1.0}, chats) == {}  # the result has only texts, or is from an older version
    nothing = result([answer([], [])])
    assert paired_change(nothing, nothing)["f1"].value == 0  # there are no violations at all


def test_resamples_in_parts_are_the_same(monkeypatch):
    values = np.random.default_rng(1).integers(0, 9, size=(40, 2)).astype(float)

    def found():
        bootstrap._draws.cache_clear()
        return bootstrap.bootstrap(values, lambda sums: {"ratio": sums[..., 0] / sums[..., 1]}, resamples=300)["ratio"]

    whole = found()
    monkeypatch.setattr(bootstrap, "PART", 700)  # 17 resamples
    assert found() == whole
    draws = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), size=300)
    ratios = (draws @ values)[:, 0] / (draws @ values)[:, 1]
    assert (whole.low, whole.high) == tuple(np.percentile(ratios, (2.5, 97.5)))
    bootstrap._draws.cache_clear()


def test_reports_of_one_bank_are_drawn_together():
    rng = np.random.default_rng(1)
    of_bank = rng.random(60) < 0.6  # the eight reports of a bank are all right or all wrong
    of_banks = [answer(["A"], ["A"] if right else [], float(right)) | {"cluster": i} for i, right in enumerate(of_bank)]
    rows = of_banks * 8
    found = intervals(result(rows))["rouge_l"]
    standard_error = of_bank.std() / math.sqrt(60)
    assert found.high - found.low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)
    alone = intervals(result([{**row, "cluster": None} for row in rows]))["rouge_l"]
    assert (found.high - found.low) / (alone.high - alone.low) == pytest.approx(math.sqrt(8), rel=0.08)


def test_one_bank_or_one_example_has_no_interval():
    one, other = ([answer(["A"], said, rouge) for said, rouge in rows] for rows in ([(["A"], 0.4)], [([], 0.1)]))
    of_one_bank = [row | {"cluster": "x"} for row in one + other]
    for before, after in ((one, other), (of_one_bank, of_one_bank[::-1])):
        assert intervals(result(after)) == {}
        for found in paired_change(result(before), result(after)).values():
            assert math.isfinite(found.value) and math.isnan(found.low) and math.isnan(found.high)


def test_at_the_bounds_the_interval_is_wilsons():
    right = result([answer(["A"], ["A"], 1.0) | {"cluster": bank} for bank in range(20) for _ in range(5)])
    wrong = result([answer(["A"], [], 0.0) | {"cluster": bank} for bank in range(20) for _ in range(5)])
    for name in ("f1", "exact", "rouge_l"):
        one, none = intervals(right)[name], intervals(wrong)[name]
        limit = 1.96**2 / (20 + 1.96**2)  # of 20 banks, not 100 reports
        assert (one.value, one.high) == (1, 1) and one.low == pytest.approx(1 - limit, abs=1e-4)
        assert (none.value, none.low) == (0, 0) and none.high == pytest.approx(limit, abs=1e-4)
        change = paired_change(wrong, right)[name]
        assert change.value == change.high == 1
        # Newcombe: both sides are off by at most 3.84 / 23.84.
        assert change.low == pytest.approx(1 - math.sqrt(2) * 1.96**2 / (20 + 1.96**2), abs=1e-4)
        back = paired_change(right, wrong)[name]
        assert (back.value, back.low, back.high) == (-1, -1, pytest.approx(-change.low))
    assert paired_change(right, right)["f1"].low == 0  # the very same answers


def fraction(right, cluster_size=1, seeds=()):
    """Return the terms of a proportion: one unit per number of `right`, `cluster_size` neighbours in a cluster."""
    rows = np.array([(value, 1.0) for value in right])
    return Terms(rows, [i // cluster_size for i in range(len(rows))], ratio, seeds=seeds)


@pytest.mark.parametrize("right", [1, 3, 10, 19])
def test_few_answers_have_wilsons_interval(right):
    """A percentile bootstrap gives 0 to 0.150 for 1 of 20."""
    bounds = interval(fraction([1] * right + [0] * (20 - right)))
    wilson = stats.binomtest(right, 20).proportion_ci(method="wilson")
    assert (bounds.low, bounds.high) == pytest.approx((wilson.low, wilson.high), abs=1e-6)
    assert bounds.value == right / 20


def test_alike_answers_count_as_their_cluster():
    of_clusters = [i % 5 < 2 for i in range(20)]
    alike = interval(fraction(np.repeat(of_clusters, 5), cluster_size=5))
    assert (alike.low, alike.high) == pytest.approx(astuple(interval(fraction(of_clusters)))[1:])
    even = interval(fraction([1, 1, 0, 0, 0] * 20, cluster_size=5))  # each cluster is like the whole
    assert (even.low, even.high) == pytest.approx(astuple(interval(fraction([1, 1, 0, 0, 0] * 20)))[1:])


def test_seeds_that_agree_add_no_answers():
    right = [1.0] * 3 + [0.0] * 17
    assert astuple(interval(fraction(right, seeds=(0.15, 0.15)))) == pytest.approx(astuple(interval(fraction(right))))
    of_two = interval(fraction([0.5] * 6 + [0.0] * 14, seeds=(0.15, 0.15)))  # no answer is right with both seeds
    half_as_wide = interval(fraction([*right, *right])).high
    assert half_as_wide <= of_two.high < interval(fraction(right)).high


def test_change_of_proportions_is_newcombes():
    """Compare with Newcombe's formula for the table of pairs: both right, only before, only after, neither."""
    a, b, c, d = 8, 1, 5, 6
    before = fraction([1] * (a + b) + [0] * (c + d))
    after = fraction([1] * a + [0] * b + [1] * c + [0] * d)
    old, new = (stats.binomtest(k, 20).proportion_ci(method="wilson") for k in (a + b, a + c))
    phi = (a * d - b * c) / math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    p, q = (a + b) / 20, (a + c) / 20
    low = math.sqrt((q - new.low) ** 2 - 2 * phi * (q - new.low) * (old.high - p) + (old.high - p) ** 2)
    high = math.sqrt((new.high - q) ** 2 - 2 * phi * (new.high - q) * (p - old.low) + (p - old.low) ** 2)
    assert astuple(change(before, after)) == pytest.approx((q - p, q - p - low, q - p + high), abs=1e-6)
    assert astuple(change(before, before, same_answers=True)) == (0, 0, 0)


def test_pairs_facts_and_unreadable_answers_have_intervals():
    rows = [
        answer(["A"], ["A"]) | {"pair": "1", "facts": [1, 1, 1], "cluster": "x"},
        answer([], []) | {"pair": "1", "facts": [0, 0, 0], "cluster": "x"},
        answer(["A"], ["A"]) | {"pair": "2", "facts": [0, 1, 1], "cluster": "y"},
        answer([], []) | {"pair": "2", "facts": [0, 0, 1], "cluster": "y", "unreadable": True},
        answer([], None) | {"pair": "3", "facts": [0, 0, 1], "cluster": "z", "unreadable": True},
    ]
    found = intervals(result(rows))
    assert found["pairs"].value == 0.5 and found["exact"].value == 3 / 5
    assert found["f1"].value == pytest.approx(4 / 6)  # two right of two, and two unreadable answers
    assert found["fact_f1"].value == pytest.approx(2 / 6)


def test_change_of_count_to_0_is_unbounded():
    """The counts after are all 0, like a fraction at its bound, but Newcombe's interval, which ends at -1, would be wrong."""
    before, after = (
        {"answers": [{"answer": str(n)} for n in counts], "metric": {"by": "m:f", "each": {"wrong": counts}}}
        for counts in ([1, 2, 3, 3] * 5, [0] * 20)
    )
    change = paired_change(before, after)["own/wrong"]
    assert change.value == -2.25 and change.low < change.value < change.high < -1.5


def test_loss_of_two_tokenizers_has_no_change():
    answers = [answer(["A"], ["A"])] * 4
    before, after = (result(answers, [[10.0, targets]] * 4) for targets in (10, 5))
    assert "loss" in paired_change(before, before) and "loss" not in paired_change(before, after)
