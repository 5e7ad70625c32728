"""Room on the disks that a run writes to."""

import shutil
from pathlib import Path

from common.errors import UserError
from distributed.process_group import Ranks, read_on_first


def check_free_space(directory: Path, size: int, ranks: Ranks, what: str) -> None:
    """Raise UserError on all ranks if fewer than `size` bytes are free where rank 0 writes `directory`. A collective."""

    def free_bytes() -> int:
        directory.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(directory).free

    free = read_on_first(free_bytes, ranks)
    if free < size:
        raise UserError(
            f"{directory}: {what} needs {size / 2**20:,.0f} MiB, but the disk has {free / 2**20:,.0f} MiB free; free some "
            "space and start again: the run continues from its last checkpoint"
        )
