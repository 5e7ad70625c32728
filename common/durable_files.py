"""Write files and directories so that they are either complete or absent, even if the process or the machine crashes.

Everything is written under a temporary name (`NAME.tmp`), fsynced and renamed. A rename within one file system is
atomic (https://man7.org/linux/man-pages/man2/rename.2.html), and an fsync of the parent directory makes it durable.
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
    """The temporary name of `path`, used until it is complete."""
    return path.with_name(path.name + SUFFIX)


def publish(path: Path, temporary: Path | None = None) -> None:
    """fsync the file or directory `temporary` and rename it to `path`, replacing an existing one.

    `temporary` is `temporary_path(path)` unless it is given.

    A directory cannot be replaced atomically. A crash between the two renames leaves nothing at `path`, and the complete
    new directory under its temporary name. At no moment does `path` name a part of a directory.
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
    """An OSError of a write, such as that the disk is full, names no file: let it name this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """`with new_directory(path) as temporary:` publishes the filled directory as `path` if the block succeeds."""
    yield start_directory(path)
    publish(path)


def write_durably(path: Path, text: str) -> None:
    """Write a small UTF-8 file. After a crash it has either the old content or the new, never a part of it.

    Half of a surrogate pair, as the name of a file or an id may have it, is written as JSON escapes it.
    """
    with naming(path):
        temporary_path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    publish(path)


def check_can_write(path: Path, option: str) -> None:
    """Raise UserError if no file can be written at `path`, which the user gave as `option`: before the work, not after it."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{option} {path}: its directory does not exist")
    if path.is_dir() or not os.access(folder, os.W_OK):  # a new file there replaces an old one
        why = "it is a directory" if path.is_dir() else f"{folder} is not writable"
        raise UserError(f"{option} {path}: {why}; name a file that can be written")


def write_json(path: Path, value: object) -> None:
    """`write_durably` of `value` as indented JSON."""
    write_durably(path, _json_text(value))


def sha256_of_json(value: object) -> str:
    """The SHA-256 of the file that `write_json` makes of `value`."""
    return hashlib.sha256(_json_text(value).encode()).hexdigest()


def _json_text(value: object) -> str:
    return json.dumps(value, indent=1) + "\n"


def write_json_lines(path: Path, values: list[dict]) -> None:
    """`write_durably` of one JSON object per line. Creates the parent directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
