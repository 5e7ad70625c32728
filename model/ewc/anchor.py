"""The Fisher diagonal and the reference weights, in memory and on disk.

    runs/NAME/ewc/fisher-00001.safetensors ...      each tensor times 2^-exponent
    runs/NAME/ewc/reference-00001.safetensors ...
    runs/NAME/ewc/settings.json                     how it was made, and the exponents

Tensors are whole and have their Hugging Face names, so that any number of ranks can read its slices.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from common.durable_files import publish, start_directory
from common.errors import UserError
from distributed.process_group import Ranks, barrier
from distributed.sharding import local_shard


@dataclass(frozen=True)
class Anchor:
    """The Fisher diagonal and the reference weights: local shards by parameter name.

    `fisher` is stored times 2^-exponent, so that the largest element of each tensor is in [0.5, 1). Neither bf16 nor a
    tensor of small gradients underflows, and the scaling itself does not round.
    """

    fisher: dict[str, torch.Tensor]
    exponents: dict[str, int]
    reference: dict[str, torch.Tensor]
    made: dict  # estimator, documents and so on: plain JSON


def scaled_to_dtype(anchor: Anchor, dtype: torch.dtype, ranks: Ranks) -> Anchor:
    """The anchor scaled and stored in `dtype`; the reference in bf16 only if that is exact. A collective.

    Do not use the argument afterwards: its fp32 tensors are scaled in place.
    """

    def largest(name: str) -> float:
        return float(anchor.fisher[name].detach().max()) if anchor.fisher[name].numel() else 0.0

    # All ranks must agree on the largest element of each tensor, and on whether any rank needs fp32.
    shared = torch.tensor(
        [[largest(n), float(not torch.equal(r, r.to(dtype).to(r.dtype)))] for n, r in anchor.reference.items()],
        dtype=torch.float64,
    )
    dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=ranks.flags)
    fisher, exponents, reference = {}, {}, {}
    for name, (value, inexact) in zip(anchor.fisher, shared, strict=True):
        shift = int(torch.frexp(value).exponent) if value else 0
        # In two halves, because fp32 has no 2^140. In place, because two fp32 copies of the model might not fit.
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
    """Write `directory`, complete or not at all. A collective: all ranks gather each tensor, rank 0 writes."""
    temporary = start_directory(directory) if ranks.rank == 0 else None
    for kind, shards in (("fisher", anchor.fisher), ("reference", anchor.reference)):
        waiting, size, number = {}, 0, 1
        for name, local in shards.items():
            whole = _whole(local, parameters[name])
            if not temporary:
                continue
            if waiting and size + whole.nbytes > max_file_bytes:
                save_file(waiting, temporary / f"{kind}-{number:05d}.safetensors", metadata={"format": "pt"})
                waiting, size, number = {}, 0, number + 1
            waiting[name] = whole.cpu().contiguous()
            size += whole.nbytes
        if temporary:
            save_file(waiting, temporary / f"{kind}-{number:05d}.safetensors", metadata={"format": "pt"})
    if temporary:
        record = {"made": anchor.made, "exponents": anchor.exponents}
        (temporary / "settings.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        publish(directory)
    barrier(ranks)


def read_made(directory: Path) -> dict:
    """How a saved anchor was made. Raises UserError if there is none."""
    return _record(directory)["made"]


def load_anchor(directory: Path, parameters: dict[str, nn.Parameter], vocabulary: set[str]) -> Anchor:
    """This rank's slices of a saved anchor, whatever the number of ranks that saved it.

    `vocabulary` names the parameters that may have more rows than were saved (new tokens). In the additional rows the
    Fisher diagonal is zero and the reference is the parameter's current value. Raises UserError if the files do not match
    the model.
    """
    record = _record(directory)
    fisher = {name: _slice(directory, "fisher", name, p, vocabulary) for name, p in parameters.items()}
    reference = {name: _slice(directory, "reference", name, p, vocabulary) for name, p in parameters.items()}
    return Anchor(fisher, record["exponents"], reference, record["made"])


def _record(directory: Path) -> dict:
    try:
        return json.loads((directory / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} has no saved Fisher diagonal: settings.json: {error}") from error


def _slice(directory: Path, kind: str, name: str, parameter: nn.Parameter, vocabulary: set[str]) -> torch.Tensor:
    local, start = local_shard(parameter)
    for file in sorted(directory.glob(f"{kind}-*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if name not in tensors.keys():  # noqa: SIM118  safe_open is not a dict
                continue
            stored = tensors.get_slice(name)
            shape, expected = tuple(stored.get_shape()), tuple(parameter.shape)
            grown = name in vocabulary and shape[1:] == expected[1:] and shape[0] < expected[0]
            if shape != expected and not grown:
                raise UserError(
                    f"{file}: {name} has shape {shape}, but the model has {expected}; it belongs to another model"
                )
            if not local.dim():
                return stored[...].to(local.device)
            known = stored[min(start, shape[0]) : min(start + local.shape[0], shape[0])].to(local.device)
            new = local[known.shape[0] :].to(known.dtype)
            return torch.cat([known, torch.zeros_like(new) if kind == "fisher" else new]) if len(new) else known
    raise UserError(f"{directory} has no {kind} of {name}: it belongs to another model")


def _whole(local: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """The whole tensor whose part on this rank is `local`, sharded like the parameter. A collective."""
    if not isinstance(parameter, DTensor):
        return local
    mesh = parameter.device_mesh
    sharded = DTensor.from_local(
        local.to(mesh.device_type),
        mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return sharded.full_tensor()
