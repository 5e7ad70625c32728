"""What a run is held to: the Fisher diagonal and the reference weights, in memory and on disk.

    runs/NAME/ewc/fisher-00001.safetensors ...      each tensor times 2^-exponent
    runs/NAME/ewc/reference-00001.safetensors ...
    runs/NAME/ewc/settings.json                     how it was made, and the exponents

Tensors are whole and have their Hugging Face names, so that any number of ranks can read its slices of them.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from common.errors import UserError
from distributed.checkpoint import fsync_directory, write_durably
from distributed.process_group import Ranks, barrier
from distributed.sharding import local_shard


@dataclass(frozen=True)
class Anchor:
    """The Fisher diagonal and the reference: local shards by parameter name.

    fisher is stored times 2^-exponent, so that the largest element of each tensor lies in [0.5, 1): neither bf16 nor a tensor
    of small gradients underflows, and the scaling itself rounds nothing.
    """

    fisher: dict[str, torch.Tensor]
    exponents: dict[str, int]
    reference: dict[str, torch.Tensor]
    made: dict  # estimator, documents and so on: plain JSON


def kept_as(anchor: Anchor, dtype: torch.dtype, ranks: Ranks) -> Anchor:
    """The same, scaled and kept in `dtype`; the reference in bf16 only where that loses nothing.

    Every rank calls it. What it was given must not be used afterwards: fp32 tensors are scaled in place.
    """

    def largest(name: str) -> float:
        return float(anchor.fisher[name].detach().max()) if anchor.fisher[name].numel() else 0.0

    # One value of each tensor that all ranks share, and whether any of them needs fp32.
    shared = torch.tensor(
        [[largest(n), float(not torch.equal(r, r.to(dtype).to(r.dtype)))] for n, r in anchor.reference.items()],
        dtype=torch.float64,
    )
    dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=ranks.flags)
    fisher, exponents, reference = {}, {}, {}
    for name, (value, inexact) in zip(anchor.fisher, shared, strict=True):
        shift = int(torch.frexp(value).exponent) if value else 0
        # In two halves: 2^140 is no fp32 number. In place: two copies of the model in fp32 might not fit.
        scaled = anchor.fisher[name].float().mul_(2.0 ** -(shift // 2)).mul_(2.0 ** -(shift - shift // 2))
        fisher[name] = scaled.to(dtype)
        exponents[name] = anchor.exponents[name] + shift
        reference[name] = anchor.reference[name] if inexact else anchor.reference[name].to(dtype)
    return Anchor(fisher, exponents, reference, anchor.made)


def save_anchor(
    directory: Path,
    anchor: Anchor,
    parameters: dict[str, nn.Parameter],
    ranks: Ranks,
    max_file_bytes: int = 5 * 2**30,
) -> None:
    """Write `directory` anew, durably, all of it or nothing. Every rank calls it: each tensor is gathered, rank 0 writes."""
    temporary = directory.with_name(directory.name + ".tmp")
    if ranks.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    for kind, shards in (("fisher", anchor.fisher), ("reference", anchor.reference)):
        waiting, size, number = {}, 0, 1
        for name, local in shards.items():
            whole = _whole(local, parameters[name])
            if ranks.rank:
                continue
            if waiting and size + whole.nbytes > max_file_bytes:
                _write(temporary / f"{kind}-{number:05d}.safetensors", waiting)
                waiting, size, number = {}, 0, number + 1
            waiting[name] = whole.cpu().contiguous()
            size += whole.nbytes
        if ranks.rank == 0:
            _write(temporary / f"{kind}-{number:05d}.safetensors", waiting)
    if ranks.rank == 0:
        record = {"made": anchor.made, "exponents": anchor.exponents}
        write_durably(temporary / "settings.json", json.dumps(record, indent=1))
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
        fsync_directory(directory.parent)
    barrier(ranks)


def read_made(directory: Path) -> dict:
    """How a saved Fisher diagonal was made. Raises UserError where there is none."""
    return _record(directory)["made"]


def load_anchor(directory: Path, parameters: dict[str, nn.Parameter], vocabulary: set[str]) -> Anchor:
    """This rank's slices of what another number of ranks may have saved.

    vocabulary: the parameters that may have more rows than were saved (new tokens): there the Fisher diagonal is zero and
    the reference what the parameter is now. Raises UserError where the files do not fit the model.
    """
    record = _record(directory)
    fisher = {name: _slice(directory, "fisher", name, p, vocabulary) for name, p in parameters.items()}
    reference = {name: _slice(directory, "reference", name, p, vocabulary) for name, p in parameters.items()}
    return Anchor(fisher, record["exponents"], reference, record["made"])


def _record(directory: Path) -> dict:
    try:
        return json.loads((directory / "settings.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{directory} holds no saved Fisher diagonal: settings.json: {error}") from error


def _slice(directory: Path, kind: str, name: str, parameter: nn.Parameter, vocabulary: set[str]) -> torch.Tensor:
    local, start = local_shard(parameter)
    for file in sorted(directory.glob(f"{kind}-*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if name not in tensors.keys():  # noqa: SIM118  a safe_open is no dictionary
                continue
            stored = tensors.get_slice(name)
            shape, wanted = tuple(stored.get_shape()), tuple(parameter.shape)
            grown = name in vocabulary and shape[1:] == wanted[1:] and shape[0] < wanted[0]
            if shape != wanted and not grown:
                raise UserError(f"{file}: {name} has shape {shape}, the model {wanted}; it belongs to another model")
            if not local.dim():
                return stored[...].to(local.device)
            known = stored[min(start, shape[0]) : min(start + local.shape[0], shape[0])].to(local.device)
            new = local[known.shape[0] :].to(known.dtype)
            return torch.cat([known, torch.zeros_like(new) if kind == "fisher" else new]) if len(new) else known
    raise UserError(f"{directory} holds no {kind} of {name}: it belongs to another model")


def _whole(local: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """The whole tensor of which this rank has `local`, laid out like the parameter. A collective."""
    if not isinstance(parameter, DTensor):
        return local
    mesh = parameter.device_mesh
    spread = DTensor.from_local(
        local.to(mesh.device_type),
        mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return spread.full_tensor()


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())
