"""Building a token store: all file types, texts cut into pieces, and interruptions at any moment."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import data.compression
import data.text_pieces
from common.errors import UserError
from data.text_pieces import Piece, batch_pieces, cut_text, read_pieces
from data.token_build import ShardWriter, build_store, marker_file
from data.token_store import open_store, tokenizer_fingerprint, tokens_file
from tests.data.test_token_store import ragged_texts, write_texts
from tests.tiny import SENTENCES, SPECIAL_TOKENS, tiny_tokenizer, write_chat_file

# Contains runs of line ends, which a tokenizer may encode as one token.
LONG = "\n".join(f"{i}. {SENTENCES[i % 4]}" + "\n" * (i % 3) for i in range(60)) + "\nGrüße: 97,3 €\rEnde"


def tokens_of(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> list[int]:
    store = open_store(folder, tokenizer_fingerprint(tokenizer or tiny_tokenizer()), 10**9)
    return store.window(0)[0].tolist()


def encoded(texts: list[str], tokenizer: PreTrainedTokenizerFast | None = None) -> list[int]:
    """The ids that training from files would see: each text tokenised as a whole, followed by EOS."""
    tokenizer = tokenizer or tiny_tokenizer()
    return [t for text in texts for t in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_file_types_are_read_in_order(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = ragged_texts(12)
    lines = write_texts(tmp_path / "a.jsonl", texts[:5])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(write_texts(tmp_path / "b.jsonl", texts[5:8]).read_bytes()))
    (tmp_path / "c.txt").write_text(texts[8])
    parquet.write_table(pyarrow.table({"text": texts[9:]}), tmp_path / "d.parquet")
    files = [lines, *(tmp_path / name for name in ("b.jsonl.gz", "c.txt", "d.parquet"))]
    progress = []
    store = build_store(files, tiny_tokenizer(), tmp_path / "store", advance=progress.append)
    assert tokens_of(tmp_path / "store") == encoded(texts)
    assert (store["documents"], store["tokens"]) == (12, len(encoded(texts)))
    assert sum(progress) == sum(path.stat().st_size for path in files) and len(progress) >= 4
    assert sorted(contents(tmp_path / "store")) == [
        "shard-00000.checksums",
        "shard-00000.documents",
        "shard-00000.tokens",
        "store.json",
    ]


def line_end_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that encodes two or three line ends as one token."""
    tokenizer = tiny_tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator([LONG, "\n\n\n \n\n"] * 9, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    assert len(made.encode("\n\n\n")) == 1
    return made


def marking_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with the structure of Llama 2's: a mark before every text, no splitting, line ends as bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "</s>", *byte_tokens], show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training: marks only begin tokens
    tokenizer.train_from_iterator(LONG.split("\n") * 3, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    line_end = made.convert_tokens_to_ids("<0x0A>")
    assert made.encode("\na")[1] == line_end and made.encode("a")[0] != made.encode("\na")[2]
    return made


@pytest.mark.parametrize("make_tokenizer", [line_end_tokenizer, marking_tokenizer])
@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_a_text_cut_into_pieces_has_the_ids_of_the_whole_text(tmp_path, monkeypatch, ending, make_tokenizer) -> None:
    monkeypatch.setattr(data.text_pieces, "PIECE_CHARACTERS", 200)
    monkeypatch.setattr(data.text_pieces, "BATCH_CHARACTERS", 700)
    monkeypatch.setattr(data.compression, "CHUNK", 1)  # splits characters and \r\n pairs
    if ending == ".txt":
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + LONG.replace("\n", "\r\n").encode())
    else:
        write_texts(tmp_path / "a.jsonl", [LONG])
    pieces = list(read_pieces([tmp_path / f"a{ending}"]))
    assert len(pieces) > 20 and max(len(piece.text) for piece in pieces) <= 200
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    tokenizer = make_tokenizer()
    build_store([tmp_path / f"a{ending}"], tokenizer, tmp_path / "store", shard_tokens=10)
    assert tokens_of(tmp_path / "store", tokenizer) == encoded([LONG], tokenizer)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab1. \n\té"), max_size=60), min_size=1, max_size=6), st.integers(1, 40))
def test_the_pieces_add_up_to_the_text(parts, size) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.text_pieces, "PIECE_CHARACTERS", size)
        pieces = list(cut_text(parts))
    assert "".join(text for text, _ in pieces) == "".join(parts)
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(0 < len(text) <= size for text, _ in pieces[:-1]) and len(pieces[-1][0]) <= size


