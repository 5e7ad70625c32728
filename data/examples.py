"""The examples of data files as tokenised documents, from the cache of an earlier start, or encoded now.

A store (data/store.py) has whole examples. What is trained of each under `sequence_length` and `too_long` is computed here, so
that a change of either does not tokenise again.
"""

import dataclasses
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from data.cache import Cache, describe
from data.encoding import NOTES, ExampleEncoder, note_sentence
from data.example_report import example_report
from data.files import expand, read_file
from data.formats import DEFAULT, Reading
from data.store import Shard, Store
from data.tokenise import ExampleSettings, build_examples

NO_TARGET = ("unanswered", "weightless")  # notes of examples without any target
Say = Callable[[str], None]


@dataclass(frozen=True)
class Parts:
    """What is trained of the documents of a store, in order: parts that have a target.

    document: uint32, whose part it is. start: uint32, its first token in the document. lengths: int64. targets: int64, or
    float64 if a weight is not 1: the sum of its weights. All are `(parts,)`. longest_span: tokens of the longest span of
    targets. counts: what is left out by reason, as in data/example_report.py. too_long: (file, example, tokens) of the first
    example that is too long, under data.too_long=error.
    """

    document: np.ndarray = field(repr=False)
    start: np.ndarray = field(repr=False)
    lengths: np.ndarray = field(repr=False)
    targets: np.ndarray = field(repr=False)
    longest_span: int
    counts: Counter
    too_long: tuple[int, int, int] | None


def parts_of(store: Store, sequence_length: int, too_long: str) -> Parts:
    """The parts of documents that are trained, as `kept_parts` (data/encoding.py) says."""
    if not store.shards:
        empty = np.zeros(0, dtype=np.int64)
        return Parts(empty, empty, empty, empty, 0, Counter(longest_read=0), None)
    found = [_parts_of_shard(shard, sequence_length, too_long) for shard in store.shards]
    counts: Counter = Counter()
    for part in found:
        counts.update(part.counts)
    counts["longest_read"] = max(part.counts["longest_read"] for part in found)
    starts = zip(found, store.document_starts, strict=False)
    return Parts(
        np.concatenate([part.document + np.uint32(start) for part, start in starts]),
        np.concatenate([part.start for part in found]),
        np.concatenate([part.lengths for part in found]),
        np.concatenate([part.targets for part in found]),
        max(part.longest_span for part in found),
        counts,
        next((part.too_long for part in found if part.too_long), None),
    )


