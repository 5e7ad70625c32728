"""Token ids of documents on disk, in any number of shards: the one format of the cache and of token stores.

A store is a directory with these files, all little-endian:

- `shard-00000.tokens`: the token ids of its documents end to end, uint16 if the vocabulary fits, else uint32; then a row for
  each document (DOCUMENT), its spans of target tokens (SPAN), the content hashes of examples (HASH), and the CRC-32 of each
  block of `BLOCK` bytes of all this. No document spans two shards.
- `store.json`: what the ids were made from, sizes, and a hash of all of this. It is written after every shard, so that a
  build that was interrupted goes on after the last one.

Documents are whole, whatever `data.sequence_length` is: data/examples.py computes what is trained of each. A token store
(data/token_store.py) has no spans or hashes: all of its tokens are targets, and it is read as windows (data/sources.py).

Reading any range reads and checks the blocks that it touches: some 30 microseconds for a few thousand tokens. It is not by a
memory map: memory does not grow with what was read, and a file that was cut off raises an error.
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
OPEN = 512  # files that stay open: on a disk of another machine an open takes as long as a read, and one server does them all
ROWS = 512  # documents that are read at a time in search of one: a block, as a rule
SHARD_TOKENS = 2**26  # a shard is complete with the document that reaches this size: 128 MiB in uint16
CHECKSUM = np.dtype("<u4")
HASH = np.dtype("<u8")
SPAN = np.dtype([("start", "<u4"), ("end", "<u4"), ("weight", "<f4")])  # counted within the document
# The numbers of ids and of spans in the shard up to the document's end; the file it is from and which of its examples it is,
# counted from 0; whether the example is a text.
DOCUMENT = np.dtype([("ids", "<u8"), ("spans", "<u8"), ("file", "<u4"), ("example", "<u4"), ("is_text", "<u4")])
SECTIONS = ("ids", "documents", "spans", "hashes")
REBUILD = "remove its directory and run the same command again; a token store is built by scripts/data.py build"


class Damaged(UserError):
    """A store that cannot be used. The cache builds its entries again."""


def shard_file(number: int) -> str:
    """Name of the file of a shard."""
    return f"shard-{number:05d}.tokens"


@dataclass(frozen=True, eq=False)
class Shard:
    """One file of a store. counts: the number of rows of each of SECTIONS. data: the file's bytes, if it is not on disk."""

    path: Path
    dtype: np.dtype
    counts: dict[str, int]
    data: bytes | None = field(default=None, repr=False)

    @cached_property
    def starts(self) -> dict[str, int]:
        """Where each section begins, in bytes, and `end`, where the checksums begin."""
        sizes = [self.counts[name] * self.dtype_of(name).itemsize for name in SECTIONS]
        return dict(zip((*SECTIONS, "end"), accumulate(sizes, initial=0), strict=True))

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.starts["end"] + CHECKSUM.itemsize * -(-self.starts["end"] // BLOCK)

    def dtype_of(self, section: str) -> np.dtype:
        """The type of a row of a section."""
        return {"ids": self.dtype, "documents": DOCUMENT, "spans": SPAN, "hashes": HASH}[section]

    def rows(self, section: str, first: int = 0, end: int | None = None) -> np.ndarray:
        """The rows `first` to `end` (exclusive) of a section. Raises Damaged if they are not those that were written."""
        dtype = self.dtype_of(section)
        end = self.counts[section] if end is None else end
        start = self.starts[section] + first * dtype.itemsize
        return np.frombuffer(self._checked(start, (end - first) * dtype.itemsize), dtype)

    def verify(self, start: int = 0) -> None:
        """Read all of it from byte `start` on. Raises Damaged if anything is not what was written."""
        for first in range(start, self.starts["end"], 64 * BLOCK):
            self._checked(first, min(64 * BLOCK, self.starts["end"] - first))

    def digest(self) -> str:
        """The hash of the ids and spans of all documents."""
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
        for first, wanted in zip(range(0, length, BLOCK), np.frombuffer(sums, CHECKSUM).tolist(), strict=True):
            if zlib.crc32(memoryview(data)[first : first + BLOCK]) != wanted:
                where = f"its bytes from {block * BLOCK + first:,} on are not those that were written"
                raise Damaged(f"{self.path} is damaged: {where}; {REBUILD}")
        return data[start - block * BLOCK : start - block * BLOCK + count]


@functools.lru_cache(maxsize=OPEN)
def _opened(shard: Shard) -> BinaryIO:
    return open(shard.path, "rb", buffering=0)


def _read(shard: Shard, start: int, count: int) -> bytes:
    """`count` bytes of a shard's file from `start` on; fewer at its end. Any thread may read, for no position is moved."""
    file, data = _opened(shard), b""
    while more := os.pread(file.fileno(), count - len(data), start + len(data)):
        data = data + more if data else more
    return data


@dataclass(frozen=True)
class Store:
    """The documents of all shards, numbered from 0 to `num_documents`, and their tokens, numbered end to end.

    Reading has no side effects, so any thread and any process with a copy may read it.
    """

    path: Path
    info: dict = field(repr=False)
    shards: tuple[Shard, ...] = field(repr=False)
    in_use: BinaryIO | None = field(default=None, repr=False)  # while it is open, the cache does not remove the store

    @cached_property
    def token_starts(self) -> list[int]:
        """The number of the first token of each shard, and the number of all tokens."""
        return list(accumulate((shard.counts["ids"] for shard in self.shards), initial=0))

    @cached_property
    def document_starts(self) -> list[int]:
        """The number of the first document of each shard, and the number of all documents."""
        return list(accumulate((shard.counts["documents"] for shard in self.shards), initial=0))

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents."""
        return self.token_starts[-1]

    @property
    def num_documents(self) -> int:
        """Number of documents."""
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
        """The token ids number `begin` to `end` (exclusive), int64."""
        ids = np.empty(end - begin, dtype=np.int64)
        for shard, first, last in self.parts(begin, end):
            start = self.token_starts[shard]
            ids[first - begin : last - begin] = self.shards[shard].rows("ids", first - start, last - start)
        return ids

    def document(self, index: int) -> tuple[int, np.ndarray]:
        """(number of its first token, its SPAN rows) of a document."""
        number = bisect_right(self.document_starts, index) - 1
        shard, row = self.shards[number], index - self.document_starts[number]
        rows = shard.rows("documents", max(0, row - 1), row + 1)
        begin, first = (int(rows[0]["ids"]), int(rows[0]["spans"])) if row else (0, 0)
        return self.token_starts[number] + begin, shard.rows("spans", first, int(rows[-1]["spans"]))

    def hashes(self) -> np.ndarray:
        """Content hash of each example that was read (data/held_out.py), uint64 `(examples,)`."""
        return np.concatenate([np.zeros(0, HASH), *(shard.rows("hashes") for shard in self.shards)])

    def ends_between(self, begin: int, end: int) -> list[int]:
        """The ends of the documents above token `begin` and up to token `end`."""
        return [
            self.token_starts[shard] + found
            for shard, first, last in self.parts(begin, end)
            for found in self._ends_in(shard, first - self.token_starts[shard], last - self.token_starts[shard])
        ]

    def parts(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """(shard, first, end) for each shard with tokens from `begin` to `end`."""
        parts = []
        shard = bisect_right(self.token_starts, begin) - 1
        while begin < end:
            last = min(end, self.token_starts[shard + 1])
            parts.append((shard, begin, last))
            begin, shard = last, shard + 1
        return parts

    def _ends_in(self, number: int, first: int, last: int) -> list[int]:
        """The ends above the token `first` of a shard and up to `last`. Two or three reads find them where documents are alike."""
        shard = self.shards[number]
        count = shard.counts["documents"]

        def ends(row: int) -> np.ndarray:
            return shard.rows("documents", row, min(count, row + ROWS))["ids"].astype(np.int64)

        # The first such end is in the rows `low` to `high`; the document before `low` ends at `below`, that of `high` at `above`.
        low, high, below, above = 0, count, 0, shard.counts["ids"]
        for turn in itertools.count(1):
            guess = low + (high - low) * (first - below) // (above - below)
            guess = (low + high) // 2 if turn % 3 == 0 else guess  # where they are not alike
            begin = max(low, min(guess - ROWS // 2, high - ROWS))
            found = ends(begin)
            if found[-1] <= first:
                low, below = begin + len(found), int(found[-1])
            elif found[0] > first and begin > low:
                high, above = begin, int(found[0])
            else:
                break
        begin, found = begin + len(found), found[found > first]
        while found[-1] <= last and begin < count:
            more = ends(begin)
            begin, found = begin + len(more), np.concatenate([found, more])
        return found[found <= last].tolist()


class StoreWriter:
    """Writes a store into the directory `folder`, which need not be empty, or into memory if it is None.

    `info` begins `store.json`. If an earlier build with the same `info` was interrupted, it goes on after its last shard. The
    ids go into the file of the current shard as they come, so that memory does not grow with them. It is a context manager,
    which closes that file.
    """

    def __init__(self, folder: Path | None, info: dict, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder = folder
        self.info = info | {"format": FORMAT, "complete": False, "shard_tokens": shard_tokens, "shards": []}
        self.dtype = np.dtype(info["dtype"])
        self.shards: list[Shard] = []  # those that were written
        if folder and is_store(folder):
            self.info["shards"] = read_info(folder)["shards"]
        self._begin()

    @property
    def next(self) -> tuple[int, int]:
        """(file, example) where an interrupted build goes on."""
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
        """Complete the current shard and give it its name; a no-op if it is empty."""
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
        of_shard = {"digest": self.shards[-1].digest(), "highest": self.highest, "next": self.at}
        self.info["shards"].append(self.counts | of_shard)
        self._begin()

    def finish(self, info: dict) -> Store:
        """Complete the store; `info` is added to `store.json`."""
        self.end_shard()
        self.close()
        self.info |= info | {"complete": True}
        if not self.folder:
            return Store(Path(), self.info, tuple(self.shards))
        self._write_info()
        return open_store(self.folder)

    def close(self) -> None:
        """Close the file of the current shard and remove it, because it is not complete. Closing twice is a no-op."""
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
        self.rows = {name: bytearray() for name in SECTIONS[1:]}  # the ids are in the file
        self.counts: dict[str, int] = dict.fromkeys(SECTIONS, 0)
        self.highest, self.at = 0, [0, 0]  # `at`: (file, example) of what comes next
        self._write_info()  # first: a directory with other files and without it is no store
        self.path = (self.folder or Path()) / shard_file(len(self.info["shards"]))
        self.file = temporary_path(self.path).open("w+b", buffering=2**20) if self.folder else io.BytesIO()

    def _write_info(self) -> None:
        if self.folder:
            write_json(self.folder / STORE_FILE, self.info | {"digest": _digest_of_info(self.info)})


def read_info(path: Path) -> dict:
    """The content of `store.json`, complete or not. Raises Damaged, and FileNotFoundError if there is none."""
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
    """Open a complete store, checking the sizes of its files. Raises Damaged, and FileNotFoundError if there is none."""
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
    """Whether a path is the directory of a store, complete or not."""
    return (Path(path) / STORE_FILE).is_file()


def _digest_of_info(info: dict) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()
