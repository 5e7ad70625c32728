import pytest

from eval.rouge import fixed_letter, rouge_l


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    reference = "the bank shall raise capital within ten days"
    # Common subsequence of 4 words (the bank shall days); 8 words in the reference, 5 in the prediction.
    expected = 2 * (4 / 8) * (4 / 5) / (4 / 8 + 4 / 5)
    scores = rouge_l([reference, reference, reference, ""], ["the bank shall wait days", reference, "", "x"])
    assert scores == pytest.approx([expected, 1.0, 0.0, 0.0])


def test_words_are_not_stemmed():
    assert rouge_l(["ratios"], ["ratio"]) == [0.0]


def test_fixed_letter_is_the_first_with_exactly_these_rules():
    training = [(("A_1", "B_2"), "both"), (("A_1",), "first"), (("A_1",), "second"), ((), "clean")]
    assert fixed_letter(("A_1",), training) == "first"
    assert fixed_letter(("B_2", "A_1"), training) == "both"
    assert fixed_letter((), training) == "clean"
    assert fixed_letter(("C_3",), training) is None
