"""The disk of a run: shared by the nodes, and with room for the checkpoints. Other nodes are pretended."""

import dataclasses
import errno
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch

from common.errors import UnknownFormat, UserError
from distributed import checkpoint, checkpoint_directory
from distributed.checkpoint_directory import check_free_space, check_room_for_run, torchrun_grace
from distributed.process_group import call_on_all, read_on_first
from training import owner
from training.owner import check_shared

GIB = 2**30
HOST = socket.gethostname()


def test_node_without_shared_directory_is_named(tmp_path, ranks, monkeypatch) -> None:
    monkeypatch.setattr(owner, "gather_objects", lambda value, ranks: [None, value])
    file, first_of_node = tmp_path / "token", dataclasses.replace(ranks, rank=1)
    words = f"{tmp_path} is not the same directory on every node: a file that rank 0 wrote there is not seen by rank 1 on host {HOST} "
    with pytest.raises(UserError, match=re.escape(words + "(No such file or directory); ")):
        check_shared(file, "text", first_of_node, 0.2)
    check_shared(file, "text", dataclasses.replace(first_of_node, local_rank=1))  # it does not look
    check_shared(file, "text", ranks)
    file.write_text("older text")
    with pytest.raises(UserError, match=re.escape(words + "(other content); ")):
        check_shared(file, "text", first_of_node, 0.2)
    file.write_text("text")
    check_shared(file, "text", first_of_node)


def test_unreadable_disk_ends_all_ranks(ranks) -> None:
    def read() -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    for call in (call_on_all, read_on_first):
        with pytest.raises(UserError, match="rank 0: Stale file handle"):
            call(read, ranks)


def test_all_ranks_get_the_class_of_an_error(ranks) -> None:
    """Every rank then takes the same branch of `except`. A rank receives the errors of the others pickled."""

    def read() -> None:
        raise UnknownFormat("manifest.json has format 0")

    for call in (call_on_all, read_on_first):
        with pytest.raises(UnknownFormat, match="manifest.json has format 0"):
            call(read, ranks)


@pytest.fixture
def disk(monkeypatch) -> dict:
    """`free`: GiB of the disk. `asked`: the paths whose disk was looked at."""
    found, usage = {"free": 3.0, "asked": []}, shutil.disk_usage("/")

    def disk_usage(path: Path) -> object:
        found["asked"].append(Path(path))
        return usage._replace(free=int(found["free"] * GIB))

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    return found


def test_fullest_node_is_named(tmp_path, ranks, monkeypatch, disk) -> None:
    gather = checkpoint_directory.gather_objects
    monkeypatch.setattr(
        checkpoint_directory, "gather_objects", lambda value, ranks: [*gather(value, ranks), (8 * GIB, "other")]
    )
    check_free_space(tmp_path, 3 * GIB, ranks, "the export")
    words = f"the export needs 4.0 GiB, but the disk of host {HOST} has 3.0 GiB free; free 1.0 GiB, or"
    with pytest.raises(UserError, match=words):
        check_free_space(tmp_path, 4 * GIB, ranks, "the export")


def test_free_space_check_creates_nothing(tmp_path, ranks, monkeypatch, disk) -> None:
    monkeypatch.chdir(tmp_path)
    check_free_space(tmp_path / "a" / "b", 3 * GIB, ranks, "the export")
    check_free_space(Path("runs/relative"), 1, ranks, "the export")
    assert disk["asked"] == [tmp_path, tmp_path] and not list(tmp_path.iterdir())

    def stale(path: object) -> object:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(shutil, "disk_usage", stale)
    words = f"on host {HOST}: Stale file handle; set run.directory to a disk that can be read"
    with pytest.raises(UserError, match=words):
        check_free_space(tmp_path, 1, ranks, "the export")


@pytest.mark.parametrize(
    "existing, free, problem",
    [
        (0, 2.0, None),  # the first checkpoint, and the second beside it
        (0, 1.9, "free 102 MiB, or set run.directory"),
        (1, 1.0, None),  # one is there already
        (3, 0.5, "free 512 MiB, or"),  # existing checkpoints do not make room for a new one
    ],
)
def test_run_needs_room_for_two_checkpoints(tmp_path, ranks, disk, existing, free, problem) -> None:
    for number in range(existing):
        (tmp_path / "checkpoints" / f"step-{number}").mkdir(parents=True)
        with (tmp_path / "checkpoints" / f"step-{number}" / "data").open("wb") as file:
            file.truncate(GIB)
    disk["free"] = free
    if problem is None:
        check_room_for_run(tmp_path, GIB, 0, 1, ranks)
    else:
        with pytest.raises(UserError, match=problem):
            check_room_for_run(tmp_path, GIB, 0, 1, ranks)


def test_read_only_disk_is_refused_at_start(tmp_path, ranks, disk, monkeypatch) -> None:
    (folder := tmp_path / "checkpoints").mkdir()
    disk["free"] = 9.0
    monkeypatch.setattr(checkpoint_directory.os, "access", lambda path, mode: path != folder)
    with pytest.raises(UserError, match=f"{folder} on host {HOST} cannot be written to; look whose it is"):
        check_room_for_run(tmp_path, GIB, 0, 1, ranks)


def test_warning_counts_all_kept_checkpoints(tmp_path, ranks, disk, monkeypatch) -> None:
    there, weight, prune = [], torch.nn.Parameter(torch.zeros(9)), checkpoint.prune

    def counted(folder: Path, *others: object) -> str | None:
        there.append(len(list(folder.glob("step-*"))))
        return prune(folder, *others)

    monkeypatch.setattr(checkpoint, "prune", counted)
    disk["free"] = 5.0
    saver = checkpoint.Saver(tmp_path / "saved", {"w": weight}, torch.optim.SGD([weight], 1.0), ranks, 2)
    for step in range(1, 8):  # the first one is the best
        saver.save({"step": step, "best_step": 1, "proven_step": step - 1})
    assert max(there) == 5  # 2 checkpoints, the best, the proven one before them, and the new one
    fits = check_room_for_run(tmp_path, GIB, GIB // 2, 2, ranks)
    assert fits == "a save writes 1.0 GiB; the disk has 5.0 GiB free"
    aside = tmp_path / "checkpoints" / "step-000001.bad"  # makes no room
    aside.mkdir(parents=True)
    with (aside / "data").open("wb") as file:
        file.truncate(GIB)
    disk["free"] = 4.9
    line = check_room_for_run(tmp_path, GIB, GIB // 2, 2, ranks)
    assert line.startswith(
        "warning: 2 checkpoints (run.keep_last), the best, the last good one, one being written (1.0 GiB each) and "
    )
    assert "(512 MiB) need 5.0 GiB more" in line and "the disk has 4.9 GiB free" in line
    assert "need 6.0 GiB more" in check_room_for_run(tmp_path, GIB, 2 * GIB, 2, ranks)  # a large export


def test_torchrun_grace_is_read_from_environment(monkeypatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "PET_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    assert torchrun_grace() is None
    grace = {"TORCHELASTIC_RUN_ID": 30.0, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": 90.0, "PET_SHUTDOWN_TIMEOUT": 120.0}
    for name, seconds in grace.items():
        monkeypatch.setenv(name, f"{seconds:.0f}")
        assert torchrun_grace() == seconds
