"""Read DCP's index of a checkpoint, `.metadata`, without running anything that it names.

The index is a pickle, and a pickle may call any function of any module (pytorch#189308). This reader resolves no name: an object
of DCP becomes a `_Value`, and DCP's own classes are built from the checked values. An index with another name is refused. So
is an entry of bytes, which DCP would unpickle in `DefaultLoadPlanner.load_bytes`.
"""

import math
import pickle
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from common.torch_private import private

_StorageInfo = private("distributed.checkpoint.filesystem._StorageInfo")
OF_DCP = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
# The layout of a tensor, and the path at which the checkpoint was saved. Python 3.13 names the module of paths otherwise.
IGNORED = (("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"))
# Raised by DCP for a file that does not hold what its index says. DCP reads tensors with `weights_only`.
NOT_A_TENSOR = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, AssertionError)
DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}


class _Value:
    """An object of an index: `state` has its attributes."""

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """An unpickler for which each object is a `_Value`, a tuple or a dtype."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch", "Size"):
            return tuple
        if module in OF_DCP or (module, name) in IGNORED:
            return _Value
        raise pickle.UnpicklingError(f"it names {module!r}, {name!r}")


def read_index(file: IO[bytes], num_bytes: int) -> Metadata:
    """Return the index in `file`. num_bytes: the size of the checkpoint, which no tensor exceeds.

    Raise some exception, of any kind, if the file is not an index of tensors as DCP writes it.
    """
    index = _Unpickler(file).load().state
    keys = [
        MetadataIndex(key.state["fqn"], _size(key.state["offset"]), key.state["index"]) for key in index["storage_data"]
    ]
    stored = dict(zip(keys, [_place(info.state) for info in index["storage_data"].values()], strict=True))
    tensors = {str(name): _tensor(value.state, num_bytes) for name, value in index["state_dict_metadata"].items()}
    return Metadata({**tensors}, storage_data=stored, storage_meta=StorageMeta(), version=index.get("version"))


def _place(state: dict) -> Any:
    """Return where a tensor lies. A compressed one is refused, because this project writes none."""
    name, offset, length = state["relative_path"], *_size((state["offset"], state["length"]))
    if "/" in name or state.get("transform_descriptors"):
        raise ValueError(f"a tensor is in {name!r}")
    return _StorageInfo(name, offset, length)


def _tensor(state: dict, num_bytes: int) -> TensorStorageMetadata:
    dtype, size = state["properties"].state[0], _size(state["size"])
    if math.prod(size) * dtype.itemsize > num_bytes:
        raise ValueError(f"a tensor has the shape {tuple(size)}")
    chunks = [ChunkStorageMetadata(*map(_size, (x.state["offsets"], x.state["sizes"]))) for x in state["chunks"]]
    return TensorStorageMetadata(TensorProperties(dtype), size, chunks)


def _size(numbers: Any) -> torch.Size:
    """Return numbers that are not negative. Raise ValueError or TypeError for others."""
    size = torch.Size(numbers)
    if min(size, default=0) < 0:
        raise ValueError(f"a size is {tuple(size)}")
    return size
