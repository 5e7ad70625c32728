"""A lock among the processes of a node, before there is a process group."""

import fcntl
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 10.0  # seconds of waiting before a line is printed
POLL, SLOW_POLL = 0.05, 1.0  # seconds; after that line: the server of a shared disk answers hundreds of processes
LOCK_FILE = "lock"


@contextmanager
def node_lock(directory: Path, key: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock `key` (hexadecimal digits) of a directory. Calls `waiting` once if that takes long.

    The operating system releases it when the process ends, even if it is killed. A range of one byte in the file `lock` of
    the directory stands for a key: unlike `flock`, such a lock is not inherited by forked workers
    (https://man7.org/linux/man-pages/man2/fcntl_locking.2.html). Where the file system has no locks, the file is in the
    temporary directory of the node. A process may hold only one lock of a directory at a time.
    """
    here = f"tokens-{os.getuid()}-{zlib.crc32(os.fsencode(directory.absolute())):08x}.lock"
    for path in (directory / LOCK_FILE, Path(tempfile.gettempdir()) / here):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError:
            continue
        try:
            if _acquire(descriptor, int(key[:12], 16), waiting):
                yield
                return
        finally:
            os.close(descriptor)
    yield  # no lock anywhere: each process does the work, under a name of its own


def _acquire(descriptor: int, position: int, waiting: Callable[[], None]) -> bool:
    """Wait for the lock. False if the file system has none."""
    start, was_told = time.monotonic(), False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, position)
            return True
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: another process has it
            time.sleep(POLL if not was_told else SLOW_POLL)
        except OSError:
            return False
        if not was_told and time.monotonic() - start > PATIENCE:
            waiting()
            was_told = True
