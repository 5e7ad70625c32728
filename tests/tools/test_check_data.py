"""What the checks of data find in sound data, and in data with a planted fault."""

import json
import random
from pathlib import Path

import pytest

from tests.tiny import CHATML, WORDS, write_chat_file
from tests.tools.tiny_run import read, tiny_config, with_mix, write_examples
from tools.check_data import FAILS, OK, SKIPPED, WARNING, Result, check_data


def results(config, ranks: int = 1) -> dict[str, Result]:
    return {result.name: result for result in check_data(read(config, ranks))}


def template(tmp_path, text: str) -> dict:
    path = tmp_path / "template.jinja"
    path.write_text(text, encoding="utf-8")
    return {"chat_template": str(path)}


def test_sound_data_pass_every_check(tmp_path) -> None:
    found = results(with_mix(tiny_config(tmp_path), str(write_chat_file(tmp_path / "other.jsonl", 8, seed=2))))
    assert {name: result.status for name, result in found.items()} == dict.fromkeys(found, OK)
    lines = found["examples"].lines
    assert len(lines) == 3 and all("<|im_start|>assistant⏎⟦" in line and line.endswith("<|im_end|>⟧") for line in lines)
    assert found["prompt"].figures == {"examples": 20, "different": 0, "doubled_bos": 0}
    ends = {
        "documents": 27,
        "answers": 27,
        "without_end": 0,
        "cut": 0,
        "stop_ids": [2],
    }  # with the other source
    assert found["EOS"].figures == ends
    assert found["validation"].figures | {"compared": 0} == {"validation": 6, "shared": 0, "near": 0, "compared": 0}


def test_a_template_that_drops_eos_and_a_prompt_that_ends_inside_a_token_are_no_fault(tmp_path) -> None:
    """EOS is written after the answer, and the answer is encoded by itself, after the ids that generation sees."""
    without = CHATML.replace("<|im_end|>", "")
    inside = CHATML.replace("'\n' + message['content']", "': ' + message['content']").replace(
        "assistant\n", "assistant: "
    )
    assert CHATML not in (without, inside)
    turns = {"messages": [{"role": role, "content": "the bank"} for role in ("user", "assistant") * 2]}
    (tmp_path / "turns.jsonl").write_text(json.dumps(turns) + "\n")
    data = {"train": (str(tmp_path / "turns.jsonl"),), "validation": ()}
    for text in (without, inside):
        found = results(tiny_config(tmp_path, data | template(tmp_path, text)))
        assert (found["EOS"].status, found["prompt"].status, found["EOS"].figures["answers"]) == (OK, OK, 2)


def test_targets_that_begin_late_are_another_prompt(tmp_path, monkeypatch) -> None:
    from data.encoding import ExampleEncoder, Span

    exact = ExampleEncoder._sequences

    def late(self, turns):
        sequences = exact(self, turns)
        spans = [tuple(Span(span.start + 1, span.end, span.weight) for span in s.spans) for s in sequences]
        return [type(s)(s.ids, moved) for s, moved in zip(sequences, spans, strict=True)]

    monkeypatch.setattr(ExampleEncoder, "_sequences", late)
    found = results(tiny_config(tmp_path))
    assert found["prompt"].status == FAILS and (
        found["prompt"].figures["examples"],
        found["prompt"].figures["different"],
    ) == (20, 20)


@pytest.mark.parametrize("last", [True, False])
def test_an_end_that_is_not_trained_in_some_examples_fails(tmp_path, monkeypatch, last) -> None:
    """In one of twenty chats of two answers, the last or the first answer loses its end token as a target."""
    from data.encoding import ExampleEncoder, Span

    exact, calls = ExampleEncoder._sequences, []

    def early(self, turns):
        sequences = exact(self, turns)
        if "question 7 " not in turns[0].prompt:
            return sequences
        (encoded,) = sequences
        calls.append(len(encoded.spans))
        cut = len(encoded.spans) - 1 if last else 0
        spans = (Span(s.start, s.end - (i == cut), s.weight) for i, s in enumerate(encoded.spans))
        return [type(encoded)(encoded.ids, tuple(spans))]

    monkeypatch.setattr(ExampleEncoder, "_sequences", early)
    turns = [
        {
            "messages": [
                {"role": role, "content": f"{words} {i} "}
                for words, role in (
                    ("question", "user"),
                    ("the bank", "assistant"),
                    ("and", "user"),
                    ("the ratio", "assistant"),
                )
            ]
        }
        for i in range(20)
    ]
    file = tmp_path / "turns.jsonl"
    file.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    found = results(tiny_config(tmp_path, {"train": (str(file),)}))
    assert set(calls) == {2}
    assert found["EOS"].status == FAILS and found["EOS"].figures["without_end"] == 1
    assert found["EOS"].figures["answers"] == 40 and "is no target" in found["EOS"].text


