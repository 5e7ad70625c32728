import numpy as np
import pytest

from eval.comparison.confusion import confusion
from tests.comparisons import row


def test_missed_and_invented_rules_of_a_report_are_paired():
    found = confusion(
        [
            row(["A", "B"], ["A", "C"]),
            row(["A"], []),
            row([], ["B"]),
            row([], []),
            row(["A", "B"], ["C"]),
            row(["B"], ["A", "C"]),
        ],
        ["A", "B", "C"],
    )
    assert found.tolist() == [
        [1, 0, 0.5, 1.5],  # A: found; half taken for C; missed once, and half
        [0.5, 0, 2.0, 0.5],  # B: for C once, half of a report that misses two, half of one that invents two
        [0, 0, 0, 0],
        [0.5, 1, 0.5, 1],  # invented; the clean report
    ]


def test_rows_count_the_truth_and_columns_the_answers():
    rng = np.random.default_rng(0)
    names = list("ABCD")
    answers = [
        row([n for n in names if rng.random() < 0.4], [n for n in names if rng.random() < 0.4]) for _ in range(50)
    ]
    found = confusion(answers, names)
    for i, name in enumerate(names):
        assert found[i].sum() == pytest.approx(sum(name in answer["true"] for answer in answers))
        assert found[:, i].sum() == pytest.approx(sum(name in answer["predicted"] for answer in answers))
    assert found.min() >= -1e-12
