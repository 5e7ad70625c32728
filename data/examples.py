"""What is trained of the examples of data files, as documents, and the report on it.

A store (data/store.py) has whole examples. What is trained of each under `sequence_length` and `too_long` is computed here, so
that a change of either does not tokenise again.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from common.errors import UserError
from data.encoding import NOTES, Encoded, Span, control_line
from data.files import Reading, expand
from data.held_out import BUT_FOR
from data.store import Shard, Store


@dataclass(frozen=True)
class Parts:
    """What is trained of the documents of a store, in order: parts that have a target, read one at a time.

    document: uint32, whose part it is. start: uint32, its first token in the document. lengths: int64. targets: int64, or
    float64 if a weight is not 1: the sum of its weights. All are `(parts,)`. longest_span: tokens of the longest span of
    targets. counts: what is left out by reason, as in `remarks_on`. too_long: (file, example, tokens) of the first
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

    def get(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a part, int64 `(length,)`, and their weights: bool if all are 0 or 1, otherwise float32."""
        first, spans = self.store.document(int(self.document[index]))
        start, length = int(self.start[index]), int(self.lengths[index])
        inside = (
            Span(max(1, begin - start), min(length, end - start), weight)
            for begin, end, weight in spans.tolist()
            if begin < start + length and end > start + 1
        )
        part = Encoded(self.store.tokens(first + start, first + start + length), tuple(inside))
        return part.ids, part.weights()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all tokens and weights in order."""
        digest = hashlib.sha256(self.store.fingerprint.encode())
        for array in (self.document, self.start, self.lengths):
            digest.update(array.tobytes())
        return digest.hexdigest()


def parts_of(store: Store, sequence_length: int, too_long: str) -> Parts:
    """The parts of documents that are trained: the whole of one, unless it is too long.

    A long text is cut into pieces. Each begins with the last token of the one before: the first token of a piece cannot be a
    target, so without this overlap every cut would lose one. `too_long` (data.too_long) applies to chats and completions; with
    `error` and `drop` nothing of a longer one is kept.
    """
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
class Documents:
    """Tokenised examples in file order. A chat is one document or several; a long text may be several.

    get: index -> token ids and weights of a document. ids: int64 `(length,)`. weights: the factor of the loss of each of its
    tokens `(length,)`: bool if all factors are 0 or 1, else float32. `weights[t]` is for the prediction of token t from the
    tokens before it; that of token 0 is 0.
    lengths, targets: `(documents,)`, number of tokens and sum of the weights. The sums are int64, or float64 if a weight is
    not 1. Of documents that were read from files these two are in memory, and the others are read one at a time.
    """

    get: Callable[[int], tuple[np.ndarray, np.ndarray]]
    lengths: np.ndarray
    targets: np.ndarray
    fingerprint: str  # hash of all tokens and weights in order; a run does not resume with other data
    report: str  # lines: what was read, then remarks such as what was truncated, dropped and skipped
    parts: Parts | None = None  # the documents that were read from files

    def __len__(self) -> int:
        return len(self.lengths)

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


def in_memory(ids: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> Documents:
    """Documents with these token ids and weights, as in `Documents`."""
    kind = np.float64 if any(one.dtype == np.float32 for one in weights) else np.int64
    lengths = np.array([len(one) for one in ids], dtype=np.int64)
    targets = np.array([one.sum(dtype=kind) for one in weights], dtype=kind)
    return Documents(lambda i: (ids[i], weights[i]), lengths, targets, fingerprint="", report="")


def documents_of(
    store: Store, origin: str, paths: tuple[str, ...], sequence_length: int, too_long: str, reading: Reading
) -> Documents:
    """What is trained of the examples of `paths`, which are in `store`. origin: where that is from, in words.

    `too_long` applies to chats of more than `sequence_length` tokens: `drop`, `truncate` (cut off the end) or `error`.
    Longer texts are cut into pieces so that every token is still a target exactly once.

    Raises UserError for an example that is too long, if that is an error, and if no target token is left.
    """
    parts = parts_of(store, sequence_length, too_long)
    if parts.too_long:
        file, number, length = parts.too_long
        from data.formats import read_files  # not where the cache has all of it

        where, _ = next(itertools.islice(read_files([expand(paths)[file]], reading), number, None))
        raise UserError(
            f"{where} has {length} tokens, more than data.sequence_length={sequence_length}; increase it, or set data.too_long "
            "to drop or truncate"
        )
    remarks = remarks_on(store, Counter({**store.info["counts"], **parts.counts}), sequence_length, reading.part)
    if not len(parts.lengths):
        needs = f"a chat needs an assistant message within data.sequence_length={sequence_length} tokens"
        if reading.validation_share:
            needs += f", and data.validation_share={reading.validation_share}, which you can change, must leave examples for {reading.part}"
        why = "; ".join(line.strip().rstrip(":") for line in remarks[len(store.info["forms"]) :])
        mend = "; increase data.sequence_length" if parts.counts["drop"] else ""
        raise UserError(f"{', '.join(paths)}: no token carries loss; {needs} ({why}){mend}")
    report = "\n".join([first_line(parts, sequence_length), *remarks, origin])
    return Documents(parts.get, parts.lengths, parts.targets, parts.fingerprint, report, parts)


# What was left out or changed, by what is counted.
REMARKS = {
    "drop": "DROPPED {n} longer than {size} (longest {longest})",
    "truncate": "TRUNCATED {n} to {size} (longest {longest})",
    "empty_truncated": "LEFT OUT {n} without a target after they were truncated to {size} tokens",
    "empty": "LEFT OUT {n} without any target",
    "left": "LEFT OUT {n} rows by data.row",
    "repeated": f"REPEATED {{n}} that say what an earlier one says, {BUT_FOR}",
}


def first_line(parts: Parts, sequence_length: int) -> str:
    """The first line of a report: how many examples, tokens and targets."""
    files, lengths, targets = parts.store.info["files"], parts.lengths, parts.targets
    tokens, sequences, cut = int(lengths.sum()), len(lengths), parts.counts["cut"]
    total = f"{int(targets.sum()):,}" if targets.dtype == np.int64 else f"{targets.sum():,.1f} (by weight)"
    first = (
        f"{sequences:,} example{_s(sequences)} from {files} file{_s(files)}, {tokens:,} tokens "
        f"({tokens / sequences:.0f} per example, longest {lengths.max()}), {total} of them targets"
    )
    pieces = f"cut into pieces of {sequence_length}, each counted as an example"
    return first + (f"; {cut:,} long text{_s(cut)} {pieces}" if cut else "")


def remarks_on(store: Store, counts: Counter, size: int, part: str) -> list[str]:
    """The other lines of a report: the forms of the examples, and what was left out or is unusual.

    counts: of examples by reason and note. size: data.sequence_length. part: of `Reading`.
    """
    info = store.info
    parts = list(info["forms"])
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
    return parts


def _s(count: int) -> str:
    return "" if count == 1 else "s"
