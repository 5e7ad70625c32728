"""A pretended GPU: real CPU tensors that report the device `cuda:0`, so that a whole run takes the CUDA path with real numbers.

A tensor is on the pretended device if its storage has a tag. Two modes of torch maintain the tags: `Names` turns `device="cuda"`
and `.to("cuda")` into a tag. `Operators` sees every operator, including backward's, passes the tag on, and checks what CUDA would
check. Below the modes, autograd, FSDP and gloo see ordinary CPU tensors.

- Host and device tensors in the same operator are an error, except where CUDA allows it (a host scalar in a pointwise operator,
  copies, host indices).
- Operations that make the host wait for the device are recorded with their place in our code: reading a value, an operator whose
  output shape depends on values, a copy that is not asynchronous or not from pinned memory.
- The varlen kernel, which no CPU has, is replaced by the same mathematics (varlen.py).

It cannot test CUDA's kernels, the order of work in streams, NCCL, or memory.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd.graph import _engine_run_backward
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.rehearsal.varlen import varlen_backward, varlen_forward

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
SHAPED_BY_VALUES = {aten.nonzero.default, aten.masked_select.default, aten.unique_dim.default, aten._unique2.default}
COPIES = {aten.copy_.default, aten._foreach_copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class PretendDevice:
    """The tags of tensors on the device, and the recorded waits and operators. `phase` is the current place, e.g. `step 3`."""

    def __init__(self) -> None:
        self.place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        self.storages: dict[int, StorageWeakRef] = {}  # the reference prevents an address from being reused
        self.pinned: dict[int, StorageWeakRef] = {}
        self.target: bool | None = None  # whether new tensors are on the device; None: like their operands
        self.is_gloo = False  # whether gloo copies its own buffers, which NCCL does not have
        self.phase = ""
        self.waits: list[tuple[str, str, str]] = []  # (phase, operation, place in our code)
        self.operators: set[str] = set()

    def has(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is on the device."""
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        return not tensor.is_meta and tensor.untyped_storage()._cdata in self.storages

    def put(self, tensor: torch.Tensor, where: dict[int, StorageWeakRef] | None = None) -> torch.Tensor:
        """Tag a tensor as on the device, or add it to the table `where`. Return the tensor."""
        plain = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if not plain.is_meta:
            reference = StorageWeakRef(plain.untyped_storage())
            (self.storages if where is None else where)[reference.cdata] = reference
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Return whether a host tensor is in pinned memory."""
        return tensor.untyped_storage()._cdata in self.pinned

    def wait(self, operation: str) -> None:
        """Record that the host waits for the device, with the place in our code."""
        if self.is_gloo:
            return
        frame, place = sys._getframe(1), "outside of our code"
        while frame:
            file = Path(frame.f_code.co_filename)
            if (
                file.is_relative_to(ROOT)
                and not file.is_relative_to(ROOT / "tests" / "rehearsal")
                and ".venv" not in file.parts
            ):
                place = f"{file.relative_to(ROOT)}:{frame.f_lineno}"
                break
            frame = frame.f_back
        self.waits.append((self.phase, operation, place))

    @contextmanager
    def making(self, target: bool) -> Iterator[None]:
        """Put all tensors that are created in the block on the device, or on the host."""
        before, self.target = self.target, target
        try:
            yield
        finally:
            self.target = before


class Names(TorchFunctionMode):
    def __init__(self, device: PretendDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, device, name = kwargs or {}, self.device, getattr(function, "__name__", "")
        if name in ("to", "cpu", "cuda") and args and isinstance(args[0], torch.Tensor):
            return self._move(function, name, args, kwargs)
        if name == "pin_memory":
            with device.making(False):
                return device.put(args[0].clone(), device.pinned)
        if name == "is_pinned":
            return device.is_pinned(args[0])
        if name in ("tolist", "numpy", "__array__") and device.has(args[0]):
            device.wait(name)
            if name != "tolist":
                raise TypeError(f"{name} of a tensor on the device")
        if name == "record_stream":
            return None
        if name == "backward":  # otherwise it would run without this mode
            with self:
                options = {"allow_unreachable": True, "accumulate_grad": True}
                return _engine_run_backward((args[0],), (torch.ones_like(args[0]),), False, False, (), **options)
        if kwargs.get("pin_memory"):
            with device.making(False):
                return device.put(function(*args, **(kwargs | {"pin_memory": False, "device": CPU})), device.pinned)
        if is_cuda(kwargs.get("device")):
            with device.making(True):
                result = function(*args, **(kwargs | {"device": CPU}))
            if name == "tensor" or name == "as_tensor":
                device.wait("a copy of Python numbers")
            return tree_map(lambda t: device.put(t) if isinstance(t, torch.Tensor) else t, result)
        if str(kwargs.get("device", "")) == "cpu":
            with device.making(False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    def _move(self, function, name, args, kwargs):
        device, tensor = self.device, args[0]
        like = next((value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if name == "to":
            options = {key: value for key, value in kwargs.items() if key != "copy"}  # which the parser refuses
            place, dtype, asynchronous, _ = torch._C._nn._parse_to(*args[1:], **options)
        else:
            place, dtype, asynchronous = torch.device(name), None, kwargs.get("non_blocking", False)
        if place is None or place.type == "meta":
            return function(*args, **kwargs)
        on, target = device.has(tensor), place.type == "cuda" if like is None else device.has(like)
        if target == on or tensor.is_meta:
            return torch.Tensor.to(tensor, CPU, dtype or tensor.dtype, copy=kwargs.get("copy", False))
        if not (asynchronous and (on or device.is_pinned(tensor))):
            device.wait("a copy to the host" if on else "a copy from memory that is not pinned")
        with device.making(target):
            return torch.Tensor.to(tensor, CPU, dtype or tensor.dtype, copy=True)


class Operators(TorchDispatchMode):
    def __init__(self, device: PretendDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls operators on local tensors, which come here
        kwargs, device = kwargs or {}, self.device
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and not t.is_meta]
        on = [device.has(t) for t in tensors]
        if is_cuda(kwargs.get("device")):  # from torch's Python code that runs below the mode `Names`
            with device.making(True):
                return self.__torch_dispatch__(function, types, args, kwargs | {"device": CPU})
        name = function.name()
        if any(on):
            device.operators.add(name.partition(".")[0])
            self._check(function, name, tensors, on, args, kwargs)
        if any(on) and name.startswith("torch_attn::_varlen_attn"):
            result = (varlen_backward if "backward" in name else varlen_forward)(*args, **kwargs)
        else:
            result = function(*args, **kwargs)
        target = (
            any(on)
            if device.target is None or any(on) and function not in COPIES and "clone" not in name
            else device.target
        )
        if function in (aten.copy_.default, aten._foreach_copy_.default) or not target:
            return result
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not device.has(tensor):
                device.put(tensor)
        return result

    def _check(self, function, name, tensors, on, args, kwargs) -> None:
        device = self.device
        if (
            function in READS
            or function in SHAPED_BY_VALUES
            or "repeat_interleave.Tensor" in name
            and kwargs.get("output_size") is None
        ):
            device.wait(name)
        elif function in (aten.copy_.default, aten._foreach_copy_.default):
            self._check_copy(function, args, kwargs)
        elif function in INDEXED:
            for index in tree_leaves(args[1]):
                if isinstance(index, torch.Tensor) and (index.dtype == torch.bool or not device.has(index)):
                    device.wait(f"{name} by a {'mask' if index.dtype == torch.bool else 'host tensor'}")
        elif not all(on):
            writes_host = name.partition(".")[0].endswith("_") and not device.has(tensors[0])
            scalars = (
                function is aten.fill_.Tensor
                or torch.Tag.pointwise in function.tags
                and not name.startswith(("aten::_foreach", "aten::_fused"))
            )
            scalars = scalars and not writes_host
            wrong = [t for t, is_on in zip(tensors, on, strict=True) if not is_on and not (scalars and t.dim() == 0)]
            if wrong:
                raise RuntimeError(
                    f"{name}: expected all tensors on cuda:0, but one of {tuple(wrong[0].shape)} is on cpu"
                )

    def _check_copy(self, function, args, kwargs) -> None:
        device, asynchronous = self.device, kwargs.get("non_blocking", len(args) > 2 and args[2])
        pairs = [args[:2]] if function is aten.copy_.default else list(zip(args[0], args[1], strict=True))
        for to, source in pairs:
            if device.has(to) == device.has(source):
                continue
            if not (asynchronous and device.is_pinned(source if device.has(to) else to)):
                device.wait("a copy between host and device")


def is_cuda(value: object) -> bool:
    """Return whether an argument names the device."""
    return isinstance(value, torch.device | str) and str(value).startswith("cuda") or type(value) is int
