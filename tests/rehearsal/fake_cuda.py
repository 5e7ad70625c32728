"""Fake `cuda` tensors on a machine without a GPU: shapes, dtypes and devices, but no values.

An operation on tensors of two devices raises FakeTensorDeviceMismatchError, as CUDA does. An operation whose result the host
must read (`item`, `nonzero`, `if tensor`) raises DataDependentOutputException or DynamicOutputShapeException: on CUDA the
host would wait there. A build of torch for CPUs has no autograd on them, so forward and backward of a whole step are
rehearsed in pretend_device.py.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

CUDA = torch.device("cuda", 0)
CUDA_TYPE, META_TYPE = 1, 14  # c10::DeviceType


class Event:
    """torch.cuda.Event, which a build for CPUs lacks."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, stream: object = None) -> None:
        """Nothing runs."""

    def synchronize(self) -> None:
        """Nothing runs."""

    def elapsed_time(self, other: "Event") -> float:
        """1 ms."""
        return 1.0


@contextmanager
def device_guard() -> Iterator[None]:
    """Indexing a fake CUDA tensor asks torch for a device guard of CUDA, which a build for CPUs lacks: lend it that of `meta`.

    The table of guards is c10::impl::device_guard_impl_registry (c10/core/impl/DeviceGuardImplInterface.h), one pointer for
    each device type. A build for CUDA fills its own entry.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META_TYPE + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[CUDA_TYPE]
    guards[CUDA_TYPE] = before or guards[META_TYPE]
    try:
        yield
    finally:
        guards[CUDA_TYPE] = before


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Tensors made inside are fake; real ones that come in become fake. Without gradients."""
    properties = SimpleNamespace(total_memory=80 * 10**9)
    with (
        device_guard(),
        mock.patch.object(torch.cuda, "Event", Event),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: properties),
        mock.patch.object(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor),
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        torch.no_grad(),
    ):
        yield mode


def on_cuda(module: torch.nn.Module) -> torch.nn.Module:
    """A model on `meta`, moved to fake CUDA. Its values are arbitrary. Call it inside `fake_cuda`."""
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA)
                owner._parameters[name] = torch.nn.Parameter(made, requires_grad=False)
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
    return module
