"""Find what tokenising has left on disk: entries of the cache `data.cache`, what was fetched for it, leftovers of killed builds, and token stores."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from data.cache import KEY, is_entry, remove_entry, size_of
from data.remote import FETCHED, RECORD
from data.store import is_store


def clean_tokens(directory: Path, delete: bool) -> str:
    """Lines that name all of them in a directory and below it; `delete` deletes them. Raises UserError without a directory.

    Links are not followed. An entry that a process is using is not deleted.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    lines, total, count = [], 0, 0
    for path, what in sorted(_walk(directory)):
        size = size_of(path) if path.is_dir() else path.stat().st_size
        in_use = delete and not _delete(path)
        lines.append(f"{path}: {what}, {size / 2**20:,.1f} MiB" + (", which is in use and was left" if in_use else ""))
        total, count = total + size * (not in_use), count + (not in_use)
    size = f"{total / 2**20:,.1f} MiB in {count} places"
    return "\n".join([*lines, f"deleted {size}" if delete else f"{size}; --yes deletes them"])


def _delete(path: Path) -> bool:
    if is_entry(path):
        return remove_entry(path)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return True


def _walk(directory: Path) -> Iterator[tuple[Path, str]]:
    """(path, what it is) of all that can be made again from the data."""
    if is_entry(directory):
        yield directory, "tokenised examples"
    elif re.fullmatch(rf"{KEY}\.[^.].*\.tmp", directory.name):
        yield directory, "leftover of a killed build"
    elif is_store(directory):
        yield directory, "token store"
    elif directory.parent.name == FETCHED and (directory / RECORD).is_file():
        yield directory, "fetched from elsewhere"
    else:
        for entry in os.scandir(directory):
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry))
            elif re.fullmatch(rf"{KEY}\.(files|failed)\.json", entry.name):
                yield Path(entry), "record of the cache"
