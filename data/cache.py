"""Encoded examples on disk, so that each node tokenises its files once: the directory `data.cache`.

An entry is a store (data/store.py) named after a hash of everything that determines its content: the bytes of the files, the
tokenizer, how chats are rendered, and the settings of data. It is never changed. After a build the entries that were not used
for longest are removed until all of them have at most `data.cache_gib`. One that is in use is not: each process that reads an
entry holds a shared lock on its `store.json`. `rm -r` of the directory is safe while no run starts or reads from it.

The processes of a node need no process group to share the work. The first takes a lock on the entry and builds it under
a temporary name; the others wait for the lock, and then find the entry.
"""

import errno
import fcntl
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

from transformers import PreTrainedTokenizerBase

from common.durable_files import SUFFIX, publish, write_json
from common.errors import DISK_FULL, UserError
from common.node_lock import node_lock
from data.encoding import ExampleEncoder
from data.files import Reading, expand, hash_files, left_out
from data.store import FORMAT, STORE_FILE, Damaged, Store, is_store, open_store

RECENT = 2 * 10**9  # ns: a file changed so shortly before it was hashed may change again without a new time stamp
ABANDONED = 3600.0  # seconds without a change, after which what looks like a build is removed
KEY = "[0-9a-f]{32}"  # the name of an entry
VERIFIED = 2**28  # bytes: an entry up to this size is read in full when it is opened, which takes about 0.2 s
Stamp = list[int]  # size, times of the last change of content and of the file's entry in ns, inode


def describe(
    paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, encoder: ExampleEncoder, reading: Reading
) -> dict:
    """What determines an entry besides the bytes of the files, as JSON."""
    return {
        "format": FORMAT,
        "tokenizer": encoder.of_tokenizer,
        "special tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},  # for templates
        "encoder": encoder.fingerprint(),
        "reading": asdict(reading),
        "names": [file.name for file in expand(paths)],  # the suffix says how a file is read
        "left out": [str(file) for file in left_out(paths)],  # they stand in the report
    }


