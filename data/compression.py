"""The bytes of a data file, on this machine or behind a URL, decompressed as the end of its name says."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from common.errors import UserError

CODECS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
CHUNK = 1 << 20  # bytes
Advance = Callable[[int], object]  # progress callback: number of bytes of the file read since the last call


def no_progress(count: int) -> None:
    """No-op progress callback."""


def data_suffix(path: str | Path) -> str:
    """The suffix of a file in lower case, without that of its compression: `.txt` for a.TXT.gz."""
    name = _name(path)
    return Path(name.stem).suffix.lower() if is_compressed(path) else name.suffix.lower()


def is_compressed(path: str | Path) -> bool:
    """Whether the name of a file ends in one of CODECS."""
    return _name(path).suffix.lower() in CODECS


def _name(path: str | Path) -> Path:
    """A path, or a URL without what stands behind its `?`."""
    return Path(str(path).partition("?")[0] if "://" in str(path) else path)


def open_raw(path: str | Path) -> Any:
    """A file as it is, open for reading: a path of this machine, or a URL that fsspec knows."""
    if "://" not in str(path):
        return Path(path).open("rb")
    import fsspec

    system, inside = fsspec.url_to_fs(str(path))
    return system.open(inside, "rb")


def read_chunks(path: str | Path, advance: Advance = no_progress) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file in chunks.

    Raises UserError if the file cannot be read, is damaged or is truncated.
    """
    codec = CODECS.get(_name(path).suffix.lower())
    try:
        with open_raw(path) as raw:
            file, done = _decompressed(raw, codec, path), 0
            while chunk := file.read(CHUNK):
                advance(raw.tell() - done)
                done = raw.tell()
                yield chunk
    except UserError:
        raise
    except Exception as error:  # of any library that decompresses or reads from elsewhere
        if codec and not getattr(error, "errno", None):
            raise UserError(f"{path} is damaged or not a {codec} file: {error}") from error
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_lines(path: str | Path, advance: Advance = no_progress) -> Iterator[bytes]:
    """Yield the lines of a file with their ends, decompressed. It raises what `read_chunks` does."""
    begun: list[bytes] = []  # parts of a line whose end has not been read yet
    for chunk in read_chunks(path, advance):
        for line in io.BytesIO(chunk):
            begun.append(line)
            if line.endswith(b"\n"):
                yield b"".join(begun)
                begun = []
    if begun:
        yield b"".join(begun)


def _decompressed(raw: Any, codec: str | None, path: str | Path) -> Any:
    if codec is None:
        return raw
    if codec != "zstd":
        import fsspec.compression

        return cast(dict, fsspec.compression.compr)[codec](raw, mode="rb")
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"{path}: reading .zst requires pyarrow; pip install pyarrow") from error
    # What fsspec takes for it stops after the first frame and accepts a truncated file.
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
