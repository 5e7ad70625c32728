"""The task interface: a task of the user, the default for chats, and mistakes in the name."""

import argparse
import sys

import pytest

from common.errors import UserError
from eval.metric import load_metric
from eval.report import Figure
from eval.task import ANY_CHAT, add_task_option, full_report, load_task

MODULE = """
from eval.task import Task
from eval.report import Figure
def score(texts, examples, where, training, train_where, *, bonus):
    return {"answers": [], "right": bonus + sum(text == "yes" for text in texts)}
def metric(answers, examples):
    return {"right": len(answers)}
TASK = Task(
    score=score,
    metric=metric,
    add_options=lambda parser: parser.add_argument("--bonus", type=int, default=1),
    read_options=lambda arguments, reading: {"bonus": arguments.bonus},
    figures=lambda result: [Figure("right", str(result["right"]), "")],
    more_lines=lambda result: ["", "a line"],
    example="ticket",
)
"""
RESULT = {"model": "m", "data": "d", "n_examples": 2, "n_in_file": 2, "seconds": 1.0}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in (("tickets", MODULE), ("empty", ""), ("plain", "from eval.task import Task\nTASK = Task()")):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)


def test_task_has_own_options_scores_and_tables(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--bonus", "3", "--task=tickets"])
    parser = argparse.ArgumentParser()
    task = add_task_option(parser)
    task.add_options(parser)
    arguments = parser.parse_args()
    scores = task.score(["yes", "no"], [{}, {}], "d", None, "", **task.read_options(arguments, None))
    assert (arguments.task, scores["right"], task.example) == ("tickets", 4, "ticket")
    text = full_report(task, RESULT | scores, None, 1)
    assert [line.split() for line in text.splitlines()[-3:]] == [["right", "4"], [], ["a", "line"]]
    assert load_metric("tickets")(["a"], [{}]) == {"right": 1.0}


def test_no_name_is_any_chat(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["score.py"])
    assert add_task_option(argparse.ArgumentParser()) is load_task("") is ANY_CHAT
    chat = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]}
    assert ANY_CHAT.score(["yes "], [chat], "d", None, "")["exact_match"] == {"n": 1, "share": 1.0}
    assert Figure("exact match", "100.0%", "1 answers", "exact_match") in ANY_CHAT.figures(
        {"exact_match": {"n": 1, "share": 1.0}}
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.task", "eval.metric=nowhere.task: the module cannot be imported: ModuleNotFoundError"),
        ("empty", "eval.metric=empty: .*empty.py has no TASK .eval/task.py.; a function is named MODULE:FUNCTION"),
        ("plain", "eval.metric=plain: the task has no metric; name a function, MODULE:FUNCTION"),
    ],
)
def test_a_mistake_in_the_name_is_one_sentence(folder, name, message):
    with pytest.raises(UserError, match=f"^{message}"):
        load_metric(name)
