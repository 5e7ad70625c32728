"""A store: documents in shards, windows, targets, errors for damage, constant memory."""

import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from configs.config import Source
from data.batches import plan_training
from data.dealing import Dealer, length_as_cost
from data.encoding import ExampleEncoder
from data.files import Reading
from data.reader import Reader
from data.sources import Windows
from data.store import (
    BLOCK,
    CHECKSUM,
    DOCUMENT,
    SECTIONS,
    STORE_FILE,
    Shard,
    Store,
    StoreWriter,
    open_store,
    shard_file,
)
from data.token_store import build_store, verify_store
from tests.in_memory import json_lines
from tests.tiny import CHATML, WORDS, tiny_tokenizer


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_bytes(json_lines([{"text": text} for text in texts]))
    return path


def ragged_texts(count: int, seed: int = 0) -> list[str]:
    """Return random texts of 1 to 60 words."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, 61))) for _ in range(count)]


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory) -> Path:
    """Build a store of 60 documents in several shards."""
    folder = tmp_path_factory.mktemp("store")
    build_store(
        [write_texts(folder / "texts.jsonl", ragged_texts(60))], tiny_tokenizer(), folder / "store", shard_tokens=900
    )
    return folder / "store"


def opened(path: Path, sequence_length: int) -> Windows:
    return Windows(open_store(path), sequence_length)


@pytest.mark.parametrize("sequence_length", [7, 128, 1000, 10**6])
def test_windows_cover_documents_across_shards(store_folder, sequence_length) -> None:
    """A part ends with its document or window; a token is a target if an earlier token of its document is in the window."""
    tokenizer = tiny_tokenizer()
    documents = [
        [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in ragged_texts(60)
    ]
    expected, ends = np.concatenate(documents), np.cumsum([len(document) for document in documents]).tolist()
    store = opened(store_folder, sequence_length)
    assert len(list(store_folder.glob("*.tokens"))) >= 5 and store.store.shards[0].dtype == np.uint16
    cuts, targets = sorted({0, len(expected), *ends, *range(0, len(expected), sequence_length)}), 0
    for i in range(len(store)):
        first, last = i * sequence_length, min(len(expected), (i + 1) * sequence_length)
        ids, is_target = store.get(i)
        assert ids.dtype == np.int64 and np.array_equal(ids, expected[first:last]) and store.num_tokens(i) == len(ids)
        inside = [cut - first for cut in cuts if first <= cut <= last]
        assert store.document_lengths(i) == tuple(np.diff(inside))
        assert np.flatnonzero(~is_target).tolist() == inside[:-1]
        assert store.num_targets(i) == is_target.sum()
        targets += store.num_targets(i)
    assert store.mean_targets == pytest.approx(targets / len(store), rel=0.02)  # computed without reading
    with pytest.raises(IndexError):
        store.get(len(store))


@pytest.mark.parametrize(
    "name, content, words",
    [
        (shard_file(2), None, "shard-00002.tokens is missing; remove its directory"),
        (shard_file(0), b"short", r"shard-00000.tokens has 5 bytes instead of \d+; remove its directory"),
        (STORE_FILE, b'{"format": 3, "shards": []}', "store.json is not what was written; remove its directory"),
        (
            STORE_FILE,
            b'{"dtype": "<u2", "shards": [], "tokenizer": "", "format": 2}',
            "format 2, but this version reads format 3; remove .*; a token store is built by scripts/data.py build",
        ),
    ],
)
def test_a_damaged_store_gives_a_one_line_error(store_folder, tmp_path, name, content, words) -> None:
    shutil.copytree(store_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(content) if content else (tmp_path / name).unlink()
    with pytest.raises(UserError, match=words) as caught:
        opened(tmp_path, 64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["ids", "documents", "end"])
@pytest.mark.parametrize("new", [b"", bytes(64)], ids=["bit flip", "zeros"])
def test_damage_at_equal_size_is_found(store_folder, tmp_path, section, new) -> None:
    shutil.copytree(store_folder, tmp_path, dirs_exist_ok=True)
    whole = verify_store(tmp_path)
    assert whole.num_tokens == open_store(store_folder).num_tokens
    path, start = tmp_path / shard_file(1), whole.shards[1].starts[section]
    data = path.read_bytes()
    new = new[: len(data) - start] or bytes([data[start] ^ 4])
    path.write_bytes(data[:start] + new + data[start + len(new) :])
    store = opened(tmp_path, 64)
    for find in (lambda: [store.get(i) for i in range(len(store))], lambda: verify_store(tmp_path)):
        with pytest.raises(UserError, match=r"shard-00001.tokens is damaged: its bytes from \d+ on are not"):
            find()


def test_reader_accepts_store_for_training_and_validation(store_folder, tmp_path) -> None:
    reader = Reader(ExampleEncoder(tiny_tokenizer()), 384, 64, "drop")
    corpus = reader.training((str(store_folder),), ())
    assert corpus.lines("train")[0].startswith(f"train: token store {store_folder}: ")
    assert len(corpus) == len(opened(store_folder, 64)) and corpus.mixture() is None
    validation = reader.validation((str(store_folder),), ())
    assert validation and validation.num_targets(0) == corpus.num_targets(0)
    with pytest.raises(UserError, match="is outside the model's embedding of 300 rows"):
        Reader(ExampleEncoder(tiny_tokenizer()), 300, 64, "drop").training((str(store_folder),), ())
    with pytest.raises(UserError, match="is a token store, which must be the only path of its source"):
        reader.training((str(store_folder), "a.jsonl"), ())
    with pytest.raises(UserError, match="no token of .* carries loss in windows of data.sequence_length=1"):
        Reader(ExampleEncoder(tiny_tokenizer()), 384, 1, "drop").training((str(store_folder),), ())
    text, part = write_texts(tmp_path / "a.jsonl", ["one two"]), Source("s", (str(store_folder),), 0.1, max_samples=3)
    with pytest.raises(UserError, match="max_samples cannot be used with the token store .* --max-samples"):
        reader.training((str(text),), (part,))
    with_row = Reader(ExampleEncoder(tiny_tokenizer()), 384, 64, "drop", reading=Reading(row="hooks:example"))
    refused = (
        f"row=hooks:example cannot be used with the token store {store_folder}, which has windows and no rows; leave it"
    )
    for refuse in (
        lambda: with_row.training((str(store_folder),), ()),
        lambda: reader.training((str(text),), (replace(part, max_samples=None, row="hooks:example"),)),
    ):
        with pytest.raises(UserError, match=refused):
            refuse()
    assert with_row.validation((str(store_folder),), ())  # beside training data with a `row`
    # The fingerprint depends on the texts and their order but not on the names of their files.
    texts, fingerprints = ragged_texts(60), []
    for name, changed in (("same", texts), ("order", texts[::-1]), ("letter", [texts[0].upper(), *texts[1:]])):
        file = write_texts(tmp_path / f"{name}.jsonl", changed)
        build_store([file], tiny_tokenizer(), tmp_path / name, shard_tokens=900)
        fingerprints.append(reader.training((str(tmp_path / name),), ()).sources[0].fingerprint)
    assert fingerprints[0] == corpus.sources[0].fingerprint and len(set(fingerprints)) == 3


def synthetic_store(folder: Path, tokens: int, document: int = 2**10) -> Windows:
    """Make a store of `tokens` tokens in two shards of documents of equal length. The token ids are holes in the files."""
    folder.mkdir()
    writer = StoreWriter(folder, {"dtype": "<u2", "tokenizer": "any"}, shard_tokens=tokens // 2)
    writer.finish({})
    ends = np.zeros(tokens // 2 // document, DOCUMENT)
    ends["ids"] = np.arange(document, tokens // 2 + 1, document)
    counts: dict[str, int] = dict(zip(SECTIONS, (tokens // 2, len(ends), 0, 0), strict=True))
    shards = [Shard(folder / shard_file(i), np.dtype("<u2"), counts) for i in range(2)]
    zeros = np.full(tokens // BLOCK, zlib.crc32(bytes(BLOCK)), dtype=CHECKSUM)  # tokens / 2 ids of 2 bytes
    data = ends.tobytes()
    rest = [zlib.crc32(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK)]
    for shard in shards:
        with shard.path.open("wb") as file:
            file.seek(tokens)
            file.write(data + zeros.tobytes() + np.array(rest, dtype=CHECKSUM).tobytes())
        assert shard.path.stat().st_size == shard.size
    return Windows(Store(folder, {"shards": []}, tuple(shards)), 2**14)


def test_failed_build_leaves_no_part_of_shard(tmp_path) -> None:
    with (
        pytest.raises(KeyError),
        StoreWriter(tmp_path, {"dtype": "<u2", "tokenizer": "any"}, shard_tokens=10) as writer,
    ):
        for _ in range(3):
            writer.add(np.arange(7))
        raise KeyError
    assert writer.file.closed and {path.name for path in tmp_path.iterdir()} == {STORE_FILE, shard_file(0)}


def resident_growth(windows: Windows, count: int) -> int:
    """Return the growth of this process's resident memory in bytes while it reads `count` windows spread over the store."""
    statm = Path("/proc/self/statm")
    before = most = int(statm.read_text().split()[1])
    for i in range(count):
        windows.get(i * len(windows) // count)
        most = max(most, int(statm.read_text().split()[1]))
    return (most - before) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="requires /proc")
