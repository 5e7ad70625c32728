"""The examples of data files as tokenised documents, from the cache of an earlier start, or encoded now.

A store (data/store.py) has whole examples. What is trained of each under `sequence_length` and `too_long` is computed here, so
that a change of either does not tokenise again.
"""

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from data.cache import Cache, describe, tokenised
from data.encoding import NOTES, ExampleEncoder, control_line
from data.files import DEFAULT, Reading, expand
from data.held_out import BUT_FOR
from data.store import Shard, Store

NO_TARGET = ("unanswered", "weightless")  # notes of examples without any target
Say = Callable[[str], None]


@dataclass(frozen=True)
class Parts:
    """What is trained of the documents of a store, in order: parts that have a target, read one at a time.

    document: uint32, whose part it is. start: uint32, its first token in the document. lengths: int64. targets: int64, or
    float64 if a weight is not 1: the sum of its weights. All are `(parts,)`. longest_span: tokens of the longest span of
    targets. counts: what is left out by reason, as in `example_report`. too_long: (file, example, tokens) of the first
    example that is too long, under data.too_long=error.
    """

    store: Store
    document: np.ndarray = field(repr=False)
    start: np.ndarray = field(repr=False)
    lengths: np.ndarray = field(repr=False)
    targets: np.ndarray = field(repr=False)
    longest_span: int
    counts: Counter
    too_long: tuple[int, int, int] | None

    def ids(self, index: int) -> np.ndarray:
        """Token ids of a part, int64 `(length,)`."""
        first, _ = self.store.document(int(self.document[index]))
        first += int(self.start[index])
        return self.store.tokens(first, first + int(self.lengths[index]))

    def weights(self, index: int) -> np.ndarray:
        """Weight of each token of a part `(length,)`: bool if all are 0 or 1, otherwise float32."""
        _, spans = self.store.document(int(self.document[index]))
        start, length = int(self.start[index]), int(self.lengths[index])
        inside = [
            (max(1, first - start), min(length, end - start), weight)
            for first, end, weight in spans.tolist()
            if first < start + length and end > start + 1
        ]
        weights = np.zeros(length, dtype=bool if all(weight == 1 for *_, weight in inside) else np.float32)
        for first, end, weight in inside:
            weights[first:end] = weight
        return weights

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all tokens and weights in order."""
        digest = hashlib.sha256(self.store.fingerprint.encode())
        for array in (self.document, self.start, self.lengths):
            digest.update(array.tobytes())
        return digest.hexdigest()


def parts_of(store: Store, sequence_length: int, too_long: str) -> Parts:
    """The parts of documents that are trained, as `kept_parts` (data/show.py) says of one."""
    arrays: list[list[np.ndarray]] = [[np.zeros(0, np.uint32), np.zeros(0, np.uint32), *2 * [np.zeros(0, np.int64)]]]
    longest, counts, refused = 0, Counter(longest_read=0), None
    for shard, first in zip(store.shards, store.document_starts, strict=False):
        found, span, of_shard, too_long_here = _parts_of_shard(shard, sequence_length, too_long)
        arrays.append([found[0] + np.uint32(first), *found[1:]])
        longest, refused = max(longest, span), refused or too_long_here
        most = max(counts["longest_read"], of_shard["longest_read"])
        counts.update(of_shard)
        counts["longest_read"] = most
    document, start, lengths, targets = map(np.concatenate, zip(*arrays, strict=True))
    return Parts(store, document, start, lengths, targets, longest, counts, refused)


def _parts_of_shard(
    shard: Shard, size: int, too_long: str
) -> tuple[tuple[np.ndarray, ...], int, Counter, tuple[int, int, int] | None]:
    """(document, start, lengths and targets of each part; longest_span, counts, too_long), as in `Parts`."""
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
    arrays = owner.astype(np.uint32), start.astype(np.uint32), end - start
    counts = Counter(actions | reasons | {"longest_read": int(lengths.max(initial=0))})
    return (*(array[has_targets] for array in arrays), sums), int(count.max(initial=0)), counts, refused


def _number_within(counts: np.ndarray) -> np.ndarray:
    """0 to n-1 for each n of `counts`, end to end."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


@dataclass(frozen=True)
class _Sequence(Sequence):
    """The ids or the weights of all parts, read when they are asked for, one at a time."""

    read: Callable[[int], np.ndarray]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.read(range(self.length)[index])


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
    parts: Parts | None = None  # the documents that were read from files

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

    def content_keys(self) -> np.ndarray:
        """A key of the content of each example that was read (data/held_out.py), uint64 `(examples,)`."""
        return self.parts.store.hashes() if self.parts else np.zeros(0, dtype=np.uint64)


