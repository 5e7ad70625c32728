"""The cache directory `data.cache`: encoded examples on disk, so that each node tokenises its files once.

An entry is a store (data/store.py) named after a hash of everything that determines its content: paths, sizes and time stamps
of the files, the tokenizer, how chats are rendered, and the settings of data. An entry never changes. After a build, the least
recently used entries are removed until the total size is at most `data.cache_gib`. Entries in use are kept: each process that
reads an entry holds a shared lock on its `store.json`. `rm -r` of the directory is safe while no run starts or reads from it.

The processes of a node share the work without a process group. The first takes a lock on the entry and builds it under a
temporary name; the others wait for the lock and then find the entry.
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
from data.encoding import ExampleEncoder
from data.files import Reading, expand, left_out
from data.node_lock import node_lock
from data.store import FORMAT, REBUILD, STORE_FILE, Damaged, Store, is_store, open_store

KEY = "[0-9a-f]{32}"  # pattern of an entry's name
VERIFIED = 2**28  # bytes; an entry up to this size is read completely when it is opened, which takes about 0.2 s


def describe(paths: Sequence[str], encoder: ExampleEncoder, reading: Reading, code: str) -> dict:
    """Return everything but the files that determines an entry, as JSON. code: a digest of the code of `reading.row`."""
    special = encoder.tokenizer.special_tokens_map
    return {
        "format": FORMAT,
        "tokenizer": encoder.tokenizer_digest,
        "special tokens": {name: str(token) for name, token in special.items()},  # templates may use them
        "encoder": encoder.fingerprint(),
        "reading": asdict(reading) | {"code": code},
        "left out": [str(file) for file in left_out(paths)],  # the stored report lists them
    }


class Cache:
    """The entries in one directory. `say` prints a line on one rank. limit: size of all entries in GiB; None: no limit."""

    def __init__(self, directory: Path, say: Callable[[str], None], limit: float | None = None) -> None:
        self.directory, self.say, self.limit = directory, say, limit

    def open(self, paths: Sequence[str], description: dict, build: Callable[[Path | None], Store]) -> tuple[Store, str]:
        """Return (the entry for these files, its origin in words). Without an entry, `build(folder)` fills the new `folder`.

        Raise the UserError of `build`. If the build of another process fails, each process that waited for it builds again.
        """
        start, files = time.perf_counter(), expand(paths)
        stamps = [_stamp(file) for file in files]
        key = hashlib.sha256(json.dumps([description, stamps], sort_keys=True).encode()).hexdigest()[:32]
        entry = self.directory / key
        damage: list[str] = []
        if store := _open_entry(entry, damage.append):
            return store, f"from the cache {store.path}, written {store.info['written']}"
        if why_not := _why_not_writable(self.directory):  # a process that rebuilds the entry reports the damage itself
            for line in damage:
                self.say(line)
            why = f" in memory, because {self.directory} cannot be written ({why_not}); data.cache can name another one"
            return build(None), tokenised(start) + why
        waiting = "waiting for another process of this node, which is tokenising the data"
        lock = functools.partial(node_lock, self.directory, key, lambda: self.say(waiting))
        with lock():
            is_built = not damage and is_store(entry)  # by another process since this one looked
            store = None if is_built else _open_entry(entry, _warn) or self._build(entry, files, stamps, build)
        if is_built:  # open it outside of the lock, because hundreds of processes may do so at once
            store = _open_entry(entry, _warn)
        if not store:
            with lock():
                store = self._build(entry, files, stamps, build)
        return store, f"{tokenised(start)} into {entry}"

    def _build(self, entry: Path, files: list[Path], stamps: list, build: Callable[[Path | None], Store]) -> Store:
        prefix = f"{entry.name}.{socket.gethostname()}-"
        # Leftovers of killed builds: no other build is running, because this process holds the lock on the entry.
        for leftover in self.directory.glob(f"{prefix}*{SUFFIX}"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = self.directory / f"{prefix}{os.getpid()}{SUFFIX}"
        temporary.mkdir()
        try:
            build(temporary)
            for file, stamp in zip(files, stamps, strict=True):
                if _stamp(file) != stamp:
                    raise UserError(f"{file} changed while it was tokenised; run the same command again")
            # On a disk without locks, another node may have published the entry, and its ranks may be reading it.
            if not _open_entry(entry, lambda damage: None):
                if entry.is_symlink() or entry.is_file():  # e.g. a dangling link to another disk
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
        with suppress(FileNotFoundError):  # another process is removing the same entries
            self._shrink()
        return store

    def _shrink(self) -> None:
        """Remove entries until their total size is at most `limit` GiB, and report it."""
        if self.limit is None:
            return
        entries = sorted(filter(is_entry, self.directory.iterdir()), key=lambda path: path.stat().st_mtime)
        sizes = {path: size_of(path) for path in entries}
        total, removed = sum(sizes.values()), []
        for path in entries[:-1]:  # keep the newest, which was just built
            if total > self.limit * 2**30 and remove_entry(path):
                removed.append(path)
                total -= sizes[path]
        if removed or total > self.limit * 2**30:
            _warn(
                f"data.cache_gib={self.limit:g}: removed {len(removed)} entries of {self.directory} that were not used for "
                f"longest ({sum(sizes[path] for path in removed) / 2**30:,.2f} GiB); {total / 2**30:,.2f} GiB are left"
            )


def tokenised(start: float) -> str:
    """Return in words how long a build took since `start`, a value of `time.perf_counter`."""
    return f"tokenised in {time.perf_counter() - start:.1f} s"


def _open_entry(entry: Path, say: Callable[[str], None]) -> Store | None:
    """Open an entry and mark it as used. Return None if there is none, or if it is damaged, which `say` reports."""
    in_use = lock_entry(entry, fcntl.LOCK_SH)
    if in_use is None:
        return None
    try:
        store = open_store(entry, in_use)
        if store.info["entry"] != entry.name:
            raise Damaged(f"it is the entry {store.info['entry']}")
        is_small = sum(shard.size for shard in store.shards) <= VERIFIED
        for shard, info in zip(store.shards, store.info["shards"], strict=True):
            # The token ids of a large entry are checked by CRC-32 when they are read; this finds accidents, not forgeries.
            shard.verify(shard.starts["hashes" if is_small else "documents"])
            if is_small and shard.digest() != info["digest"]:
                raise Damaged(f"the tokens of {shard.path} are not those of {STORE_FILE}")
    except (Damaged, OSError) as error:
        in_use.close()
        why = str(error).removesuffix(f"; {REBUILD}")
        say(f"the cache entry {entry} is damaged ({why}): the data are tokenised again")
        return None
    with suppress(OSError):  # the entry belongs to another user, or the disk is read-only
        os.utime(entry)  # the time of last use
    return store


def is_entry(path: Path) -> bool:
    """Return whether a directory is an entry of a cache."""
    return bool(re.fullmatch(KEY, path.name)) and is_store(path)


def size_of(path: Path) -> int:
    """Return the total size in bytes of the files in a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def remove_entry(path: Path) -> bool:
    """Remove an entry. Return False if a process is using it."""
    lock = lock_entry(path, fcntl.LOCK_EX)
    if lock is None and is_store(path):
        return False
    with suppress(OSError):
        shutil.rmtree(path)
    return not path.exists()


