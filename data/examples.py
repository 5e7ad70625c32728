"""Turn stored examples into the documents to train, and report on them.

A store (data/store.py) has whole examples. `sequence_length` and `too_long` are applied here, so that a change of either does
not tokenise again.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from common.errors import UserError
from data.encoding import NOTES, Encoded, Span, control_line
from data.files import Reading, expand
from data.held_out import BUT_FOR
from data.store import Store


@dataclass(frozen=True)
class Documents:
    """Tokenised examples in file order. A chat is one document or several; a long text may be several.

    get: index -> token ids and weights of a document. ids: int64 `(length,)`. weights: the factor of each token's loss
    `(length,)`, bool if all factors are 0 or 1, else float32. `weights[t]` is for the prediction of token t from the tokens
    before it; `weights[0]` is 0.
    lengths, targets: `(documents,)`, number of tokens and sum of the weights. The sums are int64, or float64 if a weight is
    not 1.
    store: the store with the tokens, for documents from files. examples: uint32 `(documents,)`, the store's document to which
    each document belongs. longest_span: length of the longest span of targets, in tokens.
    """

    get: Callable[[int], tuple[np.ndarray, np.ndarray]]
    lengths: np.ndarray
    targets: np.ndarray
    fingerprint: str  # hash of all tokens and weights in order; a run resumes only with the same data
    report: str  # a line with the sizes, then remarks on truncated, dropped and skipped examples
    store: Store | None = None
    examples: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32), repr=False)
    longest_span: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def num_tokens(self, index: int) -> int:
        """Return the number of tokens in one document."""
        return int(self.lengths[index])

    def document_lengths(self, index: int) -> tuple[int, ...]:
        """Return the length in tokens of each document in item `index`. Here an item is always a single document."""
        return (int(self.lengths[index]),)

    def items_with_targets(self) -> np.ndarray:
        """Return the indices of the documents that have a target token."""
        return np.flatnonzero(self.targets)

    def num_targets(self, index: int) -> int | float:
        """Return the sum of a document's weights: an int unless a weight in the data is not 1."""
        return self.targets[index].item()

    def content_keys(self) -> np.ndarray:
        """Return the content key of each example that was read (data/held_out.py), uint64 `(examples,)`."""
        return self.store.hashes() if self.store else np.zeros(0, dtype=np.uint64)


