"""Sources of training: whatever tokens and weights a test needs, in memory, or the documents of files; and such files."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from data.cache import Cache
from data.dealing import Dealer
from data.encoding import ExampleEncoder
from data.examples import Documents, in_memory
from data.files import DEFAULT, Reading
from data.reader import Reader

VOCABULARY = 259  # ids that every tiny model has (tests/tiny.py)


class InMemory(Documents):
    """Documents with given tokens and weights. weights: bool or float32; the first of each document is 0."""

    ids: list[np.ndarray]
    weights: list[np.ndarray]

    def __init__(self, ids: list[np.ndarray], weights: list[np.ndarray], name: str = "in memory") -> None:
        super().__init__(**vars(in_memory(ids, weights)) | {"fingerprint": name, "report": name})
        for key, value in {"ids": ids, "weights": weights}.items():
            object.__setattr__(self, key, value)  # a frozen dataclass


def load_documents(
    paths: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    too_long: str,
    encoder: ExampleEncoder | None = None,
    reading: Reading = DEFAULT,
    cache: str | Path | None = None,
    cache_gib: float | None = None,
    **options,
) -> Documents:
    """The documents of files, from the cache in this directory. options: fields of `Reader`."""
    kept = Cache(Path(cache), lambda text: None, cache_gib) if cache else None
    reader = Reader(encoder or ExampleEncoder(tokenizer), 2**31, sequence_length, too_long, kept, **options)
    documents = reader.read(paths, "", reading)
    assert isinstance(documents, Documents)
    return documents


def json_lines(rows: list) -> bytes:
    """The content of a .jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[dict]):
    """A table of Arrow, in which a key that a row has not is null. Skips the test without pyarrow."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return pytest.importorskip("pyarrow").table({key: [row.get(key) for row in rows] for key in keys})


def parquet(rows: list[dict], **options) -> bytes:
    """The content of a .parquet file."""
    pytest.importorskip("pyarrow.parquet").write_table(table(rows), sink := io.BytesIO(), **options)
    return sink.getvalue()


def texts(lengths) -> InMemory:
    """Documents of these lengths. All tokens but the first are targets, and no two tokens are equal."""
    edges = np.cumsum([0, *lengths])
    ids = [np.arange(low, high) for low, high in zip(edges, edges[1:], strict=False)]
    return InMemory(ids, [np.arange(len(tokens)) > 0 for tokens in ids])


def chats(lengths) -> InMemory:
    """Like `texts`, with targets in the second half only, so that they cannot be cut."""
    documents = texts(lengths)
    return InMemory(documents.ids, [np.arange(n) >= max(1, n // 2) for n in lengths])


def weighted(choices: tuple[float, ...], count: int = 18, seed: int = 0) -> InMemory:
    """Random documents of 10 to 60 tokens, each token with one of these weights. Every document has a target."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, VOCABULARY, n) for n in rng.integers(10, 61, count)]
    factors = [rng.choice(choices, len(tokens)).astype(np.float32) for tokens in ids]
    for weights in factors:
        weights[0], weights[-1] = 0, choices[-1]
    return InMemory(ids, factors)


def micro_batches(items, source, capacity: int, rank: int = 0, ranks: int = 1) -> list[tuple[int, ...]]:
    """The micro-batches of one rank, of at most `capacity` tokens; the cost of a document is its length squared."""
    return Dealer(capacity, lambda lengths, targets: lengths**2).deal(items, source, ranks).of_rank(rank)
