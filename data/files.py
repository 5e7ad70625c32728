"""Data files -> examples, one after another: .jsonl, .txt and .parquet, each also as .gz and .zst.

An example is a dictionary with `messages` (a chat) or `text` (a document). A .txt file is one document. A name that
ends in none of these is read as JSONL.
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
Advance = Callable[[int], None]  # is told how many bytes of a file have been read since it was told last


def no_one(count: int) -> None:
    """Who is told where there is no progress bar."""


def check_there(paths: Iterable[str | Path]) -> None:
    """Raise UserError for the first that does not exist. To be called before the others are read for minutes."""
    for path in paths:
        if not Path(path).exists():
            raise UserError(
                f"{path} does not exist; data files are .jsonl or .parquet with `messages` or `text`, or .txt, also .gz or .zst"
            )


def read_file(path: str | Path, advance: Advance = no_one) -> Iterator[tuple[str, dict]]:
    """Each example with where it stands ("FILE, line 3"), checked for shape; what has been read is not kept.

    Raises UserError for a file that is missing, damaged or empty, and for the first example that is none.
    """
    path = Path(path)
    check_there([path])
    if path.is_dir():
        raise UserError(f"{path} is a folder; name its files")
    reader = {".parquet": _parquet, ".txt": _text}.get(kind(path), _jsonl)
    empty = True
    for where, example in reader(path, advance):
        empty = False
        yield where, example
    if empty:
        raise UserError(f"{path} holds no example")


def kind(path: str | Path) -> str:
    """The ending that says what the file holds, without the compression: `.txt` of a.txt.gz."""
    path = Path(path)
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


def chunks(path: str | Path, advance: Advance = no_one) -> Iterator[bytes]:
    """The decompressed bytes of a file, piece by piece. Raises UserError where it is damaged or cut off."""
    path = Path(path)
    try:
        if path.suffix == ".zst":
            yield from _decompressed_zst(path, advance)
            return
        with path.open("rb") as raw:
            file, done = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw, 0
            while chunk := file.read(CHUNK):
                advance(raw.tell() - done)
                done = raw.tell()
                yield chunk
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is damaged or not gzip: {error}") from error


def check_example(example: object, where: str) -> dict:
    """The example itself, if it has the shape of a chat or a document. Raises UserError that begins with `where`."""
    if not isinstance(example, dict) or not ("messages" in example or "text" in example):
        raise UserError(f"{where} has neither `messages` nor `text`")
    if "messages" not in example:
        if not isinstance(example["text"], str) or not example["text"]:
            raise UserError(f"{where}: `text` must be a text that is not empty")
        return example
    messages = example["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: `messages` must be a list that is not empty")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(f"{where}: message {i} needs a `role`, one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"{where}: message {i} needs `content`, a text")
    return example


def _jsonl(path: Path, advance: Advance) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(_lines(path, advance), 1):
        where = f"{path}, line {number}"
        text = _decoded(line, where).strip()
        if not text:
            continue
        try:
            example = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
        yield where, check_example(example, where)


def _text(path: Path, advance: Advance) -> Iterator[tuple[str, dict]]:
    text = _decoded(b"".join(chunks(path, advance)), str(path)).replace("\r\n", "\n")
    if text.strip():
        yield str(path), {"text": text}


def _parquet(path: Path, advance: Advance) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: .parquet needs pyarrow; pip install pyarrow") from error
    try:
        compressed = path.suffix != ".parquet"
        source = io.BytesIO(b"".join(chunks(path, advance))) if compressed else path
        table = pyarrow.parquet.ParquetFile(source)
        columns = [name for name in ("messages", "text") if name in table.schema_arrow.names][:1]
        if not columns:
            raise UserError(
                f"{path} has neither a column `messages` nor `text`; it has {', '.join(table.schema_arrow.names)}"
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
        raise UserError(f"{path} is damaged or not parquet: {str(error).splitlines()[0]}") from error


def _lines(path: Path, advance: Advance) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks(path, advance):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")  # without the mark that Windows puts at a file's beginning
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _decompressed_zst(path: Path, advance: Advance) -> Iterator[bytes]:
    """Frame by frame: zstandard's own reader stops after the first, and takes a file that is cut off for a whole one."""
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path}: .zst needs zstandard; pip install zstandard") from error
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
            raise UserError(f"{path} is damaged or not zstd: {error}") from error
    if frame is not None and not frame.eof:
        raise UserError(f"{path} is damaged: it ends in the middle of a zstd frame")