def lock_entry(entry: Path, kind: int) -> BinaryIO | None:
    """Lock an entry: shared to read it, exclusive to remove it. Return None if it does not exist or is locked by another process.

    The lock holds as long as the returned file is open. On a disk without locks every request succeeds.
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
        pass  # this disk has no locks
    return file


def clean_tokens(directory: Path, delete: bool) -> str:
    """List everything that tokenising left in and below a directory: entries, fetched files, killed builds, token stores.

    `delete` deletes all of it except entries in use. Links are not followed. Raise UserError if there is no such directory.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    lines, sizes = [], []
    for root, folders, _ in os.walk(directory):
        path = Path(root)
        if not (kind := _kind_of(path)):
            continue
        folders.clear()
        size, was_left = size_of(path), False
        if delete and is_entry(path):
            was_left = not remove_entry(path)
        elif delete:
            shutil.rmtree(path)
        lines.append(f"{path}: {kind}, {size / 2**20:,.1f} MiB" + ", which is in use and was left" * was_left)
        sizes += [size] * (not was_left)
    total = f"{sum(sizes) / 2**20:,.1f} MiB in {len(sizes)} places"
    return "\n".join([*sorted(lines), f"deleted {total}" if delete else f"{total}; --yes deletes them"])


def _kind_of(directory: Path) -> str:
    """Return the kind of a directory that can be made again from the data; "" for any other directory."""
    from data.remote import FETCHED, RECORD  # imports fsspec, which a run without remote sources does not need

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
    """Return a stamp that changes whenever the file changes. It has the ctime, because the mtime can be set back."""
    status = file.stat()
    return [str(file.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _why_not_writable(directory: Path) -> str | None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as error:
        return error.strerror or str(error)
