"""The rows of .parquet files and of .arrow files, which is how the library `datasets` saves data. Needs pyarrow only."""

import contextlib
import io
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from data.compression import Advance, is_compressed, no_progress, read_chunks
from data.messages import short_list

BATCH = 1024  # rows
ARROW_FILE = b"ARROW1"  # the first bytes of Arrow's file format; its stream format has none


def read_parquet(path: Path, columns: Collection[str], advance: Advance = no_progress) -> Iterator[tuple[str, object]]:
    """Yield (location, row) for each row of a parquet file, with those of `columns` that it has (data/rows.py).

    A value that is null is left out at every level, because a column has the keys of all rows together. Raises
    UserError for a damaged file and for one that has none of the columns.
    """
    with _guarded(path):
        table = _open_parquet(path, advance)
        chosen = _choose(path, table.schema_arrow.names, columns)
        batches, total = table.iter_batches(BATCH, columns=chosen), table.metadata.num_rows
    yield from _rows(path, batches, total, advance)


def read_arrow(path: Path, columns: Collection[str], advance: Advance = no_progress) -> Iterator[tuple[str, object]]:
    """The same for a file in Arrow's stream format or file format."""
    with _guarded(path):
        schema, batches = _open_arrow(path, advance)
        chosen = _choose(path, schema.names, columns)
    yield from _rows(path, (batch.select(chosen) for batch in batches), None, advance)


def column_names(path: Path) -> list[str]:
    """Names of all columns of a .parquet or .arrow file, compressed or not. Raises UserError."""
    with _guarded(path):
        if _kind(path) == "parquet":
            return list(_open_parquet(path, no_progress).schema_arrow.names)
        return list(_open_arrow(path, no_progress)[0].names)


def _kind(path: Path) -> str:
    return "parquet" if ".parquet" in (suffix.lower() for suffix in path.suffixes[-2:]) else "Arrow"


@contextlib.contextmanager
def _guarded(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged file into a UserError. Only calls of pyarrow belong inside."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading .parquet and .arrow requires pyarrow; pip install pyarrow") from error
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        kind = "a parquet" if _kind(path) == "parquet" else "an Arrow"
        raise UserError(f"{path} is damaged or not {kind} file: {reason}") from error


def _source(path: Path, advance: Advance) -> Any:
    """What pyarrow reads from: the path, or the bytes of a compressed file."""
    return io.BytesIO(b"".join(read_chunks(path, advance))) if is_compressed(path) else str(path)


def _open_parquet(path: Path, advance: Advance) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(_source(path, advance), page_checksum_verification=True)


def _open_arrow(path: Path, advance: Advance) -> tuple[Any, Iterator[Any]]:
    """(schema, record batches) of an Arrow file."""
    import pyarrow

    source = _source(path, advance)
    file = pyarrow.OSFile(source) if isinstance(source, str) else pyarrow.BufferReader(source.getbuffer())
    is_file_format = file.read(len(ARROW_FILE)) == ARROW_FILE
    file.seek(0)
    if is_file_format:
        reader = pyarrow.ipc.open_file(file)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        reader = pyarrow.ipc.open_stream(file)
        batches = iter(reader)
    return reader.schema, (piece for batch in batches for piece in _pieces(batch))


def _pieces(batch: Any) -> Iterator[Any]:
    """A record batch in pieces of at most BATCH rows. Its offsets are checked, because Arrow trusts those in a file."""
    batch.validate(full=True)
    yield from (batch.slice(start, BATCH) for start in range(0, batch.num_rows, BATCH))


def _choose(path: Path, names: list[str], columns: Collection[str]) -> list[str]:
    chosen = [name for name in names if name in columns]
    if not chosen:
        raise UserError(
            f"{path} has no column of a known form (docs/data.md); its columns are {short_list(names)}; data.fields "
            "can name them"
        )
    return chosen


def _rows(path: Path, batches: Iterator[Any], total: int | None, advance: Advance) -> Iterator[tuple[str, object]]:
    """total: number of rows, for the progress; None if it is unknown."""
    size = 0 if is_compressed(path) else path.stat().st_size
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
