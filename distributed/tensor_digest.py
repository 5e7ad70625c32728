"""A SHA-256 of the tensors of a checkpoint that is the same for any number of ranks.

Ranks hold rows of a sharded tensor, and rows make units of `UNIT` bytes or a few more, whose borders do not depend on the
ranks. Each rank hashes the units that it holds whole; of one that lies on two ranks it sends the bytes. The digest of a tensor
is the SHA-256 of the digests of its units, in order.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from common.dtypes import dtype_name

UNIT = 2**14  # bytes: hashing shorter ones costs more in calls


class Part(NamedTuple):
    """The rows of a tensor on one rank: bytes before its first whole unit, the digests of whole units, bytes after them."""

    first: int  # row
    before: bytes
    digests: bytes
    after: bytes


def parts_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[str, Part]]:
    """Name -> (dtype and shape of the whole tensor, its part on this rank). Random states, which each rank has, are left out."""
    return {
        name: (f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}", part_of(*_rows_of(tensor)))
        for name, tensor in tensors.items()
        if not name.startswith("random.")
    }


def digest_of(parts: Iterable[dict[str, tuple[str, Part]]], values: object) -> str:
    """The digest of what all ranks hold, and of `values`, which are plain JSON. Ranks may hold the same rows."""
    tensors: dict[str, dict[int, Part]] = {}
    for of_rank in parts:
        for name, (kind, part) in of_rank.items():
            tensors.setdefault(f"{name} {kind}", {}).setdefault(part.first, part)
    found = {name: _joined([rows[first] for first in sorted(rows)]) for name, rows in tensors.items()}
    return hashlib.sha256(json.dumps([found, values], sort_keys=True).encode()).hexdigest()


def part_of(rows: torch.Tensor, first: int) -> Part:
    """The part that these rows are, of which the first is row `first` of the tensor."""
    if not rows.numel():
        return Part(-1, b"", b"", b"")  # a rank without rows
    flat = rows.detach().cpu().contiguous().reshape(len(rows), -1).view(torch.uint8).numpy()
    in_unit = 1
    while in_unit * flat.shape[1] < UNIT:
        in_unit *= 2
    begin = min(len(rows), -first % in_unit)
    end = max(begin, (first + len(rows)) // in_unit * in_unit - first)
    digests = (hashlib.sha256(flat[row : row + in_unit].data).digest() for row in range(begin, end, in_unit))
    return Part(first, flat[:begin].tobytes(), b"".join(digests), flat[end:].tobytes())


def _rows_of(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(this rank's rows, the number of the first one)."""
    if not isinstance(tensor, DTensor):
        return torch.atleast_1d(tensor), 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return torch.atleast_1d(tensor.to_local()), offset[0] if offset else 0


def _joined(parts: list[Part]) -> str:
    """The digest of a tensor. A unit that lies on several ranks is the end of a part, whole parts, and the begin of one."""
    found, unit = hashlib.sha256(), b""
    for part in [*parts, Part(0, b"", b"", b"the end")]:
        unit += part.before
        if part.digests or part.after:
            found.update((hashlib.sha256(unit).digest() if unit else b"") + part.digests)
            unit = part.after
    return found.hexdigest()
