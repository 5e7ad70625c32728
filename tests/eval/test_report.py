"""Tables of any task."""

import pytest

from common.errors import UserError
from eval.report import compare, one_answer, table
from tests.eval.tables import cells

RESULT = {
    "model": "runs/x/export",
    "data": "test.jsonl",
    "data_sha256": "ab",
    "n_examples": 2,
    "n_in_file": 2,
    "dtype": "bfloat16",
    "seconds": 12.3,
    "max_new_tokens": 80,
    "cut_short": 1,
    "rouge_l": {"of": "answer", "n": 2, "f": 0.321, "baselines": {}},
    "loss": {"mean": 1.2345, "targets": 1234},
    "answers": [{"id": "a", "rouge_l": 1.0, "answer": "yes"}, {"id": "b", "rouge_l": 0.0, "answer": "no"}],
}


def test_the_table_has_every_figure_with_its_n():
    text = table(RESULT)
    assert text.splitlines()[0] == "runs/x/export on test.jsonl (bfloat16, 12 s)"
    limited = table(RESULT | {"n_in_file": 104}).splitlines()[0]
    assert limited == "runs/x/export on test.jsonl (2 of 104 examples, bfloat16, 12 s)"
    assert cells(text, "answer ROUGE-L") == [
        "answer ROUGE-L (F)",
        "0.321",
        "0.095 to 0.905",
        "2 answers, words of a-z and 0-9",
    ]
    assert cells(text, "answers cut short") == ["answers cut short", "1", "at 80 tokens (as given)"]
    assert cells(text, "validation loss") == ["validation loss (nats/token)", "1.234", "1,234 response tokens"]
    damaged = table(RESULT | {"loss": {"mean": float("inf"), "targets": 1234}})
    assert cells(damaged, "validation loss")[1] == "inf"
    assert "violations" not in text and "asked with" not in text
    few = table(RESULT | {"shots": 4, "fewest_shots": 2})
    assert cells(few, "asked with")[1:] == ["4 shots", "at least 2 where the context is short"]
    assert cells(table(RESULT | {"shots": 4, "fewest_shots": 4}), "asked with")[1:] == ["4 shots"]


def test_own_scores_exact_match_and_references_are_shown():
    answers = [{**answer, "exact": answer["id"] == "a", "reference": "yes"} for answer in RESULT["answers"]]
    own = {"by": "mine:f", "scores": {"words": 2.5}}
    result = RESULT | {"answers": answers, "metric": own, "exact_match": {"n": 2, "share": 0.5}}
    assert cells(table(result), "words") == ["words", "2.5", "by mine:f"]
    assert cells(table(result), "exact match") == ["exact match", "50.0%", "0.095 to 0.905", "2 answers"]
    assert one_answer(result, 1) == "answer to example b:\nno\nreference:\nyes"


def test_one_example_has_no_interval():
    one = RESULT | {"answers": RESULT["answers"][:1]}
    assert cells(table(one), "answer ROUGE-L") == ["answer ROUGE-L (F)", "0.321", "2 answers, words of a-z and 0-9"]
    assert cells(compare(one, one), "answer ROUGE-L")[1:] == [
        "0.321",
        "0.321",
        "+0.0000",
        "2 answers, words of a-z and 0-9",
    ]


@pytest.mark.parametrize("key", ["data_sha256", "n_examples"])
def test_results_on_different_data_are_not_compared(key):
    with pytest.raises(UserError, match=key):
        compare(RESULT, {**RESULT, key: "other"})


def test_one_answer():
    assert one_answer(RESULT) == "answer to example a:\nyes"
    assert one_answer(RESULT, 3) == "answer to example b:\nno"
    labelled = {"answers": [answer | {"true": ["x"] * (answer["id"] == "b")} for answer in RESULT["answers"]]}
    assert one_answer(labelled) == "answer to example b (true: x):\nno"
    nameless = {"answers": [{"id": None, "answer": "yes"}, {"id": None, "answer": "no"}]}
    assert one_answer(nameless, 3) == "answer to example 2 of 2:\nno"


def test_scores_of_another_function_are_not_compared():
    own = {"scores": {"right": 0.5}, "each": {"right": [0.0, 1.0]}}
    same, other = (RESULT | {"metric": own | {"by": by}} for by in ("mine:f", "mine:g"))
    assert cells(compare(same, same), "right")[1:4] == ["0.5", "0.5", "+0.0000"]
    assert cells(compare(same, other), "right")[1:] == ["-", "0.5", "by mine:g"]
