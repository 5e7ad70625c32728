import math

import numpy as np
import pytest

from eval.intervals import paired_change


def answer(true, predicted, rouge=0.5):
    return {"true": true, "predicted": predicted, "rouge_l": rouge}


def result(answers, losses=None):
    return {"answers": answers, "losses": losses or [[1.0, 2]] * len(answers)}


def test_changes_are_of_micro_averages_over_the_same_examples():
    before = result(
        [answer(["A", "B"], ["A"]), answer([], ["A"], 0.1), answer(["C"], None, 0.0)], [[2.0, 4], [3.0, 1], [1.0, 5]]
    )
    after = result(
        [answer(["A", "B"], ["A", "B"], 0.9), answer([], [], 0.4), answer(["C"], ["A", "C"], 1.0)],
        [[1.0, 4], [1.0, 1], [1.0, 5]],
    )
    change = paired_change(before, after)
    # before: TP 1 of 3 true and 2 predicted; after: TP 3 of 3 true and 4 predicted.
    assert change["f1"].value == pytest.approx(6 / 7 - 2 / 5)
    assert change["rouge_l"].value == pytest.approx((0.9 + 0.4 + 1.0) / 3 - (0.5 + 0.1 + 0.0) / 3)
    assert change["loss"].value == pytest.approx(3 / 10 - 6 / 10)
    for interval in change.values():
        assert interval.low <= interval.value <= interval.high


def test_identical_results_have_no_uncertainty_and_independent_ones_have_the_expected_one():
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
