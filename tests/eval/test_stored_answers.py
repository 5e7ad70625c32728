"""Answers that are read from a file."""

import json

import pytest

from common.errors import UserError
from eval.asked_examples import choose_examples
from eval.report import table
from eval.stored_answers import read_answers, score_stored, write_answers
from xbrl.answers.scores import score_answers

BREACH = "Violations:\nLCR_MIN | LCR | 75.2% | min 100% | CRR Art. 412(1)\nDirective:\nRestore the LCR."
CLEAN = "Violations:\nnone\nDirective:\nNo measures."


def lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.fixture
def data(tmp_path):
    def example(answer, **fields):
        return {"messages": [{"role": "user", "content": "LCR"}, {"role": "assistant", "content": answer}], **fields}

    examples = [example(BREACH, id="a", bank="x"), {"text": "no question"}, example(CLEAN, id="b", bank="y")]
    return lines(tmp_path / "test.jsonl", examples)


def score(data, answers, **options):
    return score_stored(data, answers, options.get("train"), options.get("limit"), options.get("before"), score_answers)


def test_answers_are_found_by_their_ids(data, tmp_path):
    answers = lines(tmp_path / "answers.jsonl", [{"id": "b", "answer": "garbage"}, {"id": "a", "answer": BREACH}])
    result, before = score(data, answers, train=data)
    assert before is None and result["n_examples"] == 3 and result["model"] == str(answers)
    assert [(one["id"], one["predicted"]) for one in result["answers"]] == [("a", ["LCR_MIN"]), ("b", None)]
    assert (
        result["violations"]["micro"]["precision"] == 0.5 and "character n-grams" in result["violations"]["baselines"]
    )
    write_answers(tmp_path / "again.jsonl", result)
    assert read_answers(tmp_path / "again.jsonl") == read_answers(answers)


def test_a_part_of_the_examples_is_said_to_be_one(data, tmp_path):
    chosen = choose_examples([json.loads(line) for line in data.read_text().splitlines()], 2)
    answers = [{"id": one["id"], "answer": CLEAN} for one in chosen if "id" in one]
    result, _ = score(data, lines(tmp_path / "answers.jsonl", answers), limit=2)
    assert (result["n_examples"], result["n_in_file"]) == (2, 3)
    assert "(2 of 3 examples, 0 s)" in table(result | {"seconds": 0}).splitlines()[0]


def test_examples_without_an_id_are_counted(tmp_path):
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]}
    data = lines(tmp_path / "data.jsonl", [chat, chat])
    answers = lines(tmp_path / "answers.jsonl", [{"id": 1, "answer": "yes"}, {"id": 2, "answer": "no"}])
    assert score(data, answers)[0]["rouge_l"]["f"] == 0.5


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"id": "a", "answer": "x"}], r"answers\.jsonl: the answer to b of .*test\.jsonl is missing"),
        ([], r"the answer to a \(and 1 more\) of .* is missing"),
        ([{"id": "a", "answer": "x"}] * 2, r"answers\.jsonl, line 2: the answer to a stands twice"),
        ([{"id": name, "answer": "x"} for name in "abc"], r"answers\.jsonl: c is no example of .* that is scored"),
        ([{"id": "a"}], r"answers\.jsonl, line 1: it needs the keys id and answer"),
        ([{"id": "a", "answer": None}], r"line 1: it needs the keys id and answer, the answer as a text"),
        (["a"], r"line 1: it needs the keys id and answer"),
    ],
)
def test_a_mistake_is_one_sentence(data, tmp_path, answers, message):
    with pytest.raises(UserError, match=message):
        score(data, lines(tmp_path / "answers.jsonl", answers))


def test_files_that_cannot_be_read(data, tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        score(data, tmp_path / "none.jsonl")
    (tmp_path / "text.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"text\.jsonl, line 1 is not valid JSON"):
        score(data, tmp_path / "text.jsonl")
    (tmp_path / "text.jsonl").write_bytes('{"id": "a", "answer": "\u00fc"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"text\.jsonl, line 1 is not UTF-8 text: .* at byte 23"):
        score(data, tmp_path / "text.jsonl")
    twice = lines(tmp_path / "twice.jsonl", [json.loads(data.read_text().splitlines()[0])] * 2)
    with pytest.raises(UserError, match=r"twice\.jsonl: the id a stands twice"):
        score(twice, lines(tmp_path / "answers.jsonl", [{"id": "a", "answer": "x"}]))


def test_only_line_feeds_end_a_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes('\ufeff{"id": "a", "answer": "x\u2028y"}\r\n{"id": "b", "answer": "z"}\r\n'.encode())
    assert read_answers(path) == {"a": "x\u2028y", "b": "z"}
    path.write_text('{"id": "a", "answer": "\\ud800"}\n')
    with pytest.raises(UserError, match="line 1 is not valid Unicode text: surrogates not allowed"):
        read_answers(path)


def test_an_earlier_result_of_other_data_is_refused(data, tmp_path):
    answers = lines(tmp_path / "answers.jsonl", [{"id": "a", "answer": BREACH}, {"id": "b", "answer": CLEAN}])
    result, _ = score(data, answers)
    before = tmp_path / "before.json"
    before.write_text(json.dumps(result | {"general_source": "texts"}))
    assert score(data, answers, before=before)[1]["n_examples"] == 3  # a result with more than the answers
    before.write_text(json.dumps(result | {"n_examples": 2}))
    with pytest.raises(UserError, match="n_examples differs"):
        score(data, answers, before=before)
