"""The checks of data pass sound data, and name planted faults."""

import json
import random
from pathlib import Path

import pytest

from data.encoding import ExampleEncoder, Span
from scripts.check.data import check_data
from scripts.check.result import FAILS, OK, SKIPPED, WARNING, Result
from tests.scripts.check.tiny_run import read, tiny_config, with_mix, write_examples
from tests.tiny import CHATML, WORDS, write_chat_file


def results(config) -> dict[str, Result]:
    run = read(config)
    return {result.name: result for result in check_data(run.config, run.tokenizer, run.inputs)}


def with_template(tmp_path, text: str, **data: object) -> dict[str, Result]:
    path = tmp_path / "template.jinja"
    path.write_text(text, encoding="utf-8")
    return results(tiny_config(tmp_path, data | {"chat_template": str(path)}))


def write_rows(path: Path, rows: list[dict]) -> tuple[str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return (str(path),)


def move_targets(monkeypatch, move) -> None:
    """Plant a fault of the labels. move: (question, number of the answer from the end, its span) -> (start, end)."""
    exact = ExampleEncoder._sequences

    def wrong(self, turns):
        sequences = []
        for sequence in exact(self, turns):
            numbered = zip(range(-len(sequence.spans), 0), sequence.spans, strict=True)
            spans = (Span(*move(turns[0].prompt, number, span), span.weight) for number, span in numbered)
            sequences.append(type(sequence)(sequence.ids, tuple(spans)))
        return sequences

    monkeypatch.setattr(ExampleEncoder, "_sequences", wrong)


def test_sound_data_pass_every_check(tmp_path) -> None:
    lines = results(with_mix(tiny_config(tmp_path), str(write_chat_file(tmp_path / "other.jsonl", 8, seed=2))))
    assert {name: result.status for name, result in lines.items()} == dict.fromkeys(lines, OK)
    assert lines["prompt"].figures == {"examples": 20, "different": 0, "doubled_bos": 0}
    # Both sources count.
    assert lines["EOS"].figures == {"documents": 27, "answers": 27, "without_end": 0, "cut": 0, "stop_ids": [2]}
    assert lines["validation"].figures | {"compared": 0} == {"validation": 6, "shared": 0, "near": 0, "compared": 0}


def test_fetched_data_are_checked(tmp_path) -> None:
    train = write_chat_file(tmp_path / "train.jsonl", 20)
    lines = results(tiny_config(tmp_path, {"train": (f"file://{train}",), "cache": str(tmp_path / "tokens")}))
    assert (lines["prompt"].status, lines["prompt"].figures["examples"]) == (OK, 20)


@pytest.mark.parametrize(
    ("old", "new"),
    [("<|im_end|>", ""), ("'\n' + message['content']", "': ' + message['content']")],
)
def test_eos_is_trained_whatever_the_template_writes(tmp_path, old, new) -> None:
    """The answer is encoded by itself, after the ids that generation sees, and EOS follows it."""
    assert old in CHATML
    text = CHATML.replace(old, new)
    text = text.replace("assistant\n", "assistant: ") if new else text
    turns = [{"role": role, "content": "the bank"} for role in ("user", "assistant") * 2]
    train = write_rows(tmp_path / "turns.jsonl", [{"messages": turns}])
    lines = with_template(tmp_path, text, train=train, validation=())
    assert (lines["EOS"].status, lines["prompt"].status, lines["EOS"].figures["answers"]) == (OK, OK, 2)


def test_targets_that_begin_late_fail(tmp_path, monkeypatch) -> None:
    move_targets(monkeypatch, lambda question, number, span: (span.start + 1, span.end))
    line = results(tiny_config(tmp_path))["prompt"]
    assert (line.status, line.figures["examples"], line.figures["different"]) == (FAILS, 20, 20)


@pytest.mark.parametrize("answer", [-1, -2])
def test_an_untrained_end_fails(tmp_path, monkeypatch, answer) -> None:
    """In a single chat of twenty, the end token of the last or of the first answer is no target."""
    is_cut = lambda question, number: number == answer and "question 7 " in question  # noqa: E731
    move_targets(monkeypatch, lambda question, number, span: (span.start, span.end - is_cut(question, number)))
    spoken = (("question", "user"), ("the bank", "assistant"), ("and", "user"), ("the ratio", "assistant"))
    rows = [{"messages": [{"role": role, "content": f"{words} {i} "} for words, role in spoken]} for i in range(20)]
    line = results(tiny_config(tmp_path, {"train": write_rows(tmp_path / "turns.jsonl", rows)}))["EOS"]
    assert (line.status, line.figures["without_end"], line.figures["answers"]) == (FAILS, 1, 40)
    assert "is no target" in line.text


def test_bos_twice_fails(tmp_path) -> None:
    line = with_template(tmp_path, "{{ bos_token }}" + CHATML)["prompt"]
    assert line.status == FAILS and line.figures["doubled_bos"] == 20


@pytest.mark.parametrize("shared", [1, 6])
def test_validation_in_training(tmp_path, shared) -> None:
    config = tiny_config(tmp_path)
    with open(config.data.train[0], "a", encoding="utf-8") as file:
        file.writelines(Path(config.data.validation[0]).read_text(encoding="utf-8").splitlines(True)[:shared])
    line = results(config)["validation"]
    assert (line.status, line.figures["shared"]) == (FAILS, shared)


def test_near_copies_are_counted(tmp_path) -> None:
    rng, form = random.Random(0), "The bank reports to the supervisor at the end of the quarter: "
    own = [f"{form}{' '.join(f'{rng.choice(WORDS)}{rng.randrange(999)}' for _ in range(12))}" for _ in range(40)]
    files = {"train": own[:30], "validation": [*(text + " again" for text in own[:4]), *own[30:]]}
    data = {
        name: (write_examples(tmp_path / f"near-{name}.jsonl", [(text, "no violation") for text in texts]),)
        for name, texts in files.items()
    }
    line = results(tiny_config(tmp_path, data | {"sequence_length": 512}))["validation"]
    assert line.status == WARNING and line.figures["shared"] == 0
    assert (line.figures["near"], line.figures["compared"]) == (4, 14)
    assert line.text.startswith("4 of 14 validation sequences have more than half of their own runs of 13 tokens in")


def test_held_out_examples_are_compared_with_the_rest(tmp_path) -> None:
    train = (write_examples(tmp_path / "same.jsonl", [("the same question", f"answer {i}") for i in range(30)]),)
    line = results(tiny_config(tmp_path, {"train": train, "validation": (), "validation_share": 0.3}))["validation"]
    assert 0 < line.figures["validation"] < 30 and line.status == OK


def test_many_answers_cut_off_fail(tmp_path) -> None:
    pairs = [(f"question {i}", " ".join(WORDS[:40]) if i else "the bank") for i in range(20)]
    train = (write_examples(tmp_path / "long.jsonl", pairs),)
    data = {"train": train, "validation": (), "sequence_length": 64, "too_long": "truncate"}
    line = results(tiny_config(tmp_path, data))["EOS"]
    assert (line.status, line.figures["cut"]) == (FAILS, 19) and "raise it" in line.text


def test_texts_have_no_prompt_and_end_with_eos(tmp_path) -> None:
    train = write_rows(tmp_path / "texts.jsonl", [{"text": f"{i} " + " ".join(WORDS)} for i in range(12)])
    lines = results(tiny_config(tmp_path, {"train": train, "validation": (), "sequence_length": 64}))
    statuses = {name: result.status for name, result in lines.items()}
    assert statuses == dict.fromkeys(lines, OK) | dict.fromkeys(("prompt", "validation"), SKIPPED)
    assert lines["EOS"].figures["documents"] > 12 and lines["EOS"].figures["cut"] == 0
