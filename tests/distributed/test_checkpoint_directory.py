"""Manifests, damaged checkpoints, `run.resume=previous`, pruning and setting aside."""

import errno
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from common.errors import UserError
from common.sha256 import sha256
from configs.config import Optimizer
from distributed.checkpoint import Saver, load_parameters
from distributed.checkpoint_directory import (
    CheckpointReader,
    check_whole,
    complete_checkpoints,
    find_checkpoint,
    latest_checkpoint,
    prune,
    read_manifest,
    replace_state,
    set_aside_after,
    tensors_digest,
)
from distributed.optimizer import adamw
from distributed.process_group import Ranks
from model.weights import tensors_of_checkpoint
from tests.distributed.launch import flip_bit
from tests.forged import Touch, replace_file


def no_record(kind: str, **content: object) -> str:
    return ""


def weight_and_optimizer(value: float, size: int = 5000) -> tuple[dict, torch.optim.Optimizer]:
    weight = torch.nn.Parameter(torch.full((size,), value))
    return {"weight": weight}, adamw({"weight": weight}, Optimizer(1.0), seed=0)


def save(folder: Path, ranks: Ranks, step: int, keep_last: int = 9, **state: object) -> None:
    Saver(folder, *weight_and_optimizer(float(step)), ranks, keep_last).save({"step": step, **state})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_newest_best_and_proven_checkpoints_are_kept(tmp_path, ranks) -> None:
    for step in range(1, 7):
        save(tmp_path, ranks, step, keep_last=2, best_step=2, proven_step=3 if step < 6 else 4)
    # Steps 5 and 6 are the newest; the state of step 5 names the proven step 3, the state of step 6 the proven step 4.
    assert names(tmp_path) == [f"step-00000{n}" for n in (2, 3, 4, 5, 6)]
    assert latest_checkpoint(tmp_path).name == "step-000006"


def test_checkpoint_removed_while_read_is_one_sentence(tmp_path, ranks) -> None:
    """scripts/export.py reads a large one for minutes, while the run saves and prunes."""
    save(tmp_path, ranks, 1, keep_last=1)
    weights = tensors_of_checkpoint(tmp_path / "step-000001")
    assert weights.read("weight")[0] == 1.0
    save(tmp_path, ranks, 2, keep_last=1)
    with pytest.raises(UserError, match="step-000001 is gone: its run has removed it; read a newer checkpoint"):
        weights.read("weight")


def test_save_reads_no_manifests_without_pruning(tmp_path, ranks, monkeypatch) -> None:
    monkeypatch.setattr("distributed.checkpoint_directory.read_manifest", lambda path: pytest.fail(f"{path} was read"))
    for step in range(1, 4):
        save(tmp_path, ranks, step, keep_last=1000)
    assert len(complete_checkpoints(tmp_path)) == 3


def test_manifest_has_every_file_and_the_state(tmp_path, ranks) -> None:
    save(tmp_path, ranks, 3, best_loss=0.1)
    checkpoint = tmp_path / "step-000003"
    manifest = read_manifest(checkpoint)
    assert manifest["state"] == {"step": 3, "best_loss": 0.1}
    assert sorted(manifest["files"]) == [".metadata", "__0_0.distcp"]
    assert all((checkpoint / name).stat().st_size == entry["size"] for name, entry in manifest["files"].items())
    (checkpoint / "notes.txt").write_text("a file of somebody else does no harm")
    check_whole(checkpoint, ranks)
    entries = []
    replace_state(checkpoint, {"step": 3, "best_loss": 0.05}, lambda kind, **entry: entries.append(entry), step=3)
    tensors = tensors_digest(manifest)
    assert entries == [{"manifest": sha256(checkpoint / "manifest.json"), "tensors": tensors, "step": 3}]
    check_whole(checkpoint, ranks)
    assert read_manifest(checkpoint)["state"]["best_loss"] == 0.05


