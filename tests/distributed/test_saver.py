"""Saves in the background: what they store, when `latest` moves, and failures."""

import threading

import pytest
import torch
import torch.distributed as dist

import distributed.saver
from common.errors import UserError
from configs.config import Optimizer
from distributed.checkpoint import load_checkpoint
from distributed.checkpoint_directory import check_whole, latest_checkpoint, read_manifest
from distributed.optimizer import adamw
from distributed.process_group import Ranks
from distributed.saver import Saver


@pytest.fixture
def ranks():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, 0, torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()


def weight_and_optimizer(value: float) -> tuple[dict, torch.optim.Optimizer]:
    weight = torch.nn.Parameter(torch.full((64,), value))
    return {"weight": weight}, adamw({"weight": weight}, Optimizer(1.0), seed=0)


@pytest.fixture
def held(monkeypatch) -> threading.Event:
    """Background saves wait for this event before they write."""
    event, write = threading.Event(), distributed.saver.write_checkpoint

    def wait_then_write(*arguments) -> float:
        assert event.wait(60)
        return write(*arguments)

    monkeypatch.setattr(distributed.saver, "write_checkpoint", wait_then_write)
    return event


def test_a_background_save_stores_the_weights_of_its_step_and_moves_latest_at_the_end(tmp_path, ranks, held) -> None:
    saver = Saver(tmp_path, 2, True, 1.0, ranks)
    parameters, optimizer = weight_and_optimizer(1.0)
    saver.save({"step": 1}, parameters, optimizer)
    with torch.no_grad():
        parameters["weight"].fill_(2.0)  # training goes on
    assert saver.poll() == [] and latest_checkpoint(tmp_path) is None
    held.set()
    (times,) = saver.close()
    assert times.step == 1 and 0 < times.pause < times.total
    assert latest_checkpoint(tmp_path).name == "step-000001"
    check_whole(tmp_path / "step-000001", ranks)
    resumed, other = weight_and_optimizer(0.0)
    load_checkpoint(tmp_path / "step-000001", resumed, other, ranks)
    assert resumed["weight"].unique().tolist() == [1.0]


def test_one_save_waits_for_the_one_before_and_so_does_a_new_state(tmp_path, ranks, held) -> None:
    saver = Saver(tmp_path, 9, True, 1.0, ranks)
    saver.save({"step": 1}, *weight_and_optimizer(1.0))
    held.set()
    saver.save({"step": 2}, *weight_and_optimizer(2.0))
    saver.update_state({"step": 2, "best_step": 2})
    assert [times.step for times in saver.close()] == [1, 2]
    assert read_manifest(tmp_path / "step-000002")["state"] == {"step": 2, "best_step": 2}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("save")]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_failed_save_ends_the_run_with_its_reason_and_latest_stays(
    in_background, tmp_path, ranks, monkeypatch
) -> None:
    saver = Saver(tmp_path, 9, in_background, 1.0, ranks)
    saver.save({"step": 1}, *weight_and_optimizer(1.0))
    saver.wait()

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(torch.distributed.checkpoint.FileSystemWriter, "write_data", fail)
    with pytest.raises(UserError, match="the checkpoint of step 2 could not be written .*Input/output error"):
        saver.save({"step": 2}, *weight_and_optimizer(2.0))
        saver.wait()
    assert latest_checkpoint(tmp_path).name == "step-000001"


def test_a_bug_in_the_background_keeps_its_type(tmp_path, ranks, monkeypatch) -> None:
    saver = Saver(tmp_path, 9, True, 1.0, ranks)
    monkeypatch.setattr(distributed.saver, "write_checkpoint", lambda *arguments: 1 / 0)
    saver.save({"step": 1}, *weight_and_optimizer(1.0))
    with pytest.raises(ZeroDivisionError):
        saver.wait()
