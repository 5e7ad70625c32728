"""Training sources for tests: tokens and weights in memory, documents of files, and the content of such files."""

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
    """Documents with the given tokens and weights (bool or float32; the first weight of each document is 0)."""

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
    """Read the documents of files, through the cache in the directory `cache` if given. `options` are fields of `Reader`."""
    kept = Cache(Path(cache), lambda text: None, cache_gib) if cache else None
    reader = Reader(encoder or ExampleEncoder(tokenizer), 2**31, sequence_length, too_long, kept, **options)
    documents = reader.read(paths, "", reading)
    assert isinstance(documents, Documents)
    return documents


def json_lines(rows: list) -> bytes:
    """Return the content of a .jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[dict]):
    """Return an Arrow table, with null for keys that a row lacks. Skip the test without pyarrow."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return pytest.importorskip("pyarrow").table({key: [row.get(key) for row in rows] for key in keys})


def parquet(rows: list[dict], **options) -> bytes:
    """Return the content of a .parquet file. Skip the test without pyarrow."""
    pytest.importorskip("pyarrow.parquet").write_table(table(rows), sink := io.BytesIO(), **options)
    return sink.getvalue()


def texts(lengths) -> InMemory:
    """Return documents of the given lengths. All tokens but the first are targets, and no two tokens are equal."""
    edges = np.cumsum([0, *lengths])
    ids = [np.arange(low, high) for low, high in zip(edges, edges[1:], strict=False)]
    return InMemory(ids, [np.arange(len(tokens)) > 0 for tokens in ids])


def chats(lengths) -> InMemory:
    """Return documents like `texts`, with targets only in the second half, so that they cannot be cut."""
    documents = texts(lengths)
    return InMemory(documents.ids, [np.arange(n) >= max(1, n // 2) for n in lengths])


def weighted(choices: tuple[float, ...], count: int = 18, seed: int = 0) -> InMemory:
    """Return random documents of 10 to 60 tokens, each token with a weight in `choices`. Every document has a target."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, VOCABULARY, n) for n in rng.integers(10, 61, count)]
    factors = [rng.choice(choices, len(tokens)).astype(np.float32) for tokens in ids]
    for weights in factors:
        weights[0], weights[-1] = 0, choices[-1]
    return InMemory(ids, factors)


def micro_batches(items, source, capacity: int, rank: int = 0, ranks: int = 1) -> list[tuple[int, ...]]:
    """Return the micro-batches of a rank, of at most `capacity` tokens. The cost of a document is its length squared."""
    return Dealer(capacity, lambda lengths, targets: lengths**2).deal(items, source, ranks).of_rank(rank)


def vowels(answers: list[str], examples: list[dict]) -> dict[str, float]:
    """A metric: the mean fraction of vowels in an answer."""
    return {"vowels": sum(sum(c in "aeiou" for c in answer) / max(1, len(answer)) for answer in answers) / len(answers)}


def fails_at_the_end(answers: list[str], examples: list[dict]) -> dict[str, float]:
    """A metric that scores the references, and raises for an answer that a model has written."""
    if answers != [example["messages"][-1]["content"] for example in examples]:
        raise ValueError("no score")
    return vowels(answers, examples)
