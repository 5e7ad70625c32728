"""Checkpoints that survive a kill at any moment: written to a temporary name, fsynced, renamed, `latest` last.

    checkpoints/step-000120/   .metadata, __<rank>_0.distcp (torch.distributed.checkpoint), state.json
    checkpoints/latest         name of the newest complete checkpoint
    checkpoints/best           name of the one with the lowest validation loss

A directory named `step-*` is complete, because its name comes from a rename. An interrupted one is called `*.tmp`.
"""

import json
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from common.dtypes import dtype_name
from common.durable_files import SUFFIX, publish, start_directory, temporary_path, write_durably, write_json
from common.errors import UserError
from distributed.process_group import Ranks, barrier, read_on_first


def save_checkpoint(
    directory: Path,
    state: dict,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    keep_last: int,
    is_best: bool = False,
) -> None:
    """Save step `state["step"]`. A collective.

    Prunes older checkpoints beyond `keep_last`, but keeps the best one. Raises UserError on all ranks, and leaves the
    existing checkpoints as they are, if the disk has no room.
    """
    final = directory / f"step-{state['step']:06d}"
    tensors = _tensors(parameters, optimizer) | _random_state(ranks)
    if ranks.rank == 0:
        start_directory(final)
    # Whole tensors: a DTensor counts the elements of all ranks.
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    check_free_space(directory, size, ranks, f"the checkpoint of step {state['step']}")
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary_path(final), sync_files=True))
    if ranks.rank == 0:
        write_json(temporary_path(final) / "state.json", state)
        publish(final)  # replaces at most one that `latest` does not name yet
        write_durably(directory / "latest", final.name)
        if is_best:
            write_durably(directory / "best", final.name)
        _prune(directory, keep_last)
    barrier(ranks)


def update_state(directory: Path, state: dict, ranks: Ranks, is_best: bool) -> None:
    """Record an evaluation that finished after its step was saved, because a signal had cut it short before the save."""
    if ranks.rank == 0:
        name = f"step-{state['step']:06d}"
        write_json(directory / name / "state.json", state)
        if is_best:
            write_durably(directory / "best", name)


def load_checkpoint(
    checkpoint: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None, ranks: Ranks
) -> None:
    """Read parameters, moments and random state in place, for any number of ranks.

    With `optimizer=None` only the parameters are read (evaluation, export). Nothing is converted: a checkpoint of another
    `optimizer.memory` is refused. (14N and 12N store the same tensors; train.py tells them apart by the saved state.)
    Raises UserError if the checkpoint does not fit the model or the optimizer.
    """
    try:
        stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except Exception as error:
        raise UserError(f"{checkpoint} is not a complete checkpoint: {error}") from error
    tensors = _tensors(parameters, optimizer)
    for name, tensor in tensors.items():
        if optimizer and not _same_format(stored, name, tensor):
            raise UserError(
                f"{checkpoint} was saved with another optimizer.memory: {name} is not stored as "
                f"{dtype_name(tensor.dtype)}; set it back, or start a new run with another run.name"
            )
        metadata = stored.get(name)
        if not isinstance(metadata, TensorStorageMetadata):
            raise UserError(
                f"{checkpoint} has no tensor {name}: it belongs to another model; remove it or use another run.name"
            )
        if tuple(metadata.size) != tuple(tensor.shape):
            raise UserError(
                f"{checkpoint}: {name} has shape {tuple(metadata.size)}, but the model has {tuple(tensor.shape)}; "
                "resume with the model and vocabulary of the checkpoint"
            )
    random_state = {name: value for name, value in _random_state(ranks).items() if name in stored} if optimizer else {}
    dcp.load(tensors | random_state, storage_reader=dcp.FileSystemReader(checkpoint))
    if optimizer:
        for parameter in parameters.values():
            optimizer.state[parameter]["step"].copy_(tensors["optimizer.step"])
        _set_random_state(random_state, ranks)


def read_state(checkpoint: Path) -> dict:
    """The `state` that `save_checkpoint` received. Raises UserError if it cannot be read."""
    try:
        return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot resume from {checkpoint}: state.json: {error}") from error


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint, or None. Raises UserError if `latest` names one that does not exist."""
    pointer = directory / "latest"
    if pointer.is_file():
        checkpoint = directory / pointer.read_text().strip()
        if not checkpoint.is_dir():
            raise UserError(
                f"{pointer} names {checkpoint.name}, which does not exist; write the name of a complete checkpoint into "
                "it, or remove the run"
            )
        return checkpoint
    return max(_complete(directory), default=None)  # killed between the first rename and `latest`


def best_checkpoint(directory: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, or None."""
    pointer = directory / "best"
    return directory / pointer.read_text().strip() if pointer.is_file() else None


def check_free_space(directory: Path, size: int, ranks: Ranks, what: str) -> None:
    """Raise UserError on all ranks if fewer than `size` bytes are free where rank 0 writes `directory`. A collective.

    No rank returns before rank 0 has entered, so files that rank 0 created before the call exist for all ranks.
    """

    def free_bytes() -> int:
        directory.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(directory).free

    free = read_on_first(free_bytes, ranks)
    if free < size:
        raise UserError(
            f"{directory}: {what} needs {size / 2**20:,.0f} MiB, but the disk has {free / 2**20:,.0f} MiB free; free some "
            "space and start again: the run continues from its last checkpoint"
        )


def _tensors(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    if optimizer is not None:
        for name, parameter in parameters.items():
            tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items() if key != "step"}
        # All parameters have taken the same number of steps, because a skipped step counts for none of them.
        tensors["optimizer.step"] = optimizer.state[next(iter(parameters.values()))]["step"].clone()
    return tensors


def _same_format(stored: dict, name: str, tensor: torch.Tensor) -> bool:
    """Whether a parameter or moment is stored in the dtype it has now. If not, DCP would silently convert it."""
    if name in stored:
        return stored[name].properties.dtype == tensor.dtype
    kind, _, parameter = name.partition(".")
    # The parameter is stored, but this moment is not: the moment is in another format, e.g. 8-bit codes.
    return not (kind.startswith("exp_avg") and f"model.{parameter}" in stored)


def _random_state(ranks: Ranks) -> dict[str, torch.Tensor]:
    state = {f"random.{ranks.rank}": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state[f"random.cuda.{ranks.rank}"] = torch.cuda.get_rng_state(ranks.device)
    return state


def _set_random_state(state: dict[str, torch.Tensor], ranks: Ranks) -> None:
    if f"random.{ranks.rank}" in state:
        torch.set_rng_state(state[f"random.{ranks.rank}"])
    if f"random.cuda.{ranks.rank}" in state:
        torch.cuda.set_rng_state(state[f"random.cuda.{ranks.rank}"], ranks.device)


def _complete(directory: Path) -> list[Path]:
    return [path for path in directory.glob("step-*") if path.suffix != SUFFIX]


def _prune(directory: Path, keep_last: int) -> None:
    keep = set(sorted(_complete(directory))[-keep_last:]) | {best_checkpoint(directory), latest_checkpoint(directory)}
    for path in [*_complete(directory), *directory.glob(f"step-*{SUFFIX}")]:
        if path not in keep:
            shutil.rmtree(path)