def test_a_batch_has_about_the_intended_number_of_characters(monkeypatch) -> None:
    monkeypatch.setattr(data.text_pieces, "BATCH_CHARACTERS", 100)
    made = list(batch_pieces(Piece("x" * 30, True, True, 0, i) for i in range(10)))
    assert [len(batch) for batch in made] == [4, 4, 2]


@pytest.fixture
def sources(tmp_path) -> list[Path]:
    """Three files with 33 documents in total, enough for several shards of a few hundred tokens."""
    texts = ragged_texts(33, seed=1)
    (tmp_path / "b.txt").write_text(texts[20])
    return [
        write_texts(tmp_path / "a.jsonl", texts[:20]),
        tmp_path / "b.txt",
        write_texts(tmp_path / "c.jsonl", texts[21:]),
    ]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_build_resumed_after_an_interruption_anywhere_gives_the_same_bytes(
    tmp_path, sources, monkeypatch, after
) -> None:
    """Interrupts the build before or after each of the renames that publish a file, then resumes it."""
    monkeypatch.setattr(data.text_pieces, "BATCH_CHARACTERS", 400)
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
            break  # the build has fewer renames
        finally:
            monkeypatch.setattr(os, "replace", replace)
        complete = {name: data for name, data in contents(out).items() if name.endswith(".tokens")}
        if not (out / "store.json").exists():
            (out / "shard-00077.tokens.tmp").write_bytes(b"left")
        build_store(sources, tiny_tokenizer(), out, 700)
        assert contents(out) == whole
        assert all(whole[name] == data for name, data in complete.items())
    assert interrupted >= 4 * 4 + 2  # tokens, documents, checksums and marker of each shard; build.json and store.json


def test_a_resumed_build_tokenises_only_what_is_missing(tmp_path, sources, monkeypatch) -> None:
    monkeypatch.setattr(data.text_pieces, "BATCH_CHARACTERS", 100)
    texts, encode_batch = [], data.text_pieces.encode_batch

    def recording(encoder, batch: list) -> list:
        texts.extend(piece.text for piece in batch)
        return encode_batch(encoder, batch)

    monkeypatch.setattr(data.text_pieces, "encode_batch", recording)
    publish, published = ShardWriter.publish, []

    def stopping(writer: ShardWriter) -> dict:
        if len(published) == 3:
            raise KeyboardInterrupt
        published.append(publish(writer))
        return published[-1]

    monkeypatch.setattr(ShardWriter, "publish", stopping)
    with pytest.raises(KeyboardInterrupt):
        build_store(sources, tiny_tokenizer(), tmp_path / "store", 300)
    monkeypatch.setattr(ShardWriter, "publish", publish)
    marker = json.loads((tmp_path / "store" / marker_file(2)).read_text())
    before = {name: data for name, data in contents(tmp_path / "store").items() if name.startswith("shard-0000")}
    texts.clear()
    progress = []
    store = build_store(sources, tiny_tokenizer(), tmp_path / "store", 300, progress.append)
    assert sum(progress) == sum(path.stat().st_size for path in sources)
    done = sum(shard["documents"] for shard in store["shards"][:3])
    assert marker["documents"] == store["shards"][2]["documents"] and len(texts) == 33 - done < 33
    assert texts == ragged_texts(33, seed=1)[done:]
    assert all(contents(tmp_path / "store")[name] == before[name] for name in before if name.endswith(".tokens"))


def test_a_complete_store_is_not_rebuilt(tmp_path, sources) -> None:
    first = build_store(sources, tiny_tokenizer(), tmp_path / "store")
    stamp = (tmp_path / "store" / tokens_file(0)).stat().st_mtime_ns
    assert build_store(sources, tiny_tokenizer(), tmp_path / "store") == first
    assert (tmp_path / "store" / tokens_file(0)).stat().st_mtime_ns == stamp
    (tmp_path / "store" / tokens_file(0)).unlink()
    with pytest.raises(UserError, match="shard-00000.tokens is missing; remove the directory and build"):
        build_store(sources, tiny_tokenizer(), tmp_path / "store")


