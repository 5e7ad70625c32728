"""What two runs have in common: rows of their curves, and checkpoints compared tensor by tensor without a process group."""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from common.errors import UserError
from distributed.checkpoint_directory import checkpoint_name, complete_checkpoints, read_manifest
from model.weight_files import stored_tensors

READ_AT_MOST = 2 * 2**30  # bytes of weights that are read from each checkpoint
WEIGHTS = "model."


@dataclass(frozen=True)
class Difference:
    """Of two checkpoints of the same step. Both zero: equal to the bit."""

    largest: float  # absolute, over all weights that were read
    relative: float  # norm of the difference over the norm of the last step's update
    tensors: int  # that were compared


def read_rows(run: Path, key: str) -> dict[int, dict[str, float]]:
    """The rows of metrics.jsonl that have `key`, by step. A step that occurs twice is NaN in `key`."""
    rows: dict[int, dict[str, float]] = {}
    try:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError:
        return {}
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if key in row:
            rows[row["step"]] = row | ({key: math.nan} if row["step"] in rows else {})
    return rows


def checkpoint_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is, if there is one."""
    return run / "checkpoints" / checkpoint_name(step)


def saved_steps(run: Path) -> list[int]:
    """The steps of the complete checkpoints of a run, in order."""
    return [int(path.name.removeprefix("step-")) for path in complete_checkpoints(run / "checkpoints")]


def checkpoint_bytes(checkpoint: Path) -> int:
    """The size of all files of a checkpoint."""
    return sum(path.stat().st_size for path in checkpoint.iterdir())


def same_files(a: Path, b: Path) -> bool:
    """Whether the tensors of two checkpoints are equal to the bit: the checksums of their files say so at once.

    Only for checkpoints of the same number of ranks. `.metadata` is left out: it holds names that differ.
    """
    files = []
    for checkpoint in (a, b):
        try:
            found = read_manifest(checkpoint)["files"]
        except UserError:
            return False
        files.append({name: value for name, value in found.items() if name.endswith(".distcp")})
    return bool(files[0]) and files[0] == files[1]


def difference(found: Path, expected: Path, before: Path) -> Difference:
    """How far the weights of `found` are from `expected`, and both from `before`, a step earlier.

    Weights are read one by one, evenly chosen, up to `READ_AT_MOST` bytes of each checkpoint.
    """
    readers = [dcp.FileSystemReader(path) for path in (found, expected, before)]
    weights = _chosen(readers[1].read_metadata().state_dict_metadata)
    largest = square = update = 0.0
    for name, meta in weights.items():
        one, other, old = (read_tensor(reader, name, meta) for reader in readers)
        delta = one - other
        largest = max(largest, delta.abs().max().item()) if bool(torch.isfinite(delta).all()) else math.inf
        square += delta.square().sum().item()
        update += (other - old).square().sum().item()
    relative = math.sqrt(square / update) if update else (0.0 if square == 0 else math.inf)
    return Difference(largest, relative, len(weights))


def moved(after: Path, before: Path) -> float:
    """Share of the weights that an optimizer step has changed, of those that are read."""
    readers = [dcp.FileSystemReader(path) for path in (after, before)]
    changed = total = 0
    for name, meta in _chosen(readers[0].read_metadata().state_dict_metadata).items():
        one, other = (read_tensor(reader, name, meta) for reader in readers)
        changed += int((one != other).sum())
        total += one.numel()
    return changed / total if total else 0.0


def exported_otherwise(export: Path, checkpoint: Path) -> list[str]:
    """Names of the exported weights that are not those of a checkpoint in the dtype of the export, of those that are read."""
    reader, wrong = dcp.FileSystemReader(checkpoint), []
    stored = stored_tensors(export)
    for key, meta in _chosen(reader.read_metadata().state_dict_metadata).items():
        name = key.removeprefix(WEIGHTS)
        if name not in stored:  # transformers has loaded what the model needs
            continue
        with safe_open(stored[name].file, framework="pt") as file:
            weight = file.get_tensor(name)
        expected = read_tensor(reader, key, meta)[: len(weight)]  # rows of padding are not exported
        if not torch.equal(weight, expected.to(weight.dtype)):
            wrong.append(name)
    return wrong


def _chosen(stored: Mapping[str, object]) -> dict[str, TensorStorageMetadata]:
    """Weights by name, evenly spread, that hold at most `READ_AT_MOST` bytes together."""
    weights = {
        name: meta
        for name, meta in stored.items()
        if name.startswith(WEIGHTS) and isinstance(meta, TensorStorageMetadata)
    }
    size = sum(torch.Size(meta.size).numel() * meta.properties.dtype.itemsize for meta in weights.values())
    every = max(1, math.ceil(size / READ_AT_MOST))
    return dict(list(weights.items())[::every])


def read_tensor(reader: dcp.FileSystemReader, name: str, meta: TensorStorageMetadata) -> torch.Tensor:
    """One whole tensor of a checkpoint in fp32."""
    target = {name: torch.empty(meta.size, dtype=meta.properties.dtype)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no process group, which is what no_dist says
        dcp.load(target, storage_reader=reader, no_dist=True)
    return target[name].float()
