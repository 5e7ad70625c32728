"""Files of numbers that are read in part, each part with its checksum, so that damage on disk never becomes data.

A file has a CRC-32 for each block of `BLOCK` bytes, kept in another file. Reading any range reads and checks the blocks
that it touches: about 20 microseconds for a few thousand tokens. Reading is by `pread`, not by a memory map: resident
memory does not grow with what was read, and a file that was cut off raises an error instead of ending the process.
"""

import hashlib
import os
import zlib
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.cores import available_cores
from common.errors import UserError

BLOCK = 2**14  # bytes
CHECKSUM = np.dtype("<u4")


class CheckedWriter:
    """Appends to a file, and computes the checksum of each block and the hash of everything."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.digest = hashlib.sha256()
        self._checksums = array("I")
        self._unfinished, self._room = 0, BLOCK  # the CRC of the last block so far, and the bytes that it lacks

    def write(self, values: np.ndarray) -> None:
        """Append the bytes of an array."""
        data = memoryview(values.tobytes())
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)
        while data:
            part, data = data[: self._room], data[self._room :]
            self._unfinished = zlib.crc32(part, self._unfinished)
            self._room -= len(part)
            if not self._room:
                self._checksums.append(self._unfinished)
                self._unfinished, self._room = 0, BLOCK

    def checksums(self) -> np.ndarray:
        """The checksums of all blocks, the last and shorter one included."""
        last = [self._unfinished] if self._room < BLOCK else []
        return np.array([*self._checksums, *last], dtype=CHECKSUM)


@dataclass(frozen=True)
class CheckedFile:
    """A file of `size` bytes whose checksums begin at number `first` of the file `checksums`."""

    path: Path
    size: int
    checksums: Path
    first: int
    mend: str = field(repr=False)  # what to do about damage: the end of the error's sentence

    def read(self, start: int, count: int) -> bytes:
        """`count` bytes from `start` on. Raises UserError if a block of them is damaged or the file cannot be read."""
        if count <= 0:
            return b""
        if start < 0 or start + count > self.size:
            raise UserError(f"{self.path} is damaged: it is read outside its {self.size} bytes; {self.mend}")
        block, end = start // BLOCK, -(-(start + count) // BLOCK)
        try:
            data = _pread(self.path, block * BLOCK, min(end * BLOCK, self.size) - block * BLOCK)
            sums = _pread(self.checksums, 4 * (self.first + block), 4 * (end - block))
        except OSError as error:
            raise UserError(f"{error.filename or self.path} cannot be read: {error.strerror}; {self.mend}") from error
        if len(data) != min(end * BLOCK, self.size) - block * BLOCK or len(sums) != CHECKSUM.itemsize * (end - block):
            raise UserError(f"{self.path} is damaged: it has become shorter; {self.mend}")
        view = memoryview(data)
        for number, wanted in enumerate(np.frombuffer(sums, CHECKSUM).tolist()):
            if zlib.crc32(view[number * BLOCK : (number + 1) * BLOCK]) != wanted:
                where = (block + number) * BLOCK
                raise UserError(
                    f"{self.path} is damaged: its bytes from {where:,} on are not those that were written; {self.mend}"
                )
        return data[start - block * BLOCK : start - block * BLOCK + count]

    def verify(self) -> None:
        """Read all of it. Raises UserError if anything is damaged."""
        if self.path.stat().st_size != self.size:
            raise UserError(f"{self.path} has {self.path.stat().st_size} bytes instead of {self.size}; {self.mend}")
        for start in range(0, self.size, 64 * BLOCK):
            self.read(start, min(64 * BLOCK, self.size - start))


@dataclass(frozen=True)
class BytesInMemory:
    """The same interface for what is not on disk."""

    data: bytes = field(repr=False)

    def read(self, start: int, count: int) -> bytes:
        """`count` bytes from `start` on."""
        return self.data[start : start + count]

    def verify(self) -> None:
        """Nothing to check."""


def hash_files(files: Sequence[Path]) -> list[str]:
    """The hash of each file's content, BLAKE2b in hexadecimal digits. Reads several files at once, 1 GB/s per core."""

    def hash_file(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, hashlib.blake2b).hexdigest()[:64]

    if len(files) == 1:
        return [hash_file(files[0])]
    with ThreadPoolExecutor(available_cores()) as pool:
        return list(pool.map(hash_file, files))


def num_blocks(size: int) -> int:
    """Number of blocks, and so of checksums, of a file of `size` bytes."""
    return -(-size // BLOCK)


def _pread(path: Path, start: int, count: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        parts = []
        while count and (part := os.pread(descriptor, count, start)):
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(descriptor)
