"""Read examples from data files, whatever their type and form (docs/data.md), in one canonical form (data/formats.py)."""

import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from common.errors import UserError
from common.user_code import explain, load_function
from data.compression import Advance as Advance
from data.compression import data_suffix, no_progress
from data.compression import read_chunks as read_chunks
from data.formats import DEFAULT, Reading, canonical_example, describe, foreign_keys
from data.messages import short_list
from data.paths import check_files
from data.paths import check_paths_exist as check_paths_exist
from data.paths import expand as expand
from data.paths import left_out as left_out
from data.rows import COLUMNS, column_names, read_rows

DESCRIBED_ROWS = 100  # of a file, in which `describe_form` finds the keys that are used


def read_files(
    files: Iterable[Path],
    advance: Advance = no_progress,
    reading: Reading = DEFAULT,
    bad: Callable[[str], None] | None = None,
    left: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, dict]]:
    """`read_file` of one file after another, up to `reading.max_samples` rows. No further file is asked for after these."""
    rest = iter(range(reading.max_samples or sys.maxsize))
    for file in files:
        yield from read_file(file, advance, reading, bad, left, rest)
        if not operator.length_hint(rest):
            return


def read_file(
    path: str | Path,
    advance: Advance = no_progress,
    reading: Reading = DEFAULT,
    bad: Callable[[str], None] | None = None,
    left: Callable[[], None] = lambda: None,
    rest: Iterator[int] | None = None,
) -> Iterator[tuple[str, dict]]:
    """Yield (location, canonical example) for each example of a file. A location reads "FILE, line 3".

    Rows may have different forms, but one that is not of the file's first form must have keys of its own form only: an
    Alpaca example that has lost its output would otherwise become its `text`. Examples are not kept in memory. `left` is
    called for each row that data.row leaves out. `rest` has an item for each row that may still be read.

    Raises UserError for a file that is missing, damaged or empty, and for the first malformed example. With
    `reading.on_bad="skip"` malformed examples are skipped, and `bad` gets one sentence with the location of each; a damaged
    file is an error all the same, because nobody knows what it has lost.
    """
    path = Path(path)
    check_files([path])
    reading = _for_file(path, reading)
    convert = _converter(reading)
    form, problem, empty = None, None, True
    rest = iter(range(sys.maxsize)) if rest is None else rest
    for (where, row), _ in zip(read_rows(path, reading.columns, advance), rest, strict=False):
        try:
            if isinstance(row, UserError):
                raise row
            if convert and (row := convert(row, where)) is None:
                left()
                empty = False
                continue
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


def _converter(reading: Reading) -> Callable[[object, str], object] | None:
    """(row, location) -> the example that data.row makes of a row, or None if it leaves it out; None without data.row."""
    if reading.row is None:
        return None
    function, name = load_function("data.row", reading.row), reading.row

    def convert(row: object, where: str) -> object:
        """What data.row makes of a row. Raises UserError with the location of a row for which it fails."""
        if not isinstance(row, dict):
            return row  # canonical_example refuses it
        try:
            made = function(dict(row))
        except (Exception, SystemExit) as error:
            raise UserError(f"{where}: data.row={name} fails: {explain(error)}") from error
        if made is not None and not isinstance(made, dict):
            raise UserError(
                f"{where}: data.row={name} returns {short_list([type(made).__name__])}; it gets a row as a dictionary and "
                "must return an example as one, or None to leave the row out"
            )
        return made

    return convert


def describe_form(path: str | Path, reading: Reading = DEFAULT) -> str:
    """The forms of a file and which keys are used: "alpaca (instruction, output); ignored: text".

    Found in the first DESCRIBED_ROWS rows; malformed ones are passed over. Raises UserError for a damaged file.
    """
    path = Path(path)
    check_files([path])
    reading = _for_file(path, reading)
    convert = _converter(reading)
    forms, used, ignored, left = {}, {}, {}, 0
    for (where, row), _ in zip(read_rows(path, reading.columns), range(DESCRIBED_ROWS), strict=False):
        try:
            if convert:
                row = convert(row, where)
                left += row is None
            if isinstance(row, dict):
                form, _ = canonical_example(row, where, reading)
                for keys, found in zip((forms, used, ignored), ([form], *describe(form, row, reading)), strict=True):
                    keys |= dict.fromkeys(found)
        except UserError:
            pass  # read_file says it
    if not forms:
        return f"no well-formed example in the first {DESCRIBED_ROWS} rows"
    if data_suffix(path) in COLUMNS and reading.columns is not None:
        ignored = dict.fromkeys(name for name in column_names(path) if name not in reading.columns) | ignored
    words = f"{' and '.join(forms)} ({short_list(used)})" + (f"; ignored: {short_list(ignored)}" if ignored else "")
    words += f"; made by data.row={reading.row}" if reading.row else ""
    return words + (f", which leaves out {left} of the first {DESCRIBED_ROWS} rows" if left else "")


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
