"""Read the rows of a data file of any type: JSONL, JSON, CSV, text, parquet and Arrow. Their form is not known here.

A reader yields (location, row). An unreadable row is yielded as a UserError, because the rows after it can still be read. A
file that is damaged as a whole raises one. JSON is read value by value: a columnar library would give each tool call the
argument names of all other calls.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from common.errors import UserError
from data.files import CHOSEN, FOREIGN, PREFERENCES, REJECTED, SUFFIXES, codec_of, data_suffix
from data.messages import short_list

Rows = Iterator[tuple[str, Any]]
MAX_CELL = 1 << 26  # characters of a CSV cell; without a limit, an unclosed quote would swallow the rest of the file
BATCH = 1024  # rows of a column file that are read together
COLUMNS = (".parquet", ".arrow")  # suffixes of column files, in which every row has the keys of all rows
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".xlsx", ".xls", ".ods", ".docx", ".pdf")
SPACE = re.compile(r"[ \t\n\r]*")


def read_rows(path: str | Path, columns: Collection[str] | None = None) -> Rows:
    """Yield (location, row) for each row of a file; a row is a dictionary if the file is well-formed.

    A location reads "FILE, line 3". columns: the columns to read from .parquet and .arrow files, by default all; from other
    files all keys are read. A file with an unknown suffix is read as JSONL. Raise UserError for a damaged or unreadable file.
    """
    suffix = data_suffix(path)
    if suffix in ARCHIVES:
        raise UserError(f"{path} is no data file; unpack it, or export its rows as .csv or .jsonl")
    if suffix in COLUMNS:
        return _read_columns(path, columns)
    if suffix in (".csv", ".tsv"):
        return _read_csv(path, "\t" if suffix == ".tsv" else ",")
    if suffix == ".txt":
        return _read_text(path)
    return _read_json(path) if suffix == ".json" else _read_jsonl(path)


# ---- bytes ---------------------------------------------------------------------------------------------------------------


def open_raw(path: str | Path) -> Any:
    """Open a file for reading without decompressing it: a local path, or a URL that fsspec knows."""
    if "://" not in str(path):
        return Path(path).open("rb")
    import fsspec

    system, inside = fsspec.url_to_fs(str(path))
    return system.open(inside, "rb")


def read_lines(path: str | Path) -> Iterator[bytes]:
    """Yield the lines of a file with their line ends, decompressed.

    Raise UserError if the file cannot be read, is damaged or is truncated.
    """
    codec = codec_of(path)
    try:
        with open_raw(path) as raw:
            yield from raw if codec is None else _decompressed(raw, codec, path)
    except UserError:
        raise
    except Exception as error:  # of any library that decompresses or reads remote data
        if codec and not getattr(error, "errno", None):
            raise UserError(f"{path} is damaged or not a {codec} file: {error}") from error
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _decompressed(raw: Any, codec: str, path: str | Path) -> Any:
    if codec != "zstd":
        import fsspec.compression

        return cast(dict, fsspec.compression.compr)[codec](raw, mode="rb")
    pyarrow = _pyarrow(path, ".zst")
    # fsspec's own reader of zstd stops after the first frame and accepts a truncated file.
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"))


def _pyarrow(path: str | Path, what: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading {what} requires pyarrow; pip install pyarrow") from error
    return pyarrow


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")  # drops a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8") from error


def text_of(path: str | Path) -> str:
    """Return all text of a file, decompressed, without a byte order mark. Raise UserError as `read_lines` does, or if not UTF-8."""
    return _decode(b"".join(read_lines(path)), str(path))


def _read_text(path: str | Path) -> Rows:
    text = text_of(path).replace("\r\n", "\n")
    if text.strip():
        yield str(path), {"text": text}


# ---- JSON ----------------------------------------------------------------------------------------------------------------


def _read_jsonl(path: str | Path) -> Rows:
    for number, line in enumerate(read_lines(path), 1):
        where = f"{path}, line {number}"
        try:
            text = _decode(line, where).strip()
            if text:
                yield where, json.loads(text, object_pairs_hook=_object)
        except UserError as error:
            yield where, error
        except (ValueError, RecursionError) as error:
            at = error if isinstance(error, json.JSONDecodeError) else None
            hint = f" at column {at.colno}" if at else ""
            if number == 1 and data_suffix(path) not in SUFFIXES:
                hint += "; a name that does not end in .txt, .csv or the like means one JSON object per line"
            elif number == 1 and at and at.pos >= len(at.doc):  # the first line of an object with several lines
                hint += "; objects of several lines are read if the name ends in .json"
            yield where, UserError(f"{where} is not valid JSON: {_json_reason(error)}{hint}")


def _read_json(path: str | Path) -> Rows:
    """Yield the items of a single array, or the values of a file with several."""
    text = text_of(path)
    decoder, values, at = json.JSONDecoder(object_pairs_hook=_object), [], 0
    try:
        while (at := cast(re.Match, SPACE.match(text, at)).end()) < len(text):
            value, at = decoder.raw_decode(text, at)
            values.append(value)
    except json.JSONDecodeError as error:
        line = 1 + text.count("\n", 0, error.pos)
        raise UserError(f"{path}, line {line} is not valid JSON: {_json_reason(error)}") from error
    except (ValueError, RecursionError) as error:  # these do not tell the line
        raise UserError(f"{path} is not valid JSON: {_json_reason(error)}") from error
    values = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    yield from ((f"{path}, item {number}", value) for number, value in enumerate(values, 1))


def _object(pairs: list[tuple[str, object]]) -> dict:
    """Build a JSON object. Raise ValueError for a repeated key, of which Python would silently keep the last value."""
    if len(row := dict(pairs)) != len(pairs):
        repeated = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"an object has the key {short_list([repeated])} twice")
    return row


def _json_reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return error.msg.removesuffix(" at") if isinstance(error, json.JSONDecodeError) else str(error)


# ---- CSV -----------------------------------------------------------------------------------------------------------------


def _read_csv(path: str | Path, usual: str) -> Rows:
    """Yield the rows of a CSV file. The location is a row's first line; a row with quoted cells may have several."""
    csv.field_size_limit(MAX_CELL)
    lines = (_decode(line, f"{path}, line {number}") for number, line in enumerate(read_lines(path), 1))
    first = next(lines, "")
    rows = csv.reader(itertools.chain([first], lines), delimiter=_delimiter(first, usual), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}, line {rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            if "new-line character" in str(error):
                raise UserError(
                    f"{where} has a carriage return alone outside of quotes; end lines with LF or CR LF"
                ) from error
            # Other errors mean an unclosed quote, which has swallowed an unknown part of the file.
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
        elif len(row) != len(header):
            yield where, UserError(f"{where} has {len(row)} cells, but the header has {len(header)}")
        else:
            yield where, dict(zip(header, row, strict=True))


def _delimiter(header: str, usual: str) -> str:
    """Return the character that separates cells: the usual one, or another if the header has only that outside of quotes."""
    names = re.sub(r'"[^"]*"', "", header)
    return next((character for character in (usual, ",", ";", "\t", "|") if character in names), usual)


# ---- columns -------------------------------------------------------------------------------------------------------------


def column_names(path: str | Path) -> list[str]:
    """Return the names of all columns of a .parquet or .arrow file, compressed or not. Raise UserError."""
    with _guarded(path), _open_columns(path) as (names, _):
        return names


def _read_columns(path: str | Path, columns: Collection[str] | None) -> Rows:
    """Yield the rows of a column file. Nulls below a row's own keys are dropped, because a column has the keys of all rows."""
    with _guarded(path), _open_columns(path) as (names, batches_of):
        chosen = [name for name in names if columns is None or name in columns]
        if set(chosen) <= {*FOREIGN, *PREFERENCES} and not {CHOSEN, REJECTED} <= set(chosen):
            raise UserError(
                f"{path} has no column of a known form (docs/data.md); its columns are {short_list(names)}; data.fields "
                "can name them"
            )
        rows = ((row, batch.schema) for batch in batches_of(chosen) for row in batch.to_pylist())
        nulls = dict.fromkeys(chosen)
        yield from ((f"{path}, row {number}", nulls | _plain(*row)) for number, row in enumerate(rows, 1))


@contextmanager
def _open_columns(path: str | Path) -> Iterator[tuple[list[str], Callable[[list[str]], Iterator[Any]]]]:
    """Yield (names of all columns, function from chosen names to record batches). The file is open inside the block."""
    pyarrow = _pyarrow(path, ".parquet and .arrow")
    with io.BytesIO(b"".join(read_lines(path))) if codec_of(path) else open_raw(path) as file:
        if data_suffix(path) == ".parquet":
            table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
            yield list(table.schema_arrow.names), lambda chosen: table.iter_batches(BATCH, columns=chosen)
            return
        is_file_format = file.read(6) == b"ARROW1"  # Arrow's stream format begins otherwise
        file.seek(0)
        reader = pyarrow.ipc.open_file(file) if is_file_format else pyarrow.ipc.open_stream(file)

        def pieces(chosen: list[str]) -> Iterator[Any]:
            """Yield record batches of at most BATCH rows. Check offsets, because Arrow trusts those in a file."""
            for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file_format else reader:
                batch.validate(full=True)
                yield from (batch.slice(start, BATCH).select(chosen) for start in range(0, batch.num_rows, BATCH))

        yield list(reader.schema.names), pieces


@contextmanager
def _guarded(path: str | Path) -> Iterator[None]:
    """Turn pyarrow's exceptions for a damaged file into a UserError."""
    pyarrow = _pyarrow(path, ".parquet and .arrow")
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        kind = "a parquet" if data_suffix(path) == ".parquet" else "an Arrow"
        raise UserError(f"{path} is damaged or not {kind} file: {reason}") from error


def _plain(value: Any, kind: Any) -> Any:
    """Return a value of type `kind` without nulls. Parse values of a JSON type: `datasets` stores tool calls in this way."""
    if getattr(kind, "extension_name", None) == "arrow.json" and value is not None:
        return json.loads(value, object_pairs_hook=_object)
    kind = getattr(kind, "storage_type", kind)
    if isinstance(value, dict):
        return {key: _plain(item, kind.field(key).type) for key, item in value.items() if item is not None}
    return [_plain(item, getattr(kind, "value_type", None)) for item in value] if isinstance(value, list) else value
