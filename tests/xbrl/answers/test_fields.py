"""Fields of an example that scoring could misread."""

import pytest

from common.errors import UserError
from xbrl.answers.fields import check_scored_fields
from xbrl.answers.score import score_answers

ANSWER = "Violations:\nnone\nDirective:\nNo measures."
GOOD = {
    "id": "a",
    "messages": [{"role": "user", "content": "LCR"}, {"role": "assistant", "content": ANSWER}],
    "violations": [],
    "engine": ["LCR_MIN"],
    "measures": [{"subject": "liquidity", "deadline_days": 0}],
    "findings": [],
    "kind": "pledged",
    "pair": "1 in words",
    "bank": None,
}


def test_a_right_example_passes():
    check_scored_fields([GOOD, {"text": "no chat"}], "test.jsonl")
    assert score_answers([GOOD], [ANSWER], "test.jsonl", None)["violations"]["exact"] == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("violations", "LCR_MIN", r"`violations` must be a list of ids of rules, not 'LCR_MIN'"),
        ("violations", [1], r"`violations` must be a list of ids of rules, not \[1\]"),
        ("violations", None, r"`violations` must be a list of ids of rules, not None"),
        ("engine", {"LCR_MIN": 1}, r"`engine` must be a list of ids"),
        ("measures", "capital", r"`measures` must be a list of objects, not 'capital'"),
        ("measures", ["capital"], r"`measures` must be a list of objects"),
        ("measures", [{"deadline_days": 3}], r"a measure has the `subject` None; it must be a text"),
        ("measures", [{"subject": "capital"}], r"the measure on capital has the `deadline_days` None; it must be"),
        ("measures", [{"subject": "capital", "deadline_days": -3}], r"`deadline_days` -3; it must be a whole number"),
        ("measures", [{"subject": "capital", "deadline_days": True}], r"`deadline_days` True; it must be"),
        ("measures", [{"subject": "capital", "deadline_days": "10"}], r"`deadline_days` '10'; it must be"),
        ("findings", "x" * 99, r"`findings` must be a list of objects, not 'x{56}\.\.\."),
        ("kind", ["pledged"], r"`kind` must be a text"),
        ("bank", {}, r"`bank` must be a text"),
    ],
)
def test_a_mistake_names_the_file_the_example_and_the_field(field, value, message):
    for training, where in ((None, "test.jsonl"), ([GOOD | {field: value}], "train.jsonl")):
        examples = [GOOD if training else GOOD | {field: value}]
        with pytest.raises(UserError, match=f"^{where}, example a: .*{message}"):
            score_answers(examples, [ANSWER], "test.jsonl", training, "train.jsonl")
