"""The disk that a run is on: shared by all nodes, large enough, and fast enough to save within torchrun's grace."""

import math
import os
import secrets
import shutil
import socket
import time
from pathlib import Path

from common.durable_files import write_durably
from common.errors import UserError
from distributed.process_group import Ranks, barrier, gather_objects, read_on_first, world_size_from_environment

# An NFS client may believe for this long that a new directory does not exist (acdirmin=30, nfs(5)).
WAIT_SECONDS = 35.0
PROBE_BYTES = 64 * 2**20  # written on each node to measure the disk
TORCHRUN_GRACE = 30.0  # seconds between SIGTERM and SIGKILL, torchrun's default
RESERVE = 3.0  # times the seconds that the measurement promises
_POLL_SECONDS = 0.1
_TOKEN, _PROBE = ".shared-{}", ".write-speed-{}"


class NotShared(UserError):
    """A directory is not the same one on every node."""


def check_shared_directory(directory: Path, ranks: Ranks, wait_seconds: float = WAIT_SECONDS) -> None:
    """Raise NotShared on all ranks if a node does not see what rank 0 writes to `directory`. A collective.

    Rank 0 writes a token, which the first rank of each node must read within `wait_seconds`; then it is removed. Returns
    at once on one node. The directory must exist.
    """
    if not any(gather_objects(ranks.rank > 0 and ranks.local_rank == 0, ranks)):
        return
    token = read_on_first(lambda: secrets.token_hex(16), ranks)
    path = directory / _TOKEN.format(token)

    def write() -> None:
        try:
            write_durably(path, token)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; set run.directory to a disk that can be written to") from error

    try:
        read_on_first(write, ranks)
        problem = _wait_for(path, token, wait_seconds) if ranks.local_rank == 0 else None
        problems = gather_objects(problem and f"rank {ranks.rank} on host {socket.gethostname()} ({problem})", ranks)
    finally:
        if ranks.rank == 0:
            _remove(directory, _TOKEN)
    if any(problems):
        raise NotShared(
            f"{directory} is not the same directory on every node: a file that rank 0 wrote there is not seen by "
            f"{', '.join(filter(None, problems))}; checkpoints of several nodes need a shared file system: set "
            "run.directory to a directory on one"
        )


def check_free_space(directory: Path, size: int, ranks: Ranks, what: str) -> None:
    """Raise UserError on all ranks if a node has fewer than `size` bytes free where `directory` is or will be.

    A collective: no rank returns before all have entered, so files that rank 0 created before the call exist for all.
    """
    free, host = _free_bytes(directory, ranks)
    if free < size:
        raise UserError(
            f"{directory}: {what} needs {_size(size)}, but the disk{host} has {_size(free)} free; free some space and "
            "start again: the run continues from its last checkpoint"
        )


def check_room_for_run(
    directory: Path, checkpoint_bytes: int, export_bytes: int, keep_last: int, ranks: Ranks
) -> list[str]:
    """Whether the checkpoints and the export of a run will fit on its disk. A collective.

    `directory` is the run's; it may not exist yet. Raises UserError on all ranks if there is no room for two checkpoints,
    those that exist included: the old one stays until the new one is complete. Returns warnings, the same on all ranks,
    if `keep_last` checkpoints, the best one, one being written and the export will not fit.
    """
    free, host = _free_bytes(directory, ranks)

    def used() -> tuple[int, int]:
        return _bytes_under(directory / "checkpoints"), _bytes_under(directory / "export")

    checkpoints, export = read_on_first(used, ranks)
    missing = max(checkpoint_bytes, 2 * checkpoint_bytes - checkpoints) - free
    if missing > 0:
        raise UserError(
            f"{directory}: a checkpoint is {_size(checkpoint_bytes)} and the last one stays until a new one is complete, "
            f"but the disk{host} has {_size(free)} free; free {_size(missing)}, or set run.directory to another disk"
        )
    kept = (keep_last + 1) * checkpoint_bytes  # and the best one
    saving = max(kept + checkpoint_bytes - checkpoints, 0)
    exporting = max(kept - checkpoints, 0) + export_bytes  # an older export stays until the new one is complete
    needed = max(saving, exporting)
    if needed <= free:
        return []
    return [
        f"warning: the disk{host} may become full: {keep_last} checkpoints (run.keep_last), the best one, one being "
        f"written ({_size(checkpoint_bytes)} each) and the export ({_size(export_bytes)}) need {_size(needed)} more in "
        f"{directory}, and {_size(free)} are free; the run stops with a sentence when a save does not fit"
    ]


