"""Encoded examples in a few arrays, on disk or in memory: the content of data/examples.py's `Documents`.

An entry on disk is a directory with these files, all little-endian:

- `ids`: token ids of all sequences end to end, uint16 if the vocabulary fits, else uint32;
- `spans`: (start, end, weight) of each span of target tokens, uint32, uint32 and float32;
- `documents`: for each sequence, the numbers of token ids and of spans up to its end, uint64;
- `lengths`, `targets`: for each sequence its number of tokens (int64) and the sum of its weights (int64, or float64 if a
  weight is not 1);
- `hashes`: for each example that was read its `content_hash` (data/held_out.py), uint64;
- `checksums`: the CRC-32 of each block of these files (data/checked_file.py), in this order;
- `examples.json`: dtype, sizes, hash of the content, what the report says, the name of the entry that this is, and a hash of
  all of this. It is written last.

Every process maps `lengths` and `targets`, which planning needs, and reads the rest a sequence at a time.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast, overload

import numpy as np

from common.durable_files import write_json
from common.errors import UserError
from data.checked_file import BytesInMemory, CheckedFile, CheckedWriter, num_blocks

FORMAT = 2
ENTRY_FILE = "examples.json"
CHECKSUMS_FILE = "checksums"
SPAN = np.dtype([("start", "<u4"), ("end", "<u4"), ("weight", "<f4")])
DOCUMENT = np.dtype([("ids", "<u8"), ("spans", "<u8")])
HASH = np.dtype("<u8")
NAMES = ("ids", "spans", "documents", "lengths", "targets", "hashes")
VERIFIED = 2**28  # bytes: an entry up to this size is read in full when it is opened, which takes about 0.2 s


class DamagedEntry(Exception):
    """An entry on disk that cannot be used. The message says why, without a mend: it is built again."""


@dataclass
class Sequences:
    """Encoded sequences end to end.

    ids: `(tokens,)`. lengths, span_counts: int64 `(sequences,)`. spans: SPAN `(spans,)`, counted within their sequence.
    """

    ids: np.ndarray
    lengths: np.ndarray
    spans: np.ndarray
    span_counts: np.ndarray


@dataclass(frozen=True)
class ExampleStore:
    """Encoded sequences, read one at a time."""

    dtype: np.dtype
    parts: dict[str, CheckedFile | BytesInMemory] = field(repr=False)
    lengths: np.ndarray = field(repr=False)
    targets: np.ndarray = field(repr=False)
    info: dict

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, index: int) -> np.ndarray:
        """Token ids of a sequence, int64 `(length,)`."""
        (start, end), _ = self._bounds(index)
        return self._read("ids", self.dtype, start, end).astype(np.int64)

    def weights(self, index: int) -> np.ndarray:
        """Weight of each token of a sequence `(length,)`: bool if all are 0 or 1, otherwise float32."""
        _, (start, end) = self._bounds(index)
        spans = self._read("spans", SPAN, start, end)
        is_plain = bool((spans["weight"] == 1).all())
        weights = np.zeros(int(self.lengths[index]), dtype=bool if is_plain else np.float32)
        for first, last, weight in spans.tolist():
            weights[first:last] = weight
        return weights

    def hashes(self) -> np.ndarray:
        """Content hash of each example, uint64 `(examples,)`."""
        return self._read("hashes", HASH, 0, self.info["sizes"]["hashes"] // HASH.itemsize)

    def longest_span(self) -> int:
        """Tokens of the longest span of targets, 0 without any: of an answer with the token that ends it."""
        spans = self._read("spans", SPAN, 0, self.info["sizes"]["spans"] // SPAN.itemsize)
        return int((spans["end"].astype(np.int64) - spans["start"]).max(initial=0))

    def _bounds(self, index: int) -> tuple[tuple[int, int], tuple[int, int]]:
        before = max(0, index - 1)
        rows = self._read("documents", DOCUMENT, before, index + 1)
        first = rows[0] if index else np.zeros((), DOCUMENT)
        return (int(first["ids"]), int(rows[-1]["ids"])), (int(first["spans"]), int(rows[-1]["spans"]))

    def _read(self, name: str, dtype: np.dtype, start: int, end: int) -> np.ndarray:
        return np.frombuffer(self.parts[name].read(start * dtype.itemsize, (end - start) * dtype.itemsize), dtype)


class StoredSequence(Sequence):
    """The ids or the weights of all sequences of a store, read when they are asked for."""

    def __init__(self, store: ExampleStore, name: str) -> None:
        self._store = store
        self._read = store.ids if name == "ids" else store.weights

    def __len__(self) -> int:
        return len(self._store)

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


class ExampleWriter:
    """Writes a store, into the directory `folder` or, if it is None, into memory."""

    def __init__(self, folder: Path | None, dtype: np.dtype) -> None:
        self.folder = folder
        self.dtype = dtype
        self.streams = {name: (folder / name).open("wb") if folder else io.BytesIO() for name in NAMES}
        self.writers = {name: CheckedWriter(stream) for name, stream in self.streams.items()}
        self.num_ids = self.num_spans = self.num_sequences = 0
        self.highest = 0  # token id
        self.longest = 0  # sequence, in tokens
        self._weighted = False  # a weight is not 1, so that `targets` is float64

    def add(self, sequences: Sequences) -> None:
        """Append sequences."""
        if not len(sequences.lengths):
            return
        ends = np.empty(len(sequences.lengths), DOCUMENT)
        ends["ids"] = self.num_ids + np.cumsum(sequences.lengths)
        ends["spans"] = self.num_spans + np.cumsum(sequences.span_counts)
        self.num_ids, self.num_spans = int(ends["ids"][-1]), int(ends["spans"][-1])
        self.num_sequences += len(ends)
        self.highest = max(self.highest, int(sequences.ids.max()))
        self.longest = max(self.longest, int(sequences.lengths.max()))
        self._weighted = self._weighted or bool((sequences.spans["weight"] != 1).any())
        self.writers["ids"].write(sequences.ids.astype(self.dtype, copy=False))
        self.writers["spans"].write(sequences.spans)
        self.writers["documents"].write(ends)
        self.writers["lengths"].write(sequences.lengths.astype("<i8", copy=False))
        self.writers["targets"].write(num_targets(sequences))

    def add_hashes(self, hashes: np.ndarray) -> None:
        """Append the content hashes of examples, uint64."""
        self.writers["hashes"].write(hashes.astype(HASH, copy=False))

    def read_hashes(self) -> np.ndarray:
        """The content hashes written so far, uint64."""
        return np.frombuffer(self._written("hashes"), HASH)

    def finish(self, info: dict) -> ExampleStore:
        """Complete the store. `info` goes into `examples.json`, with what this class has counted."""
        names = [name for name in NAMES if name != "targets"]
        targets = self._targets()
        content = [self.dtype.str, *(self.writers[name].digest.hexdigest() for name in names if name != "hashes")]
        info = info | {
            "format": FORMAT,
            "dtype": self.dtype.str,
            "targets_dtype": targets.dtype.str,
            "sizes": {name: writer.size for name, writer in self.writers.items()},
            "fingerprint": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
            "sequences": self.num_sequences,
            "tokens": self.num_ids,
            "targets": float(targets.sum()) if self._weighted else int(targets.sum()),
            "highest": self.highest,
            "longest": self.longest,
        }
        if not self.folder:
            parts = {name: BytesInMemory(self._written(name)) for name in NAMES}
            return ExampleStore(self.dtype, dict(parts), np.frombuffer(parts["lengths"].data, "<i8"), targets, info)
        info["entry"] = self.folder.name.partition(".")[0]  # without what makes the name a temporary one
        checksums = np.concatenate([self.writers[name].checksums() for name in NAMES])
        (self.folder / CHECKSUMS_FILE).write_bytes(checksums.tobytes())
        self.close()
        write_json(self.folder / ENTRY_FILE, info | {"digest": _digest(info)})
        return open_entry(self.folder)

    def close(self) -> None:
        """Close the files. Closing twice is a no-op."""
        for stream in self.streams.values():
            stream.close()

    def _written(self, name: str) -> bytes:
        stream = self.streams[name]
        stream.flush()
        return stream.getvalue() if isinstance(stream, io.BytesIO) else (cast(Path, self.folder) / name).read_bytes()

    def _targets(self) -> np.ndarray:
        """The sums of weights. They were written as float64; if all weights are 1, they become int64."""
        stream = self.streams["targets"]
        sums = np.frombuffer(self._written("targets"), "<f8")
        if self._weighted:
            return sums
        whole = sums.astype("<i8")
        stream.seek(0)
        self.writers["targets"] = CheckedWriter(stream)
        self.writers["targets"].write(whole)
        return whole


def num_targets(sequences: Sequences) -> np.ndarray:
    """The sum of the weights of each sequence, float64 `(sequences,)`."""
    spans = sequences.spans
    sums = (spans["end"].astype(np.int64) - spans["start"]) * spans["weight"].astype(np.float64)
    owner = np.repeat(np.arange(len(sequences.lengths)), sequences.span_counts)
    return np.bincount(owner, weights=sums, minlength=len(sequences.lengths)).astype("<f8")


def open_entry(folder: Path) -> ExampleStore:
    """Open an entry on disk. Raises DamagedEntry, and FileNotFoundError if there is none.

    A small entry is checked in full. Of a large one the arrays that planning needs are checked, and the rest when it is
    read.
    """
    text = (folder / ENTRY_FILE).read_bytes()
    try:
        info = json.loads(text)
        if info["format"] != FORMAT:
            raise DamagedEntry(f"it has format {info['format']} instead of {FORMAT}")
        if info.pop("digest") != _digest(info):
            raise DamagedEntry(f"{ENTRY_FILE} is not what was written")
        sizes = {name: int(info["sizes"][name]) for name in NAMES}
        dtype, targets_dtype = np.dtype(info["dtype"]), np.dtype(info["targets_dtype"])
        mend = f"remove {folder} and run the same command again"
        parts, first = {}, 0
        for name, size in sizes.items():
            parts[name] = CheckedFile(folder / name, size, folder / CHECKSUMS_FILE, first, mend)
            first += num_blocks(size)
        is_small = sum(sizes.values()) <= VERIFIED
        for name, part in parts.items():
            if is_small or name in ("lengths", "targets"):
                part.verify()
            elif part.path.stat().st_size != part.size:
                raise DamagedEntry(f"{name} has another size")
        lengths = _mapped(folder / "lengths", np.dtype("<i8"), sizes["lengths"])
        targets = _mapped(folder / "targets", targets_dtype, sizes["targets"])
    except (ValueError, KeyError, TypeError, OSError, UserError) as error:
        raise DamagedEntry(str(error).removesuffix(f"; remove {folder} and run the same command again")) from error
    return ExampleStore(dtype, parts, lengths, targets, info)


def _digest(info: dict) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()


def _mapped(path: Path, dtype: np.dtype, size: int) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, "r")) if size else np.zeros(0, dtype)
