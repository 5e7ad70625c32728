"""Replacements for the parts of torch.cuda that a CPU build of torch lacks, for a run on a pretended GPU."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch

import training.observe
from tests.rehearsal.pretend_device import CPU, Names, Operators, PretendDevice, is_cuda


class _Event:
    """A torch.cuda.Event of a device on which all work is always done."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, stream: object = None) -> "_Event":
        return self

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        return 1.0  # ms


class _Stream:
    """A stream in which all work is always done."""

    stream_id, device_index, device_type = 0, 0, 1  # FSDP of torch 2.15 hands them to an operator that needs numbers

    def __init__(self, *args, **kwargs) -> None:
        pass

    def is_capturing(self) -> bool:
        return False

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: _Event()


@contextmanager
def pretend_device() -> Iterator[PretendDevice]:
    """Run the block as if this process had a GPU. Yield the pretended device."""
    device, stream = PretendDevice(), _Stream()

    @contextmanager
    def on_stream(stream: object) -> Iterator[None]:
        yield

    group = torch.optim.Optimizer._group_tensors_by_device_and_dtype

    def grouped(lists, with_indices=False):
        groups = group(lists, with_indices)
        where = device.place if device.has(next(t for t in lists[0] if t is not None)) else CPU
        return {(where, dtype): value for (_, dtype), value in groups.items()}

    wrapper = torch.Tensor._make_wrapper_subclass

    def made_of(*args, **kwargs):
        return wrapper(*args, **(kwargs | ({"device": CPU} if is_cuda(kwargs.get("device")) else {})))

    start = torch.distributed.init_process_group

    def gloo(backend, *args, device_id, **kwargs):
        assert backend == "cpu:gloo,cuda:nccl" and device_id == device.place
        return start("gloo", *args, **kwargs)

    wait_for = torch.distributed.Work.wait

    def wait_in_stream(work: torch.distributed.Work, *args) -> bool:
        """Do not record gloo's copies from a host buffer: with NCCL the device's stream waits, and nothing is copied."""
        device.is_gloo = True
        try:
            return wait_for(work, *args)
        finally:
            device.is_gloo = False

    pretended = {
        "Event": _Event,
        "Stream": _Stream,
        "stream": on_stream,
        "current_stream": lambda *args: stream,
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        "current_device": lambda: device.place.index,
        "set_device": lambda device: None,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_name": lambda device=None: "pretended GPU",
        "get_device_properties": lambda device: SimpleNamespace(
            name="pretended GPU",
            total_memory=80 * 10**9,
            major=9,  # an H100, for which varlen_attn of torch 2.15 prefers cuDNN's kernel
            minor=0,
        ),
        "mem_get_info": lambda device=None: (70 * 10**9, 80 * 10**9),
        "max_memory_allocated": lambda device=None: 0,
        "synchronize": lambda device=None: device_waits(device),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
    }

    plain_mm = torch.mm

    def mm(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype | None = None, **options) -> torch.Tensor:
        """Multiply bf16 matrices with an fp32 result, which torch supports on CUDA only."""
        if out_dtype is None:
            return plain_mm(left, right, **options)
        return plain_mm(left.to(out_dtype), right.to(out_dtype))

    def device_waits(_: object) -> None:
        device.wait("synchronize")

    plain = torch._C.TensorBase.device
    place = property(lambda tensor: device.place if device.has(tensor) else plain.__get__(tensor))
    with ExitStack() as stack:
        for name, value in pretended.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for owner, name, value in (
            (torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(grouped)),
            (torch.Tensor, "_make_wrapper_subclass", made_of),
            (torch, "mm", mm),
            (torch.distributed, "init_process_group", gloo),
            (torch.distributed.Work, "wait", wait_in_stream),
            (training.observe, "record_memory_history", lambda *args, **options: None),
            (torch.accelerator, "current_stream", lambda *args: stream),
            (torch.Tensor, "device", place),
            (torch.Tensor, "is_cuda", property(device.has)),
            (torch.Tensor, "is_cpu", property(lambda tensor: tensor.device.type == "cpu")),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(Operators(device))
        stack.enter_context(Names(device))
        yield device
