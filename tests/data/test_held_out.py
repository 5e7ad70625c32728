"""The split is the same in any order and file, has the requested share, and keeps copies and groups together."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data.encoding import ExampleEncoder
from data.files import Reading
from data.held_out import HASH_BYTES, content_hash, group_hash, is_held_out, key_of, num_shared
from data.reader import Reader, with_shared_examples_reported
from tests.in_memory import json_lines, parquet
from tests.tiny import tiny_tokenizer

CHAT = [{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "97.3%"}]
HASHES = [content_hash({"text": f"document {i}"}) for i in range(8_000)]


def test_the_hash_is_of_the_content_alone() -> None:
    whole = content_hash({"messages": CHAT, "tools": [{"name": "f", "type": "function"}]})
    assert len(whole) == HASH_BYTES
    weighted = [CHAT[0], CHAT[1] | {"weight": 0.0}]
    reordered = {"tools": [{"type": "function", "name": "f"}], "id": 7, "messages": weighted, "weight": 0.5}
    assert content_hash(reordered) == whole and "weight" in reordered["messages"][1]
    different = [
        {"messages": CHAT},
        {"messages": CHAT[::-1]},
        {"messages": [CHAT[0], CHAT[1] | {"reasoning_content": "r"}]},
        {"text": "ab"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "ab", "completion": ""},
        *({"text": text} for text in ("1.5", "15", "2+2", "2*2", "2-2", "a b", "12 % < 8 %", "12 % > 8 %", "ä", "a")),
    ]
    assert len({whole, *map(content_hash, different)}) == 1 + len(different)


def test_hash_ignores_case_space_and_punctuation() -> None:
    copies = (
        "Own funds: the bank's ratio is 8,5 % (see §3).",
        "own funds, the bank's ratio is 8.5 %  (SEE §3) ",
        "Own funds;\n\tthe bank’s ratio\u00a0is “8,5 %” (see §3)\r\n",
        "Own funds\\ the bank's ratio is 8.5 % (see §3)!?…",
    )
    assert len({content_hash({"text": copy}) for copy in copies}) == 1
    assert len({content_hash({"messages": [{"role": "user", "content": copy}]}) for copy in copies}) == 1
    assert content_hash({"text": copies[0]}) != content_hash({"text": copies[0].replace("8,5", "8,6")})


def test_group_is_the_value_of_its_key() -> None:
    first, second, spaced = (
        {"text": text, "author": author} for text, author in (("a", "X1"), ("b", "X1"), ("c", " x1\n"))
    )
    assert group_hash(first, "author") == group_hash(second, "author") == group_hash(spaced, "author")
    assert group_hash({"author": 7}, "author") == group_hash({"author": "7"}, "author")
    assert group_hash({"author": "7"}, "author") != group_hash({"author": "8"}, "author")
    assert group_hash(first, None) == content_hash(first) != content_hash(second)
    assert group_hash({"text": "a"}, "author") is None is group_hash({"author": " "}, "author")
    assert not is_held_out(None, 0.999)


def rows_by_author(number: int, authors: int) -> list[dict]:
    return [{"text": f"Report {i} of an author.", "author": f"B{i % authors}", "id": i} for i in range(number)]


def write(path: Path, rows: list[dict]) -> str:
    path.write_bytes(json_lines(rows))
    return str(path)


def read_both(path: str, split_by: str | None, share: float = 0.3, on_bad: str = "error"):
    reading = Reading(on_bad=on_bad, split_by=split_by, validation_share=share)
    reader = Reader(ExampleEncoder(tiny_tokenizer()), 384, 128, "drop", reading=reading)
    corpus = reader.training((path,), ())
    return corpus, with_shared_examples_reported(reader.validation((), (), (path,)), corpus)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_groups_stay_on_one_side(tmp_path, kind) -> None:
    rows, path = rows_by_author(200, 20), str(tmp_path / f"reports.{kind}")
    if kind == "jsonl":
        write(Path(path), rows)
    elif kind == "parquet":
        Path(path).write_bytes(parquet(rows))
    else:
        lines = ["text,author,id", *(f"{row['text']},{row['author']},{row['id']}" for row in rows)]
        Path(path).write_text("\n".join(lines))
    held = {row["author"] for row in rows if is_held_out(group_hash(row, "author"), 0.3)}
    assert 2 <= len(held) <= 12
    train, validation = read_both(path, "author")
    sides = [
        {key for row in rows if (row["author"] in held) == side for key in [key_of(content_hash(row))]}
        for side in (0, 1)
    ]
    assert [set(part.sources[0].content_keys().tolist()) for part in (train, validation)] == sides
    assert len(validation.sources[0]) == 10 * len(held)
    assert "text (text); ignored: id\n" in train.sources[0].report + "\n"  # the key of the split is not ignored
    # Without the key, most authors have reports on both sides.
    train, validation = read_both(path, None)
    keys = {key_of(content_hash(row)): row["author"] for row in rows}
    authors = [{keys[key] for key in part.sources[0].content_keys().tolist()} for part in (train, validation)]
    assert len(authors[0] & authors[1]) > 15


def test_share_that_holds_out_nothing_is_named(tmp_path) -> None:
    path = write(tmp_path / "few.jsonl", rows_by_author(2, 2))
    with pytest.raises(
        UserError, match=r"few.jsonl: data.validation_share=0.001 leaves no example for validation, because all 2"
    ):
        read_both(path, None, share=0.001)


def test_row_without_split_key_is_refused_or_skipped(tmp_path) -> None:
    rows = rows_by_author(20, 10)
    rows[3]["author"] = "half of a pair: \ud800"  # valid JSON, although no encoding has it
    rows[6]["author"] = ""
    del rows[9]["author"]
    path = str(tmp_path / "a.jsonl")
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    sentence = "a.jsonl, line 7 has no value of `author` beside the keys of its form, by which data.split_by splits"
    with pytest.raises(UserError, match=sentence):
        read_both(path, "author")
    train, validation = read_both(path, "author", on_bad="skip")
    assert len(train.sources[0]) + len(validation.sources[0]) == 18
    for corpus in (train, validation):
        assert "SKIPPED 2 malformed:\n  " in corpus.sources[0].report and sentence in corpus.sources[0].report


def test_copies_are_on_one_side_and_counted(tmp_path) -> None:
    texts = [f"Bank {i} shall hold own funds." for i in range(100)]
    rows = [{"text": text} for text in texts] + [{"text": text + " "} for text in texts]
    train, validation = read_both(write(tmp_path / "a.jsonl", rows), None)
    assert "also in" not in validation.sources[0].report
    held = len(validation.sources[0])
    repeated = f"\nREPEATED {held // 2} with the content of an earlier example, but for case, white space"
    assert 30 < held < 90 and repeated in validation.sources[0].report
    reader = Reader(ExampleEncoder(tiny_tokenizer()), 384, 128, "drop")
    corpus = reader.training((write(tmp_path / "t.jsonl", rows[:100]),), ())
    changed = [{"text": text.upper().replace(".", " !")} for text in texts[:7]] + [{"text": "Something else."}]
    validation = reader.validation((write(tmp_path / "v.jsonl", changed),), ())
    report = with_shared_examples_reported(validation, corpus).sources[0].report
    assert report.endswith(
        "\nSHARED: 7 of 8 examples are also in the training data, but for case, white space and punctuation"
    )


def test_held_out_part_grows_with_its_share() -> None:
    held_out = {share: {i for i, h in enumerate(HASHES) if is_held_out(h, share)} for share in (0.0, 0.02, 0.1, 0.5)}
    assert not held_out[0.0] and held_out[0.02] < held_out[0.1] < held_out[0.5]
    for share, items in held_out.items():
        assert abs(len(items) - share * len(HASHES)) <= 4 * (len(HASHES) * share * (1 - share)) ** 0.5
    assert is_held_out(b"\0" * HASH_BYTES, 1e-9) and not is_held_out(b"\xff" * HASH_BYTES, 0.999_999)


def test_shared_examples_are_counted_also_without_examples() -> None:
    random = np.random.default_rng(0)
    for sizes in ((0, 0), (0, 5), (5, 0), (300, 40), (40, 300)):
        keys, more = (random.integers(0, 200, size).astype(np.uint64) + np.uint64(2**63) for size in sizes)
        assert num_shared(keys, more) == sum(key in set(more.tolist()) for key in keys.tolist())
