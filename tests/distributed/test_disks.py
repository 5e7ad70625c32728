"""The disk of a run: shared by the nodes, and with room for the checkpoints. Other nodes are pretended."""

import dataclasses
import re
import shutil
import socket
from pathlib import Path

import pytest

from common.errors import UserError
from distributed import disks
from distributed.disks import NotShared, check_free_space, check_room_for_run, check_shared, torchrun_grace

GIB = 2**30
HOST = socket.gethostname()


def set_free(monkeypatch, free: float) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(free)))


def test_a_node_that_does_not_see_the_file_of_rank_0_is_named(tmp_path, ranks, monkeypatch) -> None:
    monkeypatch.setattr(disks, "gather_objects", lambda value, ranks: [None, value])
    file, first_of_node = tmp_path / "token", dataclasses.replace(ranks, rank=1)
    words = f"{tmp_path} is not the same directory on every node: a file that rank 0 wrote there is not seen by rank 1 on host {HOST} "
    with pytest.raises(NotShared, match=re.escape(words + "(No such file or directory); ")):
        check_shared(file, "text", first_of_node, 0.2)
    check_shared(file, "text", dataclasses.replace(first_of_node, local_rank=1))  # it does not look
    check_shared(file, "text", ranks)
    file.write_text("older text")
    with pytest.raises(NotShared, match=re.escape(words + "(other content); ")):
        check_shared(file, "text", first_of_node, 0.2)
    file.write_text("text")
    check_shared(file, "text", first_of_node)


def test_the_fullest_node_decides_and_is_named(tmp_path, ranks, monkeypatch) -> None:
    gather = disks.gather_objects
    monkeypatch.setattr(disks, "gather_objects", lambda value, ranks: [*gather(value, ranks), (8 * GIB, "other")])
    set_free(monkeypatch, 3 * GIB)
    check_free_space(tmp_path, 3 * GIB, ranks, "the export")
    with pytest.raises(
        UserError, match=f"the export needs 4.0 GiB, but the disk of host {HOST} has 3.0 GiB free; free 1.0 GiB, or"
    ):
        check_free_space(tmp_path, 4 * GIB, ranks, "the export")
    line = check_room_for_run(tmp_path / "not" / "yet", GIB, GIB, 2, ranks)
    assert line.startswith(
        "warning: 2 checkpoints (run.keep_last), the best one, one being written (1.0 GiB each) and the export "
    )
    assert "need 4.0 GiB more" in line and f"the disk of host {HOST} has 3.0 GiB free" in line

    def stale(path: object) -> object:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(shutil, "disk_usage", stale)
    with pytest.raises(
        UserError, match=f"on host {HOST}: Stale file handle; set run.directory to a disk that can be read"
    ):
        check_free_space(tmp_path, 1, ranks, "the export")


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
    fits = check_room_for_run(tmp_path, GIB, GIB // 2, 2, ranks)  # 2 kept, the best and a new one
    assert fits == "a save writes 1.0 GiB; the disk has 4.0 GiB free"
    line = check_room_for_run(tmp_path, GIB, GIB // 2, 3, ranks)
    assert "3 checkpoints (run.keep_last), the best one" in line and "(512 MiB) need 5.0 GiB more" in line
    line = check_room_for_run(tmp_path, GIB, 2 * GIB, 2, ranks)  # the export is larger than a new checkpoint
    assert "need 5.0 GiB more" in line and "the disk has 4.0 GiB free" in line


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
