"""The rows of a data file, before anything is known about their form: JSONL, JSON, CSV, text, parquet and Arrow.

A reader yields (location, row). A row that cannot be read is yielded as a UserError, because the rows after it can. A
file that is damaged as a whole raises one.
"""

import codecs
import csv
import io
import json
from collections.abc import Collection, Iterator
from pathlib import Path

from common.errors import UserError
from data.arrow_rows import read_arrow, read_parquet
from data.compression import Advance, ChunkStream, data_suffix, no_progress, read_chunks
from data.json_values import explain_json_error, read_json_values

Rows = Iterator[tuple[str, object]]
MAX_CELL = 1 << 26  # characters of a CSV cell; without a limit, one quote that is not closed takes the rest of the file
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")


def read_rows(path: Path, columns: Collection[str], advance: Advance = no_progress) -> Rows:
    """Yield (location, row) for each row of a file; a row is a dictionary if the file is well-formed.

    A location reads "FILE, line 3". columns: what is read of .parquet and .arrow files; other files have all of their
    keys. A file with an unknown suffix is read as JSONL. Raises UserError for a file that is damaged or cannot be read.
    """
    suffix = data_suffix(path)
    if suffix == ".parquet":
        return read_parquet(path, columns, advance)
    if suffix == ".arrow":
        return read_arrow(path, columns, advance)
    if suffix in (".csv", ".tsv"):
        return _read_csv(path, "\t" if suffix == ".tsv" else ",", advance)
    return {".json": _read_json, ".txt": _read_text}.get(suffix, _read_jsonl)(path, advance)


def _read_jsonl(path: Path, advance: Advance) -> Rows:
    for number, line in enumerate(_read_lines(path, advance), 1):
        where = f"{path}, line {number}"
        try:
            text = _decode(line, where).strip()
            if text:
                yield where, json.loads(text)
        except UserError as error:
            yield where, error
        except (ValueError, RecursionError) as error:
            yield where, UserError(f"{where} is not valid JSON: {explain_json_error(error)}")


def _read_json(path: Path, advance: Advance) -> Rows:
    for number, value in enumerate(read_json_values(_decoded(path, advance), str(path)), 1):
        yield f"{path}, item {number}", value


def _read_csv(path: Path, delimiter: str, advance: Advance) -> Rows:
    """A location is the first line of a row, which may have several if a cell is quoted."""
    csv.field_size_limit(MAX_CELL)
    stream = io.TextIOWrapper(
        io.BufferedReader(ChunkStream(read_chunks(path, advance))), encoding="utf-8-sig", newline=""
    )
    rows = csv.reader(stream, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}, line {rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            # Other errors mean a quote that is not closed; what it has swallowed is unknown.
            if "expected after" not in str(error):
                raise UserError(f"{where} is not valid CSV: {error}; is a quote not closed?") from error
            yield where, UserError(f"{where} is not valid CSV: {error}")
            continue
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error.reason} near line {rows.line_num + 1}") from error
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


def _read_text(path: Path, advance: Advance) -> Rows:
    text = _decode(b"".join(read_chunks(path, advance)), str(path)).replace("\r\n", "\n")
    if text.strip():
        yield str(path), {"text": text}


def _read_lines(path: Path, advance: Advance) -> Iterator[bytes]:
    begun: list[bytes] = []  # parts of a line whose end has not been read yet
    for chunk in read_chunks(path, advance):
        first, *lines = chunk.split(b"\n")
        begun.append(first)
        if lines:
            yield b"".join(begun)
            yield from lines[:-1]
            begun = [lines[-1]]
    if any(begun):
        yield b"".join(begun)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")  # drops a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _decoded(path: Path, advance: Advance) -> Iterator[str]:
    """The text of a file in parts."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        for chunk in read_chunks(path, advance):
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}") from error
