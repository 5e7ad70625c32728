"""The retrieval baseline for letters."""

import pytest

from xbrl.answers.nearest_letter import score_nearest_letters


def example(report, letter):
    answer = f"Violations:\nnone\nDirective:\n{letter}"
    return {"messages": [{"role": "user", "content": report}, {"role": "assistant", "content": answer}]}


def test_each_test_split_is_scored_against_the_nearest_training_letters():
    training = [example("CET1 ratio 4% LCR 90%", "raise capital now"), example("NSFR 99% LR 3%", "raise funding")]
    test = [example("CET1 ratio 5% LCR 90%", "raise capital now"), example("NSFR 99% LR 2%", "raise capital")]
    scores = score_nearest_letters({"train": training, "validation": test, "test_banks": test, "test_quarters": []}, 0)
    assert scores == {"test_banks": {"rouge_l": pytest.approx((1 + 1 / 2) / 2), "n": 2}}


def test_without_training_reports_there_is_no_nearest_letter():
    assert score_nearest_letters({"train": [], "test": [{}]}, 0) == {}