def test_memory_of_reading_does_not_grow_with_store(tmp_path) -> None:
    growth = []
    for name, tokens in (("small", 2 * 2**20), ("large", 16 * 2**20)):  # 4 and 32 MiB
        store = synthetic_store(tmp_path / name, tokens)
        growth.append(resident_growth(store, len(store)))
    assert len(store) == 1_024 and growth[1] < growth[0] + 8 * 2**20


@pytest.mark.parametrize("kind", ["alike", "sorted", "one is long"])
def test_documents_of_any_lengths_are_found(kind, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("data.store.ROWS", 3)
    random = np.random.default_rng(0)
    lengths = {
        "alike": random.integers(1, 61, 300),
        "sorted": np.sort(random.integers(1, 61, 300)),
        "one is long": [1] * 300,
    }
    lengths = np.array(lengths[kind])
    lengths[150] = 5000 if kind == "one is long" else lengths[150]
    ends = np.cumsum(lengths)
    with StoreWriter(tmp_path, {"dtype": "<u2", "tokenizer": "any"}, shard_tokens=4000) as writer:
        for length in lengths:
            writer.add(np.zeros(length))
        store = writer.finish({})
    for begin in range(0, store.num_tokens - 1, 7):
        for end in (begin + 1, begin + 100, begin + 3000):
            end = min(end, store.num_tokens)
            assert store.ends_between(begin, end) == ends[(ends > begin) & (ends <= end)].tolist()


def test_step_of_windows_needs_few_reads(tmp_path, monkeypatch) -> None:
    """Every rank plans all windows of every step: 40 reads per window took longer than the step of hundreds of GPUs."""
    store, read, opened = synthetic_store(tmp_path / "store", 2**21, document=32), [], []
    rows, plain = Shard.rows, open
    monkeypatch.setattr(
        Shard, "rows", lambda shard, section, *ends: read.append(section) or rows(shard, section, *ends)
    )
    monkeypatch.setattr("builtins.open", lambda *arguments, **options: opened.append(1) or plain(*arguments, **options))
    plan = plan_training(store, 1, 0, global_examples=64)
    batch = plan.batch(0)
    deal = Dealer(2**14, length_as_cost).deal(batch.items, store, 8)
    assert sum(map(len, deal.of_rank(0))) == 8 and len(batch.document_lengths) == 64 * 2**14 // 32
    assert len(read) <= 2 * 64 and len(opened) <= 2  # shards


def test_opening_and_planning_read_no_tokens(store_folder, tmp_path, monkeypatch) -> None:
    """Start-up time therefore does not grow with the corpus: planning 10^15 tokens is as fast as planning ten."""
    rows = Shard.rows

    def read_no_tokens(shard: Shard, section: str, *ends: int) -> np.ndarray:
        assert section != "ids", "a token was read"
        return rows(shard, section, *ends)

    monkeypatch.setattr(Shard, "rows", read_no_tokens)
    reader = Reader(ExampleEncoder(tiny_tokenizer()), 384, 64, "drop")
    assert len(reader.training((str(store_folder),), ())) > 10
    shard = open_store(store_folder).shards[0]
    counts = shard.counts | {"ids": 10**15, "documents": 10**12}
    huge = Windows(Store(tmp_path, {}, (replace(shard, counts=counts),)), 64)
    plan = plan_training(huge, 2, 0, global_examples=512)
    assert plan.num_steps == 2 * -(-len(huge) // 512) and plan.passes(plan.num_steps // 2) == (1.0,)


def test_a_large_vocabulary_takes_four_bytes_per_token(tmp_path) -> None:
    words = {"[UNK]": 0, "<eos>": 1, "first": 2, "last": 2**16 + 7}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", chat_template=CHATML)
    store = build_store([write_texts(tmp_path / "a.jsonl", ["first last", "last"])], tokenizer, tmp_path / "store")
    assert store.info["dtype"] == "<u4" and store.highest == 2**16 + 7
    windows = Windows(store, 16)
    assert windows.get(0)[0].tolist() == [2, 2**16 + 7, 1, 2**16 + 7, 1] and windows.document_lengths(0) == (3, 2)
