"""Token ids of documents on disk, in any number of shards: the format of both the cache and token stores.

A store is a directory with these files, all little-endian:

- `shard-00000.tokens`: the token ids of its documents end to end, uint16 if the vocabulary fits, else uint32; then a row for
  each document (DOCUMENT), its spans of target tokens (SPAN), the content hashes of examples (HASH), and the CRC-32 of each
  block of `BLOCK` bytes of all these. No document spans two shards.
- `store.json`: the origin of the ids, sizes, and a hash of this content. It is written after every shard, so that an interrupted
  build continues after its last shard.

Documents are stored whole, whatever `data.sequence_length` is: data/examples.py computes the parts to train. A token store
(data/token_store.py) has no spans or hashes: all of its tokens are targets, and it is read as windows (data/sources.py).

A read of any range reads and checks the blocks that it touches: some 30 microseconds for a few thousand tokens. It does not use a
memory map, so that memory does not grow with the bytes that were read, and a file that was cut off raises an error.
"""

import functools
import hashlib
import io
import itertools
import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from common.durable_files import publish, temporary_path, write_json
from common.errors import UserError

FORMAT = 3
STORE_FILE = "store.json"
BLOCK = 2**14  # bytes
# Files that stay open. On a shared disk, an open takes as long as a read, and a single server does all opens.
OPEN = 512
ROWS = 512  # documents per read in a search for one; their rows usually fill a block
SHARD_TOKENS = 2**26  # a shard ends with the document that reaches this size: 128 MiB in uint16
CHECKSUM = np.dtype("<u4")
HASH = np.dtype("<u8")
SPAN = np.dtype([("start", "<u4"), ("end", "<u4"), ("weight", "<f4")])  # counted within the document
# Number of ids and of spans in the shard up to the document's end; number of the source file and of the example in it, counted
# from 0; whether the example is a text.
DOCUMENT = np.dtype([("ids", "<u8"), ("spans", "<u8"), ("file", "<u4"), ("example", "<u4"), ("is_text", "<u4")])
SECTIONS = ("ids", "documents", "spans", "hashes")
REBUILD = "remove its directory and run the same command again; a token store is built by scripts/data.py build"


class Damaged(UserError):
    """A store cannot be used. The cache then builds its entry again."""


