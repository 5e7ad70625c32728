"""The settings of a process before it uses its GPU. torch.cuda is replaced, so no GPU is needed."""

import os
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from common.errors import UserError
from distributed import device, process_group


@pytest.fixture
def gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    torch.backends.cuda.enable_cudnn_sdp(True)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores the variable that choose_device sets
        monkeypatch.delenv(name)


def test_allocator_uses_expandable_segments_by_default(gpu, monkeypatch) -> None:
    device.choose_device(0, 1)
    assert os.environ.pop("PYTORCH_CUDA_ALLOC_CONF") == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:128")
    device.choose_device(0, 1)
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


@pytest.mark.parametrize("installed, major, expected", [(True, 9, ["FA3"]), (True, 8, []), (False, 9, [])])
def test_flash_attention_3_runs_on_hopper_if_installed(gpu, monkeypatch, installed, major, expected) -> None:
    activated = []
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (major, 0))
    monkeypatch.setattr(device, "activate_flash_attention_impl", activated.append)
    monkeypatch.setattr(device, "list_flash_attention_impls", lambda: ["FA3", "FA4"])
    device.choose_device(0, 1)
    assert activated == expected
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # varlen_attn of torch 2.15 would prefer it


@pytest.mark.parametrize("launched, error", [(False, UserError), (False, RuntimeError), (True, UserError)])
def test_mistake_on_single_gpu_ends_the_group(monkeypatch, launched, error) -> None:
    """Otherwise NCCL would warn at exit. With more ranks NCCL might wait for a lost rank; after an error of CUDA it might fail."""
    ended, store = [], dist.HashStore()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value) if launched else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(process_group, "join", lambda minutes: store)
    monkeypatch.setattr(process_group, "Heartbeat", lambda *arguments: Mock(lost=Mock(return_value=None)))
    monkeypatch.setattr(process_group, "_start", lambda *arguments: Mock())
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append(True))
    with pytest.raises(error), process_group.process_group(device=torch.device("cuda", 0)):
        raise error("a mistake")
    assert ended == [True] * (error is UserError and not launched)
