"""Encoded examples on disk, so that each node tokenises its files once: the directory `data.cache`.

An entry is a store (data/store.py) named after a hash of everything that determines its content: paths, sizes and time stamps
of the files, the tokenizer, how chats are rendered, and the settings of data. It is never changed. After a build the entries
that were not used for longest are removed until all of them have at most `data.cache_gib`. One that is in use is not: each
process that reads an entry holds a shared lock on its `store.json`. `rm -r` of the directory is safe while no run starts or
reads from it.

The processes of a node need no process group to share the work. The first takes a lock on the entry and builds it under
a temporary name; the others wait for the lock, and then find the entry.
"""

import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from common.durable_files import SUFFIX, publish
from common.errors import DISK_FULL, UserError
from common.node_lock import node_lock
from data.encoding import ExampleEncoder
from data.files import Reading, expand, left_out
from data.store import FORMAT, REBUILD, STORE_FILE, Damaged, Store, is_store, open_store

KEY = "[0-9a-f]{32}"  # the name of an entry
VERIFIED = 2**28  # bytes: an entry up to this size is read in full when it is opened, which takes about 0.2 s


def describe(paths: Sequence[str], encoder: ExampleEncoder, reading: Reading, code: str) -> dict:
    """What determines an entry besides the files, as JSON. code: a digest of the code of `reading.row`."""
    special = encoder.tokenizer.special_tokens_map
    return {
        "format": FORMAT,
        "tokenizer": encoder.of_tokenizer,
        "special tokens": {name: str(token) for name, token in special.items()},  # for templates
        "encoder": encoder.fingerprint(),
        "reading": asdict(reading) | {"code": code},
        "left out": [str(file) for file in left_out(paths)],  # they stand in the report
    }


class Cache:
    """The entries in one directory. `say` prints a line, on one rank only. limit: GiB of all entries; None: none."""

    def __init__(self, directory: Path, say: Callable[[str], None], limit: float | None = None) -> None:
        self.directory, self.say, self.limit = directory, say, limit

    def open(self, paths: Sequence[str], description: dict, build: Callable[[Path | None], Store]) -> tuple[Store, str]:
        """(the entry of these files, where it comes from). If there is none, `build(folder)` fills the new directory `folder`.

        Raises the UserError of `build`. A process that waited for one that failed builds for itself, and fails likewise.
        """
        start, files = time.perf_counter(), expand(paths)
        stamps = [_stamp(file) for file in files]
        key = hashlib.sha256(json.dumps([description, stamps], sort_keys=True).encode()).hexdigest()[:32]
        entry = self.directory / key
        damage: list[str] = []
        if store := _open_entry(entry, damage.append):
            return store, f"from the cache {store.path}, written {store.info['written']}"
        if why_not := _why_not_writable(self.directory):  # otherwise the process says the damage that mends it
            for line in damage:
                self.say(line)
            why = f" in memory, because {self.directory} cannot be written ({why_not}); data.cache can name another one"
            return build(None), tokenised(start) + why
        waiting = "waiting for another process of this node, which is tokenising the data"
        lock = functools.partial(node_lock, self.directory, key, lambda: self.say(waiting))
        with lock():
            is_built = not damage and is_store(entry)  # by another process since this one began
            store = None if is_built else _open_entry(entry, _warn) or self._build(entry, files, stamps, build)
        if is_built:  # hundreds of processes may open it, and not one after the other
            store = _open_entry(entry, _warn)
        if not store:
            with lock():
                store = self._build(entry, files, stamps, build)
        return store, f"{tokenised(start)} into {entry}"

    def _build(self, entry: Path, files: list[Path], stamps: list, build: Callable[[Path | None], Store]) -> Store:
        ours = f"{entry.name}.{socket.gethostname()}-"
        for left in self.directory.glob(
            f"{ours}*{SUFFIX}"
        ):  # by a killed build, because the lock on the entry is held here
            shutil.rmtree(left, ignore_errors=True)
        temporary = self.directory / f"{ours}{os.getpid()}{SUFFIX}"
        temporary.mkdir()
        try:
            build(temporary)
            for file, stamp in zip(files, stamps, strict=True):
                if _stamp(file) != stamp:
                    raise UserError(f"{file} changed while it was tokenised; run the same command again")
            # Without locks another node that shares the directory may have published it: its ranks may read theirs.
            if not _open_entry(entry, lambda damage: None):
                if entry.is_symlink() or entry.is_file():  # a link to another disk that dangles
                    entry.unlink()
                publish(entry, temporary)
        except OSError as error:
            if error.errno in DISK_FULL:
                mend = "free some space there, or name another directory in data.cache"
                raise UserError(f"the disk of {self.directory} is full; {mend}") from error
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if not (store := _open_entry(entry, _warn)):
            raise UserError(f"the new cache entry {entry} cannot be read; name another directory in data.cache")
        with suppress(FileNotFoundError):  # another process removes the same entries
            self._shrink()
        return store

    def _shrink(self) -> None:
        """Remove entries until all of them have at most `limit` GiB, and say so."""
        if self.limit is None:
            return
        entries = sorted(filter(is_entry, self.directory.iterdir()), key=lambda path: path.stat().st_mtime)
        sizes = {path: size_of(path) for path in entries}
        total, removed = sum(sizes.values()), []
        for path in entries[:-1]:  # the last is the one that was built
            if total > self.limit * 2**30 and remove_entry(path):
                removed.append(path)
                total -= sizes[path]
        if removed or total > self.limit * 2**30:
            _warn(
                f"data.cache_gib={self.limit:g}: removed {len(removed)} entries of {self.directory} that were not used for "
                f"longest ({sum(sizes[path] for path in removed) / 2**30:,.2f} GiB); {total / 2**30:,.2f} GiB are left"
            )


