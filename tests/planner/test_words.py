"""Numbers in words."""

import pytest

from planner.words import hours


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((120.4, 250.0), "120-250"),
        ((3.42, 4.81), "3.4-4.8"),
        ((0.28, 0.48), "0.28-0.48"),
        ((0.0126, 0.0151), "0.013-0.015"),
        ((0.00291, 0.00377), "0.0029-0.0038"),  # of a run of seconds
    ],
)
def test_hours_have_two_digits_that_count(values: tuple[float, float], words: str):
    assert hours(values) == words