def load_documents(
    paths: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    too_long: str,
    *,
    encoder: ExampleEncoder | None = None,
    reading: Reading = DEFAULT,
    cache: str | Path | None = None,
    cache_gib: float | None = None,
    processes: int | None = None,
    progress: str = "",
    say: Say = lambda text: None,
) -> Documents:
    """Read and tokenise the examples of files.

    `too_long` applies to chats of more than `sequence_length` tokens: `drop`, `truncate` (cut off the end) or `error`.
    Longer texts are cut into pieces so that every token is still a target exactly once.

    encoder, reading: how chats are rendered and files are read. Their defaults are those of a config.
    cache: a directory (data/cache.py) in which the result is kept. The processes of a node meet there: one of them
    tokenises, the others wait for it. None: in memory. cache_gib: the size above which entries are removed (data.cache_gib).
    processes: number of processes to tokenise with. None: one per available core if the files are large enough.
    progress: label of the progress bar, which the process that tokenises draws on a terminal. say: prints a line about waiting for another
    process. Neither these nor `processes` change the result.

    Raises UserError for a bad file, or if no example or no target token is left.
    """
    encoder = encoder or ExampleEncoder(tokenizer)
    start = time.perf_counter()

    def build(folder: Path | None) -> Store:
        from data.tokenise import build_examples  # not where the cache has all of it

        return build_examples(paths, encoder, reading, folder, processes, progress)

    if cache is None:
        store = build(None)
        origin = tokenised(start)
    else:
        store, origin = Cache(Path(cache), say, cache_gib).open(
            paths, describe(paths, tokenizer, encoder, reading), build
        )
    parts = parts_of(store, sequence_length, too_long)
    counts = Counter({**store.info["counts"], **parts.counts})
    _check_parts(paths, parts, counts, sequence_length, reading)
    ids, weights = (_Sequence(read, len(parts.lengths)) for read in (parts.ids, parts.weights))
    report = example_report(parts, counts, sequence_length, reading.part)
    return Documents(ids, weights, parts.lengths, parts.targets, parts.fingerprint, f"{report}\n{origin}", parts)


def _check_parts(paths: tuple[str, ...], parts: Parts, counts: Counter, limit: int, reading: Reading) -> None:
    """Raise UserError for an example that is too long, if that is an error, and if there is nothing to train on."""
    names = ", ".join(paths)
    if parts.too_long:
        file, number, length = parts.too_long
        from data.formats import read_files

        where, _ = next(itertools.islice(read_files([expand(paths)[file]], reading), number, None))
        raise UserError(
            f"{where} has {length} tokens, more than data.sequence_length={limit}; increase it, or set data.too_long to drop "
            "or truncate"
        )
    if len(parts.lengths):
        return
    if not counts["examples"]:
        raise UserError(
            f"{names}: data.validation_share={reading.validation_share} leaves no example for {reading.part} "
            f"(examples read: {counts['other_part']}); change it"
        )
    if counts["drop"] and not counts["empty"]:
        raise UserError(
            f"all {counts['drop']} examples in {names} are longer than data.sequence_length={limit}; increase it (the longest "
            f"example has {counts['longest_read']} tokens)"
        )
    bad = parts.store.info["bad"]
    skipped = f"; {counts['skipped']} malformed examples are skipped, the first: {bad[0]}" if bad else ""
    # Why an example has no target, besides its length.
    found = [f"{NOTES[note]}: {counts[f'note:{note}']:,}" for note in NO_TARGET if counts[f"note:{note}"]]
    why = f" ({'; '.join(found)})" if found else ""
    raise UserError(
        f"{names}: no token carries loss; a chat needs an assistant message within data.sequence_length={limit} tokens{why}"
        f"{skipped}"
    )


# What was left out or changed, by what is counted.
REMARKS = {
    "drop": "DROPPED {n} longer than {size} (longest {longest})",
    "truncate": "TRUNCATED {n} to {size} (longest {longest})",
    "empty_truncated": "LEFT OUT {n} without a target after they were truncated to {size} tokens",
    "empty": "LEFT OUT {n} without any target",
    "left": "LEFT OUT {n} rows by data.row",
    "repeated": f"REPEATED {{n}} that say what an earlier one says, {BUT_FOR}",
}


def example_report(parts_read: Parts, counts: Counter, size: int, part: str) -> str:
    """Lines about a source: what it has, then remarks.

    counts: of examples by reason and note. size: data.sequence_length. part: of `Reading`.
    """
    info, lengths, targets = parts_read.store.info, parts_read.lengths, parts_read.targets
    tokens, sequences = int(lengths.sum()), len(lengths)
    total = f"{int(targets.sum()):,}" if targets.dtype == np.int64 else f"{targets.sum():,.1f} (by weight)"
    first = (
        f"{sequences:,} example{_s(sequences)} from {info['files']} file{_s(info['files'])}, {tokens:,} tokens "
        f"({tokens / sequences:.0f} per example, longest {lengths.max()}), {total} of them targets"
    )
    if cut := counts["cut"]:
        first += f"; {cut:,} long text{_s(cut)} cut into pieces of {size}, each counted as an example"
    parts = [first, *info["forms"]]
    if others := info["left_out"]:
        parts.append(
            f"LEFT OUT {len(others)} files of another kind: {', '.join(others[:3])}{', ...' * (len(others) > 3)}"
        )
    counts = Counter(counts | {"repeated": info["repeated"]})
    for key, words in REMARKS.items():
        if counts[key]:
            parts.append(words.format(n=f"{counts[key]:,}", size=size, longest=counts["longest_read"]))
    if count := counts["skipped"]:
        listed = "" if len(info["bad"]) == count else f", the first {len(info['bad'])} of them"
        parts += [f"SKIPPED {count:,} malformed{listed}:", *(f"  {sentence}" for sentence in info["bad"])]
    if count := counts["other_part"]:
        parts.append(f"{count:,} example{_s(count)} {'held out' if part == 'training' else 'not held out'}")
    for note, words in NOTES.items():
        count = counts[f"note:{note}"]
        if note == "control" and count:
            parts.append(control_line(count, info["control"]))
        elif count:
            parts.append(f"{words}: {count:,}")
            if note == "split":
                split, whole = counts["split_tokens"], counts["whole_tokens"]
                parts[-1] += f"; they have {split:,} tokens where one sequence each would have {whole:,}"
    return "\n".join(parts)


def _s(count: int) -> str:
    return "" if count == 1 else "s"