def test_checkpoint_is_durable_before_its_rename(tmp_path, ranks, monkeypatch) -> None:
    """A resume refuses a checkpoint without an entry; an entry without a checkpoint, which a kill leaves, it passes over."""
    checkpoint, recorded, synced, fsync = tmp_path / "step-000003", [], {}, os.fsync

    def append(kind: str, **entry: object) -> str:
        recorded.append(read_manifest(checkpoint)["state"] if checkpoint.exists() else None)
        return ""

    def noted(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.removesuffix(".tmp")
        synced.setdefault(name, (os.fstat(descriptor).st_size, checkpoint.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    Saver(tmp_path, *weight_and_optimizer(3.0), ranks, append=append).save({"step": 3})
    for name, entry in read_manifest(checkpoint)["files"].items():
        assert synced[name] == (entry["size"], False), name
    replace_state(checkpoint, {"step": 3, "best_loss": 0.1}, append)
    assert recorded == [None, {"step": 3}]


def test_tensor_digest_depends_on_bits(tmp_path, ranks) -> None:
    def digest(name: str, change: float = 0.0, **options: object) -> str:
        parameters, optimizer = weight_and_optimizer(3.0)
        parameters["weight"].data[-1] += change
        saver = Saver(tmp_path / name, parameters, optimizer, ranks, **options)
        saver.save({"step": 3, "loss": len(name)})
        saver.close()
        return tensors_digest(read_manifest(tmp_path / name / "step-000003"))

    same = digest("one")
    assert digest("again") == digest("background", in_background=True) == same != digest("other", 1e-6)
    indices = {(tmp_path / name / "step-000003" / ".metadata").read_bytes() for name in ("one", "again")}
    assert len(indices) == 2  # DCP puts a random number there, which is why it does not count
    torch.manual_seed(1)
    assert digest("random") != same  # a resume needs the state of random numbers as well


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "a flipped bit": ("__0_0.distcp", flip_bit, "__0_0.distcp is damaged: its checksum is"),
    "a truncated file": ("__0_0.distcp", cut, "__0_0.distcp is damaged: it has"),
    "a missing file": ("__0_0.distcp", Path.unlink, "__0_0.distcp is missing"),
    "flipped metadata": (".metadata", flip_bit, ".metadata is damaged: its checksum is"),
    "a flipped manifest": ("manifest.json", flip_bit, "manifest.json is damaged"),
    "a missing manifest": ("manifest.json", Path.unlink, "manifest.json is missing"),
    "an empty manifest": ("manifest.json", lambda path: path.write_bytes(b""), "manifest.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_previous_continues_from_newest_whole_checkpoint(damage, tmp_path, ranks) -> None:
    for step in (2, 4, 6):
        save(tmp_path, ranks, step)
    file, do, sentence = DAMAGE[damage]
    do(tmp_path / "step-000006" / file)
    parameters, optimizer = weight_and_optimizer(0.0)
    saver = Saver(tmp_path, parameters, optimizer, ranks)
    with pytest.raises(UserError) as raised:
        saver.load(find_checkpoint(tmp_path, "auto", ranks)[0])
    assert sentence in str(raised.value) and "run.resume=previous" in str(raised.value)
    assert len(complete_checkpoints(tmp_path)) == 3 and latest_checkpoint(tmp_path).name == "step-000006"
    checkpoint, passed_over = find_checkpoint(tmp_path, "previous", ranks)
    assert checkpoint == tmp_path / "step-000004"
    assert len(passed_over) == 1 and sentence in passed_over[0]
    saver.load(checkpoint)
    assert parameters["weight"].unique().tolist() == [4.0]


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_unreadable_file_is_not_called_damaged(file, tmp_path, ranks, monkeypatch) -> None:
    save(tmp_path, ranks, 2)
    opened = Path.open

    def refused(path: Path, *arguments: object, **options: object) -> object:
        if path.name == file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match=rf"{re.escape(file)} cannot be read \(Permission denied\)"):
        Saver(tmp_path, *weight_and_optimizer(0.0), ranks).load(tmp_path / "step-000002")


def test_run_without_whole_checkpoint_is_refused(tmp_path, ranks) -> None:
    assert find_checkpoint(tmp_path, "previous", ranks) == (None, [])
    save(tmp_path, ranks, 2)
    flip_bit(tmp_path / "step-000002" / "__0_0.distcp")
    with pytest.raises(UserError, match="has no whole checkpoint .*__0_0.distcp is damaged.*choose another run.name"):
        find_checkpoint(tmp_path, "previous", ranks)


def test_pruning_touches_only_its_own_names(tmp_path, ranks) -> None:
    for stray in ("step-old.tar.tmp", "step-000001-copy"):
        (tmp_path / stray).touch()
    (tmp_path / "step-000007.tmp").symlink_to(tmp_path / "elsewhere")
    for step in (999_999, 1_000_000):
        save(tmp_path, ranks, step, keep_last=1)
    assert names(tmp_path) == ["step-000001-copy", "step-1000000", "step-old.tar.tmp"]
    save(tmp_path / "other", ranks, 999_999)
    (tmp_path / "other" / "step-999999").rename(tmp_path / "step-999999")
    assert latest_checkpoint(tmp_path).name == "step-1000000"


def test_kill_in_pruning_leaves_no_half_checkpoint(tmp_path, ranks, monkeypatch) -> None:
    for step in (1, 2, 3):
        save(tmp_path, ranks, step)

    def killed(path: Path, ignore_errors: bool) -> None:
        (path / ".metadata").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, 1, no_record)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000003"]
    shutil.copytree(tmp_path / "step-000003", tmp_path / "step-000000")  # as a kill before the pruning leaves it
    removed: list[str] = []
    saver = Saver(
        tmp_path, *weight_and_optimizer(0.0), ranks, append=lambda kind, **entry: removed.extend(*entry.values())
    )
    saver.load(tmp_path / "step-000003")  # load prunes too: after the last step no save follows
    assert names(tmp_path) == ["step-000003"] and removed == ["step-000000"]


def test_checkpoint_open_on_nfs_is_removed_later(tmp_path, ranks, monkeypatch) -> None:
    for step in (1, 2):
        save(tmp_path, ranks, step)
    with monkeypatch.context() as patch:
        busy = OSError(errno.ENOTEMPTY, "Directory not empty")
        patch.setattr(os, "rmdir", lambda *args, **options: (_ for _ in ()).throw(busy))
        prune(tmp_path, 1, no_record)
    assert names(tmp_path) == ["step-000001.tmp", "step-000002"]
    prune(tmp_path, 1, no_record)
    assert names(tmp_path) == ["step-000002"]


def test_kill_while_setting_aside_leaves_older_ones(tmp_path, ranks, monkeypatch) -> None:
    for step in (1, 2):
        save(tmp_path, ranks, step)
    replace, done = Path.replace, []

    def killed(path: Path, target: Path) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(replace(path, target))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            set_aside_after(tmp_path, 0, no_record, "NaN")
    assert latest_checkpoint(tmp_path).name == "step-000001"  # from which the run comes here again


def test_checkpoint_of_another_model_is_refused(tmp_path, ranks) -> None:
    checkpoint = tmp_path / "step-000001"
    save(tmp_path, ranks, 1)
    with pytest.raises(
        UserError, match=r"model.weight has shape \(5000,\), now \(4,\); resume with the model, vocabulary"
    ):
        Saver(tmp_path, *weight_and_optimizer(1.0, 4), ranks).load(checkpoint)
    parameters, _ = weight_and_optimizer(1.0)
    with pytest.raises(UserError, match="does not fit this run: it has no model.other; "):
        load_parameters(checkpoint, {"other": parameters["weight"]}, ranks)
    (checkpoint / ".metadata").unlink()
    with pytest.raises(UserError, match="metadata is missing; the hint"):
        load_parameters(checkpoint, parameters, ranks, "the hint")


def test_dcp_and_ours_read_the_same_index(tmp_path, ranks) -> None:
    """A checkpoint stays readable for other programs, and theirs for this project."""
    save(tmp_path, ranks, 3)
    ours, theirs = (
        reader(tmp_path / "step-000003").read_metadata() for reader in (CheckpointReader, dcp.FileSystemReader)
    )
    described = [  # without the strides, which torch 2.15 adds and no reader of an index uses
        {
            name: (tensor.properties.dtype, tensor.size, tensor.chunks)
            for name, tensor in index.state_dict_metadata.items()
        }
        for index in (ours, theirs)
    ]
    assert described[0] == described[1] and ours.storage_data == theirs.storage_data
    assert list(map(repr, ours.storage_data)) == list(map(repr, theirs.storage_data)) and ours.version == theirs.version


def as_bytes(index: Metadata) -> None:
    """DCP unpickles such an entry from the file of tensors when it loads the weight."""
    index.state_dict_metadata["model.weight"] = BytesStorageMetadata()


def elsewhere(index: Metadata) -> None:
    next(iter(index.storage_data.values())).relative_path = "../step-000002/__0_0.distcp"


def without_end(index: Metadata) -> None:
    index.state_dict_metadata["model.weight"].size = torch.Size([2**40])


# Pickle's BUILD sets attributes of a class as readily as of an object.
CLASS = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
HOSTILE = {
    "a call": lambda index, mark: pickle.dumps(Touch(mark)),
    "a call in an ignored part": lambda index, mark: setattr(index, "planner_data", Touch(mark)),
    "a call by protocol 0": lambda index, mark: f"cposix\nsystem\n(S'touch {mark}'\ntR.".encode(),
    "a changed class": lambda index, mark: CLASS + b"(N}S'version'\nS'forged'\nstb.",
    "a function as an attribute": lambda index, mark: b"ctorch.serialization\nload\n.",
    "an entry of bytes": lambda index, mark: as_bytes(index),
    "a file outside": lambda index, mark: elsewhere(index),
    "a tensor without end": lambda index, mark: without_end(index),
    "no pickle": lambda index, mark: b"{}",
    "a name of two lines": lambda index, mark: b"\x80\x04\x8c\x02os\x8c\x0bsystem\nline\x93.",
}


@pytest.mark.parametrize("content", HOSTILE)
def test_hostile_index_is_one_sentence(content, tmp_path, ranks) -> None:
    save(tmp_path / "run", ranks, 3)
    checkpoint, mark = tmp_path / "run" / "step-000003", tmp_path / "executed"
    index = dcp.FileSystemReader(checkpoint).read_metadata()
    replace_file(checkpoint, ".metadata", HOSTILE[content](index, mark) or pickle.dumps(index))
    parameters, optimizer = weight_and_optimizer(0.0)
    sentence = r"step-000003/\.metadata is not an index that torch.distributed.checkpoint writes \(.*\); "
    for read in (
        lambda: Saver(tmp_path / "run", parameters, optimizer, ranks).load(checkpoint),
        lambda: tensors_of_checkpoint(checkpoint),
    ):
        with pytest.raises(UserError, match=sentence) as raised:
            read()
        assert "\n" not in str(raised.value)
    assert not mark.exists() and Metadata.version is None


def test_hostile_tensors_are_one_sentence(tmp_path, ranks) -> None:
    save(tmp_path / "run", ranks, 3)
    checkpoint, mark = tmp_path / "run" / "step-000003", tmp_path / "executed"
    size = (checkpoint / "__0_0.distcp").stat().st_size
    replace_file(checkpoint, "__0_0.distcp", pickle.dumps(Touch(mark)).ljust(size, b"\0"))
    parameters, optimizer = weight_and_optimizer(0.0)
    for read in (
        lambda: Saver(tmp_path / "run", parameters, optimizer, ranks).load(checkpoint),
        lambda: tensors_of_checkpoint(checkpoint).read("weight"),
    ):
        with pytest.raises(UserError, match=r"step-000003 does not hold the tensors of its \.metadata \("):
            read()
    assert not mark.exists()
