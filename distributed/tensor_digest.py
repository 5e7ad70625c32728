"""A SHA-256 of the tensors of a checkpoint that is the same for any number of ranks.

Ranks hold rows of a sharded tensor, and rows make units of `UNIT` bytes or a few more whose borders do not depend on the
ranks. Each rank hashes the units that it holds whole. Of a unit that lies on two ranks it sends the bytes, and rank 0 hashes
that one. The digest of a tensor is the SHA-256 of the digests of its units, in order.
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
        name: (f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}", _part(tensor))
        for name, tensor in tensors.items()
        if not name.startswith("random.")
    }


def digest_of(parts: Iterable[dict[str, tuple[str, Part]]], values: object) -> str:
    """The digest of what all ranks hold, and of `values`, which are plain JSON. Ranks may hold the same rows."""
    tensors: dict[str, tuple[str, dict[int, Part]]] = {}
    for of_rank in parts:
        for name, (kind, part) in of_rank.items():
            tensors.setdefault(name, (kind, {}))[1].setdefault(part.first, part)
    whole = {name: [kind, _joined(found)] for name, (kind, found) in tensors.items()}
    return hashlib.sha256(json.dumps([whole, values], sort_keys=True).encode()).hexdigest()


def _part(tensor: torch.Tensor) -> Part:
    first, local = 0, tensor
    if isinstance(tensor, DTensor):
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        first, local = offset[0] if offset else 0, tensor.to_local()
    return _part_of_rows(local, first) if local.numel() else Part(-1, b"", b"", b"")  # a rank without rows


def _part_of_rows(local: torch.Tensor, first: int) -> Part:
    rows = len(local) if local.dim() else 1
    flat = local.detach().cpu().contiguous().reshape(rows, -1).view(torch.uint8).numpy()
    in_unit = 1
    while in_unit * flat.shape[1] < UNIT:
        in_unit *= 2
    begin = min(rows, -first % in_unit)
    end = max(begin, (first + rows) // in_unit * in_unit - first)
    digests = (hashlib.sha256(flat[row : row + in_unit].data).digest() for row in range(begin, end, in_unit))
    return Part(first, flat[:begin].tobytes(), b"".join(digests), flat[end:].tobytes())


def _joined(parts: dict[int, Part]) -> str:
    """The digest of a tensor. A unit on several ranks is the end of a part, whole parts, and the begin of another one."""
    found, open_unit = hashlib.sha256(), b""
    for first in sorted(parts):
        part = parts[first]
        open_unit += part.before
        if (part.digests or part.after) and open_unit:
            found.update(hashlib.sha256(open_unit).digest())
            open_unit = b""
        found.update(part.digests)
        open_unit += part.after
    if open_unit:
        found.update(hashlib.sha256(open_unit).digest())
    return found.hexdigest()
