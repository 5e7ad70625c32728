"""Building a token store: all file types, texts cut into pieces, and interruptions at any moment."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import data.rows
import data.tokenise
from common.errors import UserError
from data.store import STORE_FILE, StoreWriter, open_store, shard_file
from data.token_store import build_store
from data.tokenise import Unit, UnitEncoder, cut
from tests.data.test_store import ragged_texts, write_texts
from tests.tiny import CHATML, SENTENCES, SPECIAL_TOKENS, tiny_tokenizer, write_chat_file

# Contains runs of line ends, which a tokenizer may encode as one token.
LONG = "\n".join(f"{i}. {SENTENCES[i % 4]}" + "\n" * (i % 3) for i in range(60)) + "\nGrüße: 97,3 €\rEnde"


def tokens_of(folder: Path) -> list[int]:
    store = open_store(folder)
    return store.tokens(0, store.num_tokens).tolist()


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
    assert (store.num_documents, store.num_tokens) == (12, len(encoded(texts)))
    assert sum(progress) == sum(path.stat().st_size for path in files) and len(progress) >= 4
    assert sorted(contents(tmp_path / "store")) == ["lock", "shard-00000.tokens", "store.json"]


def line_end_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that encodes two or three line ends as one token."""
    tokenizer = tiny_tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator([LONG, "\n\n\n \n\n"] * 9, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML)
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
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", chat_template=CHATML
    )
    line_end = made.convert_tokens_to_ids("<0x0A>")
    assert made.encode("\na")[1] == line_end and made.encode("a")[0] != made.encode("\na")[2]
    return made


@pytest.mark.parametrize("make_tokenizer", [line_end_tokenizer, marking_tokenizer])
@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_a_text_cut_into_pieces_has_the_ids_of_the_whole_text(tmp_path, monkeypatch, ending, make_tokenizer) -> None:
    monkeypatch.setattr(data.tokenise, "PIECE_CHARACTERS", 200)
    monkeypatch.setattr(data.tokenise, "BATCH_CHARACTERS", 700)
    monkeypatch.setattr(data.rows, "CHUNK", 1)  # splits characters and \r\n pairs
    if ending == ".txt":
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + LONG.replace("\n", "\r\n").encode())
    else:
        write_texts(tmp_path / "a.jsonl", [LONG])
    texts, call = [], UnitEncoder.__call__
    monkeypatch.setattr(UnitEncoder, "__call__", lambda self, units: texts.extend(units) or call(self, units))
    tokenizer = make_tokenizer()
    build_store([tmp_path / f"a{ending}"], tokenizer, tmp_path / "store", shard_tokens=10)
    assert len(texts) > 20 and max(len(unit.example["text"]) for unit in texts) <= 200
    assert [unit.ends for unit in texts] == [False] * (len(texts) - 1) + [True]
    assert tokens_of(tmp_path / "store") == encoded([LONG], tokenizer)


@settings(max_examples=100)
@given(st.text(st.sampled_from("ab1. \n\té"), max_size=300), st.integers(1, 40))
def test_the_pieces_add_up_to_the_text(text, size) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.tokenise, "PIECE_CHARACTERS", size)
        pieces = list(cut(Unit(0, 0, "", {"text": text})))
    texts = [piece.example["text"] for piece in pieces]
    assert "".join(texts) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert all(0 < len(text) <= size for text in texts[:-1]) and len(texts[-1]) <= size


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
    monkeypatch.setattr(data.tokenise, "BATCH_CHARACTERS", 400)
    build_store(sources, tiny_tokenizer(), tmp_path / "whole", 700)
    whole = contents(tmp_path / "whole")
    assert len(whole) >= 6  # four shards, store.json and the lock
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
        if (out / STORE_FILE).is_file():
            build_store(sources, tiny_tokenizer(), out, 700)
            assert contents(out) == whole
    assert interrupted >= 4 * 2 + 2  # each shard with store.json after it; store.json at the beginning and at the end


def test_a_resumed_build_tokenises_only_what_is_missing(tmp_path, sources, monkeypatch) -> None:
    monkeypatch.setattr(data.tokenise, "BATCH_CHARACTERS", 100)
    texts, call = [], UnitEncoder.__call__

    def recording(encoder: UnitEncoder, units: list) -> list:
        texts.extend(unit.example["text"] for unit in units)
        return call(encoder, units)

    monkeypatch.setattr(UnitEncoder, "__call__", recording)
    end_shard = StoreWriter.end_shard

    def stopping(writer: StoreWriter) -> None:
        if len(writer.info["shards"]) == 3:
            raise KeyboardInterrupt
        end_shard(writer)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "end_shard", stopping)
        with pytest.raises(KeyboardInterrupt):
            build_store(sources, tiny_tokenizer(), tmp_path / "store", 300)
    before = {name: data for name, data in contents(tmp_path / "store").items() if name.endswith(".tokens")}
    assert len(before) == 3
    texts.clear()
    progress = []
    store = build_store(sources, tiny_tokenizer(), tmp_path / "store", 300, progress.append)
    assert sum(progress) == sum(path.stat().st_size for path in sources)
    done = store.document_starts[3]
    assert len(texts) == 33 - done < 33 and texts == ragged_texts(33, seed=1)[done:]
    assert all(contents(tmp_path / "store")[name] == data for name, data in before.items())


