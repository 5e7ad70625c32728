"""Bytes of the tensors that are alive, by what they are for, while code runs on fake tensors."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators return, each once, until the last tensor that uses it is gone.

    A new storage is of the kind that `making` names, else an activation. A fake tensor's storage has a size but no memory,
    and lives as long as a real one. What a kernel allocates for itself while it runs is not seen.
    https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html
    """

    def __init__(self) -> None:
        super().__init__()
        self.now: dict[str, int] = {}  # kind -> bytes
        self.peak: dict[str, int] = {}  # the same when the sum was highest
        self.ignored: frozenset[str] = frozenset()
        self._kind = "activations"
        self._storages: dict[int, _Entry] = {}  # address of the storage -> entry

    def total(self, by_kind: dict[str, int]) -> int:
        """Sum over the kinds that count."""
        return sum(count for kind, count in by_kind.items() if kind not in self.ignored)

    def ignore(self, *kinds: str) -> None:
        """These kinds are not in this memory, and do not count for its peak."""
        self.ignored = frozenset(kinds)

    def set_kind(self, tensor: torch.Tensor, kind: str) -> None:
        """Count the storage of `tensor` as `kind` from now on. Of a sharded tensor this rank's part counts."""
        entry = self._entry(tensor)
        self._add(entry, -entry.bytes)
        entry.kind = kind
        self._add(entry, entry.bytes)

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Storages made inside the block are of this kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operator, then look at the tensors it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._entry(leaf)
        if self.total(self.now) > self.total(self.peak):
            self.peak = dict(self.now)
        return result

    def __enter__(self) -> "LiveBytes":
        """FSDP frees and allocates parameters by resizing their storages, which is not an operator."""
        self._resize = torch.UntypedStorage.resize_
        live = self

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            live._resize(storage, size)
            entry = live._storages.get(storage._cdata)
            if entry:
                live._add(entry, size - entry.bytes)
                entry.bytes = size
            return storage

        torch.UntypedStorage.resize_ = resize_  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def _entry(self, tensor: torch.Tensor) -> "_Entry":
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        storage = tensor.untyped_storage()
        key = storage._cdata
        entry = self._storages.get(key)
        if entry is None:
            entry = self._storages[key] = _Entry(self._kind, storage.nbytes())
            entry.alive = weakref.ref(storage, lambda _: self._forget(key))
            self._add(entry, entry.bytes)
        return entry

    def _add(self, entry: "_Entry", count: int) -> None:
        self.now[entry.kind] = self.now.get(entry.kind, 0) + count

    def _forget(self, key: int) -> None:
        entry = self._storages.pop(key)
        self._add(entry, -entry.bytes)


class _Entry:
    """A storage that is alive."""

    alive: weakref.ref

    def __init__(self, kind: str, size: int) -> None:
        self.kind, self.bytes = kind, size
