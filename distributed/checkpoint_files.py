"""The files of a checkpoint, with a CRC-32 of every 16 MiB: computed while they are written, compared while they are read.

torch.distributed.checkpoint (DCP) reads parts of files, and other parts on another number of ranks. A checksum per block makes
sure of exactly the bytes that a rank uses, in the one read that it needs anyway. (The CRC in the zip format of torch.save is
not looked at by torch.load.)
"""

import dataclasses
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata

from common.errors import UserError

BLOCK = 2**24  # bytes
# Blocks of a file that is being read. torch.load looks at the beginning and at the end of a tensor before it reads it: each may
# lie on two blocks.
KEPT = 4


class Sums:
    """Size and checksums of a file that grows; the entry of the file in the manifest."""

    def __init__(self) -> None:
        self.size, self.crcs = 0, []

    def add(self, data: memoryview) -> None:
        """Count the bytes that are appended to the file."""
        while data:
            done = self.size % BLOCK
            if not done:
                self.crcs.append(0)
            part, data = data[: BLOCK - done], data[BLOCK - done :]
            self.crcs[-1] = zlib.crc32(part, self.crcs[-1])
            self.size += len(part)

    def entry(self) -> dict:
        """As plain JSON."""
        return {"size": self.size, "block": BLOCK, "crc32": self.crcs}


class CheckpointWriter(dcp.FileSystemWriter):
    """DCP's writer. `entries()` are those of the files that this process has written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=True)
        self.sums: dict[str, Sums] = {}
        self.fs = _SummingFiles(self.sums)

    def entries(self) -> dict[str, dict]:
        """File name -> entry in the manifest."""
        return {
            name.removesuffix(".tmp"): sums.entry() for name, sums in self.sums.items()
        }  # DCP renames .metadata.tmp


class _SummingFiles(FileSystem):
    def __init__(self, sums: dict[str, Sums]) -> None:
        self.sums = sums

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        sums = self.sums[Path(path).name] = Sums()
        with super().create_stream(path, mode) as file:
            yield _SummedFile(file, sums)


class _SummedFile:
    """A file that DCP appends to."""

    def __init__(self, file: Any, sums: Sums) -> None:
        self.file, self.sums = file, sums

    def write(self, data: Any) -> int:
        self.sums.add(memoryview(data).cast("B"))
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class CheckpointReader(dcp.FileSystemReader):
    """DCP's reader. Raises UserError when a part of a file that it reads is damaged; `files` are those of the manifest."""

    def __init__(self, checkpoint: Path, files: dict[str, dict], hint: str) -> None:
        super().__init__(checkpoint)
        self.fs = _CheckedFiles(files, hint)
        self.metadata = super().read_metadata()
        self.num_bytes = sum(entry["size"] for entry in files.values())

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """What was read when the reader was made."""
        return self.metadata

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Any:
        """Read in the order of the bytes, so that every block is read once."""

        def place(item: Any) -> tuple[str, int]:
            info = self.storage_data[item.storage_index]
            return info.relative_path, info.offset

        return super().read_data(dataclasses.replace(plan, items=sorted(plan.items, key=place)), planner)


class _CheckedFiles(FileSystem):
    def __init__(self, files: dict[str, dict], hint: str) -> None:
        self.files, self.hint = files, hint

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        path = Path(path)
        with io.BufferedReader(CheckedFile(path, self.files[path.name], self.hint)) as file:
            yield file


class CheckedFile(io.RawIOBase):
    """A file of a checkpoint for reading, block by block. Raises UserError, with the `hint`, for one that is damaged."""

    def __init__(self, path: Path, entry: dict, hint: str) -> None:
        self.path, self.entry, self.hint = path, entry, hint
        self.position, self.blocks = 0, {}
        check_size(path, entry, hint)
        self.file = path.open("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.entry["size"]}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        number, start = divmod(self.position, self.entry["block"])
        if self.position >= self.entry["size"]:
            return 0
        part = self._block(number)[start : start + len(buffer)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)

    def check(self) -> None:
        """Read the whole file."""
        for number in range(len(self.entry["crc32"])):
            self._block(number)

    def close(self) -> None:
        self.file.close()
        super().close()

    def _block(self, number: int) -> memoryview:
        if number not in self.blocks:
            while len(self.blocks) >= KEPT:
                del self.blocks[min(self.blocks)]  # reading goes forward
            try:
                self.file.seek(number * self.entry["block"])
                size = min(self.entry["block"], self.entry["size"] - self.file.tell())
                data = memoryview(bytearray(size))
                while data[:size] and (count := self.file.readinto(data[-size:])):
                    size -= count
            except OSError as error:  # the disk cannot read a block
                raise UserError(f"{self.path} cannot be read ({error.strerror}); {self.hint}") from error
            found, stated = zlib.crc32(data), self.entry["crc32"][number]
            if found != stated:
                raise UserError(
                    f"{self.path} is damaged: its checksum is {found:08x} instead of {stated:08x}; {self.hint}"
                )
            self.blocks[number] = data
        return self.blocks[number]


def check_size(path: Path, entry: dict, hint: str) -> None:
    """Raise UserError if a file is missing or has another size than the manifest says."""
    if not path.is_file():
        raise UserError(f"{path} is missing; {hint}")
    size = path.stat().st_size
    if size != entry["size"]:
        raise UserError(f"{path} is damaged: it has {size:,} bytes instead of {entry['size']:,}; {hint}")
