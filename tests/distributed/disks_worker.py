"""Checks of the disk on several ranks that may see different directories, as nodes without a shared file system do.

    torchrun --nproc_per_node=2 tests/distributed/disks_worker.py FOLDER

Both ranks are the first of their node. Each writes what it got to FOLDER/rank<rank>.json.
"""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.errors import UserError, exit_process
from distributed.disks import check_free_space, check_room_for_run, check_shared
from distributed.process_group import start_process_group

folder = Path(sys.argv[1])
ranks = dataclasses.replace(start_process_group(), local_rank=0)
os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
here = folder / f"node{ranks.rank}"
shared = folder / "shared"
answers = {}


def answer(name: str, check) -> None:
    try:
        answers[name] = check()
    except UserError as error:
        answers[name] = f"UserError: {error}"


usage = shutil.disk_usage


def disk_of_node(path: object) -> object:
    return usage(folder)._replace(free=(8 if ranks.rank == 0 else 3) * 2**30)


if ranks.rank == 0:
    (shared / "token").write_text("text")
    (here / "token").write_text("text")
answer("shared", lambda: check_shared(shared / "token", "text", ranks, 10.0))
answer("other", lambda: check_shared(here / "token", "text", ranks, 0.2))
answer("older", lambda: check_shared(shared / "token", "newer text", ranks, 0.2))
same_node = dataclasses.replace(ranks, local_rank=ranks.rank)
answer("no node but one", lambda: check_shared(here / "token", "text", same_node, 0.2))
shutil.disk_usage = disk_of_node
answer("small", lambda: check_free_space(shared, 4 * 2**30, ranks, "the export"))
answer("fits", lambda: check_free_space(shared, 3 * 2**30, ranks, "the export"))
answer("no room", lambda: check_room_for_run(folder / "not" / "yet", 2 * 2**30, 2**30, 2, ranks))
answer("room", lambda: check_room_for_run(folder / "not" / "yet", 2**30, 2**30, 2, ranks))
if ranks.rank == 1:

    def broken_disk(path: object) -> object:
        raise OSError(116, "Stale file handle")

    shutil.disk_usage = broken_disk
answer("stale", lambda: check_free_space(shared, 1, ranks, "the export"))
(folder / f"rank{ranks.rank}.json").write_text(json.dumps(answers))
exit_process(0)
