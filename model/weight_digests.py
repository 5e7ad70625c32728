"""SHA-256 of weight files, remembered by the file's path, size and time of change."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from common.sha256 import sha256_of_all
from data.node_lock import node_lock

MEMORY = Path("artifacts/sha256")  # one small file per digest
LONG = 2**31  # bytes; a longer read is announced


def remembered_sha256(
    paths: Iterable[Path], say: Callable[[str], None] = lambda text: None, memory: Path = MEMORY
) -> dict[Path, str]:
    """Return the SHA-256 of each file, and read only files that have changed since they were last read.

    One process of a node reads; the others wait. A file counts as changed if its path, size, inode, mtime or ctime differs.
    Damage by the disk itself changes none of these. `say` is called before a long wait.
    """
    paths = list(paths)

    def recalled() -> dict[Path, str]:
        return {path: digest for path in paths if (digest := _recall(_place(memory, path)))}

    if len(known := recalled()) == len(paths):  # before taking the lock, for which hundreds of processes would queue
        return known
    try:
        memory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say(f"warning: {memory} cannot be made ({error.strerror}): every process of every start reads all weights")
    key = hashlib.sha256(os.fsencode("\n".join(map(str, paths)))).hexdigest()
    with node_lock(memory, key, lambda: say("waiting for another process, which computes the SHA-256 of the weights")):
        known = recalled()
        unread = [path for path in paths if path not in known]
        size = sum(path.stat().st_size for path in unread)
        if size > LONG:
            say(f"computing the SHA-256 of {size / 2**30:.1f} GiB, once for these files")
        for path, digest in sha256_of_all(unread).items():
            _remember(_place(memory, path), digest, say)
            known[path] = digest
    return {path: known[path] for path in paths}


def _place(memory: Path, path: Path) -> Path:
    """Return the file that remembers a digest. Its name changes when the file at `path` changes."""
    path = path.resolve()
    stat = path.stat()
    state = (str(path), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
    return memory / hashlib.sha256(repr(state).encode()).hexdigest()[:32]


def _recall(place: Path) -> str | None:
    try:
        text = place.read_text()
    except OSError:
        return None
    return text if re.fullmatch("[0-9a-f]{64}", text) else None


def _remember(place: Path, digest: str, say: Callable[[str], None]) -> None:
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(digest)
        temporary.replace(place)
    except OSError as error:
        say(f"warning: {place.parent} cannot be written ({error.strerror}): the next start reads these weights again")
