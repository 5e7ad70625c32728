"""A run directory has one owner: the process of rank 0 that writes to it. A second start is refused.

The owner holds a lock of the kernel (flock) on runs/NAME/run.lock. The kernel releases it when the process dies, however it
dies, so a lock is never left behind. NFS forwards it to the server, which releases it when the lease of a dead machine
expires (https://man7.org/linux/man-pages/man2/flock.2.html). The file's text says who the owner is; it does not decide,
except on a file system without locks.
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

from common.errors import UserError
from distributed.disks import check_shared_directory
from distributed.process_group import Ranks, read_on_first

LOCK_FILE = "run.lock"
WAIT_SECONDS = 10.0  # for a process that is about to end, e.g. after a restart by torchrun
_POLL_SECONDS = 0.1
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre without -o flock, NFS without lockd, some FUSE
_held: set[int] = set()  # descriptors with a lock of this process


@contextmanager
def own_directory(directory: Path, ranks: Ranks, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """`with own_directory(...):` owns `directory`, and creates it if it does not exist. Entered by all ranks.

    Prints a warning if the file system has no locks. Raises UserError on all ranks if another process still owns the
    directory after `wait_seconds`, when nothing in it has changed, or if a node does not see it.
    """
    descriptor = -1

    def lock() -> bool:
        """Take the lock on rank 0, and write who owns it. Whether the file system has locks."""
        nonlocal descriptor
        try:
            directory.mkdir(parents=True, exist_ok=True)
            descriptor, has_locks = _lock(directory / LOCK_FILE, wait_seconds)
            _write(descriptor, _description())
        except OSError as error:
            _unlock(descriptor)
            raise UserError(
                f"{error.filename or directory}: {error.strerror}; run.directory must be on a disk that can be written to"
            ) from error
        return has_locks

    try:
        has_locks = read_on_first(lock, ranks)
        check_shared_directory(directory, ranks)
        if not has_locks and ranks.rank == 0:
            print(
                f"warning: the file system of {directory} has no file locks: a start on another host is refused by the text "
                f"of {LOCK_FILE} alone, also after its owner was killed; two starts at the same moment are not noticed"
            )
        yield
    finally:
        if descriptor >= 0:
            with suppress(OSError):  # the text does not decide
                _write(descriptor, "")
            _unlock(descriptor)


def _lock(path: Path, wait_seconds: float) -> tuple[int, bool]:
    """(descriptor of the locked file, whether the file system has locks). UserError if another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited by programs that this process starts
    end = time.monotonic() + wait_seconds
    while True:
        has_locks = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                has_locks, is_free = False, _has_ended(_read(path))
            elif error.errno in (errno.EAGAIN, errno.EACCES):
                is_free = False
            else:
                os.close(descriptor)
                raise
        if is_free:
            _held.add(descriptor)
            return descriptor, has_locks
        if time.monotonic() >= end:
            os.close(descriptor)
            raise UserError(_refusal(path, has_locks))
        time.sleep(_POLL_SECONDS)


def _unlock(descriptor: int) -> None:
    if descriptor in _held:
        _held.remove(descriptor)
        os.close(descriptor)  # releases the lock: no child has a copy


def _forget_in_child() -> None:
    """In a forked child: close its copies of the descriptors, which would keep the lock after the owner's death."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_in_child)


def _description() -> str:
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
    }
    return json.dumps(owner) + "\n"


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
    os.fsync(descriptor)


def _read(path: Path) -> dict:
    """What the owner wrote; empty if it has not yet, or has ended."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _has_ended(owner: dict) -> bool:
    """Whether the owner is known to have ended. Only a process of this host can be looked up."""
    if not owner:
        return True
    if owner.get("host") != socket.gethostname():
        return False
    if owner.get("pid") == os.getpid():
        return not _held  # another process had this number before
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, KeyError, ValueError):
        pass
    return False


def _refusal(path: Path, has_locks: bool) -> str:
    owner = _read(path)
    process = (
        f"process {owner.get('pid')} on host {owner.get('host')}, started {owner.get('started')}"
        if owner
        else "a process that has not written its name yet"
    )
    what = f"{path.parent} belongs to a run that has not ended: {process}; wait for it, stop it, or choose another run.name"
    return what if has_locks else f"{what} (the file system has no locks: if the process has ended, remove {path})"
