"""The disk that a run is on: shared by all nodes, and large enough. And how long torchrun lets a save take."""

import os
import shutil
import socket
import time
from pathlib import Path

from common.errors import UserError
from distributed.process_group import Ranks, call_on_all, gather_objects, read_on_first

# An NFS client may believe for this long that a new directory does not exist (acdirmin=30, nfs(5)).
WAIT_SECONDS = 35.0
ALSO_KEPT = 2  # checkpoints beside run.keep_last: the best one, and a proven one before them (`prune`)
TORCHRUN_GRACE = 30.0  # seconds between SIGTERM and SIGKILL, torchrun's default
_POLL_SECONDS = 0.1


def check_shared(path: Path, text: str, ranks: Ranks, wait_seconds: float = WAIT_SECONDS) -> None:
    """Raise UserError on all ranks if a node does not see the `text` that rank 0 has written to the file `path`. A collective.

    The first rank of each node reads the file until it has the text, for `wait_seconds`.
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
    problems = [one for one in gather_objects(here, ranks) if one]
    if problems:
        raise UserError(
            f"{path.parent} is not the same directory on every node: a file that rank 0 wrote there is not seen by "
            f"{', '.join(problems)}; checkpoints of several nodes need a shared file system: set run.directory to a "
            "directory on one"
        )


def check_free_space(directory: Path, size: int, ranks: Ranks, what: str) -> None:
    """Raise UserError on all ranks if a node has fewer than `size` bytes free where `directory` is or will be.

    A collective: no rank returns before all have entered, so files that rank 0 created before the call exist for all.
    """
    _check(directory, size, ranks, f"{what} needs {_size(size)}")


def check_room_for_run(directory: Path, checkpoint_bytes: int, export_bytes: int, keep_last: int, ranks: Ranks) -> str:
    """A line that says whether the checkpoints and the export of a run will fit on its disk. A collective.

    `directory` is the run's; it may not exist yet. Raises UserError on all ranks if there is no room for a new checkpoint beside
    the last one. The line is a warning if all that is kept (`prune`), a checkpoint being written and the export will not fit.
    """
    saved = directory.glob("checkpoints/step-*[0-9]")  # not those that were set aside, which no save removes
    there = read_on_first(lambda: sum(map(_bytes_under, saved)), ranks)
    what = f"a checkpoint is {_size(checkpoint_bytes)} and the last one stays until a new one is complete"
    free, said = _check(directory / "checkpoints", max(checkpoint_bytes, 2 * checkpoint_bytes - there), ranks, what)
    kept = (keep_last + ALSO_KEPT) * checkpoint_bytes
    # An older export, too, stays until the new one is complete.
    needed = max(kept + checkpoint_bytes - there, max(kept - there, 0) + export_bytes, 0)
    if needed <= free:
        return f"a save writes {_size(checkpoint_bytes)}; {said}"
    return (
        f"warning: {keep_last} checkpoints (run.keep_last), the best, the last good one, one being written "
        f"({_size(checkpoint_bytes)} each) and the export ({_size(export_bytes)}) need {_size(needed)} more in {directory}, and "
        f"{said}; the run stops with a sentence when a save does not fit"
    )


def torchrun_grace() -> float | None:
    """Seconds that torchrun grants between SIGTERM and SIGKILL; None without torchrun.

    A value given as --shutdown-timeout is not known to the ranks; one in the environment is.
    https://docs.pytorch.org/docs/stable/elastic/run.html
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    default = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", TORCHRUN_GRACE)
    return float(os.environ.get("PET_SHUTDOWN_TIMEOUT", default))


def _check(directory: Path, size: int, ranks: Ranks, what: str) -> tuple[int, str]:
    """(smallest free space over the nodes, the words for it). Raises UserError on all ranks if it is below `size`."""

    def free() -> tuple[int, str] | None:
        if ranks.local_rank:
            return None
        host = socket.gethostname()
        try:
            existing = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
            space = shutil.disk_usage(existing).free
        except OSError as error:
            raise UserError(
                f"{directory} on host {host}: {error.strerror}; set run.directory to a disk that can be read"
            ) from error
        if not os.access(existing, os.W_OK):  # else the first save would notice, after the steps up to it
            raise UserError(
                f"{existing} on host {host} cannot be written to; look whose it is, and whether its disk is read-only"
            )
        return space, host

    answers = [answer for answer in gather_objects(call_on_all(free, ranks), ranks) if answer]
    smallest, host = min(answers)
    said = f"the disk{f' of host {host}' if len(answers) > 1 else ''} has {_size(smallest)} free"
    if smallest < size:
        raise UserError(
            f"{directory}: {what}, but {said}; free {_size(size - smallest)}, or set run.directory to another disk, and start "
            "again: the run continues from its last checkpoint"
        )
    return smallest, said


def _bytes_under(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def _size(num_bytes: float) -> str:
    """1536 * 2**20 -> 1.5 GiB."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"