def test_bos_twice_fails(tmp_path) -> None:
    found = results(tiny_config(tmp_path, template(tmp_path, "{{ bos_token }}" + CHATML)))
    assert found["prompt"].status == FAILS and found["prompt"].figures["doubled_bos"] == 20


@pytest.mark.parametrize("shared, status", [(0, OK), (1, FAILS), (6, FAILS)])
def test_validation_in_training(tmp_path, shared, status) -> None:
    config = tiny_config(tmp_path)
    with open(config.data.train[0], "a", encoding="utf-8") as file:
        file.writelines(Path(config.data.validation[0]).read_text(encoding="utf-8").splitlines(True)[:shared])
    found = results(config)
    assert (found["validation"].status, found["validation"].figures["shared"]) == (status, shared)


def test_copies_with_another_word_are_near_and_a_form_that_all_fill_in_is_not(tmp_path) -> None:
    rng = random.Random(0)
    form = "The bank reports to the supervisor at the end of the quarter: "
    own = [" ".join(f"{rng.choice(WORDS)}{rng.randrange(999)}" for _ in range(12)) for _ in range(40)]
    config = tiny_config(
        tmp_path,
        {
            "train": (write_examples(tmp_path / "t.jsonl", [(form + text, "no violation") for text in own[:30]]),),
            "validation": (
                write_examples(
                    tmp_path / "v.jsonl",
                    [(form + text + " again", "no violation") for text in own[:4]]
                    + [(form + text, "no violation") for text in own[30:]],
                ),
            ),
            "sequence_length": 512,
        },
    )
    found = results(config)["validation"]
    assert found.status == WARNING and found.figures["shared"] == 0
    assert (found.figures["near"], found.figures["compared"]) == (4, 14)
    assert found.text.startswith(
        "4 of 14 validation sequences have more than half of their own runs of 13 tokens in one"
    )


def test_held_out_examples_are_compared_with_the_rest(tmp_path) -> None:
    pairs = [("the same question", f"answer {i}") for i in range(30)]
    train = (write_examples(tmp_path / "same.jsonl", pairs),)
    found = results(tiny_config(tmp_path, {"train": train, "validation": (), "validation_share": 0.3}))
    held = found["validation"].figures["validation"]
    assert 0 < held < 30 and found["validation"].status == OK


def test_more_than_half_of_the_answers_cut_off_fails(tmp_path) -> None:
    pairs = [(f"question {i}", " ".join(WORDS[:40]) if i else "the bank") for i in range(20)]
    train = (write_examples(tmp_path / "long.jsonl", pairs),)
    data = {"train": train, "validation": (), "sequence_length": 64, "too_long": "truncate"}
    found = results(tiny_config(tmp_path, data))
    assert (found["EOS"].status, found["EOS"].figures["cut"]) == (FAILS, 19)
    assert "raise it" in found["EOS"].text


def test_texts_have_no_prompt_and_end_with_eos(tmp_path) -> None:
    file = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"{i} " + " ".join(WORDS)}) for i in range(12)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = results(tiny_config(tmp_path, {"train": (str(file),), "validation": (), "sequence_length": 64}))
    statuses = {name: result.status for name, result in found.items()}
    assert statuses == dict.fromkeys(found, OK) | dict.fromkeys(("prompt", "validation"), SKIPPED)
    assert found["EOS"].figures["documents"] > 12 and found["EOS"].figures["cut"] == 0
