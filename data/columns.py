"""The rows of files that keep them by columns: parquet and Arrow, by pyarrow. Imported for such a file only."""

import contextlib
import io
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from data.files import codec_of, data_suffix
from data.messages import short_list
from data.rows import Advance, Rows, no_progress, open_raw, read_chunks

BATCH = 1024  # rows that are read together


def column_names(path: str | Path) -> list[str]:
    """Names of all columns of a .parquet or .arrow file, compressed or not. Raises UserError."""
    with _guarded(path):
        return list(_open_columns(path, None, no_progress)[0])


def read_columns(path: str | Path, columns: Collection[str] | None, advance: Advance) -> Rows:
    """A value that is null is left out at every level, because a column has the keys of all rows together."""
    with _guarded(path):
        names, batches, total, size = _open_columns(path, columns, advance)
    if columns is not None and not any(name in columns for name in names):
        raise UserError(
            f"{path} has no column of a known form (docs/data.md); its columns are {short_list(names)}; data.fields "
            "can name them"
        )
    number = done = 0
    while True:
        with _guarded(path):
            batch = next(batches, None)
            rows = [] if batch is None else _as_dictionaries(batch)
        if batch is None:
            break
        for row in rows:
            number += 1
            where = f"{path}, row {number}"
            yield where, row if row is not None else UserError(f"{where} is not UTF-8 text")
        read = size * number // total if total else done
        advance(read - done)
        done = read
    advance(size - done)


def _open_columns(
    path: str | Path, columns: Collection[str] | None, advance: Advance
) -> tuple[list[str], Iterator[Any], int | None, int]:
    """(names of all columns, record batches with the chosen ones, number of rows if known, bytes not yet counted)."""
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO(b"".join(read_chunks(path, advance))) if codec_of(path) else open_raw(path)
    size = 0 if codec_of(path) else file.seek(0, io.SEEK_END)
    file.seek(0)
    if data_suffix(path) == ".parquet":
        table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        names, total = list(table.schema_arrow.names), table.metadata.num_rows
        chosen = [name for name in names if columns is None or name in columns]
        return names, table.iter_batches(BATCH, columns=chosen), total, size
    is_file_format = file.read(6) == b"ARROW1"  # which is how Arrow's file format begins; its stream format does not
    file.seek(0)
    if is_file_format:
        reader = pyarrow.ipc.open_file(file)
        batches = map(reader.get_batch, range(reader.num_record_batches))
    else:
        reader = pyarrow.ipc.open_stream(file)
        batches = iter(reader)
    chosen = [name for name in reader.schema.names if columns is None or name in columns]
    pieces = (piece for batch in batches for piece in _pieces(batch))
    return list(reader.schema.names), (piece.select(chosen) for piece in pieces), None, size


def _pieces(batch: Any) -> Iterator[Any]:
    """A record batch in pieces of at most BATCH rows. Its offsets are checked, because Arrow trusts those in a file."""
    batch.validate(full=True)
    yield from (batch.slice(start, BATCH) for start in range(0, batch.num_rows, BATCH))


@contextlib.contextmanager
def _guarded(path: str | Path) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged file into a UserError. Only calls of pyarrow belong inside."""
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"{path}: reading .parquet and .arrow requires pyarrow; pip install pyarrow") from error
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        kind = "a parquet" if data_suffix(path) == ".parquet" else "an Arrow"
        raise UserError(f"{path} is damaged or not {kind} file: {reason}") from error


def _as_dictionaries(batch: Any) -> list[dict | None]:
    """The rows of a record batch; None for a row with a string that is not UTF-8."""
    try:
        return [_without_nulls(row) for row in batch.to_pylist()]
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [row for i in range(batch.num_rows) for row in _as_dictionaries(batch.slice(i, 1))]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
