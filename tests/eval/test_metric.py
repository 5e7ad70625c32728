"""The user's metric, one-sentence errors about it, and the default scores."""

import copy
import math
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import UserError
from eval.metric import load_metric, metric_figures, plain_scores, single_scores
from training.answers import Answers

EXAMPLES = [
    {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]} for text in ("a b", "c")
]
MODULE = """
def number(answers, examples):
    return sum(a == e["messages"][-1]["content"] for a, e in zip(answers, examples)) / len(answers)

def several(answers, examples):
    return {"right": 1, "length.mean": 2.5}

def fails(answers, examples):
    return answers[7]

def not_finite(answers, examples):
    return {"right": float("inf")}

def of_numbers(answers, examples):
    numbers = [float(answer) for answer in answers if answer.isdecimal()]
    return {"decimal": len(numbers) / len(answers), "mean": sum(numbers) / len(numbers) if numbers else float("nan")}

def taken(answers, examples):
    return {"loss": 1.0}

def text(answers, examples):
    return "0.5"

def leaves(answers, examples):
    raise SystemExit(3)

def spoils(answers, examples):
    return len(answers.pop()) + len(examples.pop()["messages"].pop())
"""


@pytest.fixture
def scores(tmp_path, monkeypatch):
    (tmp_path / "scores_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "scores_of_mine", raising=False)


def test_single_number_is_named_metric(scores):
    assert load_metric("scores_of_mine:number")(["a b", "d"], EXAMPLES) == {"metric": 0.5}
    result = load_metric("scores_of_mine:several")(["", ""], EXAMPLES)
    assert result == {"right": 1.0, "length.mean": 2.5} and type(result["right"]) is float


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("scores_of_yours:f", "module scores_of_yours is not found; put it beside train.py or its folder into"),
        ("scores_of_mine:f", "scores_of_mine.py has no function f"),
        ("scores_of_mine:fails", "fails: IndexError: list index out of range ("),
        ("scores_of_mine:not_finite", "returns inf for right; a score must be finite"),
        ("scores_of_mine:text", "returns '0.5' for metric; it gets (answers, examples) and must return a number"),
        ("scores_of_mine:leaves", "fails: SystemExit: 3 ("),
        ("scores_of_mine:taken", "returns the name 'loss'; use letters"),
    ],
)
def test_a_mistake_is_one_sentence(scores, name, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        load_metric(name)(["", ""], EXAMPLES)
    assert str(error.value).startswith(f"eval.metric={name}") and "\n" not in str(error.value)
    if name.endswith("fails"):
        assert str(error.value).endswith("scores_of_mine.py, line 9)")


def test_metric_cannot_modify_examples(scores):
    """Only rank 0 calls the metric, and all ranks continue with the same examples."""
    answers, examples, metric = ["a b", "d"], copy.deepcopy(EXAMPLES), load_metric("scores_of_mine:spoils")
    assert metric(answers, examples) == metric(answers, examples) == {"metric": 3.0}
    assert (answers, examples) == (["a b", "d"], EXAMPLES)


def test_default_scores_compare_with_reference(monkeypatch):
    assert plain_scores(["a\n b ", "d"], EXAMPLES) == {"exact_match": 0.5, "rouge_l": 0.5}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plain_scores(["a b", "d"], EXAMPLES) == {"exact_match": 0.5}


def test_metric_option_adds_named_scores(scores):
    name = "scores_of_mine:spoils"
    found = {"by": name, "scores": {"metric": 3.0}, "each": {}}  # no mean: it counts more in two answers than in each
    assert metric_figures(name)(["a b", "d"], EXAMPLES) == {"metric": found}
    each = {"metric": [1.0, 0.0]}
    assert metric_figures("scores_of_mine:number")(["a b", "d"], EXAMPLES)["metric"]["each"] == each
    assert metric_figures("")(["a b", "d"], EXAMPLES) == {}
    with pytest.raises(UserError, match="no_such_module"):
        metric_figures("no_such_module:f")


def test_nan_score_leaves_other_scores(scores):
    """Such as a mean over the answers that are numbers, if no answer is a number."""
    name, answers = "scores_of_mine:of_numbers", ["7", "x"]
    found = load_metric(name)(["y", "x"], EXAMPLES)
    assert found["decimal"] == 0 and math.isnan(found["mean"])
    figures = metric_figures(name)(answers, EXAMPLES)["metric"]
    assert figures == {"by": name, "scores": {"decimal": 0.5, "mean": 7}, "each": {"decimal": [1, 0]}}
    asked = SimpleNamespace(metric=load_metric(name), examples=EXAMPLES)
    newest: Any = SimpleNamespace(asked=asked, texts=answers)
    assert Answers.interval(newest, "decimal") == pytest.approx((0.0945, 0.9055), abs=1e-4)  # Wilson's, 1 of 2
    assert Answers.interval(newest, "mean") is None


def test_single_score_is_the_first_between_0_and_1() -> None:
    def metric(answers: list[str], examples: list[dict]) -> dict[str, float]:
        return {"first": sum(map(float, answers)) / len(answers), "second": 7.0}

    assert single_scores(metric, ["0", "0.5", "1"], [{}] * 3) == [0.0, 0.5, 1.0]
    for answer in ("2", "-1", "nan"):
        with pytest.raises(
            UserError, match="forgetting.max_drop needs eval.metric's first score between 0 and 1; first is"
        ):
            single_scores(metric, [answer], [{}])
