"""A run directory has one owner: the process of rank 0 that writes to it. A second start is refused.

The owner holds a lock of the kernel (flock) on runs/NAME/run.lock. The kernel releases it when the process dies, however it
dies, so a lock is never left behind. NFS forwards it to the server, which releases it when the lease of a dead machine
expires (https://man7.org/linux/man-pages/man2/flock.2.html). The file's text says who the owner is: for the sentence of a
refusal, and for the other nodes, which must see it too.
"""

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from common.errors import UserError
from distributed.disks import check_shared
from distributed.process_group import Ranks, read_on_first

LOCK_FILE = "run.lock"


@contextmanager
def own_directory(directory: Path, ranks: Ranks) -> Iterator[None]:
    """`with own_directory(...):` owns `directory`, and creates it if it does not exist. Entered by all ranks.

    Prints a warning if the file system has no locks. Raises UserError on all ranks if another process owns the directory, when
    nothing in it has changed, or if a node does not see it.
    """
    with ExitStack() as held:  # on rank 0: the locked file; closing it releases the lock

        def lock() -> str:
            """Take the lock, and write who owns it. Returns what it wrote."""
            path = directory / LOCK_FILE
            try:
                directory.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(
                    path.open("a", encoding="utf-8")
                )  # no program that this process starts inherits it
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError) as error:
                    raise UserError(_refusal(path)) from error
                except OSError:  # Lustre without -o flock, NFS without lockd, some FUSE
                    print(
                        f"warning: the file system of {directory} has no file locks: a second start of this run is not "
                        "noticed, and two would overwrite each other's checkpoints"
                    )
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

        check_shared(directory / LOCK_FILE, read_on_first(lock, ranks), ranks)
        yield


def _refusal(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        process = f"process {owner['pid']} on host {owner['host']}, started {owner['started']}"
    except (OSError, ValueError):
        process = "a process that has not written its name yet"
    return f"{path.parent} belongs to a run that has not ended: {process}; wait for it, stop it, or choose another run.name"