def measure_write_speed(directory: Path, ranks: Ranks, probe_bytes: int = PROBE_BYTES) -> float:
    """Bytes per second that all ranks together write durably to `directory`. A collective; the directory must exist.

    All ranks write and fsync at the same time: `probe_bytes` on each node in total, or a quarter of the free space if
    that is less. The files are removed. Raises UserError on all ranks if one cannot write.
    """
    free, _ = _free_bytes(directory, ranks)
    size = max(1, min(probe_bytes, free // 4) // world_size_from_environment()[1])
    path = directory / _PROBE.format(ranks.rank)
    block = os.urandom(min(size, 2**20))  # not compressible
    barrier(ranks)
    problem, start = None, time.perf_counter()
    try:
        with path.open("wb") as file:
            for written in range(0, size, len(block)):
                file.write(block[: size - written])
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        problem = f"rank {ranks.rank} on host {socket.gethostname()}: {path}: {error.strerror}"
    finally:
        seconds = time.perf_counter() - start
        path.unlink(missing_ok=True)
    answers = gather_objects((problem, size, seconds), ranks)
    if ranks.rank == 0:
        _remove(directory, _PROBE)  # what a killed start left
    problems = [problem for problem, _, _ in answers if problem]
    if problems:
        raise UserError(f"{'; '.join(problems)}: set run.directory to a disk that every rank can write to")
    return sum(size for _, size, _ in answers) / max(seconds for _, _, seconds in answers)


def torchrun_grace() -> float | None:
    """Seconds that torchrun grants between SIGTERM and SIGKILL; None without torchrun.

    A value given as --shutdown-timeout is not known to the ranks; one in the environment is.
    https://docs.pytorch.org/docs/stable/elastic/run.html
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    default = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", TORCHRUN_GRACE)
    return float(os.environ.get("PET_SHUTDOWN_TIMEOUT", default))


def save_line(checkpoint_bytes: int, bytes_per_second: float, grace_seconds: float | None) -> str:
    """How long a save takes here, and whether it fits the time that torchrun grants after a signal (None: no limit).

    A save fits if one that takes `RESERVE` times as long would: the disk is shared, the measurement is short, and checksums
    come on top. `SaveTimes.line` (distributed/checkpoint.py) says how long each save really took.
    """
    seconds = checkpoint_bytes / bytes_per_second
    line = f"a save writes {_size(checkpoint_bytes)}: about {_seconds(seconds)} at the {_size(bytes_per_second)}/s measured here with a short write"
    if grace_seconds is None:
        return line
    if RESERVE * seconds <= grace_seconds:
        return f"{line}, which fits the {grace_seconds:g} s that torchrun grants after a signal"
    wanted = 10 * math.ceil((RESERVE * seconds + 10) / 10)
    return (
        f"warning: {line}, which does not safely fit the {grace_seconds:g} s that torchrun grants after a signal: start "
        f"torchrun with --shutdown-timeout={wanted}, and let a scheduler send its signal at least that long before its "
        "limit (docs/runs.md); unless that is done already, a run that is stopped loses the steps since its last save"
    )


def _free_bytes(directory: Path, ranks: Ranks) -> tuple[int, str]:
    """(smallest free space over the nodes, " of host NAME" or nothing on one node). A collective."""
    answer = None
    if ranks.local_rank == 0:
        host, free, problem = socket.gethostname(), 0, None
        try:
            existing = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
            free = shutil.disk_usage(existing).free
        except OSError as error:
            problem = f"{directory} on host {host}: {error.strerror}; set run.directory to a disk that can be read"
        answer = free, f" of host {host}", problem
    answers = [answer for answer in gather_objects(answer, ranks) if answer]
    for *_, problem in answers:
        if problem:
            raise UserError(problem)
    smallest, host, _ = min(answers, key=lambda answer: answer[0])
    return smallest, host if len(answers) > 1 else ""


def _bytes_under(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def _remove(directory: Path, name: str) -> None:
    for path in directory.glob(name.format("*")):
        path.unlink(missing_ok=True)


def _wait_for(path: Path, text: str, wait_seconds: float) -> str | None:
    """None when `path` holds `text`, else what is wrong after `wait_seconds`."""
    end = time.monotonic() + wait_seconds
    while True:
        try:
            problem = None if path.read_text() == text else "other content"
        except OSError as error:
            problem = error.strerror
        if problem is None or time.monotonic() >= end:
            return problem
        time.sleep(_POLL_SECONDS)


def _size(num_bytes: float) -> str:
    """1536 * 2**20 -> 1.5 GiB."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
