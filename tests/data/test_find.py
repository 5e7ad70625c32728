"""Which items of a corpus are made of given examples: in a mix, copies with other ids, texts in two documents; plans without them."""

import gzip
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from configs.config import Data, Source
from data.batches import plan_training
from data.encoding import ExampleEncoder
from data.find import called, exclude, find, wanted_by
from data.reader import Reader
from data.sources import Corpus
from tests.in_memory import json_lines
from tests.tiny import tiny_tokenizer, write_chat_file

TEXTS = [
    "The bank is small.",
    "The bank holds enough.",
    "THE BANK, is small",
    "A long report of the bank of Graz. " * 40,
]


@pytest.fixture
def made(tmp_path) -> tuple[Corpus, Data]:
    """A main source of four chats, and a mix of four texts: the third says what the first says, and the last is cut."""
    chats, mix = write_chat_file(tmp_path / "chats.jsonl", 4), tmp_path / "mix.jsonl"
    mix.write_bytes(json_lines([{"id": f"text-{i}", "bank": "X", "text": text} for i, text in enumerate(TEXTS)]))
    data = Data((str(chats),), mix=(Source("mix", (str(mix),), 0.5),), exclude=str(tmp_path / "exclude.txt"))
    return Reader(ExampleEncoder(tiny_tokenizer()), 384, 256, "truncate").training(data.train, data.mix), data


def test_examples_of_a_mix_are_found_with_their_copies_and_all_of_their_parts(made) -> None:
    corpus, data = made
    found = find(corpus, data, called("text-0"))
    assert [one.items for one in found] == [(4,), (6,)] and all("mix.jsonl, line " in one.where for one in found)
    assert found[0].digest == found[1].digest and find(corpus, data, called(found[0].digest)) != []
    (cut,) = find(corpus, data, called("text-3"))
    assert len(cut.items) > 1 and cut.items == tuple(range(7, len(corpus)))
    assert {one.items for one in find(corpus, data, called("of the bank of"))} == {cut.items}
    assert [one.items[0] for one in find(corpus, data, called("The bank"))] == [4, 5, 6]  # 6 as a copy of 4
    assert len(find(corpus, data, called("X"))) == 4 and find(corpus, data, called("nobody")) == []


def test_a_plan_without_an_example_of_a_mix_keeps_all_others_in_their_steps(made) -> None:
    corpus, data = made
    whole = plan_training(corpus, epochs=3, seed=0, global_examples=1)
    Path(str(data.exclude)).write_text("text-0\nexample-2\nno-such-id\n")
    plan, exclusion = exclude(whole, corpus, data)
    gone, seen = {2, 4, 6}, []
    for step in range(whole.num_steps):
        before, after = whole.batch(step).items, plan.batch(step).items
        assert after == tuple(item for item in before if item not in gone) == tuple(plan.items(step))
        assert before == tuple(whole.items(step))
        assert plan.batch(step).targets_by_source == tuple(
            sum(corpus.num_targets(item) for item in after if corpus.locate(item)[0] == number) for number in (0, 1)
        )
        seen += [step] if gone.intersection(before) else []
    assert seen and exclusion.first_step(whole.num_steps) == seen[0] and exclusion.first_step(seen[0]) is None
    assert "3 examples, 3 documents are not trained on" in exclusion.lines[0] and "no-such-id" in exclusion.lines[1]
    assert len(exclusion.digests) == 2
    # Nor does looking for it make the batches of all steps, which takes an hour for 100,000 steps of 10,000 documents.
    unread = replace(exclusion, whole=replace(whole, batch=lambda step: pytest.fail("a batch was made")))
    assert unread.first_step(whole.num_steps) == seen[0]
    Path(str(data.exclude)).write_text("no-such-id\n")
    with pytest.raises(UserError, match="names no example that is trained on; check its ids or hashes"):
        exclude(whole, corpus, data)


def test_names_are_read_of_any_text_file(tmp_path) -> None:
    """Windows begins one with a byte order mark, without which the first example would be trained on."""
    for name, content in (("a.txt", "\ufeffid-1\r\nid-2\r\n".encode()), ("a.txt.gz", gzip.compress(b"id-1\nid-2"))):
        (tmp_path / name).write_bytes(content)
        assert wanted_by(tmp_path / name, Data(())).names == {"id-1", "id-2"}
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(UserError, match="latin.txt is not UTF-8 text"):
        wanted_by(tmp_path / "latin.txt", Data(()))
