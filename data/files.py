"""Read examples from data files, whatever their type and form (docs/data.md), in one canonical form (data/formats.py)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from common.errors import UserError
from data.arrow_rows import column_names
from data.compression import Advance as Advance
from data.compression import data_suffix, no_progress
from data.compression import read_chunks as read_chunks
from data.formats import DEFAULT, Reading, canonical_example, describe, foreign_keys
from data.messages import short_list
from data.paths import check_files
from data.paths import check_paths_exist as check_paths_exist
from data.paths import expand as expand
from data.paths import left_out as left_out
from data.rows import read_rows

DESCRIBED_ROWS = 100  # of a file, in which `describe_form` finds the keys that are used


def read_file(
    path: str | Path,
    advance: Advance = no_progress,
    reading: Reading = DEFAULT,
    bad: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, dict]]:
    """Yield (location, canonical example) for each example of a file. A location reads "FILE, line 3".

    Rows may have different forms, but one that is not of the file's first form must have keys of its own form only: an
    Alpaca example that has lost its output would otherwise become its `text`. Examples are not kept in memory. Raises UserError for a file that is
    missing, damaged or empty, and for the first malformed example. With `reading.on_bad="skip"` malformed examples are
    skipped, and `bad` gets one sentence with the location of each; a damaged file is an error all the same, because
    nobody knows what it has lost.
    """
    path = Path(path)
    check_files([path])
    reading = _for_file(path, reading)
    form, problem, empty = None, None, True
    for where, row in read_rows(path, reading.read, advance):
        try:
            if isinstance(row, UserError):
                raise row
            row_form, example = canonical_example(row, where, reading)
            form = form or row_form
            if row_form != form and isinstance(row, dict) and (keys := foreign_keys(row_form, row, reading)):
                raise UserError(
                    f"{where} has the form {row_form}, but also {short_list(keys)}, and the file began with {form}; name "
                    "the form in data.format, or give the row the keys of one form"
                )
        except UserError as error:
            if reading.on_bad == "error":
                raise
            assert bad is not None, "nobody hears what is skipped"
            bad(str(error))
            problem = problem or error
            continue
        empty = False
        yield where, example
    if empty and problem:
        raise UserError(f"{path} contains no well-formed example; {problem}") from problem
    if empty:
        raise UserError(f"{path} contains no examples")


def describe_form(path: str | Path, reading: Reading = DEFAULT) -> str:
    """The forms of a file and which keys are used: "alpaca (instruction, output); ignored: text".

    Found in the first DESCRIBED_ROWS rows; malformed ones are passed over. Raises UserError for a damaged file.
    """
    path = Path(path)
    check_files([path])
    reading = _for_file(path, reading)
    forms, used, ignored = {}, {}, {}
    for count, (where, row) in enumerate(read_rows(path, reading.read), 1):
        try:
            if isinstance(row, dict):
                form, _ = canonical_example(row, where, reading)
                for keys, found in zip((forms, used, ignored), ([form], *describe(form, row, reading)), strict=True):
                    keys |= dict.fromkeys(found)
        except UserError:
            pass  # read_file says it
        if count == DESCRIBED_ROWS:
            break
    if not forms:
        return f"no well-formed example in the first {DESCRIBED_ROWS} rows"
    if data_suffix(path) in (".parquet", ".arrow"):
        ignored = dict.fromkeys(name for name in column_names(path) if name not in reading.read) | ignored
    return f"{' and '.join(forms)} ({short_list(used)})" + (f"; ignored: {short_list(ignored)}" if ignored else "")


def describe_files(paths: Sequence[Path], reading: Reading = DEFAULT) -> list[str]:
    """One line for each group of files that `describe_form` says the same of: "a.jsonl and 2 more: text (text)"."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(describe_form(path, reading), []).append(path)
    return [
        f"{files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}: {form}" for form, files in groups.items()
    ]


def _for_file(path: Path, reading: Reading) -> Reading:
    """How this file is read: a .txt file has no keys that data.fields could name."""
    return replace(reading, fields={}) if data_suffix(path) == ".txt" else reading
