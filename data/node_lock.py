"""A lock between the processes of a node, usable before a process group exists."""

import fcntl
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 10.0  # seconds of waiting before a line is printed
# Seconds between two attempts before and after that line: the server of a shared disk may serve hundreds of processes.
POLL, SLOW_POLL = 0.05, 1.0
LOCK_FILE = "lock"


@contextmanager
def node_lock(directory: Path, key: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock `key` (hexadecimal digits) of a directory. Call `waiting` once if the wait is long.

    The operating system releases the lock when the process ends, even if it is killed. Each key is a range of one byte in the
    directory's file `lock`: unlike `flock`, such a lock is not inherited by forked workers
    (https://man7.org/linux/man-pages/man2/fcntl_locking.2.html). If the file system has no locks, the file is in the
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
    yield  # no file system here has locks: each process does the work, under its own temporary name


def _acquire(descriptor: int, position: int, waiting: Callable[[], None]) -> bool:
    """Wait for the lock. Return False if the file system has no locks."""
    start, has_called_waiting = time.monotonic(), False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, position)
            return True
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: another process holds it
            time.sleep(POLL if not has_called_waiting else SLOW_POLL)
        except OSError:
            return False
        if not has_called_waiting and time.monotonic() - start > PATIENCE:
            waiting()
            has_called_waiting = True
