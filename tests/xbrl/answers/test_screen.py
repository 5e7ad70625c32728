"""The last screen of the quickstart: columns of models and programs on the same reports."""

import json
import random

import pytest

from common.errors import UserError
from xbrl.answers.baselines import baseline_predictions
from xbrl.answers.scores import score_answers
from xbrl.answers.screen import PROGRAMS, Column, of_result, screen, table

WORDS = {True: ("is granted", "is valid", "stands"), False: ("is refused", "is expired", "fell")}


def report(number: int, rng: random.Random, lcr: int, applies: bool) -> dict:
    """Return an example: a report with a note on a waiver, and its right answer."""
    note = f"The waiver of the LCR {rng.choice(WORDS[applies])}, letter {number}"
    leverage, missed = f"{rng.randint(30, 60) / 10}%", lcr < 100
    violated = ["LCR_MIN"] if missed and not applies else []
    answer = f'Note:\n"{note}" | waiver | {"applies" if applies else "does not apply"} | - | - | -'
    fact = {"kind": "waiver", "applies": applies, "amount": None, "who": [], "since": "", "quote": note}
    question = f"Bank {number}\nLeverage ratio {leverage}\nLCR {lcr}%\nNote: {note}."
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        **{"id": f"report {number}", "bank": f"bank {number}", "kind": "waiver", "note_facts": [fact]},
        **{"violations": violated, "engine": ["LCR_MIN"] if missed else []},
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write a corpus whose test has 8 minimal pairs in words and 8 in figures."""
    rng, directory = random.Random(0), tmp_path_factory.mktemp("screen")
    low, high = (lambda: rng.randint(80, 99)), (lambda: rng.randint(100, 130))
    for split, count in (("train", 80), ("validation", 10)):
        examples = [report(i, rng, rng.choice([low, high])(), rng.random() < 0.5) for i in range(count)]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in examples))
    test, number = [], 1000
    for pair in range(16):
        in_words, figure = pair % 2 == 0, low()
        for second in (False, True):
            lcr = figure if in_words or not second else high()
            one = report(number, rng, lcr, second and in_words)
            test.append(one | {"pair": f"{pair} in {'words' if in_words else 'figures'}"})
            number += 1
    (directory / "test.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in test))
    return directory


def examples(directory, split: str) -> list[dict]:
    return [json.loads(line) for line in (directory / f"{split}.jsonl").open()]


def result(test: list[dict], texts: list[str]) -> dict:
    return score_answers(texts, test, "test.jsonl", None)


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return [cell.strip() for cell in line.strip().removeprefix(name).split("  ") if cell.strip()]


def test_right_answers_stand_beside_the_programs(data) -> None:
    test, training = examples(data, "test"), examples(data, "train")
    right = [example["messages"][-1]["content"] for example in test]
    half = [answer if i % 2 else "no idea" for i, answer in enumerate(right)]  # every pair has one right report
    models = {"base": of_result(result(test, half), test), "tuned": of_result(result(test, right), test)}
    found = baseline_predictions(training, test, examples(data, "validation"))
    text = table(
        models
        | {
            title: Column(test, found[name].rules, found[name].facts)
            for name, title in PROGRAMS.items()
            if name in found
        }
    )
    assert text.splitlines()[0].split() == ["base", "tuned", "note", "words", "n-grams", "engine", "thresholds"]
    assert row(text, "reports") == ["32"] * 6
    f1 = [float(value) for value in row(text, "F1, all rules")]
    assert f1[0] < 0.8 and f1[1] == f1[2] == 1.0 > f1[4]  # the words of these notes are easy, and the engine reads none
    assert row(text, "F1, rules decided by notes (unseen wordings)")[1:3] == row(text, "waiver")[1:3] == ["1.000"] * 2
    in_words, in_figures = (row(text, f"minimal pairs {part}, both right") for part in ("in words", "in figures"))
    assert in_words[:3] == in_figures[:3] == ["0 of 8", "8 of 8", "8 of 8"]
    assert (in_words[4], in_figures[4]) == ("0 of 8", "8 of 8")
    assert row(text, "facts of notes: kind and applies right, F1")[1:4] == ["1.000", "1.000", "-"]
    broken = [answer.replace("appl", "may appl") for answer in right]
    text = table({"broken": of_result(result(test, broken), test)})  # a line that cannot be read is not right
    assert row(text, "minimal pairs in words, both right")[0] == "0 of 8"


def test_the_whole_screen(data, tmp_path) -> None:
    test = examples(data, "test")
    answers = [example["messages"][-1]["content"] for example in test]
    after = result(test, answers)
    forgetting = {
        "perplexity_per_byte": {"base": {"value": 1.9}, "tuned": {"value": 2.0}},
        "kl": {"value": 0.5},
        "questions": {"all": {"base": {"value": 0.79}, "tuned": {"value": 0.74}}},
    }
    with pytest.raises(UserError, match=r"before\.json: .*No such file.*run scripts/quickstart\.sh"):
        screen(tmp_path, data)
    (tmp_path / "eval").mkdir()
    for text, problem in (("{", "before.json: Expecting property name"), ("{}", "before.json has no answers; remove")):
        (tmp_path / "eval" / "before.json").write_text(text)
        with pytest.raises(UserError, match=problem):
            screen(tmp_path, data)
    for name, content in (("before", after), ("after", after), ("forgetting", forgetting)):
        (tmp_path / "eval" / f"{name}.json").write_text(json.dumps(content))
    text = screen(tmp_path, data)
    assert "1.900 -> 2.000; KL 0.50 nats per token; general questions right: 79% -> 74%" in text
    assert f"tensorboard --logdir {tmp_path}/tensorboard" in text and "(true violations: " in text
