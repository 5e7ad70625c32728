"""Read the sources of a run from files and token stores, for training and validation."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from configs.config import Source
from data.cache import Cache
from data.encoding import ExampleEncoder
from data.reader import Reader, with_shared_examples_reported
from tests.in_memory import json_lines
from tests.tiny import tiny_tokenizer, write_chat_file

TEXTS = ["The bank shall hold own funds.", "Grüße: die LCR beträgt 97,3 %."]


def test_reader_loads_all_sources_and_validation(tmp_path) -> None:
    chat = str(write_chat_file(tmp_path / "chat.jsonl", 12))
    text, held_out = (str(tmp_path / name) for name in ("general.txt", "held_out.txt"))
    (tmp_path / "general.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "held_out.txt").write_text(TEXTS[0], encoding="utf-8")
    reader = Reader(ExampleEncoder(tiny_tokenizer()), 384, 128, "drop")
    mix = (Source("general", (text,), 0.05, (held_out,)), Source("law", (text,), 0.1))
    corpus = reader.training((chat,), mix)
    assert corpus.names == ("main", "general", "law") and corpus.shares == pytest.approx((0.85, 0.05, 0.1))
    assert [line.split(":")[0] for line in corpus.lines("train", (1.0, 2.5, 3.0)) if line[0] != " "] == [
        "train (85.0% of the target tokens, 1.00 passes)",
        "train, general (5.0% of the target tokens, 2.50 passes)",
        "train, law (10.0% of the target tokens, 3.00 passes)",
    ]
    assert corpus.lines("train")[1] == f"  {chat}: messages (messages); ignored: id"
    assert [part[:2] for part in corpus.mixture()] == [["general", 0.05], ["law", 0.1]]
    assert json.loads(json.dumps(corpus.mixture())) == corpus.mixture()  # as stored in a checkpoint
    assert reader.training((chat,), ()).mixture() is None
    assert reader.validation((chat,), mix).names == ("main", "general")
    assert reader.validation((), mix).names == ("general",) and reader.validation((), ()) is None
    with pytest.raises(UserError, match=r"token id \d+ of the tokenizer is outside the model's embedding of 300 rows"):
        Reader(ExampleEncoder(tiny_tokenizer()), 300, 128, "drop").training((chat,), ())
    folder = reader.training((str(tmp_path),), ())  # all data files in it
    assert len(folder) == 13 and "from 3 files" in folder.lines("train")[0]


def test_examples_in_two_sources_are_counted(tmp_path) -> None:
    chat, part, third = (str(tmp_path / f"{name}.jsonl") for name in ("chat", "part", "other"))
    lines = write_chat_file(chat, 12).read_text().splitlines(keepends=True)
    Path(part).write_text("".join(lines[:5]))
    write_chat_file(third, 3, seed=1)
    reader = Reader(ExampleEncoder(tiny_tokenizer()), 384, 128, "drop")
    mix = [Source(name, (path,), 0.1) for name, path in (("a", part), ("b", third), ("c", third))]
    corpus = reader.training((chat,), mix)
    warned = ["SHARED" in source.report for source in corpus.sources]
    assert warned == [False, True, False, True]
    assert "SHARED: 5 of 5 examples are also in another source of training data" in corpus.sources[1].report
    validation = with_shared_examples_reported(reader.validation((part,), ()), corpus)
    assert "SHARED: 5 of 5 examples are also in the training data" in validation.sources[0].report


def test_each_source_has_its_own_row_function(tmp_path, monkeypatch) -> None:
    """A source's `row` differs from data.row and applies to its validation files too; a digest of its code is requested."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hooks_of_a_mix.py").write_text("def text(row): return {'text': row['title']}")
    file = tmp_path / "titles.jsonl"
    file.write_bytes(json_lines([{"title": text} for text in TEXTS]))
    chat, requested = str(write_chat_file(tmp_path / "chat.jsonl", 3)), []
    cache, digest = Cache(tmp_path / "cache", print), lambda row: requested.append(row) or ""
    reader = Reader(ExampleEncoder(tiny_tokenizer()), 384, 128, "drop", cache=cache, digest_of_row=digest)
    mix = (Source("titles", (str(file),), 0.1, (str(file),), row="hooks_of_a_mix:text"),)
    documents = reader.training((chat,), mix).sources[1]
    assert len(documents) == 2 and "text (text); made by data.row=hooks_of_a_mix:text" in documents.report
    assert len(reader.validation((), mix).sources[0]) == 2 and set(requested) == {None, "hooks_of_a_mix:text"}
    with pytest.raises(UserError, match="line 1 has none of the forms"):
        reader.training((chat,), (Source("titles", (str(file),), 0.1),))
