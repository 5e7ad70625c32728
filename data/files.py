"""Read examples from data files: .jsonl, .txt and .parquet, each also compressed as .gz or .zst.

An example is a dictionary with `messages` (a chat) or `text` (a document). A .txt file is one document. A file with any
other suffix is read as JSONL.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from common.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
CHUNK = 1 << 20  # bytes
Advance = Callable[[int], None]  # progress callback: number of bytes of the file read since the last call


def no_progress(count: int) -> None:
    """No-op progress callback."""


def check_paths_exist(paths: Iterable[str | Path]) -> None:
    """Raise UserError for the first path that does not exist. Call this before a slow read of the first file."""
    for path in paths:
        if not Path(path).exists():
            raise UserError(
                f"{path} does not exist; data files are .jsonl or .parquet with `messages` or `text`, or .txt, optionally "
                "compressed as .gz or .zst"
            )


def check_files(paths: Iterable[str | Path]) -> None:
    """Raise UserError for the first path that does not exist or is a directory."""
    for path in map(Path, paths):
        if path.is_dir():
            raise UserError(f"{path} is a directory; name the files in it instead")
        if not path.exists():
            raise UserError(f"{path} does not exist")


def read_file(path: str | Path, advance: Advance = no_progress) -> Iterator[tuple[str, dict]]:
    """Yield (location, example) for each example of a file. A location reads "FILE, line 3".

    Examples are checked for shape and not kept in memory. Raises UserError for a file that is missing, damaged or
    empty, and for the first malformed example.
    """
    path = Path(path)
    check_files([path])
    reader = {".parquet": _read_parquet, ".txt": _read_text}.get(data_suffix(path), _read_jsonl)
    empty = True
    for where, example in reader(path, advance):
        empty = False
        yield where, example
    if empty:
        raise UserError(f"{path} contains no examples")


def data_suffix(path: str | Path) -> str:
    """The suffix of a file without that of its compression: `.txt` for a.txt.gz."""
    path = Path(path)
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


def read_chunks(path: str | Path, advance: Advance = no_progress) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file in chunks. Raises UserError if the file is damaged or truncated."""
    path = Path(path)
    try:
        if path.suffix == ".zst":
            yield from _decompress_zst(path, advance)
            return
        with path.open("rb") as raw:
            file, done = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw, 0
            while chunk := file.read(CHUNK):
                advance(raw.tell() - done)
                done = raw.tell()
                yield chunk
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is damaged or not a gzip file: {error}") from error


def check_example(example: object, where: str) -> dict:
    """Return `example` if it is a well-formed chat or document. Raises UserError that begins with `where`."""
    if not isinstance(example, dict) or not ("messages" in example or "text" in example):
        raise UserError(f"{where} has neither `messages` nor `text`")
    if "messages" not in example:
        if not isinstance(example["text"], str) or not example["text"]:
            raise UserError(f"{where}: `text` must be a non-empty string")
        _check_unicode(example["text"], where)
        return example
    messages = example["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: `messages` must be a non-empty list")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(f"{where}: message {i} needs a `role` that is one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"{where}: message {i} needs a `content` that is a string")
        _check_unicode(message["content"], where)
    return example


def _check_unicode(text: str, where: str) -> None:
    """Refuse lone surrogates, which JSON can contain but no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not valid Unicode text: {error.reason}") from error


def _read_jsonl(path: Path, advance: Advance) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(_read_lines(path, advance), 1):
        where = f"{path}, line {number}"
        text = _decode(line, where).strip()
        if not text:
            continue
        try:
            example = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not valid JSON: {error.msg} at column {error.colno}") from error
        yield where, check_example(example, where)


def _read_text(path: Path, advance: Advance) -> Iterator[tuple[str, dict]]:
    text = _decode(b"".join(read_chunks(path, advance)), str(path)).replace("\r\n", "\n")
    if text.strip():
        yield str(path), {"text": text}


def _read_parquet(path: Path, advance: Advance) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading .parquet requires pyarrow; pip install pyarrow") from error
    try:
        compressed = path.suffix != ".parquet"
        source = io.BytesIO(b"".join(read_chunks(path, advance))) if compressed else path
        table = pyarrow.parquet.ParquetFile(source)
        columns = [name for name in ("messages", "text") if name in table.schema_arrow.names][:1]
        if not columns:
            raise UserError(
                f"{path} has neither a `messages` nor a `text` column; its columns are {', '.join(table.schema_arrow.names)}"
            )
        number = done = 0
        size = 0 if compressed else path.stat().st_size
        for batch in table.iter_batches(1024, columns=columns):
            for example in batch.to_pylist():
                number += 1
                where = f"{path}, row {number}"
                yield where, check_example(example, where)
            read = size * number // table.metadata.num_rows
            advance(read - done)
            done = read
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is damaged or not a parquet file: {str(error).splitlines()[0]}") from error


def _read_lines(path: Path, advance: Advance) -> Iterator[bytes]:
    rest = b""
    for chunk in read_chunks(path, advance):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")  # drops a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from error


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
