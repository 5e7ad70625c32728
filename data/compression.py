"""The bytes of a data file, decompressed if its name ends in .gz or .zst."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from common.errors import UserError

COMPRESSIONS = (".gz", ".zst")
CHUNK = 1 << 20  # bytes
Advance = Callable[[int], object]  # progress callback: number of bytes of the file read since the last call


def no_progress(count: int) -> None:
    """No-op progress callback."""


def data_suffix(path: str | Path) -> str:
    """The suffix of a file in lower case, without that of its compression: `.txt` for a.TXT.gz."""
    path = Path(path)
    return Path(path.stem).suffix.lower() if is_compressed(path) else path.suffix.lower()


def is_compressed(path: Path) -> bool:
    """Whether the name of a file ends in .gz or .zst."""
    return path.suffix.lower() in COMPRESSIONS


def read_chunks(path: str | Path, advance: Advance = no_progress) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file in chunks.

    Raises UserError if the file cannot be read, is damaged or is truncated.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".zst":
            yield from _decompress_zst(path, advance)
            return
        with path.open("rb") as raw:
            file, done = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw, 0
            while chunk := file.read(CHUNK):
                advance(raw.tell() - done)
                done = raw.tell()
                yield chunk
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is damaged or not a gzip file: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


class ChunkStream(io.RawIOBase):
    """Chunks of bytes as a stream that can be read but not rewound."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """True: this is an input."""
        return True

    def readinto(self, buffer) -> int:  # noqa: ANN001  (a writable buffer, which has no type before Python 3.12)
        """Fill `buffer` from the current chunk. Returns the number of bytes, 0 at the end."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _decompress_zst(path: Path, advance: Advance) -> Iterator[bytes]:
    """Decompress frame by frame: zstandard's own reader stops after the first frame and accepts a truncated file."""
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path}: reading .zst requires zstandard; pip install zstandard") from error
    frame = None
    with path.open("rb") as file:
        try:
            while chunk := file.read(CHUNK):
                advance(len(chunk))
                while chunk:
                    if frame is None or frame.eof:
                        frame = zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(chunk)
                    chunk = frame.unused_data
        except zstandard.ZstdError as error:
            raise UserError(f"{path} is damaged or not a zstd file: {error}") from error
    if frame is not None and not frame.eof:
        raise UserError(f"{path} is damaged: it ends in the middle of a zstd frame")
