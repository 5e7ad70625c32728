"""Find the items of given examples: in a mix, as copies with other ids, as texts in several documents."""

import gzip

import pytest

from common.errors import UserError
from configs.config import Data, Source
from data.encoding import ExampleEncoder
from data.find import find_examples, query_by_name, query_from_file
from data.reader import Reader
from data.sources import Corpus
from tests.in_memory import json_lines
from tests.tiny import tiny_tokenizer, write_chat_file

TEXTS = [
    "The house is small.",
    "The house has room.",
    "THE HOUSE, is small",
    "A long report on the town of Graz. " * 40,
]


@pytest.fixture
def source(tmp_path) -> tuple[Corpus, Data]:
    """A main source of four chats, and a mix of four texts: the third is a copy of the first, and the last is cut."""
    chats, mix = write_chat_file(tmp_path / "chats.jsonl", 4), tmp_path / "mix.jsonl"
    mix.write_bytes(json_lines([{"id": f"text-{i}", "author": "X", "text": text} for i, text in enumerate(TEXTS)]))
    data = Data((str(chats),), mix=(Source("mix", (str(mix),), 0.5),))
    return Reader(ExampleEncoder(tiny_tokenizer()), 384, 256, "truncate").training(data.train, data.mix), data


def test_copies_and_all_parts_are_found(source) -> None:
    corpus, data = source
    matches = find_examples(corpus, data, query_by_name("text-0"))
    assert [match.items for match in matches] == [(4,), (6,)]
    assert all("mix.jsonl, line " in match.where for match in matches)
    assert (
        matches[0].digest == matches[1].digest and find_examples(corpus, data, query_by_name(matches[0].digest)) != []
    )
    (cut,) = find_examples(corpus, data, query_by_name("text-3"))
    assert len(cut.items) > 1 and cut.items == tuple(range(7, len(corpus)))
    assert {match.items for match in find_examples(corpus, data, query_by_name("on the town of"))} == {cut.items}
    # 6 is a copy of 4.
    assert [match.items[0] for match in find_examples(corpus, data, query_by_name("The house"))] == [4, 5, 6]
    assert (
        len(find_examples(corpus, data, query_by_name("X"))) == 4
        and find_examples(corpus, data, query_by_name("nobody")) == []
    )


def test_names_are_read_from_any_text_file(tmp_path) -> None:
    """A byte order mark, with which Windows begins a file, is no part of the first name."""
    for name, content in (("a.txt", "\ufeffid-1\r\nid-2\r\n".encode()), ("a.txt.gz", gzip.compress(b"id-1\nid-2"))):
        (tmp_path / name).write_bytes(content)
        assert query_from_file(tmp_path / name, Data(())).names == {"id-1", "id-2"}
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(UserError, match="latin.txt is not UTF-8 text"):
        query_from_file(tmp_path / "latin.txt", Data(()))