class Cache:
    """The entries in one directory. `say` prints a line, on one rank only. limit: GiB of all entries; None: none."""

    def __init__(self, directory: Path, say: Callable[[str], None], limit: float | None = None) -> None:
        self.directory, self.say, self.limit = directory, say, limit
        self.why_not = _why_not_writable(directory)

    def open(self, paths: Sequence[str], description: dict, build: Callable[[Path | None], Store]) -> tuple[Store, str]:
        """(the entry of these files, where it comes from). If there is none, `build(folder)` fills the new directory `folder`.

        Raises the UserError of `build`. A process that waited for one that failed builds for itself, and fails likewise.
        """
        start, files = time.perf_counter(), expand(paths)
        stamps = [_stamp(file) for file in files]
        hashes = self._hashes(files, stamps)
        key = _key([description, hashes])
        entry = self.directory / key
        # Damage in a directory that can be written is said below, by the process that mends it.
        if store := self._existing(entry, self.say if self.why_not else _nothing):
            return store, f"from the cache {entry}, written {store.info['written']}"
        if self.why_not:
            store = build(None)
            why = f" in memory, because {self.directory} cannot be written ({self.why_not}); data.cache can name another one"
            return store, tokenised(store, start) + why
        with node_lock(self.directory, key, self._waiting):
            if store := self._existing(entry, _warn):  # by another process since this one began
                return store, f"{tokenised(store, start)} into {entry}"
            _remove_abandoned(self.directory, key)
            temporary = self.directory / f"{key}.{socket.gethostname()}-{os.getpid()}{SUFFIX}"
            temporary.mkdir()
            try:
                build(temporary)
                for file, stamp in zip(files, stamps, strict=True):
                    if _stamp(file) != stamp:
                        raise UserError(f"{file} changed while it was tokenised; run the same command again")
                self._publish(entry, temporary)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                mend = "free some space there, or name another directory in data.cache"
                raise UserError(f"the disk of {self.directory} is full; {mend}") from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            if store := self._existing(entry, _warn):
                self._shrink()
                return store, f"{tokenised(store, start)} into {entry}"
            raise UserError(f"the new cache entry {entry} cannot be read; name another directory in data.cache")

    def _publish(self, entry: Path, temporary: Path) -> None:
        """Give a new entry its name, unless another node that shares the directory has: its ranks may read theirs."""
        if self._existing(entry, _nothing):
            return
        if entry.is_symlink() or entry.is_file():
            entry.unlink()
        try:
            publish(entry, temporary)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise

    def _existing(self, entry: Path, say: Callable[[str], None]) -> Store | None:
        in_use = lock_entry(entry, fcntl.LOCK_SH)
        if in_use is None:
            return None
        mend = f"remove {entry} and run the same command again"
        try:
            store = open_store(entry, mend, in_use)
            if store.info["entry"] != entry.name:
                raise Damaged(f"it is the entry {store.info['entry']}")
            is_small = sum(shard.size for shard in store.shards) <= VERIFIED
            for shard in store.shards:  # of a large one the ids are checked when they are read
                shard.verify(0 if is_small else shard.starts["documents"])
        except (Damaged, OSError) as error:
            in_use.close()
            say(
                f"the cache entry {entry} is damaged ({str(error).removesuffix(f'; {mend}')}): the data are tokenised again"
            )
            return None
        with suppress(OSError):  # of another user, or on a read-only disk
            os.utime(entry)  # last used now
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

    def _waiting(self) -> None:
        self.say("waiting for another process of this node, which is tokenising the data")

    def _hashes(self, files: list[Path], stamps: list[Stamp]) -> list[str]:
        """The hash of each file's bytes. A file whose size, times and inode are as they were is not read again."""
        name = _key([str(file.absolute()) for file in files])
        record = self.directory / f"{name}.files.json"
        if known := _recorded(record, stamps):
            return known
        if self.why_not:
            return hash_files(files)
        with node_lock(self.directory, name, self._waiting):
            if known := _recorded(record, stamps):
                return known
            now = time.time_ns()
            hashes = hash_files(files)
            with suppress(OSError):
                write_json(record, {"time": now, "stamps": stamps, "hashes": hashes})
            return hashes


def tokenised(store: Store, start: float) -> str:
    """How long it took to build a store since `start`, by `time.perf_counter`."""
    processes = store.info["processes"]
    return f"tokenised in {time.perf_counter() - start:.1f} s" + (f" (on {processes} cores)" if processes > 1 else "")


def is_entry(path: Path) -> bool:
    """Whether a directory is an entry of a cache, of an earlier version too."""
    return bool(re.fullmatch(KEY, path.name)) and (is_store(path) or (path / "examples.json").is_file())


def size_of(path: Path) -> int:
    """Bytes of the files in a directory."""
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
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:
            pass  # no locks here
        return file
    except OSError:
        return None


def _recorded(record: Path, stamps: list[Stamp]) -> list[str] | None:
    """The hashes in a record, if they are those of files with these stamps."""
    known = _read(record)
    time, hashes = known.get("time"), known.get("hashes")
    if known.get("stamps") != stamps or not isinstance(time, int) or not isinstance(hashes, list):
        return None
    if any(time - max(stamp[1:3]) < RECENT for stamp in stamps):
        return None
    return hashes


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _nothing(text: str) -> None:
    """Says nothing."""


def _key(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _stamp(file: Path) -> Stamp:
    status = file.stat()
    # The time of the last change of the file's entry cannot be set back, unlike that of its content.
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read(path: Path) -> dict:
    """The content of a small file, or an empty dictionary if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def _why_not_writable(directory: Path) -> str | None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _remove_abandoned(directory: Path, key: str) -> None:
    """Remove what killed builds left: of this entry on this node, whose lock is held, and old ones."""
    for path in directory.glob(f"*{SUFFIX}"):
        is_ours = path.name.startswith(f"{key}.{socket.gethostname()}-")
        with suppress(OSError):
            newest = max([path.stat().st_mtime, *(file.stat().st_mtime for file in path.glob("*"))])
            if is_ours or time.time() - newest > ABANDONED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
