"""ROUGE-L, and the score of whole answers."""

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from eval.rouge import rouge_l, score_whole_answers


def test_whole_answers_are_compared_with_the_last_message():
    example = {
        "id": "a",
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "it is forty two"}],
    }
    result = score_whole_answers([example], ["it is"])
    assert result["rouge_l"] == {"of": "answer", "n": 1, "f": pytest.approx(2 / 3), "baselines": {}}
    (answer,) = result["answers"]
    assert answer | {"reference": "", "rouge_l": 0.0} == {
        "id": "a",
        "answer": "it is",
        "reference": "",
        "exact": False,
        "rouge_l": 0.0,
    }
    assert answer["rouge_l"] == pytest.approx(2 / 3) and answer["reference"] == example["messages"][-1]["content"]
    assert result["exact_match"] == {"n": 1, "share": 0.0}


def test_the_values_are_those_of_rouge_score():
    rng = random.Random(0)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    for _ in range(200):
        one, other = (
            " ".join(rng.choices(["LCR", "93.1%", "ratio", "ratios", "x"], k=rng.randint(0, 90))) for _ in "ab"
        )
        expected = scorer.score(one, other)["rougeL"].fmeasure
        assert rouge_l([one], [other]) == pytest.approx([expected])
