"""The disk of a run: shared by the nodes, with room for the checkpoints, and how fast it is."""

import errno
import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from common.errors import UserError
from distributed.disks import (
    check_free_space,
    check_room_for_run,
    check_shared_directory,
    measure_write_speed,
    save_line,
    torchrun_grace,
)
from distributed.process_group import Ranks
from tests.processes import run_ranks

GIB = 2**30
HOST = socket.gethostname()


@pytest.fixture
def ranks():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, 0, torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()


def set_free(monkeypatch, free: float) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(free)))


@pytest.mark.slow
def test_two_nodes_with_their_own_and_with_a_shared_directory(tmp_path) -> None:
    for name in ("node0", "node1", "shared", "node1/only"):
        (tmp_path / name).mkdir()
    done = run_ranks(2, Path(__file__).with_name("disks_worker.py"), tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["shared"] is None and first["no node but one"] is None and first["fits"] is None
    # Each rank names the directory that it was given; in a real run they are the same.
    assert first.pop("other").replace("node0", "node1") == second.pop("other")
    assert first == second
    assert re.match(
        rf"UserError: {tmp_path}/node1 is not the same directory on every node: a file that rank 0 wrote there is not seen "
        rf"by rank 1 on host {HOST} \(No such file or directory\); .* set run.directory to a directory on one$",
        json.loads((tmp_path / "rank1.json").read_text())["other"],
    )
    assert re.match(
        rf"UserError: {tmp_path}/absent/\S+: No such file or directory; set run.directory", first["absent on rank 0"]
    )
    assert first["speed"] > 0
    assert first["small"] == (
        f"UserError: {tmp_path}/shared: the export needs 4.0 GiB, but the disk of host {HOST} has 3.0 GiB free; free some "
        "space and start again: the run continues from its last checkpoint"
    )
    assert "free 1.0 GiB, or set run.directory to another disk" in first["no room"]
    assert (
        len(first["room"]) == 1 and "need 4.0 GiB more" in first["room"][0] and "3.0 GiB are free" in first["room"][0]
    )
    assert first["stale"] == (
        f"UserError: {tmp_path}/shared on host {HOST}: Stale file handle; set run.directory to a disk that can be read"
    )
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert files == {"node0", "node1", "node1/only", "shared", "rank0.json", "rank1.json"}


def test_free_space_is_looked_up_where_the_directory_will_be_and_nothing_is_created(
    tmp_path, ranks, monkeypatch
) -> None:
    seen, usage = [], shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: seen.append(Path(path)) or usage(path)._replace(free=GIB))
    check_free_space(tmp_path / "a" / "b", GIB, ranks, "the export")
    with pytest.raises(UserError, match=r"a/b: the export needs 1.5 GiB, but the disk has 1.0 GiB free"):
        check_free_space(tmp_path / "a" / "b", 3 * 2**29, ranks, "the export")
    monkeypatch.chdir(tmp_path)
    check_free_space(Path("runs/relative"), 1, ranks, "the export")
    assert seen == [tmp_path, tmp_path, tmp_path] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("existing", "free", "problem"),
    [
        (0, 2.0, None),  # the first checkpoint, and the second beside it
        (0, 1.9, "free 102 MiB, or set run.directory"),
        (1, 1.0, None),  # one is there already
        (3, 0.5, "free 512 MiB, or"),  # those that exist do not make room for a new one
    ],
)
def test_a_run_needs_room_for_a_new_checkpoint_beside_an_old_one(
    tmp_path, ranks, monkeypatch, existing, free, problem
) -> None:
    for number in range(existing):
        (tmp_path / "checkpoints" / f"step-{number}").mkdir(parents=True)
        with (tmp_path / "checkpoints" / f"step-{number}" / "data").open("wb") as file:
            file.truncate(GIB)
    set_free(monkeypatch, free * GIB)
    if problem is None:
        check_room_for_run(tmp_path, GIB, 0, 1, ranks)
    else:
        with pytest.raises(UserError, match=problem):
            check_room_for_run(tmp_path, GIB, 0, 1, ranks)


def test_a_warning_counts_kept_and_best_checkpoints_a_new_one_and_the_export(tmp_path, ranks, monkeypatch) -> None:
    set_free(monkeypatch, 4 * GIB)
    assert check_room_for_run(tmp_path, GIB, GIB // 2, 2, ranks) == []  # 2 kept, the best and a new one
    (line,) = check_room_for_run(tmp_path, GIB, GIB // 2, 3, ranks)
    assert "3 checkpoints (run.keep_last), the best one" in line and "(512 MiB) need 5.0 GiB more" in line
    (line,) = check_room_for_run(tmp_path, GIB, 2 * GIB, 2, ranks)  # the export is larger than a new checkpoint
    assert "need 5.0 GiB more" in line and "4.0 GiB are free" in line


def test_the_write_speed_is_measured_with_durable_files_that_are_removed(tmp_path, ranks, monkeypatch) -> None:
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_size) or fsync(descriptor)
    )
    (tmp_path / ".write-speed-7").write_text("of a killed start with more ranks")
    assert 0 < measure_write_speed(tmp_path, ranks, 3 * 2**19) < float("inf")
    set_free(monkeypatch, 2**20)
    measure_write_speed(tmp_path, ranks)  # no more than a quarter of the free space
    assert flushed == [3 * 2**19, 2**18] and not list(tmp_path.iterdir())

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=rf"^rank 0 on host {HOST}: .*No space left on device: set run.directory"):
        measure_write_speed(tmp_path, ranks)
    assert not list(tmp_path.iterdir())


def test_one_node_does_not_look_for_a_token(tmp_path, ranks) -> None:
    check_shared_directory(tmp_path / "absent", ranks)
    assert not list(tmp_path.iterdir())


def test_the_line_says_how_long_a_save_takes_and_what_to_do_if_it_does_not_fit() -> None:
    start = "a save writes 2.0 GiB: about "
    assert save_line(2 * GIB, GIB / 4, None) == f"{start}8.0 s at the 256 MiB/s measured here with a short write"
    assert save_line(2 * GIB, GIB / 4, 30.0).endswith("which fits the 30 s that torchrun grants after a signal")
    assert save_line(2 * GIB, GIB / 5, 30.0).endswith("which fits the 30 s that torchrun grants after a signal")
    slow = save_line(2 * GIB, GIB / 20, 30.0)
    assert slow.startswith(
        f"warning: {start}40 s at the 51 MiB/s measured here with a short write, which does not safely fit the 30 s"
    )
    assert "--shutdown-timeout=130" in slow and "docs/runs.md" in slow
    assert "does not safely fit" in save_line(11 * GIB, GIB, 30.0)  # 11 s, and three times as long if it is busy


def test_torchruns_grace_is_read_from_its_own_variables(monkeypatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "PET_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    assert torchrun_grace() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert torchrun_grace() == 30.0
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "90")
    assert torchrun_grace() == 90.0
    monkeypatch.setenv("PET_SHUTDOWN_TIMEOUT", "120")
    assert torchrun_grace() == 120.0
