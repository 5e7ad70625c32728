"""ROUGE-L, and the score of whole answers."""

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from eval.rouge import rouge_l, score_whole_answers


def test_whole_answers_are_compared_with_the_last_message():
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "it is forty two"}]
    f = pytest.approx(2 / 3)
    assert score_whole_answers(["it is"], [{"id": "a", "messages": messages}]) == {
        "exact_match": {"n": 1, "share": 0.0},
        "rouge_l": {"of": "answer", "n": 1, "f": f, "baselines": {}},
        "answers": [{"id": "a", "answer": "it is", "reference": "it is forty two", "exact": False, "rouge_l": f}],
    }


def test_the_values_are_those_of_rouge_score():
    rng = random.Random(0)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    for _ in range(200):
        words = ["LCR", "93.1%", "ratio", "ratios", "x"]
        one, other = (" ".join(rng.choices(words, k=rng.randint(0, 90))) for _ in "ab")
        expected = scorer.score(one, other)["rougeL"].fmeasure
        assert rouge_l([one], [other]) == pytest.approx([expected])
