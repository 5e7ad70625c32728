"""ROUGE-L, and the score of whole answers."""

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from eval.rouge import rouge_l, score_whole_answers


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    reference = "the bank shall raise capital within ten days"
    # The longest common subsequence with the first prediction has 4 words (the bank shall days), the reference 8, the
    # prediction 5.
    expected = 2 * (4 / 8) * (4 / 5) / (4 / 8 + 4 / 5)
    scores = rouge_l([reference, reference, reference, ""], ["the bank shall wait days", reference, "", "x"])
    assert scores == pytest.approx([expected, 1.0, 0.0, 0.0])


def test_words_are_not_stemmed():
    assert rouge_l(["ratios"], ["ratio"]) == [0.0]


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
        one, other = (" ".join(rng.choices(["LCR", "93.1%", "own", "funds", "x"], k=rng.randint(0, 90))) for _ in "ab")
        expected = scorer.score(one, other)["rougeL"].fmeasure
        assert rouge_l([one], [other]) == pytest.approx([expected])
