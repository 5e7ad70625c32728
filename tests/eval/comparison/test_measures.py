"""Metrics as sums over reports, texts and questions."""

import math

import numpy as np
import pytest

from eval.comparison.contrasts import over_seeds
from eval.comparison.measures import (
    arm_terms,
    averaged,
    general_terms,
    label_f1,
    label_terms,
    measure_of,
    named_labels,
)
from eval.intervals import change, interval, terms_of
from tests.comparisons import arm, general, row, task
from xbrl.answers.scores import score_violations

ANSWERS = [
    row(["A", "B"], ["A", "C"], "x"),
    row(["B"], ["B"], "x"),
    row([], [], "y"),
    row(["A"], [], "z"),
    row(["A"], [], "z", unreadable=True),
]


def test_the_values_are_those_of_the_evaluation():
    predicted = [answer["predicted"] + ["(unreadable)"] * answer.get("unreadable", False) for answer in ANSWERS]
    expected = score_violations([answer["true"] for answer in ANSWERS], predicted)
    found = {name: one.value for name, one in label_terms(task(ANSWERS), named_labels([task(ANSWERS)])).items()}
    micro = {name: expected["micro"][name] for name in ("precision", "recall")}
    assert found == pytest.approx(micro | {"macro_f1": expected["macro_f1"]})
    for rule in ("A", "B", "C"):
        assert label_f1(task(ANSWERS), rule).value == pytest.approx(expected["per_rule"][rule]["f1"])
    assert math.isnan(label_f1(task(ANSWERS), "D").value)


def test_macro_f1_of_resample_uses_its_own_labels():
    terms = label_terms(task([row(["A"], ["A"]), row(["B"], [])]), ["A", "B"])["macro_f1"]
    assert terms.value == 0.5 and terms.metric(2 * terms.rows[0]) == 1
    assert terms.metric(np.stack([terms.rows[0], terms.rows[1]])).tolist() == [1, 0]


def test_interval_at_ceiling_counts_only_informative_clusters():
    few = task([row(["A"] if i < 40 else [], ["A"] if i < 3 else [], f"bank {i}") for i in range(300)])
    assert interval(label_terms(few, ["A"])["precision"]).low == pytest.approx(3 / (3 + 1.96**2), abs=1e-4)
    silent, one = (task([row(["A"], ["A"] if i < count else [], f"bank {i}") for i in range(100)]) for count in (0, 1))
    precision = averaged([label_terms(seed, ["A"])["precision"] for seed in (silent, one)])
    assert interval(precision).low == pytest.approx(1 / (1 + 1.96**2), abs=1e-4)  # one bank, not a hundred


def test_count_metric_is_not_cut_at_1():
    counts = [task([row([], [])] * 9, metric={"each": {"wrong": [count] * 9}}) for count in (0, 6)]
    mean = averaged([terms_of(entry)["own/wrong"] for entry in counts])
    none = averaged([terms_of(counts[0])["own/wrong"]] * 2)
    found = over_seeds(change(none, mean), none, mean).interval()
    assert found.value == 3 and found.low < -1 and found.high > 3


def test_seeds_are_averaged_for_each_report():
    both = arm("both", task([row(["A"], ["A"]), row(["A"], [])]), task([row(["A"], ["A"]), row(["A"], ["A"])]))
    terms = arm_terms([both], ["A"])[0]["both"]
    assert len(terms["f1"].rows) == 2  # reports, not answers
    assert terms["f1"].value == terms["fact_f1"].value == pytest.approx(2 * 1.5 / (2 + 1.5))
    assert terms["recall"].value == 3 / 4 and measure_of("fact_f1").heading == "fact-F1"
    assert terms["exact"].rows[:, 0].tolist() == [1, 0.5]


def test_the_loss_is_per_answer_where_tokenizers_differ():
    answers = [row(["A"], ["A"])] * 3
    for targets, losses in ((2, (3.0, 3.0)), (3, (6.0, 6.0))):
        arms = [arm("a", task(answers, 6.0, 2)), arm("b", task(answers, 6.0, targets))]
        found, per_answer = arm_terms(arms, ["A"])
        assert (found["a"]["loss"].value, found["b"]["loss"].value, per_answer) == (*losses, targets == 3)


def test_general_text_and_questions():
    tuned, base = (general_terms(general(rise=0.1, right=7), side) for side in ("tuned", "base"))
    assert base["perplexity"].value == pytest.approx(math.exp(0.8)) and "kl" not in base
    assert tuned["perplexity"].value == pytest.approx(math.exp(0.8 + 0.1 + 0.01))
    assert tuned["kl"].value == pytest.approx((1 + 0.5) / 20)
    assert (tuned["questions"].value, base["questions"].value) == (0.7, 1.0)
