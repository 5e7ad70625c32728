"""The owner of a run directory: the process of rank 0 that writes to it. A second start is refused.

The owner holds a kernel lock (flock) on runs/NAME/run.lock. The kernel releases the lock when the process dies for any reason,
so no lock is left behind. NFS forwards it to the server, which releases it when the lease of a dead machine expires
(https://man7.org/linux/man-pages/man2/flock.2.html). The text of the file names the owner, for the message of a refusal and for
the other nodes, which must see it too.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from common.errors import UserError
from distributed.process_group import Ranks, gather_objects, read_on_first

LOCK_FILE = "run.lock"
# An NFS client may believe for this long that a new directory does not exist (acdirmin=30, nfs(5)).
SHARED_SECONDS = 35.0
WAIT_SECONDS = 10.0  # for a process that is about to end, e.g. after a restart by torchrun
_POLL_SECONDS = 0.1
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre without -o flock, NFS without lockd, some FUSE
_held: set[TextIO] = set()  # the locked files of this process


@contextmanager
def own_directory(directory: Path, ranks: Ranks, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Own `directory` within this context, and create it if it does not exist. Every rank must enter it.

    Print a warning if the file system has no locks. Raise UserError on all ranks if another process still owns the directory
    after `wait_seconds`, in which case this start changes nothing in it, or if a node does not see it.
    """
    file: TextIO | None = None

    def lock() -> str:
        """Take the lock on rank 0, write the owner into the file, and return this text."""
        nonlocal file
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = _lock(directory / LOCK_FILE, wait_seconds)
            owner = {"host": socket.gethostname(), "pid": os.getpid()}
            owner |= {"started": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv}
            text = json.dumps(owner)
            file.truncate(0)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            return text
        except OSError as error:
            raise UserError(
                f"{error.filename or directory}: {error.strerror}; run.directory must be on a disk that can be written to"
            ) from error

    try:
        check_shared(directory / LOCK_FILE, read_on_first(lock, ranks), ranks)
        yield
    finally:
        if file:
            with suppress(OSError):  # the lock decides, not the text
                file.truncate(0)
            _held.discard(file)
            file.close()  # releases the lock: no child has a copy


def check_shared(path: Path, text: str, ranks: Ranks, wait_seconds: float = SHARED_SECONDS) -> None:
    """Raise UserError on all ranks if a node does not see the `text` that rank 0 has written to the file `path`.

    Every rank must call this. The first rank of each node reads the file until it has the text, for up to `wait_seconds`.
    """
    problem, end = None, time.monotonic() + wait_seconds
    while ranks.rank > 0 and ranks.local_rank == 0:
        try:
            problem = None if path.read_text(encoding="utf-8") == text else "other content"
        except OSError as error:
            problem = error.strerror
        if problem is None or time.monotonic() >= end:
            break
        time.sleep(_POLL_SECONDS)
    here = problem and f"rank {ranks.rank} on host {socket.gethostname()} ({problem})"
    problems = [problem for problem in gather_objects(here, ranks) if problem]
    if problems:
        raise UserError(
            f"{path.parent} is not the same directory on every node: a file that rank 0 wrote there is not seen by "
            f"{', '.join(problems)}; checkpoints of several nodes need a shared file system: set run.directory to a "
            "directory on one"
        )


def _lock(path: Path, wait_seconds: float) -> TextIO:
    """Return the open, locked file. Raise UserError if another process holds the lock."""
    file = path.open("a", encoding="utf-8")  # not inherited by programs that this process starts
    end = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError) as error:
            if time.monotonic() >= end:
                file.close()
                raise UserError(_refusal(path)) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"warning: the file system of {path.parent} has no file locks: a second start of this run is not noticed, "
                "and two would overwrite each other's checkpoints"
            )
            break
        time.sleep(_POLL_SECONDS)
    _held.add(file)
    return file


def _forget_in_child() -> None:
    """Close a forked child's copies of the files, which would keep the lock after the owner's death."""
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_forget_in_child)


def _refusal(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        process = f"process {owner['pid']} on host {owner['host']}, started {owner['started']}"
    except (OSError, ValueError):
        process = "a process that has not written its name yet"
    return f"{path.parent} belongs to a run that has not ended: {process}; wait for it, stop it, or choose another run.name"