def tokenised(start: float) -> str:
    """How long it took to build a store since `start`, by `time.perf_counter`."""
    return f"tokenised in {time.perf_counter() - start:.1f} s"


def _open_entry(entry: Path, say: Callable[[str], None]) -> Store | None:
    """The entry at a path, in use as long as it is referred to. None if there is none, or it is damaged, of which `say` hears."""
    in_use = lock_entry(entry, fcntl.LOCK_SH)
    if in_use is None:
        return None
    try:
        store = open_store(entry, in_use)
        if store.info["entry"] != entry.name:
            raise Damaged(f"it is the entry {store.info['entry']}")
        is_small = sum(shard.size for shard in store.shards) <= VERIFIED
        for shard, info in zip(store.shards, store.info["shards"], strict=True):
            # Of a large one the ids are checked when they are read, and by CRC-32 alone, which anybody can mend.
            shard.verify(shard.starts["hashes" if is_small else "documents"])
            if is_small and shard.digest() != info["digest"]:
                raise Damaged(f"the tokens of {shard.path} are not those of {STORE_FILE}")
    except (Damaged, OSError) as error:
        in_use.close()
        why = str(error).removesuffix(f"; {REBUILD}")
        say(f"the cache entry {entry} is damaged ({why}): the data are tokenised again")
        return None
    with suppress(OSError):  # of another user, or on a read-only disk
        os.utime(entry)  # last used now
    return store


def is_entry(path: Path) -> bool:
    """Whether a directory is an entry of a cache."""
    return bool(re.fullmatch(KEY, path.name)) and is_store(path)


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files in a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def remove_entry(path: Path) -> bool:
    """Remove an entry, unless a process is using it: then False."""
    lock = lock_entry(path, fcntl.LOCK_EX)
    if lock is None and is_store(path):
        return False
    with suppress(OSError):
        shutil.rmtree(path)
    return not path.exists()


def lock_entry(entry: Path, kind: int) -> BinaryIO | None:
    """A lock on an entry: shared to read it, exclusive to remove it. None if there is no entry, or it is locked otherwise.

    It is held as long as the file that is returned is open. A disk without locks gives all of them.
    """
    try:
        file = (entry / STORE_FILE).open("rb" if kind == fcntl.LOCK_SH else "r+b")
    except OSError:
        return None
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        pass  # no locks here
    return file


def clean_tokens(directory: Path, delete: bool) -> str:
    """Lines that name what tokenising has left in a directory and below it: entries, what was fetched, killed builds, token stores.

    `delete` deletes them, but no entry that a process is using. Links are not followed. Raises UserError without a directory.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    lines, sizes = [], []
    for root, folders, _ in os.walk(directory):
        path = Path(root)
        if not (what := _what(path)):
            continue
        folders.clear()
        size, was_left = size_of(path), False
        if delete and is_entry(path):
            was_left = not remove_entry(path)
        elif delete:
            shutil.rmtree(path)
        lines.append(f"{path}: {what}, {size / 2**20:,.1f} MiB" + ", which is in use and was left" * was_left)
        sizes += [size] * (not was_left)
    total = f"{sum(sizes) / 2**20:,.1f} MiB in {len(sizes)} places"
    return "\n".join([*sorted(lines), f"deleted {total}" if delete else f"{total}; --yes deletes them"])


def _what(directory: Path) -> str:
    """What a directory is, if all of it can be made again from the data."""
    from data.remote import FETCHED, RECORD  # a run imports it for a source that lies elsewhere only

    if is_entry(directory):
        return "tokenised examples"
    if re.fullmatch(rf"{KEY}\.[^.].*\.tmp", directory.name):
        return "leftover of a killed build"
    if is_store(directory):
        return "token store"
    is_fetched = directory.parent.name == FETCHED and (directory / RECORD).is_file()
    return "fetched from elsewhere" if is_fetched else ""


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _stamp(file: Path) -> list:
    """What changes with the content of a file. The time of its entry's last change cannot be set back, unlike that of its content."""
    status = file.stat()
    return [str(file.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _why_not_writable(directory: Path) -> str | None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as error:
        return error.strerror or str(error)
