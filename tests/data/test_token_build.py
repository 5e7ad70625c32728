"""Building a token store: every kind of file, texts in pieces, and an interruption at any moment."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import trainers
from transformers import PreTrainedTokenizerFast

import data.files
import data.token_build
from common.errors import UserError
from data.token_build import Piece, batches, build_store, cut, note_file, read_pieces
from data.token_store import open_store, tokenizer_fingerprint, tokens_file
from tests.data.test_token_store import ragged_texts, write_texts
from tests.tiny import SENTENCES, SPECIAL_TOKENS, tiny_tokenizer, write_chat_file

# Runs of line ends, which a tokenizer may know as one token.
LONG = "\n".join(f"{i}. {SENTENCES[i % 4]}" + "\n" * (i % 3) for i in range(60)) + "\nGrüße: 97,3 €\rEnde"


def tokens_of(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> list[int]:
    store = open_store(folder, tokenizer_fingerprint(tokenizer or tiny_tokenizer()), 10**9)
    return store.window(0)[0].tolist()


def encoded(texts: list[str], tokenizer: PreTrainedTokenizerFast | None = None) -> list[int]:
    """What training makes of the texts as files: each tokenised whole, with EOS behind it."""
    tokenizer = tokenizer or tiny_tokenizer()
    return [t for text in texts for t in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_kinds_of_files_in_their_order(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = ragged_texts(12)
    lines = write_texts(tmp_path / "a.jsonl", texts[:5])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(write_texts(tmp_path / "b.jsonl", texts[5:8]).read_bytes()))
    (tmp_path / "c.txt").write_text(texts[8])
    parquet.write_table(pyarrow.table({"text": texts[9:]}), tmp_path / "d.parquet")
    files = [lines, *(tmp_path / name for name in ("b.jsonl.gz", "c.txt", "d.parquet"))]
    told = []
    store = build_store(files, tiny_tokenizer(), tmp_path / "store", advance=told.append)
    assert tokens_of(tmp_path / "store") == encoded(texts)
    assert (store["documents"], store["tokens"]) == (12, len(encoded(texts)))
    assert sum(told) == sum(path.stat().st_size for path in files) and len(told) >= 4  # of the progress bar
    assert sorted(contents(tmp_path / "store")) == ["shard-00000.documents", "shard-00000.tokens", "store.json"]


def tokenizer_of_line_ends() -> PreTrainedTokenizerFast:
    """One for which two and three line ends are one token."""
    tokenizer = tiny_tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator([LONG, "\n\n\n \n\n"] * 9, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    assert len(made.encode("\n\n\n")) == 1
    return made


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_a_text_in_pieces_gets_the_ids_of_the_whole_text(tmp_path, monkeypatch, ending) -> None:
    monkeypatch.setattr(data.token_build, "PIECE", 200)
    monkeypatch.setattr(data.token_build, "BATCH", 700)
    monkeypatch.setattr(data.files, "CHUNK", 1)  # so also in the middle of a character, and between \r and \n
    if ending == ".txt":
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + LONG.replace("\n", "\r\n").encode())
    else:
        write_texts(tmp_path / "a.jsonl", [LONG])
    pieces = list(read_pieces([tmp_path / f"a{ending}"]))
    assert len(pieces) > 20 and max(len(piece.text) for piece in pieces) <= 200
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    tokenizer = tokenizer_of_line_ends()
    build_store([tmp_path / f"a{ending}"], tokenizer, tmp_path / "store", shard_tokens=10)
    assert tokens_of(tmp_path / "store", tokenizer) == encoded([LONG], tokenizer)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab1. \n\té"), max_size=60), min_size=1, max_size=6), st.integers(1, 40))
def test_pieces_are_the_text(parts, size) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.token_build, "PIECE", size)
        pieces = list(cut(parts))
    assert "".join(text for text, _ in pieces) == "".join(parts)
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(0 < len(text) <= size for text, _ in pieces[:-1]) and len(pieces[-1][0]) <= size


def test_a_batch_holds_about_as_many_characters_as_it_should(monkeypatch) -> None:
    monkeypatch.setattr(data.token_build, "BATCH", 100)
    made = list(batches(Piece("x" * 30, True, 0, i, "") for i in range(10)))
    assert [len(batch) for batch in made] == [4, 4, 2]


@pytest.fixture
def sources(tmp_path) -> list[Path]:
    """Three files of 33 documents, for about five shards of 300 tokens."""
    texts = ragged_texts(33, seed=1)
    (tmp_path / "b.txt").write_text(texts[20])
    return [
        write_texts(tmp_path / "a.jsonl", texts[:20]),
        tmp_path / "b.txt",
        write_texts(tmp_path / "c.jsonl", texts[21:]),
    ]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_interruption_anywhere_and_the_same_command_again_give_the_same_bytes(
    tmp_path, sources, monkeypatch, after
) -> None:
    """Stopped before, or after, each of the renames that make a file complete."""
    monkeypatch.setattr(data.token_build, "BATCH", 400)
    build_store(sources, tiny_tokenizer(), tmp_path / "whole", 700)
    whole = contents(tmp_path / "whole")
    assert len(whole) >= 9  # four shards and store.json
    replace, interrupted = os.replace, 0
    while True:
        out, count = tmp_path / f"stopped-{interrupted}", iter(range(10**6))

        def stopping(source: Path, target: Path, count=count, at=interrupted) -> None:
            now = next(count) == at
            if after or not now:
                replace(source, target)
            if now:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", stopping)
        try:
            build_store(sources, tiny_tokenizer(), out, 700)
        except KeyboardInterrupt:
            interrupted += 1
        else:
            break  # fewer renames than this
        finally:
            monkeypatch.setattr(os, "replace", replace)
        complete = {name: data for name, data in contents(out).items() if name.endswith(".tokens")}
        if not (out / "store.json").exists():
            (out / "shard-00077.tokens.partial").write_bytes(b"left")
        build_store(sources, tiny_tokenizer(), out, 700)
        assert contents(out) == whole
        assert all(whole[name] == data for name, data in complete.items())
    assert interrupted >= 3 * 4 + 2  # tokens, documents and note of each shard; build.json and store.json


def test_a_build_that_goes_on_tokenises_only_what_is_missing(tmp_path, sources, monkeypatch) -> None:
    monkeypatch.setattr(data.token_build, "BATCH", 100)
    texts, encode = [], data.token_build.encode

    def counted(encoder, batch: list) -> list:
        texts.extend(piece.text for piece in batch)
        return encode(encoder, batch)

    monkeypatch.setattr(data.token_build, "encode", counted)
    keep, kept = data.token_build._keep, []

    def stopping(*arguments) -> None:
        if len(kept) == 3:
            raise KeyboardInterrupt
        keep(*arguments)
        kept.append(arguments)

    monkeypatch.setattr(data.token_build, "_keep", stopping)
    with pytest.raises(KeyboardInterrupt):
        build_store(sources, tiny_tokenizer(), tmp_path / "store", 300)
    monkeypatch.setattr(data.token_build, "_keep", keep)
    note = json.loads((tmp_path / "store" / note_file(2)).read_text())
    before = {name: data for name, data in contents(tmp_path / "store").items() if name.startswith("shard-0000")}
    texts.clear()
    told = []
    store = build_store(sources, tiny_tokenizer(), tmp_path / "store", 300, told.append)
    assert sum(told) == sum(path.stat().st_size for path in sources)
    done = sum(shard["documents"] for shard in store["shards"][:3])
    assert note["documents"] == store["shards"][2]["documents"] and len(texts) == 33 - done < 33
    assert texts == ragged_texts(33, seed=1)[done:]
    assert all(contents(tmp_path / "store")[name] == before[name] for name in before if name.endswith(".tokens"))


def test_a_complete_store_is_left_as_it_is(tmp_path, sources) -> None:
    first = build_store(sources, tiny_tokenizer(), tmp_path / "store")
    stamp = (tmp_path / "store" / tokens_file(0)).stat().st_mtime_ns
    assert build_store(sources, tiny_tokenizer(), tmp_path / "store") == first
    assert (tmp_path / "store" / tokens_file(0)).stat().st_mtime_ns == stamp
    (tmp_path / "store" / tokens_file(0)).unlink()
    with pytest.raises(UserError, match="shard-00000.tokens is missing; remove the folder and build"):
        build_store(sources, tiny_tokenizer(), tmp_path / "store")


def test_what_cannot_go_on_is_refused(tmp_path, sources) -> None:
    out = tmp_path / "store"
    build_store(sources, tiny_tokenizer(), out, 700)
    with pytest.raises(UserError, match="holds a store of another tokenizer; choose another folder, or remove it"):
        build_store(sources, tiny_tokenizer(300), out, 300)
    with pytest.raises(UserError, match="holds a store of other files, or files that have changed"):
        build_store(sources[:2], tiny_tokenizer(), out, 300)
    with pytest.raises(UserError, match="holds a store with other settings"):
        build_store(sources, tiny_tokenizer(), out, 301)
    with sources[0].open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match="files that have changed"):
        build_store(sources, tiny_tokenizer(), out, 700)
    (out / "store.json").write_text("{")
    with pytest.raises(UserError, match="store.json is damaged; remove .*store and build the store again"):
        build_store(sources, tiny_tokenizer(), out, 700)


def test_a_folder_of_other_things_is_not_touched(tmp_path, sources) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.md").write_text("mine")
    with pytest.raises(UserError, match="other holds other files; choose another folder"):
        build_store(sources, tiny_tokenizer(), tmp_path / "other")
    assert contents(tmp_path / "other") == {"notes.md": b"mine"}
    with pytest.raises(UserError, match="notes.md is a file; choose another folder"):
        build_store(sources, tiny_tokenizer(), tmp_path / "other" / "notes.md")


def test_two_builds_of_one_store_at_once_are_refused(tmp_path, sources, monkeypatch) -> None:
    """The second begins while the first is in the middle of its first shard."""
    keep, refused = data.token_build._keep, []

    def second(*arguments) -> None:
        with pytest.raises(UserError, match="another process is building .*store") as caught:
            build_store(sources, tiny_tokenizer(), tmp_path / "store")
        refused.append(caught)
        keep(*arguments)

    monkeypatch.setattr(data.token_build, "_keep", second)
    build_store(sources, tiny_tokenizer(), tmp_path / "store")
    assert len(refused) == 1 and tokens_of(tmp_path / "store") == encoded(ragged_texts(33, seed=1))


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ""}\n', "a.jsonl, line 2: `text` must be a text that is not empty"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', "a.jsonl, line 2 is not a valid text: surrogates"),
        ("a.txt", " \n\n", "a.txt holds no text"),
        ("a.jsonl", "\n", "a.jsonl holds no example"),
    ],
)
def test_a_bad_text_is_named(tmp_path, name, content, words) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        build_store([tmp_path / name], tiny_tokenizer(), tmp_path / "store")
    assert not (tmp_path / "store" / "store.json").exists()


def test_chats_folders_and_missing_files_are_refused(tmp_path) -> None:
    chat = write_chat_file(tmp_path / "chat.jsonl", 1)
    for path, words in [
        (chat, "chat.jsonl, line 1 is a chat; a token store is for texts, and chats go into data.train as files"),
        (tmp_path, "is a folder; name its files"),
        (tmp_path / "absent.txt", "absent.txt does not exist"),
    ]:
        with pytest.raises(UserError, match=words):
            build_store([path], tiny_tokenizer(), tmp_path / "store")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 is latin-1")
    with pytest.raises(UserError, match="b.txt is not UTF-8 text"):
        build_store([tmp_path / "b.txt"], tiny_tokenizer(), tmp_path / "other")


def test_a_shard_ends_with_the_document_that_fills_it(tmp_path) -> None:
    texts = ["a" * n for n in (5, 5, 50, 1)]
    lengths = [len(encoded([text])) for text in texts]
    files = [write_texts(tmp_path / "a.jsonl", texts)]
    store = build_store(files, tiny_tokenizer(), tmp_path / "store", shard_tokens=lengths[0] + lengths[1])
    assert [shard["tokens"] for shard in store["shards"]] == [lengths[0] + lengths[1], lengths[2], lengths[3]]
    assert [shard["documents"] for shard in store["shards"]] == [2, 1, 1]
    ends = np.fromfile(tmp_path / "store" / "shard-00000.documents", "<u8")
    assert ends.tolist() == [lengths[0], lengths[0] + lengths[1]]