def in_memory(ids: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> Documents:
    """Make `Documents` from token ids and weights in memory."""
    kind = np.float64 if any(array.dtype == np.float32 for array in weights) else np.int64
    lengths = np.array([len(array) for array in ids], dtype=np.int64)
    targets = np.array([array.sum(dtype=kind) for array in weights], dtype=kind)
    return Documents(lambda i: (ids[i], weights[i]), lengths, targets, fingerprint="", report="")


def parts_of(
    store: Store, sequence_length: int, too_long: str
) -> tuple[Documents, Counter, tuple[int, int, int] | None]:
    """Divide a store's documents into the parts to train: the whole document, unless it is too long. Drop parts without targets.

    A long text is cut into pieces. Each piece begins with the last token of the previous piece: the first token of a piece
    cannot be a target, so without this overlap every cut would lose a target. `too_long` (data.too_long) applies to chats and
    completions; with `error` and `drop` nothing of a longer one is kept.

    Return (the parts, read on demand and without a report; the number of omissions by reason, as in `remarks_on`;
    (file, example, tokens) of the first example that is too long, under `error`).
    """
    arrays: list[list[np.ndarray]] = [[np.zeros(0, np.uint32), np.zeros(0, np.uint32), *2 * [np.zeros(0, np.int64)]]]
    longest_span, counts, refused = 0, Counter(longest_read=0), None
    step = max(1, sequence_length - 1)  # each piece begins with the last token of the previous piece
    for shard, first in zip(store.shards, store.document_starts, strict=False):
        documents, spans = shard.rows("documents"), shard.rows("spans")
        lengths = np.diff(documents["ids"].astype(np.int64), prepend=0)
        is_long_text = (lengths > sequence_length) & (documents["is_text"] > 0)
        is_long_chat = (lengths > sequence_length) & ~is_long_text
        num_parts = np.where(is_long_text, -(-(lengths - 1) // step), ~is_long_chat | (too_long == "truncate"))
        owner = np.repeat(np.arange(len(documents)), num_parts)
        start = _number_within(num_parts) * step
        end = np.minimum(lengths[owner], start + sequence_length)
        # One entry for each pair of a part and a span of its document.
        ends = documents["spans"].astype(np.int64)
        num_spans = np.diff(ends, prepend=0)
        part = np.repeat(np.arange(len(owner)), num_spans[owner])
        span = spans[_number_within(num_spans[owner]) + (ends - num_spans)[owner][part]]
        # The first token of a part has no context, so it is no target.
        count = np.minimum(span["end"], end[part]) - np.maximum(span["start"], start[part] + 1)
        part, span, count = part[count > 0], span[count > 0], count[count > 0]
        has_targets = np.bincount(part, minlength=len(owner)) > 0
        sums = np.bincount(part, count * span["weight"].astype(np.float64), len(owner))
        sums = sums.astype(np.int64) if (span["weight"] == 1).all() else sums
        columns = (owner + first).astype(np.uint32), start.astype(np.uint32), end - start, sums
        arrays.append([array[has_targets] for array in columns])
        longest_span = max(longest_span, int(count.max(initial=0)))
        counts["longest_read"] = max(counts["longest_read"], int(lengths.max(initial=0)))
        is_truncated = is_long_chat[owner] & ~has_targets
        counts["empty_truncated"] += int(is_truncated.sum())
        counts["empty"] += int((~has_targets & ~is_truncated).sum())
        counts["cut"] += int(is_long_text.sum())
        counts[too_long] += int(is_long_chat.sum())
        if too_long == "error" and is_long_chat.any() and not refused:
            row = documents[np.argmax(is_long_chat)]
            refused = int(row["file"]), int(row["example"]), int(lengths[is_long_chat][0])
    document, first_tokens, lengths, targets = map(np.concatenate, zip(*arrays, strict=True))

    def get(index: int) -> tuple[np.ndarray, np.ndarray]:
        first, spans = store.document(int(document[index]))
        start, length = int(first_tokens[index]), int(lengths[index])
        inside = (
            Span(max(1, begin - start), min(length, end - start), weight)
            for begin, end, weight in spans.tolist()
            if begin < start + length and end > start + 1
        )
        part = Encoded(store.tokens(first + start, first + start + length), tuple(inside))
        return part.ids, part.weights()

    digest = hashlib.sha256(store.fingerprint.encode())
    for array in (document, first_tokens, lengths):
        digest.update(array.tobytes())
    parts = Documents(get, lengths, targets, digest.hexdigest(), "", store, document, longest_span)
    return parts, counts, refused


def _number_within(counts: np.ndarray) -> np.ndarray:
    """Return 0 to n-1 for each n in `counts`, concatenated."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def documents_of(
    store: Store, origin: str, paths: tuple[str, ...], sequence_length: int, too_long: str, reading: Reading
) -> Documents:
    """Return the documents to train from the examples of `paths`, which are in `store`. origin: the store's origin in words.

    `too_long` applies to chats and completions of more than `sequence_length` tokens: `drop`, `truncate` (cut off the end) or `error`.
    Longer texts are cut into pieces so that every token is still a target exactly once.

    Raise UserError for an example that is too long under `error`, and if no target token is left.
    """
    documents, counts, refused = parts_of(store, sequence_length, too_long)
    if refused:
        file, number, length = refused
        from data.formats import read_files  # not needed if the cache has all examples

        where, _ = next(itertools.islice(read_files([expand(paths)[file]], reading), number, None))
        raise UserError(
            f"{where} has {length} tokens, more than data.sequence_length={sequence_length}; increase it, or set data.too_long "
            "to drop or truncate"
        )
    counted = Counter({**store.info["counts"], **counts})
    remarks = remarks_on(store, counted, sequence_length, reading.part)
    if not len(documents):
        if store.info["bad"] and set(+counted) <= {"skipped", "examples"}:  # nothing else was counted
            raise UserError(f"{', '.join(paths)}: every example is malformed; {store.info['bad'][0]}")
        if not store.num_documents and (others := counted["other_part"]):
            raise UserError(
                f"{', '.join(paths)}: data.validation_share={reading.validation_share} leaves no example for {reading.part}, because "
                f"all {others:,} belong to the other part; change it, or set it to 0"
            )
        needs = f"a chat needs an assistant message within data.sequence_length={sequence_length} tokens"
        why = "; ".join(line.strip().rstrip(":") for line in remarks[len(store.info["forms"]) :])
        mend = "; increase data.sequence_length" if counts["drop"] else ""
        raise UserError(f"{', '.join(paths)}: no token carries loss; {needs} ({why}){mend}")
    first = first_line(documents, store.info["files"], counts["cut"], sequence_length)
    return replace(documents, report="\n".join([first, *remarks, origin]))


# Reason -> its line in the report, for examples that were left out or changed.
REMARKS = {
    "drop": "DROPPED {n} longer than {size} (longest {longest})",
    "truncate": "TRUNCATED {n} to {size} (longest {longest})",
    "empty_truncated": "LEFT OUT {n} without a target after they were truncated to {size} tokens",
    "empty": "LEFT OUT {n} without any target",
    "left": "LEFT OUT {n} rows by data.row",
    "repeated": f"REPEATED {{n}} with the content of an earlier example, {BUT_FOR}",
}


def first_line(documents: Documents, files: int, cut: int, sequence_length: int) -> str:
    """Return a report's first line. files: number of files that were read. cut: number of long texts that were cut."""
    lengths, targets = documents.lengths, documents.targets
    tokens, sequences = int(lengths.sum()), len(lengths)
    total = f"{int(targets.sum()):,}" if targets.dtype == np.int64 else f"{targets.sum():,.1f} (by weight)"
    first = (
        f"{sequences:,} example{_s(sequences)} from {files} file{_s(files)}, {tokens:,} tokens "
        f"({tokens / sequences:.0f} per example, longest {lengths.max()}), {total} of them targets"
    )
    pieces = f"cut into pieces of {sequence_length}, each counted as an example"
    return first + (f"; {cut:,} long text{_s(cut)} {pieces}" if cut else "")


def remarks_on(store: Store, counts: Counter, size: int, part: str) -> list[str]:
    """Return a report's lines after the first: the forms of the examples, omissions, and notes.

    counts: number of examples by reason and note. size: data.sequence_length. part: `Reading.part`.
    """
    info = store.info
    parts = list(info["forms"])
    if names := info["left_out"]:
        parts.append(f"LEFT OUT {len(names)} files of another kind: {', '.join(names[:3])}{', ...' * (len(names) > 3)}")
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