def shard_file(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.tokens"


@dataclass(frozen=True, eq=False)
class Shard:
    """One file of a store. counts: the number of rows of each of SECTIONS. data: the file's bytes, for a shard in memory."""

    path: Path
    dtype: np.dtype
    counts: dict[str, int]
    data: bytes | None = field(default=None, repr=False)

    @cached_property
    def starts(self) -> dict[str, int]:
        """The first byte of each section, and of the checksums (`end`)."""
        sizes = [self.counts[name] * self.dtype_of(name).itemsize for name in SECTIONS]
        return dict(zip((*SECTIONS, "end"), accumulate(sizes, initial=0), strict=True))

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self.starts["end"] + CHECKSUM.itemsize * -(-self.starts["end"] // BLOCK)

    def dtype_of(self, section: str) -> np.dtype:
        """Return the type of a section's rows."""
        return {"ids": self.dtype, "documents": DOCUMENT, "spans": SPAN, "hashes": HASH}[section]

    def rows(self, section: str, first: int = 0, end: int | None = None) -> np.ndarray:
        """Return the rows `first` to `end` (exclusive) of a section. Raise Damaged if their checksums are wrong."""
        dtype = self.dtype_of(section)
        end = self.counts[section] if end is None else end
        start = self.starts[section] + first * dtype.itemsize
        return np.frombuffer(self._checked(start, (end - first) * dtype.itemsize), dtype)

    def verify(self, start: int = 0) -> None:
        """Read the whole shard from byte `start` on. Raise Damaged if any checksum is wrong."""
        for first in range(start, self.starts["end"], 64 * BLOCK):
            self._checked(first, min(64 * BLOCK, self.starts["end"] - first))

    def digest(self) -> str:
        """Return the hash of the ids and spans of all documents."""
        digest = hashlib.sha256()
        for first in range(0, self.counts["ids"], 2**20):
            digest.update(self.rows("ids", first, min(first + 2**20, self.counts["ids"])).tobytes())
        documents = self.rows("documents")
        for part in (documents["ids"], documents["spans"], self.rows("spans")):
            digest.update(part.tobytes())
        return digest.hexdigest()

    def _checked(self, start: int, count: int) -> bytes:
        if self.data is not None:
            return self.data[start : start + count]
        block, end = start // BLOCK, -(-(start + count) // BLOCK)
        length = min(end * BLOCK, self.starts["end"]) - block * BLOCK
        try:
            data = _read(self, block * BLOCK, length)
            sums = _read(self, self.starts["end"] + CHECKSUM.itemsize * block, CHECKSUM.itemsize * (end - block))
        except OSError as error:
            raise Damaged(f"{self.path} cannot be read: {error.strerror}; {REBUILD}") from error
        if len(data) != length or len(sums) != CHECKSUM.itemsize * (end - block):
            raise Damaged(f"{self.path} is damaged: it has become shorter; {REBUILD}")
        for first, checksum in zip(range(0, length, BLOCK), np.frombuffer(sums, CHECKSUM).tolist(), strict=True):
            if zlib.crc32(memoryview(data)[first : first + BLOCK]) != checksum:
                where = f"its bytes from {block * BLOCK + first:,} on are not those that were written"
                raise Damaged(f"{self.path} is damaged: {where}; {REBUILD}")
        return data[start - block * BLOCK : start - block * BLOCK + count]


@functools.lru_cache(maxsize=OPEN)
def _opened(shard: Shard) -> BinaryIO:
    return open(shard.path, "rb", buffering=0)


def _read(shard: Shard, start: int, count: int) -> bytes:
    """Return `count` bytes of a shard's file from `start` on; fewer at its end. Thread-safe, because no position is moved."""
    file, data = _opened(shard), b""
    while more := os.pread(file.fileno(), count - len(data), start + len(data)):
        data = data + more if data else more
    return data


@dataclass(frozen=True)
class Store:
    """The documents of all shards, numbered from 0 to `num_documents`, and their tokens, numbered end to end.

    Reads have no side effects, so any thread and any process with a copy may read.
    """

    path: Path
    info: dict = field(repr=False)
    shards: tuple[Shard, ...] = field(repr=False)
    in_use: BinaryIO | None = field(default=None, repr=False)  # while this file is open, the cache keeps the store

    @cached_property
    def token_starts(self) -> list[int]:
        """The number of each shard's first token, and the number of all tokens."""
        return list(accumulate((shard.counts["ids"] for shard in self.shards), initial=0))

    @cached_property
    def document_starts(self) -> list[int]:
        """The number of each shard's first document, and the number of all documents."""
        return list(accumulate((shard.counts["documents"] for shard in self.shards), initial=0))

    @property
    def num_tokens(self) -> int:
        return self.token_starts[-1]

    @property
    def num_documents(self) -> int:
        return self.document_starts[-1]

    @property
    def highest(self) -> int:
        """The highest token id."""
        return max((shard["highest"] for shard in self.info["shards"]), default=0)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all ids, document ends and spans in order. The names of the source files do not matter."""
        content = [self.info["dtype"], *(shard["digest"] for shard in self.info["shards"])]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Return the token ids number `begin` to `end` (exclusive), int64."""
        ids = np.empty(end - begin, dtype=np.int64)
        for shard, first, last in self.parts(begin, end):
            start = self.token_starts[shard]
            ids[first - begin : last - begin] = self.shards[shard].rows("ids", first - start, last - start)
        return ids

    def document(self, index: int) -> tuple[int, np.ndarray]:
        """Return (number of its first token, its SPAN rows) for a document."""
        number = bisect_right(self.document_starts, index) - 1
        shard, row = self.shards[number], index - self.document_starts[number]
        rows = shard.rows("documents", max(0, row - 1), row + 1)
        begin, first = (int(rows[0]["ids"]), int(rows[0]["spans"])) if row else (0, 0)
        return self.token_starts[number] + begin, shard.rows("spans", first, int(rows[-1]["spans"]))

    def hashes(self) -> np.ndarray:
        """Return the content hash of each example (data/held_out.py), uint64 `(examples,)`."""
        return np.concatenate([np.zeros(0, HASH), *(shard.rows("hashes") for shard in self.shards)])

    def ends_between(self, begin: int, end: int) -> list[int]:
        """Return the ends of the documents above token `begin` and up to token `end`."""
        return [
            self.token_starts[shard] + end_in_shard
            for shard, first, last in self.parts(begin, end)
            for end_in_shard in self._ends_in(shard, first - self.token_starts[shard], last - self.token_starts[shard])
        ]

    def parts(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """Return (shard, first, end) for each shard with tokens from `begin` to `end`."""
        parts = []
        shard = bisect_right(self.token_starts, begin) - 1
        while begin < end:
            last = min(end, self.token_starts[shard + 1])
            parts.append((shard, begin, last))
            begin, shard = last, shard + 1
        return parts

    def _ends_in(self, number: int, first: int, last: int) -> list[int]:
        """Return the document ends above the token `first` of a shard and up to `last`.

        Interpolation search needs two or three reads if documents have similar lengths.
        """
        shard = self.shards[number]
        count = shard.counts["documents"]

        def ends(row: int) -> np.ndarray:
            return shard.rows("documents", row, min(count, row + ROWS))["ids"].astype(np.int64)

        # The first such end is in the rows `low` to `high`. The document before `low` ends at `below`, document `high` at `above`.
        low, high, below, above = 0, count, 0, shard.counts["ids"]
        for turn in itertools.count(1):
            guess = low + (high - low) * (first - below) // (above - below)
            guess = (low + high) // 2 if turn % 3 == 0 else guess  # bisect every third time
            begin = max(low, min(guess - ROWS // 2, high - ROWS))
            rows_read = ends(begin)
            if rows_read[-1] <= first:
                low, below = begin + len(rows_read), int(rows_read[-1])
            elif rows_read[0] > first and begin > low:
                high, above = begin, int(rows_read[0])
            else:
                break
        begin, rows_read = begin + len(rows_read), rows_read[rows_read > first]
        while rows_read[-1] <= last and begin < count:
            more = ends(begin)
            begin, rows_read = begin + len(more), np.concatenate([rows_read, more])
        return rows_read[rows_read <= last].tolist()


class StoreWriter:
    """Writes a store into the directory `folder`, which need not be empty, or into memory if `folder` is None.

    `store.json` begins with `info`. If an earlier build with the same `info` was interrupted, the writer continues after its last
    shard. Ids are written to the current shard's file as they come, so memory does not grow with them. As a context manager it
    closes that file.
    """

    def __init__(self, folder: Path | None, info: dict, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder = folder
        self.info = info | {"format": FORMAT, "complete": False, "shard_tokens": shard_tokens, "shards": []}
        self.dtype = np.dtype(info["dtype"])
        self.shards: list[Shard] = []  # written by this writer
        if folder and is_store(folder):
            self.info["shards"] = read_info(folder)["shards"]
        self._begin()

    @property
    def next(self) -> tuple[int, int]:
        """(file, example) where an interrupted build continues."""
        return tuple(self.info["shards"][-1]["next"]) if self.info["shards"] else (0, 0)

    def add(
        self,
        ids: np.ndarray,
        spans: Iterable[tuple[int, int, float]] = (),
        file: int = 0,
        example: int = 0,
        is_text: bool = True,
    ) -> None:
        """Append a document, and end the shard if it is full."""
        self.file.write(ids.astype(self.dtype).tobytes())
        self.counts["ids"] += len(ids)
        self._append("spans", np.array([tuple(span) for span in spans], SPAN))
        row = (self.counts["ids"], self.counts["spans"], file, example, is_text)
        self._append("documents", np.array([row], DOCUMENT))
        self.highest, self.at = max(self.highest, int(ids.max(initial=0))), [file, example + 1]
        if self.counts["ids"] >= self.info["shard_tokens"]:
            self.end_shard()

    def add_hash(self, key: int) -> None:
        """Append the content hash of an example."""
        self._append("hashes", np.array([key], HASH))

    def end_shard(self) -> None:
        """Complete the current shard and give it its final name; do nothing if it is empty."""
        if not any(self.counts.values()):
            return
        with self.file as file:
            for rows in self.rows.values():
                file.write(rows)
            file.seek(0)
            checksums = [zlib.crc32(block) for block in iter(lambda: file.read(BLOCK), b"")]
            file.write(np.array(checksums, CHECKSUM).tobytes())
            data = file.getvalue() if isinstance(file, io.BytesIO) else None
        if self.folder:
            publish(self.path)
        self.shards.append(Shard(self.path, self.dtype, self.counts, data))
        shard_info = {"digest": self.shards[-1].digest(), "highest": self.highest, "next": self.at}
        self.info["shards"].append(self.counts | shard_info)
        self._begin()

    def finish(self, info: dict) -> Store:
        """Complete the store. `info` is added to `store.json`."""
        self.end_shard()
        self.close()
        self.info |= info | {"complete": True}
        if not self.folder:
            return Store(Path(), self.info, tuple(self.shards))
        self._write_info()
        return open_store(self.folder)

    def close(self) -> None:
        """Close the file of the incomplete current shard and remove it. A second call does nothing."""
        if self.folder:
            temporary_path(self.path).unlink(missing_ok=True)
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _append(self, section: str, rows: np.ndarray) -> None:
        self.rows[section] += rows.tobytes()
        self.counts[section] += len(rows)

    def _begin(self) -> None:
        self.rows = {name: bytearray() for name in SECTIONS[1:]}  # ids go to the file at once
        self.counts: dict[str, int] = dict.fromkeys(SECTIONS, 0)
        self.highest, self.at = 0, [0, 0]  # `at`: (file, example) that comes next
        self._write_info()  # before any shard, because a directory of other files without store.json is refused
        self.path = (self.folder or Path()) / shard_file(len(self.info["shards"]))
        self.file = temporary_path(self.path).open("w+b", buffering=2**20) if self.folder else io.BytesIO()

    def _write_info(self) -> None:
        if self.folder:
            write_json(self.folder / STORE_FILE, self.info | {"digest": _digest_of_info(self.info)})


def read_info(path: Path) -> dict:
    """Return the content of `store.json`, complete or not. Raise Damaged, or FileNotFoundError if there is none."""
    text = (path / STORE_FILE).read_bytes()
    try:
        info = json.loads(text)
        version = info["format"]
        digest = info.pop("digest", None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path / STORE_FILE} is damaged ({error!r}); {REBUILD}") from error
    if version != FORMAT:
        raise Damaged(f"the store {path} has format {version}, but this version reads format {FORMAT}; {REBUILD}")
    if digest != _digest_of_info(info):
        raise Damaged(f"{path / STORE_FILE} is not what was written; {REBUILD}")
    return info


def open_store(path: Path, in_use: BinaryIO | None = None) -> Store:
    """Open a complete store and check its file sizes. Raise Damaged, or FileNotFoundError if there is none."""
    info = read_info(path)
    if not info["complete"]:
        raise UserError(
            f"the token store {path} is incomplete; run the same scripts/data.py build command again to finish it"
        )
    dtype = np.dtype(info["dtype"])
    shards = [Shard(path / shard_file(i), dtype, {k: s[k] for k in SECTIONS}) for i, s in enumerate(info["shards"])]
    for shard in shards:
        if not shard.path.is_file():
            raise Damaged(f"{shard.path} is missing; {REBUILD}")
        if (size := shard.path.stat().st_size) != shard.size:
            raise Damaged(f"{shard.path} has {size} bytes instead of {shard.size}; {REBUILD}")
    return Store(path, info, tuple(shards), in_use)


def is_store(path: str | Path) -> bool:
    """Return whether a path is the directory of a store, complete or not."""
    return (Path(path) / STORE_FILE).is_file()


def _digest_of_info(info: dict) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()
