"""The last screen of the quickstart: columns of models and programs on the same reports."""

import json

import pytest

from common.errors import UserError
from xbrl.answers.scores import score_answers
from xbrl.answers.screen import of_result, programs, screen, table
from xbrl.corpus.generate import Request
from xbrl.corpus.quickstart import generate_quickstart


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("screen") / "data"
    generate_quickstart(directory, Request(140, 0, "quickstart", [0.5, 0.07, 0.43]))
    return directory


def examples(directory, split: str) -> list[dict]:
    return [json.loads(line) for line in (directory / f"{split}.jsonl").open()]


def result(test: list[dict], texts: list[str]) -> dict:
    return score_answers(test, texts, "test.jsonl", None)


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return [cell.strip() for cell in line.strip().removeprefix(name).split("  ") if cell.strip()]


def test_right_answers_stand_beside_the_programs(data) -> None:
    test, training = examples(data, "test"), examples(data, "train")
    right = [example["messages"][-1]["content"] for example in test]
    half = [answer if i % 2 else "no idea" for i, answer in enumerate(right)]  # every pair has one right report
    models = {"base": of_result(result(test, half), test), "tuned": of_result(result(test, right), test)}
    text = table(models | programs(training, test, examples(data, "validation"), None))
    assert text.splitlines()[0].split() == ["base", "tuned", "note", "words", "n-grams", "engine", "thresholds"]
    assert row(text, "reports") == ["60"] * 6
    f1 = [float(value) for value in row(text, "F1, all rules")]
    assert f1[1] == 1.0 and 0.3 < f1[0] < 0.8 and min(f1[2:]) > 0.5 and max(f1[2:]) < 0.9
    notes = [float(value) for value in row(text, "F1, what notes decide (unseen wordings)")]
    assert notes[1] == 1.0 and max(notes[2:]) < 0.9
    for part, number in (("in words", 24), ("in figures", 6)):
        pairs = row(text, f"minimal pairs {part}, both right")
        assert pairs[:2] == [f"0 of {number}", f"{number} of {number}"]
    assert row(text, "minimal pairs in words, both right")[4] == "0 of 24"  # the engine reads no words
    assert row(text, "minimal pairs in figures, both right")[4] == "3 of 6"  # those whose note changes nothing


def test_an_answer_with_an_unreadable_line_is_not_right(data) -> None:
    test = examples(data, "test")
    answers = [example["messages"][-1]["content"] for example in test]
    broken = [answer.replace(": met", ": perhaps so") for answer in answers]
    text = table({"broken": of_result(result(test, broken), test)})
    assert row(text, "minimal pairs in words, both right")[0] == "0 of 24"


def test_a_result_that_is_missing_or_of_another_form_is_one_sentence(tmp_path):
    folder = tmp_path / "eval"
    folder.mkdir()
    with pytest.raises(UserError, match=r"before\.json: No such file or directory; run scripts/quickstart\.sh"):
        screen(tmp_path, tmp_path)
    (folder / "before.json").write_text("{")
    with pytest.raises(UserError, match=r"before\.json is not JSON"):
        screen(tmp_path, tmp_path)
    (folder / "before.json").write_text(json.dumps({"answers": []}))
    (folder / "after.json").write_text(json.dumps({"answers": [], "rouge_l": {}}))
    with pytest.raises(UserError, match=r"after\.json has no facts; remove it"):
        screen(tmp_path, tmp_path)


def test_the_whole_screen(data, tmp_path) -> None:
    test = examples(data, "test")
    answers = [example["messages"][-1]["content"] for example in test]
    after = result(test, answers)
    forgetting = {
        "perplexity_per_byte": {"base": {"value": 1.9}, "tuned": {"value": 2.0}},
        "kl": {"value": 0.5},
        "questions": {"all": {"base": {"value": 0.79}, "tuned": {"value": 0.74}}},
    }
    (tmp_path / "eval").mkdir()
    for name, content in (("before", after), ("after", after), ("forgetting", forgetting)):
        (tmp_path / "eval" / f"{name}.json").write_text(json.dumps(content))
    text = screen(tmp_path, data)
    assert "F1 of rule, figure, limit and article together 1.000, directive ROUGE-L 1.000" in text
    assert "1.900 -> 2.000; KL 0.50 nats per token; general questions right: 79% -> 74%" in text
    assert f"tensorboard --logdir {tmp_path}/tensorboard" in text and "(true violations: " in text
