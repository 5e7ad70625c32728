"""The rows of a data file, before anything is known about their form: JSONL, JSON, CSV, text; columns in data/columns.py.

A reader yields (location, row). A row that cannot be read is yielded as a UserError, because the rows after it can. A
file that is damaged as a whole raises one. JSON is read value by value: a library of columns would give each tool call the
argument names of all others.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, cast

from common.errors import UserError
from data.files import codec_of, data_suffix
from data.messages import short_list

CHUNK = 1 << 20  # bytes
Advance = Callable[[int], object]  # progress callback: number of bytes of the file read since the last call
Rows = Iterator[tuple[str, Any]]
MAX_CELL = 1 << 26  # characters of a CSV cell; without a limit, one quote that is not closed takes the rest of the file
COLUMNS = (".parquet", ".arrow")  # suffixes of files in which a column has the keys of all rows together
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".xlsx", ".xls", ".ods", ".docx", ".pdf")
SPACE = re.compile(r"[ \t\n\r]*")


def no_progress(count: int) -> None:
    """No-op progress callback."""


def read_rows(path: str | Path, columns: Collection[str] | None = None, advance: Advance = no_progress) -> Rows:
    """Yield (location, row) for each row of a file; a row is a dictionary if the file is well-formed.

    A location reads "FILE, line 3". columns: what is read of .parquet and .arrow files, by default all; other files have all
    of their keys. A file with an unknown suffix is read as JSONL. Raises UserError for a file that is damaged or cannot be
    read.
    """
    suffix = data_suffix(path)
    if suffix in ARCHIVES:
        raise UserError(f"{path} is no data file; unpack it, or export its rows as .csv or .jsonl")
    if suffix in COLUMNS:
        from data.columns import read_columns

        return read_columns(path, columns, advance)
    if suffix in (".csv", ".tsv"):
        return _read_csv(path, "\t" if suffix == ".tsv" else ",", advance)
    if suffix == ".txt":
        return _read_text(path, advance)
    return _read_json(path, advance) if suffix == ".json" else _read_jsonl(path, advance)


# ---- bytes ---------------------------------------------------------------------------------------------------------------


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
    codec = codec_of(path)
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


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")  # drops a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _read_text(path: str | Path, advance: Advance) -> Rows:
    text = _decode(b"".join(read_chunks(path, advance)), str(path)).replace("\r\n", "\n")
    if text.strip():
        yield str(path), {"text": text}


# ---- JSON ----------------------------------------------------------------------------------------------------------------


def _read_jsonl(path: str | Path, advance: Advance) -> Rows:
    for number, line in enumerate(read_lines(path, advance), 1):
        where = f"{path}, line {number}"
        try:
            text = _decode(line, where).strip()
            if text:
                yield where, json.loads(text, object_pairs_hook=_object)
        except UserError as error:
            yield where, error
        except (ValueError, RecursionError) as error:
            column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            yield where, UserError(f"{where} is not valid JSON: {_json_reason(error)}{column}")


def _read_json(path: str | Path, advance: Advance) -> Rows:
    values = json_values(_decode(b"".join(read_chunks(path, advance)), str(path)), str(path))
    yield from ((f"{path}, item {number}", value) for number, value in enumerate(values, 1))


def json_values(text: str, name: str) -> Iterator[object]:
    """Yield the items of one array, or the values of a text that does not begin with `[`, one after another.

    Raises UserError with `name` and the line for invalid JSON; the items after it are not found.
    """

    def after(position: int) -> int:
        match = SPACE.match(text, position)
        assert match is not None, "white space may be empty"
        return match.end()

    def error(reason: str, position: int) -> UserError:
        return UserError(f"{name}, line {1 + text.count(chr(10), 0, position)} is not valid JSON: {reason}")

    at, decoder = after(0), json.JSONDecoder(object_pairs_hook=_object)
    in_array = text.startswith("[", at)
    at = after(at + 1) if in_array else at
    end = "]" if in_array and text.startswith("]", at) else ""
    while at < len(text) and not end:
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as wrong:
            place, reason = getattr(wrong, "pos", at), _json_reason(wrong)
            is_cut = place >= len(text.rstrip()) or reason.startswith("Unterminated")
            raise error(f"{reason}; is the file cut off?" if is_cut else reason, place) from wrong
        yield value
        at = after(at)
        if in_array and at < len(text):
            end = text[at] if text[at] != "," else ""
            if end not in ("", "]"):
                raise error("Expecting ',' or ']' after an item of the array", at)
            at = at if end else after(at + 1)
    if in_array and not end:
        raise error("the array is cut off", at)
    if end and after(at + 1) < len(text):
        raise error("there is more after the end of the array", after(at + 1))


def _object(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON. Raises ValueError for a key that stands there twice, of which Python would keep the last value."""
    if len(row := dict(pairs)) != len(pairs):
        repeated = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"an object has the key {short_list([repeated])} twice")
    return row


def _json_reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return error.msg.removesuffix(" at")
    return "it has a number with more than 4,300 digits" if "digits" in str(error) else str(error)


# ---- CSV -----------------------------------------------------------------------------------------------------------------


def _read_csv(path: str | Path, usual: str, advance: Advance) -> Rows:
    """A location is the first line of a row, which may have several if a cell is quoted."""
    csv.field_size_limit(MAX_CELL)
    lines = (_decode(line, f"{path}, line {number}") for number, line in enumerate(read_lines(path, advance), 1))
    first = next(lines, "")
    named = re.fullmatch(r"sep=(.)\r?\n", first)  # Excel's own line, before the header
    first = next(lines, "") if named else first
    delimiter = named[1] if named else _delimiter(first, usual)
    rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}, line {rows.line_num + (2 if named else 1)}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            # Other errors mean a quote that is not closed; what it has swallowed is unknown.
            if "expected after" not in str(error):
                raise UserError(f"{where} is not valid CSV: {error}; is a quote not closed?") from error
            yield where, UserError(f"{where} is not valid CSV: {error}")
            continue
        if row is None:
            return
        if not row:
            continue
        if header is None:
            header = row
            if repeated := [name for name in header if name and header.count(name) > 1]:
                raise UserError(f"{where}: the column {repeated[0]!r} occurs twice; rename one of them")
            if any("\0" in name for name in header):
                raise UserError(f"{path} is not UTF-8 text: it has NUL characters, as UTF-16 files do")
        elif len(row) != len(header):
            yield where, UserError(f"{where} has {len(row)} cells, but the header has {len(header)}")
        else:
            yield where, dict(zip(header, row, strict=True))


def _delimiter(header: str, usual: str) -> str:
    """What separates the cells of a file: the usual character, or another one if the header has only that outside quotes."""
    names = re.sub(r'"[^"]*"', "", header)
    return next((character for character in (usual, ",", ";", "\t", "|") if character in names), usual)
