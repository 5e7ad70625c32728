"""Write files and directories so that they are either complete or absent, even if the process or the machine crashes.

All data is written under a temporary name (`NAME.tmp`), fsynced and renamed. A rename within one file system is atomic
(https://man7.org/linux/man-pages/man2/rename.2.html), and an fsync of the parent directory makes it durable.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError

SUFFIX = ".tmp"


def temporary_path(path: Path) -> Path:
    """Return the temporary name of `path`, used until the file or directory is complete."""
    return path.with_name(path.name + SUFFIX)


def publish(path: Path, temporary: Path | None = None) -> None:
    """fsync the file or directory `temporary` and rename it to `path`, replacing an existing one.

    `temporary` defaults to `temporary_path(path)`.

    A directory cannot be replaced atomically. A crash between the two renames leaves nothing at `path`, and the complete new
    directory under its temporary name. `path` never names an incomplete directory.
    """
    temporary = temporary or temporary_path(path)
    if temporary.is_dir():
        for part in [*(p for p in temporary.rglob("*") if not p.is_symlink()), temporary]:
            fsync(part)
        old = path.with_name(path.name + ".old" + SUFFIX)
        if path.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            path.replace(old)
        temporary.replace(path)
        fsync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    else:
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)


def start_directory(path: Path) -> Path:
    """Create an empty directory at `temporary_path(path)`. The caller fills it and then calls `publish(path)`."""
    temporary = temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file name `path` to an OSError of a write. The error of a full disk, for example, names no file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory and publish it as `path` if the block succeeds."""
    yield start_directory(path)
    publish(path)


def write_durably(path: Path, text: str) -> None:
    """Write a small UTF-8 file. After a crash it has either the complete old content or the complete new content.

    A lone surrogate, which file names and ids may contain, is written as a JSON escape.
    """
    with naming(path):
        temporary_path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    publish(path)


def check_can_write(path: Path, option: str) -> None:
    """Raise UserError if no file can be written at `path`, the value of `option`. Call this before the work, not after it."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{option} {path}: its directory does not exist")
    if path.is_dir() or not os.access(folder, os.W_OK):  # an existing file is replaced by a rename within the folder
        why = "it is a directory" if path.is_dir() else f"{folder} is not writable"
        raise UserError(f"{option} {path}: {why}; name a file that can be written")


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON with `write_durably`."""
    write_durably(path, _json_text(value))


def sha256_of_json(value: object) -> str:
    """Return the SHA-256 of the file that `write_json` would write for `value`."""
    return hashlib.sha256(_json_text(value).encode()).hexdigest()


def _json_text(value: object) -> str:
    return json.dumps(value, indent=1) + "\n"


def write_json_lines(path: Path, values: list[dict]) -> None:
    """Write one JSON object per line with `write_durably`, and create the parent directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
