"""Reading a token store: windows, documents, targets, errors for damaged stores, constant memory."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import data.text_pieces
from common.errors import UserError
from data.batches import plan_training
from data.checked_file import BLOCK, CHECKSUM, CheckedFile, CheckedWriter
from data.reader import Reader
from data.sources import Windows
from data.token_build import build_store
from data.token_store import (
    TokenStore,
    checksums_file,
    documents_file,
    open_store,
    tokenizer_fingerprint,
    tokens_file,
    verify_store,
)
from tests.tiny import SENTENCES, WORDS, tiny_tokenizer

WORDS_OF_A_LARGE_VOCABULARY = {"[UNK]": 0, "<eos>": 1, "first": 2, "last": 2**16 + 7}


def large_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of four words, one of which has an id that needs 32 bits."""
    tokenizer = Tokenizer(models.WordLevel(WORDS_OF_A_LARGE_VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def ragged_texts(count: int, seed: int = 0) -> list[str]:
    """Random texts of 1 to 60 words."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, 61))) for _ in range(count)]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return ragged_texts(60)


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory, texts) -> Path:
    """A store of 60 documents in several shards."""
    folder = tmp_path_factory.mktemp("store")
    build_store([write_texts(folder / "texts.jsonl", texts)], tiny_tokenizer(), folder / "store", shard_tokens=900)
    return folder / "store"


def opened(path: Path, sequence_length: int) -> TokenStore:
    return open_store(path, tokenizer_fingerprint(tiny_tokenizer()), sequence_length)


@pytest.mark.parametrize("sequence_length", [7, 64, 1000, 10**6])
def test_windows_cover_the_concatenated_documents_whatever_the_shards(store_folder, texts, sequence_length) -> None:
    tokenizer = tiny_tokenizer()
    documents = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in texts]
    expected = np.concatenate(documents)
    store = opened(store_folder, sequence_length)
    assert len(list(store_folder.glob("*.tokens"))) >= 5 and store.dtype == np.uint16
    windows = [store.window(i) for i in range(len(store))]
    assert np.array_equal(np.concatenate([ids for ids, _ in windows]), expected)
    assert all(ids.dtype == np.int64 and len(ids) == sequence_length for ids, _ in windows[:-1])
    # A part ends where a document or the window ends, and nowhere else.
    ends = np.cumsum([len(document) for document in documents])
    cuts = np.cumsum([length for _, lengths in windows for length in lengths])
    wanted = set(ends.tolist()) | {min(len(expected), (i + 1) * sequence_length) for i in range(len(store))}
    assert cuts.tolist() == sorted(wanted)
    assert [store.document_lengths(i) for i in range(len(store))] == [lengths for _, lengths in windows]
    with pytest.raises(IndexError):
        store.window(len(store))


@pytest.mark.parametrize("sequence_length", [16, 128])
def test_a_token_is_a_target_if_its_document_has_an_earlier_token_in_the_window(store_folder, sequence_length) -> None:
    store = opened(store_folder, sequence_length)
    windows = Windows(store, "", "", store.mean_targets)
    total = 0
    for i in range(len(store)):
        ids, is_target = windows.get(i)
        begins = {0} | {t + 1 for t in np.flatnonzero(ids == tiny_tokenizer().eos_token_id)}
        assert [t not in begins for t in range(len(ids))] == is_target.tolist()
        assert windows.num_targets(i) == is_target.sum()
        total += windows.num_targets(i)
    assert windows.mean_targets == pytest.approx(total / len(store), rel=0.01)  # computed without reading


def test_a_large_vocabulary_takes_four_bytes_per_token(tmp_path) -> None:
    tokenizer = large_tokenizer()
    store = build_store([write_texts(tmp_path / "a.jsonl", ["first last", "last"])], tokenizer, tmp_path / "store")
    assert store["dtype"] == "<u4" and (tmp_path / "store" / tokens_file(0)).stat().st_size == 4 * 5
    ids, lengths = open_store(tmp_path / "store", tokenizer_fingerprint(tokenizer), 16).window(0)
    assert ids.tolist() == [2, 2**16 + 7, 1, 2**16 + 7, 1] and lengths == (3, 2)


def test_the_fingerprint_depends_on_what_determines_the_ids(tmp_path) -> None:
    same = tokenizer_fingerprint(tiny_tokenizer())
    tiny_tokenizer().save_pretrained(tmp_path)
    reloaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    reloaded("a", padding="max_length", truncation=True, max_length=8)  # changes settings of its backend
    reloaded.chat_template = None
    assert tokenizer_fingerprint(reloaded) == same
    added, other_eos, lower, merged = (tiny_tokenizer() for _ in range(4))
    added.add_tokens(["r0010"])
    other_eos.eos_token = "<|endoftext|>"
    lower.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # does not split digits
    merged = tiny_tokenizer(300)
    assert len({same, *map(tokenizer_fingerprint, (added, other_eos, lower, merged))}) == 5


def test_a_store_made_with_another_tokenizer_is_refused(store_folder) -> None:
    with pytest.raises(UserError, match="was made with a different tokenizer from the model's"):
        open_store(store_folder, tokenizer_fingerprint(tiny_tokenizer(300)), 64)


def damage(path: Path, kind: str) -> None:
    """Remove, truncate or extend a file, or replace its content by `kind`."""
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    elif kind == "longer":
        path.write_bytes(path.read_bytes() + b"\0\0")
    else:
        path.write_text(kind)


@pytest.mark.parametrize(
    "name, kind, words",
    [
        (tokens_file(2), "missing", "shard-00002.tokens is missing; remove the directory and build the store again"),
        (tokens_file(0), "cut", r"shard-00000.tokens has \d+ bytes instead of \d+; remove the directory"),
        (documents_file(1), "longer", r"shard-00001.documents has \d+ bytes instead of \d+"),
        ("store.json", "missing", "is a directory without store.json"),
        ("store.json", "{", "store.json is damaged .*; remove the directory"),
        ("store.json", "[]", "store.json is damaged"),
        (
            "store.json",
            '{"format": 2, "dtype": "<u2", "shards": [{"tokens": 1}]}',
            r"store.json is damaged \(KeyError\('documents'\)",
        ),
        ("store.json", '{"format": 2, "dtype": "?!", "shards": []}', "store.json is damaged"),
        (
            "store.json",
            '{"dtype": "<u2", "shards": [], "tokenizer": "", "format": 1}',
            "store format 1, but this version reads format 2; remove the directory and build the store again",
        ),
    ],
)
def test_a_damaged_store_gives_a_one_line_error(store_folder, tmp_path, name, kind, words) -> None:
    for path in store_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path / name, kind)
    with pytest.raises(UserError, match=words) as caught:
        opened(tmp_path, 64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [tokens_file(1), documents_file(1), checksums_file(1)])
@pytest.mark.parametrize("kind", ["bit flip", "zeros"])
def test_damage_at_equal_size_is_found_when_it_is_read_and_by_verify(store_folder, tmp_path, name, kind) -> None:
    for path in store_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = verify_store(tmp_path)
    assert whole.num_tokens == opened(store_folder, 64).num_tokens
    data = bytearray((tmp_path / name).read_bytes())
    if kind == "zeros":
        data[: len(data) // 2] = bytes(len(data) // 2)
    else:
        data[len(data) // 2] ^= 4
    (tmp_path / name).write_bytes(data)

    def read_all() -> None:
        store = opened(tmp_path, 64)  # finds what is in the last block of the offsets
        for i in range(len(store)):
            store.window(i)

    for find in (read_all, lambda: verify_store(tmp_path)):
        with pytest.raises(
            UserError, match=r"shard-00001.(tokens|documents) is damaged: its bytes from \d+ on are not"
        ):
            find()


def test_offsets_that_do_not_increase_are_found_even_with_right_checksums(tmp_path) -> None:
    """As a store written by other software might have them: 3 documents, two of which change places."""
    ends = np.array([10, 30, 20, 40, 64], dtype="<u8")
    with (tmp_path / documents_file(0)).open("wb") as documents, (tmp_path / tokens_file(0)).open("wb") as tokens:
        writers = [CheckedWriter(tokens), CheckedWriter(documents)]
        writers[0].write(np.zeros(64, dtype="<u2"))
        writers[1].write(ends)
    checksums = np.concatenate([writer.checksums() for writer in writers])
    (tmp_path / checksums_file(0)).write_bytes(checksums.tobytes())
    hashes = dict(zip(("tokens", "documents"), (w.digest.hexdigest() for w in writers), strict=True))
    shard = {"tokens": 64, "documents": 5, "sha256": hashes}
    (tmp_path / "store.json").write_text(
        json.dumps({"format": 2, "dtype": "<u2", "tokenizer": "any", "shards": [shard]})
    )
    for find in (lambda: open_store(tmp_path, "any", 64).window(0), lambda: verify_store(tmp_path)):
        with pytest.raises(UserError, match="shard-00000.documents is damaged: its offsets do not increase"):
            find()


def test_each_document_begins_with_the_bos_that_the_tokenizer_adds_at_inference(tmp_path, monkeypatch) -> None:
    tokenizer = tiny_tokenizer()
    without = tokenizer_fingerprint(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    monkeypatch.setattr(data.text_pieces, "PIECE_CHARACTERS", 100)  # only the first piece of a text has it
    texts = [text * 3 for text in SENTENCES[:2]]
    store = build_store([write_texts(tmp_path / "a.jsonl", texts)], tokenizer, tmp_path / "store")
    assert store["bos"] == [1] == tokenizer.encode("")
    ids, _ = open_store(tmp_path / "store", tokenizer_fingerprint(tokenizer), 10**6).window(0)
    assert ids.tolist() == [t for text in texts for t in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    with pytest.raises(UserError, match="was made with a different tokenizer"):
        open_store(tmp_path / "store", without, 64)


def test_the_error_for_an_incomplete_build_says_how_to_finish_it(tmp_path) -> None:
    (tmp_path / "build.json").write_text("{}")
    with pytest.raises(UserError, match="is incomplete; run the same scripts/data.py build command again to finish it"):
        opened(tmp_path, 64)


def test_the_reader_accepts_a_store_for_training_and_validation(store_folder, tmp_path) -> None:
    reader = Reader(tiny_tokenizer(), 384, 64, "drop")
    corpus = reader.training((str(store_folder),), ())
    assert corpus.lines("train")[0].startswith(f"train: token store {store_folder}: ")
    assert len(corpus) == len(opened(store_folder, 64)) and corpus.mixture() is None
    assert reader.validation((str(store_folder),), ()).num_targets(0) == corpus.num_targets(0)
    with pytest.raises(UserError, match="is outside the model's embedding of 300 rows"):
        Reader(tiny_tokenizer(), 300, 64, "drop").training((str(store_folder),), ())
    with pytest.raises(UserError, match="is a directory among other files of training"):
        reader.training((str(store_folder), "a.jsonl"), ())
    with pytest.raises(UserError, match="no token of .* carries loss in windows of data.sequence_length=1"):
        Reader(tiny_tokenizer(), 384, 1, "drop").training((str(store_folder),), ())
    # The fingerprint depends on the texts and their order but not on the file they came from.
    texts, found = ragged_texts(60), []
    for name, changed in (("same", texts), ("order", texts[::-1]), ("letter", [texts[0].upper(), *texts[1:]])):
        file = write_texts(tmp_path / f"{name}.jsonl", changed)
        build_store([file], tiny_tokenizer(), tmp_path / name, shard_tokens=900)
        found.append(reader.training((str(tmp_path / name),), ()).sources[0].fingerprint)
    assert found[0] == corpus.sources[0].fingerprint and len(set(found)) == 3


def synthetic_store(folder: Path, tokens: int, document: int = 2**10) -> TokenStore:
    """A store of `tokens` tokens in two shards of documents of equal length. The token files are sparse."""
    folder.mkdir()
    shards, size = [], tokens // 2 * 2  # in bytes, for uint16
    for shard in range(2):
        with (folder / tokens_file(shard)).open("wb") as file:
            file.truncate(size)
        ends = np.arange(document, tokens // 2 + 1, document, dtype="<u8")
        writer = CheckedWriter((folder / documents_file(shard)).open("wb"))
        writer.write(ends)
        writer.file.close()
        zeros = np.full(size // BLOCK, zlib.crc32(bytes(BLOCK)), dtype=CHECKSUM)
        (folder / checksums_file(shard)).write_bytes(np.concatenate([zeros, writer.checksums()]).tobytes())
        shards.append({"tokens": tokens // 2, "documents": len(ends), "sha256": {}})
    (folder / "store.json").write_text(json.dumps({"format": 2, "dtype": "<u2", "tokenizer": "any", "shards": shards}))
    return open_store(folder, "any", 2**14)


def resident_growth(windows: Windows, count: int) -> int:
    """Growth of this process's resident memory in bytes while it reads `count` windows spread over the store."""
    statm = Path("/proc/self/statm")
    before = most = int(statm.read_text().split()[1])
    for i in range(count):
        windows.get(i * len(windows) // count)
        most = max(most, int(statm.read_text().split()[1]))
    return (most - before) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="requires /proc")
def test_reading_a_large_store_takes_no_more_memory_than_reading_a_small_one(tmp_path) -> None:
    growth = []
    for name, tokens in (("small", 5 * 2**20), ("large", 160 * 2**20)):  # 10 and 320 MiB
        store = synthetic_store(tmp_path / name, tokens)
        growth.append(resident_growth(Windows(store, "", "", store.mean_targets), len(store)))
    assert len(store) == 10_240 and growth[1] < growth[0] + 8 * 2**20


def test_opening_and_planning_read_no_tokens(tmp_path, monkeypatch) -> None:
    """Start-up time therefore does not grow with the corpus: planning 10^15 tokens is as fast as planning ten."""
    store = synthetic_store(tmp_path / "store", 2**20)

    read = CheckedFile.read

    def read_no_tokens(file: CheckedFile, start: int, count: int) -> bytes:
        assert not file.path.name.endswith(".tokens"), "a token was read"
        return read(file, start, count)

    monkeypatch.setattr(CheckedFile, "read", read_no_tokens)
    store = open_store(tmp_path / "store", "any", 64)
    huge = TokenStore(store.path, 64, store.dtype, 10**15, 10**12, (0, 10**15), (10**12,))
    plan = plan_training(Windows(huge, "", "", huge.mean_targets), 2, 0, global_examples=512)
    assert plan.num_steps == 2 * -(-len(huge) // 512) and plan.passes(plan.num_steps // 2) == (1.0,)
