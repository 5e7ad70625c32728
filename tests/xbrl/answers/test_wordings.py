"""What is kept for the tests: wordings, and the figures of their reports."""

import random

import pytest

from xbrl.answers.wordings import Wordings, is_held_out
from xbrl.corpus.generate import shown_earlier


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (3, 1), (4, 1), (5, 2), (6, 2), (8, 3), (12, 4)])
def test_the_last_third_of_the_wordings_is_held_out(count, held_out):
    options = [f"wording {place}" for place in range(count)]
    training, test = (Wordings(random.Random(0), part) for part in (False, True))
    assert {training(options) for _ in range(300)} == set(options[: count - held_out])
    assert {test(options) for _ in range(300)} == set(options[count - held_out :])
    assert [test.at(options, number) for number in range(held_out)] == options[count - held_out :]
    assert len({training.at(options, number) for number in range(count)}) == count - held_out


def test_a_single_wording_and_options_that_are_no_texts_are_not_divided():
    choose = Wordings(random.Random(0), True)
    assert choose(["only"]) == "only"
    assert {choose([1, 2, 3]) for _ in range(100)} == {1, 2, 3}
    assert [is_held_out(split) for split in ("train", "validation", "test", "test_banks")] == [False, False, True, True]


def test_no_report_of_a_test_is_shown_below_a_training_report():
    splits = ["train", "test_combinations", "train", "train", "test_quarters"]
    assert [shown_earlier(splits, index) for index in range(5)] == [[], [0], [], [2], [0, 1, 2, 3]]