def test_a_build_with_other_inputs_or_a_damaged_store_is_refused(tmp_path, sources) -> None:
    out = tmp_path / "store"
    build_store(sources, tiny_tokenizer(), out, 700)
    with pytest.raises(
        UserError, match="the store in .*store was made with another tokenizer; remove that directory or choose"
    ):
        build_store(sources, tiny_tokenizer(300), out, 300)
    with pytest.raises(UserError, match="was made from other files, or the files have changed"):
        build_store(sources[:2], tiny_tokenizer(), out, 300)
    with pytest.raises(UserError, match="was made with other settings"):
        build_store(sources, tiny_tokenizer(), out, 301)
    with sources[0].open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match="the files have changed"):
        build_store(sources, tiny_tokenizer(), out, 700)
    sources[0].write_text(sources[0].read_text().removesuffix('{"text": "more"}\n').replace("bank", "Bank"))
    with pytest.raises(UserError, match="the files have changed"):  # at equal size
        build_store(sources, tiny_tokenizer(), out, 700)
    (out / "store.json").write_text("{")
    with pytest.raises(UserError, match="store.json is damaged; remove .*store and build the store again"):
        build_store(sources, tiny_tokenizer(), out, 700)


def test_a_directory_with_other_files_is_not_touched(tmp_path, sources) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.md").write_text("mine")
    with pytest.raises(UserError, match="other contains other files; choose another directory"):
        build_store(sources, tiny_tokenizer(), tmp_path / "other")
    assert contents(tmp_path / "other") == {"notes.md": b"mine"}
    with pytest.raises(UserError, match="notes.md is a file; choose another directory"):
        build_store(sources, tiny_tokenizer(), tmp_path / "other" / "notes.md")


def test_a_second_build_of_the_same_store_at_the_same_time_is_refused(tmp_path, sources, monkeypatch) -> None:
    """The second build starts while the first one is in its first shard."""
    publish, refused = ShardWriter.publish, []

    def start_second(writer: ShardWriter) -> dict:
        with pytest.raises(UserError, match="another process is building .*store") as caught:
            build_store(sources, tiny_tokenizer(), tmp_path / "store")
        refused.append(caught)
        return publish(writer)

    monkeypatch.setattr(ShardWriter, "publish", start_second)
    build_store(sources, tiny_tokenizer(), tmp_path / "store")
    assert len(refused) == 1 and tokens_of(tmp_path / "store") == encoded(ragged_texts(33, seed=1))


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ""}\n', "a.jsonl, line 2: `text` must be a non-empty string"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', "a.jsonl, line 2 is not valid Unicode text: surrogates"),
        ("a.txt", " \n\n", "a.txt contains no text"),
        ("a.jsonl", "\n", "a.jsonl contains no examples"),
    ],
)
def test_the_error_names_a_bad_text(tmp_path, name, content, words) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        build_store([tmp_path / name], tiny_tokenizer(), tmp_path / "store")
    assert not (tmp_path / "store" / "store.json").exists()


def test_chats_directories_and_missing_files_are_refused(tmp_path) -> None:
    chat = write_chat_file(tmp_path / "chat.jsonl", 1)
    for path, words in [
        (chat, "chat.jsonl, line 1 is a chat, but a token store takes only documents with `text`"),
        (tmp_path, "is a directory; name the files in it instead"),
        (tmp_path / "absent.txt", "absent.txt does not exist"),
    ]:
        with pytest.raises(UserError, match=words):
            build_store([path], tiny_tokenizer(), tmp_path / "store")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 is latin-1")
    with pytest.raises(UserError, match="b.txt is not UTF-8 text"):
        build_store([tmp_path / "b.txt"], tiny_tokenizer(), tmp_path / "other")


def test_a_shard_is_closed_by_the_document_that_fills_it(tmp_path) -> None:
    texts = ["a" * n for n in (5, 5, 50, 1)]
    lengths = [len(encoded([text])) for text in texts]
    files = [write_texts(tmp_path / "a.jsonl", texts)]
    store = build_store(files, tiny_tokenizer(), tmp_path / "store", shard_tokens=lengths[0] + lengths[1])
    assert [shard["tokens"] for shard in store["shards"]] == [lengths[0] + lengths[1], lengths[2], lengths[3]]
    assert [shard["documents"] for shard in store["shards"]] == [2, 1, 1]
    ends = np.fromfile(tmp_path / "store" / "shard-00000.documents", "<u8")
    assert ends.tolist() == [lengths[0], lengths[0] + lengths[1]]
