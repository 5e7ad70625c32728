"""The check's line EOS passes sound data, and fails if the end of an answer is not trained."""

import json
from pathlib import Path

import pytest

from data.encoding import ExampleEncoder, Span
from tests.scripts.check.tiny_run import read, tiny_config, with_mix
from tests.tiny import CHATML, WORDS, write_chat_file
from training.check_result import FAILS, OK, Result
from training.quick_check import check_ends


def result_of(config) -> Result:
    run = read(config)
    return check_ends(run.config, run.tokenizer, run.inputs)


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


def test_answers_of_all_sources_are_checked(tmp_path) -> None:
    config = with_mix(tiny_config(tmp_path), str(write_chat_file(tmp_path / "other.jsonl", 8, seed=2)))
    result = result_of(config)
    assert result.status == OK and "27 answers in 27 documents is an end token (<|im_end|>)" in result.text, result.text


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
    (template := tmp_path / "template.jinja").write_text(text, encoding="utf-8")
    result = result_of(tiny_config(tmp_path, {"train": train, "validation": (), "chat_template": str(template)}))
    assert result.status == OK and " 2 answers in " in result.text, result.text


@pytest.mark.parametrize("answer", [-1, -2])
def test_an_untrained_end_fails(tmp_path, monkeypatch, answer) -> None:
    """In a single chat of twenty, the end token of the last or of the first answer is no target."""
    is_cut = lambda question, number: number == answer and "question 7 " in question  # noqa: E731
    move_targets(monkeypatch, lambda question, number, span: (span.start, span.end - is_cut(question, number)))
    spoken = (("question", "user"), ("the bank", "assistant"), ("and", "user"), ("the ratio", "assistant"))
    rows = [{"messages": [{"role": role, "content": f"{words} {i} "} for words, role in spoken]} for i in range(20)]
    result = result_of(tiny_config(tmp_path, {"train": write_rows(tmp_path / "turns.jsonl", rows)}))
    assert result.status == FAILS and result.text.startswith("1 of 20 documents") and "is no target" in result.text


def test_texts_end_with_eos_or_are_pieces(tmp_path) -> None:
    train = write_rows(tmp_path / "texts.jsonl", [{"text": f"{i} " + " ".join(WORDS)} for i in range(12)])
    result = result_of(tiny_config(tmp_path, {"train": train, "validation": (), "sequence_length": 64}))
    documents = int(result.text.partition(" answers in ")[2].partition(" ")[0])
    assert result.status == OK and documents > 12, result.text
