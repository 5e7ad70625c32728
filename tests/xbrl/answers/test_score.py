"""Scores of a model's answers to bank reports."""

import pytest

from xbrl.answers.answer_reader import Answer
from xbrl.answers.score import fixed_letter, score_answers

CLEAN = "Violations:\nnone\nDirective:\nNo measures."


def breach(rule, letter="The bank shall restore its ratio."):
    return f"Violations:\n{rule} | LCR | 75.2% | min 100% | CRR Art. 412(1)\nDirective:\n{letter}"


def example(name, answer):
    return {"id": name, "messages": [{"role": "user", "content": "report"}, {"role": "assistant", "content": answer}]}


EXAMPLES = [example("a", breach("LCR_MIN")), example("b", breach("NSFR_MIN")), example("c", CLEAN)]


def test_scores_of_violations_and_letters_with_their_baselines():
    texts = [breach("LCR_MIN"), "I am a bank.", CLEAN.replace("No measures.", "No other measures at all.")]
    training = [example("t", breach("LCR_MIN", "The bank shall pay.")), example("u", breach("LCR_MIN")), EXAMPLES[2]]
    result = score_answers(EXAMPLES, texts, "test.jsonl", training, "train.jsonl")
    violations = result["violations"]
    assert violations["micro"] == pytest.approx(
        {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    )  # garbage is a false positive
    assert violations["unparsable"] == {"n": 1, "share": pytest.approx(1 / 3)}
    assert violations["exact"] == pytest.approx(2 / 3)
    # Each baseline gives the same answer to all three reports.
    f1 = {name: scores["f1"] for name, scores in violations["baselines"].items()}
    # All reports are the same text, so those that learn predict what is most frequent in it, and the nearest is the first.
    trivial = {"always clean": 0.0, "flag everything": 0.4, "most frequent violation": 0.4}
    assert f1 == pytest.approx(
        trivial | {"character n-grams": 0.4, "presence and signs": 0.4, "threshold program": 0.0, "nearest report": 0.4}
    )
    everything = violations["baselines"]["flag everything"]  # LCR_MIN for all three; it is in one, of two violations
    assert (everything["precision"], everything["recall"]) == (pytest.approx(1 / 3), 0.5)
    ngrams = violations["baselines"]["character n-grams"]
    assert (ngrams["precision"], ngrams["recall"]) == (pytest.approx(1 / 3), 0.5)
    assert violations["baselines_fitted_on"] == "3 training examples"
    # An unparsable answer has no directive. "no measures" (2 words) is a subsequence of the 5 words of the third
    # answer.
    third = 2 * 1.0 * 0.4 / 1.4
    assert [answer["rouge_l"] for answer in result["answers"]] == pytest.approx([1.0, 0.0, third])
    assert result["rouge_l"]["f"] == pytest.approx((1 + third) / 3)
    assert result["rouge_l"]["n"] == 3
    # "No measures." for all three scores 0 + 0 + 1. "The bank shall pay." has 3 words in common with two of the
    # letters, which have 6 words; it has 4.
    pay = 2 * (3 / 6) * (3 / 4) / (3 / 6 + 3 / 4)
    sent = {"always clean": 1 / 3, "flag everything": 2 * pay / 3, "most frequent violation": 2 * pay / 3}
    sent |= {"the nearest report": 2 * pay / 3}
    assert result["rouge_l"]["floor"]["fixed"] == pytest.approx(
        2 * pay / 3
    )  # the first letter of training, sent to all
    assert result["rouge_l"]["baselines"] == pytest.approx({f"the letter of {k}": v for k, v in sent.items()})
    assert [answer["predicted"] for answer in result["answers"]] == [["LCR_MIN"], None, []]
    assert [answer["true"] for answer in result["answers"]] == [["LCR_MIN"], ["NSFR_MIN"], []]


def test_baselines_without_a_training_split():
    result = score_answers(EXAMPLES, [CLEAN] * 3, "test.jsonl", None)
    assert set(result["violations"]["baselines"]) == {"always clean", "flag everything"}
    assert result["violations"]["baselines"]["flag everything"]["f1"] == pytest.approx(2 * 2 / (6 + 2))
    assert result["violations"]["baselines_fitted_on"] == "the evaluated file itself"
    assert result["rouge_l"]["baselines"] == {}


def test_another_task_is_scored_by_its_whole_answers():
    result = score_answers([example("a", "it is forty two"), example("b", "no")], ["it is", "yes"], "own.jsonl", None)
    assert "violations" not in result
    assert result["rouge_l"] == {"of": "answer", "n": 2, "f": pytest.approx((2 / 3) / 2), "baselines": {}}


def test_fixed_letter_is_the_first_with_exactly_these_rules():
    training = [
        Answer(("A_1", "B_2"), "both"),
        Answer(("A_1",), "first"),
        Answer(("A_1",), "second"),
        Answer((), "clean"),
    ]
    assert fixed_letter(("A_1",), training) == "first"
    assert fixed_letter(("B_2", "A_1"), training) == "both"
    assert fixed_letter((), training) == "clean"
    assert fixed_letter(("C_3",), training) is None


def test_lines_of_an_example_that_cannot_be_read_are_counted_and_left_out():
    odd = example("a", breach("LCR_MIN").replace("\nDirective", "\nOF_SUM | a sum\nDirective")) | {
        "violations": ["LCR_MIN"]
    }
    result = score_answers([odd], [breach("LCR_MIN")], "test.jsonl", None)
    assert result["violations"]["void_true_lines"] == 1 and result["facts"]["f1"] == 1
