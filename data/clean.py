"""Find what tokenising has left on disk: entries of the cache `data.cache`, leftovers of killed builds, and token stores."""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from data.example_store import ENTRY_FILE
from data.token_store import is_store

KEY = "[0-9a-f]{32}"  # the name of an entry of the cache (data/example_cache.py)


@dataclass(frozen=True)
class Tokens:
    """A file or directory that can be made again from the data. size: bytes."""

    path: Path
    what: str
    size: int


def clean_tokens(directory: Path, delete: bool) -> str:
    """Lines that name all of them in a directory and below it; `delete` deletes them. Raises UserError without a directory.

    Links are not followed.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    found = sorted(_walk(directory), key=lambda tokens: tokens.path)
    for tokens in found if delete else ():
        shutil.rmtree(tokens.path) if tokens.path.is_dir() else tokens.path.unlink()
    total = f"{sum(tokens.size for tokens in found) / 2**20:,.1f} MiB in {len(found)} places"
    last = f"deleted {total}" if delete else f"{total}; --yes deletes them"
    return "\n".join([*(f"{one.path}: {one.what}, {one.size / 2**20:,.1f} MiB" for one in found), last])


def _walk(directory: Path) -> Iterator[Tokens]:
    if what := _what(directory):
        yield Tokens(directory, what, sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()))
        return
    for entry in os.scandir(directory):
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry))
        elif re.fullmatch(rf"{KEY}\.(files|failed)\.json", entry.name):
            yield Tokens(Path(entry), "record of the cache", entry.stat(follow_symlinks=False).st_size)


def _what(directory: Path) -> str | None:
    if is_store(directory):
        return "token store"
    if re.fullmatch(KEY, directory.name) and (directory / ENTRY_FILE).is_file():
        return "tokenised examples"
    if re.fullmatch(rf"{KEY}\.[^.].*\.tmp", directory.name):
        return "leftover of a killed build"
    return None
