"""Answers that are read from a file."""

import pytest

from common.durable_files import write_json, write_json_lines
from common.errors import UserError
from eval.asked_examples import choose_examples, read_as
from eval.report import table
from eval.stored_answers import read_answers, score_stored, write_answers
from eval.task import ANY_CHAT

BREACH = "Violations:\nLCR_MIN | LCR | 75.2% | min 100% | CRR Art. 412(1)\nDirective:\nRestore the LCR."
CLEAN = "Violations:\nnone\nDirective:\nNo measures."


def chat(answer, **fields):
    return {"messages": [{"role": "user", "content": "LCR"}, {"role": "assistant", "content": answer}], **fields}


EXAMPLES = [chat(BREACH, id="a", bank="x"), {"text": "no question"}, chat(CLEAN, id="b", bank="y")]


@pytest.fixture
def score(tmp_path):
    """Score the answers, (id, answer) or rows, to EXAMPLES or others."""

    def call(answers, examples=EXAMPLES, **options):
        write_json_lines(tmp_path / "test.jsonl", examples)
        rows = [
            dict(zip(("id", "answer"), entry, strict=True)) if isinstance(entry, tuple) else entry for entry in answers
        ]
        write_json_lines(tmp_path / "answers.jsonl", rows)
        return score_stored(tmp_path / "test.jsonl", tmp_path / "answers.jsonl", ANY_CHAT.score, **options)

    return call


def test_answers_are_found_by_their_ids(score, tmp_path):
    write_json_lines(tmp_path / "train.jsonl", EXAMPLES)
    result, before = score([("b", "garbage"), ("a", BREACH)], train=tmp_path / "train.jsonl")
    assert before is None and result["n_examples"] == 3 and result["model"] == str(tmp_path / "answers.jsonl")
    assert [(answer["id"], answer["exact"]) for answer in result["answers"]] == [("a", True), ("b", False)]
    assert result["exact_match"] == {"n": 2, "share": 0.5}
    write_answers(tmp_path / "again.jsonl", [BREACH, "garbage"], EXAMPLES[::2])
    assert read_answers(tmp_path / "again.jsonl") == read_answers(tmp_path / "answers.jsonl")


def test_limited_result_shows_both_counts(score):
    chosen = choose_examples(EXAMPLES, 2)
    result, _ = score([(entry["id"], CLEAN) for entry in chosen if "id" in entry], limit=2)
    assert (result["n_examples"], result["n_in_file"]) == (2, 3)
    assert "(2 of 3 examples, 0 s)" in table(result | {"seconds": 0}).splitlines()[0]


def test_examples_without_id_are_numbered(score):
    answers = [(1, "yes"), (2, "no")]
    assert score(answers, [chat("yes"), chat("yes")])[0]["rouge_l"]["f"] == 0.5
    own = [{"talk": chat("yes")["messages"]}] * 2
    assert score(answers, own, reading=read_as("auto", "messages=talk"))[0]["rouge_l"]["f"] == 0.5


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([("a", "x")], r"answers\.jsonl: the answer to b of .*test\.jsonl is missing"),
        ([], r"the answer to a \(and 1 more\) of .* is missing"),
        ([("a", "x")] * 2, r"answers\.jsonl, line 2: the answer to a stands twice"),
        ([(name, "x") for name in "abc"], r"answers\.jsonl: c is no example of .* that is scored"),
        ([{"id": "a"}], r"answers\.jsonl, line 1: it needs the keys id and answer"),
        ([("a", None)], r"line 1: it needs the keys id and answer, the answer as a text"),
        (["a"], r"line 1: it needs the keys id and answer"),
    ],
)
def test_a_mistake_is_one_sentence(score, answers, message):
    with pytest.raises(UserError, match=message):
        score(answers)


def test_an_id_that_two_examples_have_is_refused(score):
    with pytest.raises(UserError, match=r"test\.jsonl: the id a stands twice"):
        score([("a", "x")], EXAMPLES[:1] * 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"answers\.jsonl does not exist"),
        (b"[" * 100_000, r"answers\.jsonl, line 1 is not valid JSON"),
        ('{"id": "a", "answer": "\u00fc"}'.encode("latin-1"), r"line 1 is not UTF-8 text: .* at byte 23"),
        (b'{"id": "a", "answer": "\\ud800"}\n', "line 1 is not valid Unicode text: surrogates not allowed"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, message):
    if content is not None:
        (tmp_path / "answers.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_answers(tmp_path / "answers.jsonl")


def test_only_line_feeds_end_a_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes('\ufeff{"id": "a", "answer": "x\u2028y"}\r\n{"id": "b", "answer": "z"}\r\n'.encode())
    assert read_answers(path) == {"a": "x\u2028y", "b": "z"}


def test_an_earlier_result_of_other_data_is_refused(score, tmp_path):
    answers, before = [("a", BREACH), ("b", CLEAN)], tmp_path / "before.json"
    result, _ = score(answers)
    write_json(before, result | {"loss": {"mean": 1.0, "targets": 2}})
    assert score(answers, before=before)[1]["n_examples"] == 3  # a result with more than the answers
    write_json(before, result | {"n_examples": 2})
    with pytest.raises(UserError, match="n_examples differs"):
        score(answers, before=before)


def test_file_without_answers_is_refused(score, tmp_path):
    (tmp_path / "answers.jsonl").touch()
    with pytest.raises(UserError, match="no example of .* is a chat with an answer, so there is nothing to score"):
        score([], [{"text": "no question"}])