def _parts_of_shard(shard: Shard, size: int, too_long: str) -> Parts:
    documents, spans = shard.rows("documents"), shard.rows("spans")
    lengths = np.diff(documents["ids"].astype(np.int64), prepend=0)
    is_text, is_long = documents["is_text"] > 0, lengths > size
    step = max(1, size - 1)  # each piece begins with the last token of the one before
    num_parts = np.where(is_long, np.where(is_text, -(-(lengths - 1) // step), too_long == "truncate"), 1)
    owner = np.repeat(np.arange(len(documents)), num_parts)
    start = _number_within(num_parts) * step
    end = np.minimum(lengths[owner], start + size)
    # Each pair of a part and a span of its document.
    ends = documents["spans"].astype(np.int64)
    num_spans = np.diff(ends, prepend=0)
    part = np.repeat(np.arange(len(owner)), num_spans[owner])
    span = spans[_number_within(num_spans[owner]) + (ends - num_spans)[owner][part]]
    # The first token of a part is not a target: it has no context.
    count = np.minimum(span["end"], end[part]) - np.maximum(span["start"], start[part] + 1)
    is_inside = count > 0
    part, span, count = part[is_inside], span[is_inside], count[is_inside]
    has_targets = np.bincount(part, minlength=len(owner)) > 0
    sums = np.bincount(part, count * span["weight"].astype(np.float64), len(owner))[has_targets]
    if (span["weight"] == 1).all():
        sums = sums.astype(np.int64)
    actions = {action: int((is_long & (is_text == (action == "cut"))).sum()) for action in {"cut", too_long}}
    is_truncated = (is_long & ~is_text)[owner] & ~has_targets
    reasons = {"empty_truncated": int(is_truncated.sum()), "empty": int((~has_targets & ~is_truncated).sum())}
    refused = None
    if too_long == "error" and (is_long & ~is_text).any():
        first = int(np.argmax(is_long & ~is_text))
        refused = (int(documents[first]["file"]), int(documents[first]["example"]), int(lengths[first]))
    return Parts(
        owner[has_targets].astype(np.uint32),
        start[has_targets].astype(np.uint32),
        (end - start)[has_targets],
        sums,
        int(count.max(initial=0)),
        Counter(actions | reasons | {"longest_read": int(lengths.max(initial=0))}),
        refused,
    )


def _number_within(counts: np.ndarray) -> np.ndarray:
    """0 to n-1 for each n of `counts`, end to end."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


@dataclass(frozen=True)
class Examples:
    """The parts of a store's documents, read one at a time."""

    store: Store
    parts: Parts

    def ids(self, index: int) -> np.ndarray:
        """Token ids of a part, int64 `(length,)`."""
        first, _ = self.store.document(int(self.parts.document[index]))
        first += int(self.parts.start[index])
        return self.store.tokens(first, first + int(self.parts.lengths[index]))

    def weights(self, index: int) -> np.ndarray:
        """Weight of each token of a part `(length,)`: bool if all are 0 or 1, otherwise float32."""
        _, spans = self.store.document(int(self.parts.document[index]))
        start, length = int(self.parts.start[index]), int(self.parts.lengths[index])
        inside = [
            (max(1, first - start), min(length, end - start), weight)
            for first, end, weight in spans.tolist()
            if first < start + length and end > start + 1
        ]
        weights = np.zeros(length, dtype=bool if all(weight == 1 for *_, weight in inside) else np.float32)
        for first, end, weight in inside:
            weights[first:end] = weight
        return weights

    def longest_span(self) -> int:
        """Tokens of the longest span of targets, 0 without any: of an answer with the token that ends it."""
        return self.parts.longest_span

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all tokens and weights in order."""
        digest = hashlib.sha256(self.store.fingerprint.encode())
        for array in (self.parts.document, self.parts.start, self.parts.lengths):
            digest.update(array.tobytes())
        return digest.hexdigest()


class _Sequence(Sequence):
    """The ids or the weights of all parts, read when they are asked for."""

    def __init__(self, read: Callable[[int], np.ndarray], length: int) -> None:
        self._read, self._length = read, length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._read(index % len(self))


@dataclass(frozen=True)
class Documents:
    """Tokenised examples in file order. A chat is one document or several; a long text may be several.

    ids: int64 `(length,)` for each document.
    weights: for each document, the factor of the loss of each of its tokens `(length,)`: bool if all factors are 0 or 1,
    else float32. `weights[t]` is for the prediction of token t from the tokens before it; that of token 0 is 0.
    lengths, targets: `(documents,)`, number of tokens and sum of the weights. The sums are int64, or float64 if a weight is
    not 1. Of documents that were read from files these two are in memory, and the others are read one at a time.
    """

    ids: Sequence[np.ndarray]
    weights: Sequence[np.ndarray]
    lengths: np.ndarray
    targets: np.ndarray
    fingerprint: str  # hash of all tokens and weights in order; a run does not resume with other data
    report: str  # lines: what was read, then remarks such as what was truncated, dropped and skipped
    store: Examples | None = None  # the documents that were read from files

    def __len__(self) -> int:
        return len(self.ids)

    def get(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and weights of one document."""
        return self.ids[index], self.weights[index]

    def num_tokens(self, index: int) -> int:
        """Number of tokens in one document."""
        return int(self.lengths[index])

    def document_lengths(self, index: int) -> tuple[int, ...]:
        """Length in tokens of each document in item `index`. An item here is always one document."""
        return (int(self.lengths[index]),)

    def items_with_targets(self) -> np.ndarray:
        """Indices of the documents that have a target token."""
        return np.flatnonzero(self.targets)

    def num_targets(self, index: int) -> int | float:
        """Sum of the weights of one document: an int unless a weight in the data is not 1."""
        return self.targets[index].item()

    def highest_token(self) -> int:
        """The highest token id in all documents."""
        return self.store.store.highest if self.store else max(int(ids.max()) for ids in self.ids)

    def content_keys(self) -> np.ndarray:
        """A key of the content of each example that was read (data/held_out.py), uint64 `(examples,)`."""
        return self.store.store.hashes() if self.store else np.zeros(0, dtype=np.uint64)


def read_examples(path: str | Path, reading: Reading = DEFAULT) -> list[dict]:
    """All examples of a file (data/files.py), checked for shape. Raises UserError with the file and line."""
    return [example for _, example in read_file(path, reading=reading)]


def load_documents(
    paths: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    too_long: str,
    *,
    encoder: ExampleEncoder | None = None,
    settings: ExampleSettings | None = None,
    cache: str | Path | None = None,
    cache_gib: float | None = None,
    processes: int | None = None,
    progress: str | None = None,
    say: Say = lambda text: None,
) -> Documents:
    """Read and tokenise the examples of files.

    `too_long` applies to chats of more than `sequence_length` tokens: `drop`, `truncate` (cut off the end) or `error`.
    Longer texts are cut into pieces so that every token is still a target exactly once.

    encoder, settings: how chats are rendered, and the other settings of data. Their defaults are those of a config.
    cache: a directory (data/cache.py) in which the result is kept. The processes of a node meet there: one of them
    tokenises, the others wait for it. None: in memory. cache_gib: the size above which entries are removed (data.cache_gib).
    processes: number of processes to tokenise with. None: one per available core if the files are large enough.
    progress: label of a progress bar, drawn by the process that tokenises. say: prints a line about waiting for another
    process. Neither these nor `processes` change the result.

    Raises UserError for a bad file, or if no example or no target token is left.
    """
    encoder = encoder or ExampleEncoder(tokenizer)
    settings = dataclasses.replace(
        settings or ExampleSettings(sequence_length), sequence_length=sequence_length, too_long=too_long
    )
    start = time.perf_counter()

    def build(folder: Path | None) -> Store:
        return build_examples(paths, encoder, settings, folder, processes, progress)

    if cache is None:
        store = build(None)
        origin = _tokenised(store, start)
    else:
        found = Cache(Path(cache), say, cache_gib).open(paths, describe(paths, tokenizer, encoder, settings), build)
        store = found.store
        if found.is_new:
            origin = f"{_tokenised(store, start)}{found.remark or f' into {found.folder}'}"
        else:
            origin = f"from the cache {found.folder}, written {store.info['written']}"
    files, parts = expand(paths), parts_of(store, sequence_length, too_long)
    counts = Counter({**store.info["counts"], **parts.counts})
    _check_parts(paths, files, store.info, parts, counts, settings)
    examples = Examples(store, parts)
    ids, weights = (_Sequence(read, len(parts.lengths)) for read in (examples.ids, examples.weights))
    report = example_report(store.info, settings, files, counts, parts.lengths, parts.targets)
    return Documents(ids, weights, parts.lengths, parts.targets, examples.fingerprint, f"{report}\n{origin}", examples)


def _tokenised(store: Store, start: float) -> str:
    processes = store.info["processes"]
    return f"tokenised in {time.perf_counter() - start:.1f} s" + (f" (on {processes} cores)" if processes > 1 else "")


def _check_parts(
    paths: tuple[str, ...],
    files: Sequence[Path],
    info: dict,
    parts: Parts,
    counts: Counter,
    settings: ExampleSettings,
) -> None:
    """Raise UserError for an example that is too long, if that is an error, and if there is nothing to train on."""
    names, limit = ", ".join(paths), settings.sequence_length
    if parts.too_long:
        file, number, length = parts.too_long
        rows = read_file(files[file], reading=settings.reading, bad=lambda sentence: None)
        where, _ = next(itertools.islice(rows, number, None))
        raise UserError(
            f"{where} has {length} tokens, more than data.sequence_length={limit}; increase it, or set data.too_long to drop "
            "or truncate"
        )
    if len(parts.lengths):
        return
    if not counts["examples"]:
        raise UserError(
            f"{names}: data.validation_share={settings.validation_share} leaves no example for {settings.part} "
            f"(examples read: {counts['other_part']}); change it"
        )
    if counts["drop"] and not counts["empty"]:
        raise UserError(
            f"all {counts['drop']} examples in {names} are longer than data.sequence_length={limit}; increase it (the longest "
            f"example has {counts['longest_read']} tokens)"
        )
    bad = info["bad"]
    skipped = f"; {counts['skipped']} malformed examples are skipped, the first: {bad[0]}" if bad else ""
    # Why an example has no target, besides its length.
    found = [note_sentence(note, count) for note in NOTES if note in NO_TARGET and (count := counts[f"note:{note}"])]
    why = f" ({'; '.join(found)})" if found else ""
    raise UserError(
        f"{names}: no token carries loss; a chat needs an assistant message within data.sequence_length={limit} tokens{why}"
        f"{skipped}"
    )