def test_a_complete_store_is_not_rebuilt(tmp_path, sources) -> None:
    first = build_store(sources, tiny_tokenizer(), tmp_path / "store")
    stamp = (tmp_path / "store" / shard_file(0)).stat().st_mtime_ns
    assert build_store(sources, tiny_tokenizer(), tmp_path / "store").info == first.info
    assert (tmp_path / "store" / shard_file(0)).stat().st_mtime_ns == stamp
    (tmp_path / "store" / shard_file(0)).unlink()
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
    (out / STORE_FILE).write_text("{")
    with pytest.raises(UserError, match="store.json is damaged .*; remove the directory and build the store again"):
        build_store(sources, tiny_tokenizer(), out, 700)


def test_a_directory_with_other_files_is_not_touched(tmp_path, sources) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.md").write_text("mine")
    with pytest.raises(UserError, match="other contains other files; choose another directory"):
        build_store(sources, tiny_tokenizer(), tmp_path / "other")
    assert contents(tmp_path / "other") == {"notes.md": b"mine"}
    with pytest.raises(UserError, match="notes.md is a file; choose another directory"):
        build_store(sources, tiny_tokenizer(), tmp_path / "other" / "notes.md")


def test_three_builds_of_one_store_at_once_make_it_once(tmp_path, sources) -> None:
    """Each process writes a line for every text that it tokenises."""
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(Path(__file__).resolve().parents[2])))
    command = [sys.executable, "worker.py", *(path.name for path in sources)]
    started = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate(timeout=300)[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0] and len(said) == 1
    assert len((tmp_path / "tokenised").read_text().splitlines()) == 33
    assert tokens_of(tmp_path / "store") == encoded(ragged_texts(33, seed=1))


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from data.token_store import build_store
from data.tokenise import UnitEncoder
from tests.tiny import tiny_tokenizer
call = UnitEncoder.__call__
def recording(self, units):
    with open("tokenised", "a") as file:
        file.write("x\\n" * len(units))
    return call(self, units)
UnitEncoder.__call__ = recording
print(build_store(list(map(Path, sys.argv[1:])), tiny_tokenizer(), Path("store"), 300).fingerprint)
"""


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ""}\n', "a.jsonl, line 2: `text` must be a non-empty string"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', "a.jsonl, line 2 is not valid Unicode text: surrogates"),
        ("a.txt", " \n\n", "a.txt contains no examples"),
        ("a.jsonl", "\n", "a.jsonl contains no examples"),
    ],
)
def test_the_error_names_a_bad_text(tmp_path, name, content, words) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        build_store([tmp_path / name], tiny_tokenizer(), tmp_path / "store")
    with pytest.raises(UserError, match="is incomplete"):
        open_store(tmp_path / "store")


def test_chats_and_what_is_no_text_are_refused(tmp_path) -> None:
    chat = write_chat_file(tmp_path / "chat.jsonl", 1)
    with pytest.raises(
        UserError, match="chat.jsonl, line 1 is a chat, but a token store takes only documents with `tex"
    ):
        build_store([chat], tiny_tokenizer(), tmp_path / "store")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 is latin-1")
    with pytest.raises(UserError, match="b.txt is not UTF-8 text"):
        build_store([tmp_path / "b.txt"], tiny_tokenizer(), tmp_path / "other")


def test_a_shard_is_closed_by_the_document_that_fills_it(tmp_path) -> None:
    texts = ["a" * n for n in (5, 5, 50, 1)]
    lengths = [len(encoded([text])) for text in texts]
    files = [write_texts(tmp_path / "a.jsonl", texts)]
    store = build_store(files, tiny_tokenizer(), tmp_path / "store", shard_tokens=lengths[0] + lengths[1])
    assert [shard.counts["ids"] for shard in store.shards] == [lengths[0] + lengths[1], lengths[2], lengths[3]]
    assert [shard.counts["documents"] for shard in store.shards] == [2, 1, 1]
    assert store.shards[0].rows("documents")["ids"].tolist() == [lengths[0], lengths[0] + lengths[1]]
