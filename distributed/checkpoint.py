"""Checkpoints that survive a kill at any moment: written aside, fsynced, renamed, `latest` last.

    checkpoints/step-000120/   .metadata, __<rank>_0.distcp (torch.distributed.checkpoint), state.json
    checkpoints/latest         the name of the newest complete one
    checkpoints/best           the name of the one with the lowest validation loss

A folder named `step-*` is complete, because its name comes from a rename; what was cut off is called `*.tmp`.
"""

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from common.errors import UserError
from distributed.process_group import Ranks, barrier


def save_checkpoint(
    directory: Path,
    state: dict,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    keep_last: int,
    is_best: bool = False,
) -> None:
    """Save the step `state["step"]`; every rank calls it. Older ones beyond `keep_last` go, the best stays.

    Raises UserError where the disk has no room for it; the last one stays as it is.
    """
    name = f"step-{state['step']:06d}"
    temporary, final = directory / f"{name}.tmp", directory / name
    tensors = _tensors(parameters, optimizer) | _random_state(ranks)
    if ranks.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    # Of whole tensors: a DTensor counts the elements of all ranks.
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    check_room(temporary, size, ranks, f"the checkpoint of step {state['step']}")
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary, sync_files=True))
    if ranks.rank == 0:
        write_durably(temporary / "state.json", json.dumps(state, indent=1))
        fsync_directory(temporary)
        shutil.rmtree(final, ignore_errors=True)  # only ever one that `latest` does not name yet
        temporary.rename(final)
        fsync_directory(directory)
        write_durably(directory / "latest", name)
        if is_best:
            write_durably(directory / "best", name)
        _prune(directory, keep_last)
    barrier(ranks)


def update_state(directory: Path, state: dict, ranks: Ranks, is_best: bool) -> None:
    """Note a validation that came after its step was saved: the signal that saved the step had cut it off."""
    if ranks.rank == 0:
        name = f"step-{state['step']:06d}"
        write_durably(directory / name / "state.json", json.dumps(state, indent=1))
        if is_best:
            write_durably(directory / "best", name)


def load_checkpoint(
    checkpoint: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None, ranks: Ranks
) -> None:
    """Read parameters, moments and random state into place, at any number of ranks. Raises UserError if it does not fit.

    Nothing is converted: a checkpoint of another `optimizer.memory` is refused. (14N and 12N store the same tensors; train.py
    tells them apart by its state.)

    optimizer None: the parameters alone (evaluation, export).
    """
    try:
        stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except Exception as error:
        raise UserError(f"{checkpoint} is not a complete checkpoint: {error}") from error
    tensors = _tensors(parameters, optimizer)
    for name, tensor in tensors.items():
        if optimizer and not _kept_alike(stored, name, tensor):
            raise UserError(
                f"{checkpoint} was made with another optimizer.memory: its {name} is kept in another form than "
                f"{str(tensor.dtype).removeprefix('torch.')}; set it back, or start anew with another run.name"
            )
        if name not in stored:
            raise UserError(
                f"{checkpoint} has no {name}: it belongs to another model; remove it or use another run.name"
            )
        if tuple(stored[name].size) != tuple(tensor.shape):
            raise UserError(
                f"{checkpoint}: {name} has shape {tuple(stored[name].size)}, the model {tuple(tensor.shape)}; "
                "resume with the model and vocabulary it was made with"
            )
    random_state = {name: value for name, value in _random_state(ranks).items() if name in stored} if optimizer else {}
    dcp.load(tensors | random_state, storage_reader=dcp.FileSystemReader(checkpoint))
    if optimizer:
        for parameter in parameters.values():
            optimizer.state[parameter]["step"].copy_(tensors["optimizer.step"])
        _set_random_state(random_state, ranks)


def read_state(checkpoint: Path) -> dict:
    """What `save_checkpoint` was given as `state`."""
    try:
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{checkpoint} cannot be resumed from: state.json: {error}") from error


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint, or None. Raises UserError where `latest` names one that is gone."""
    pointer = directory / "latest"
    if pointer.is_file():
        checkpoint = directory / pointer.read_text().strip()
        if not checkpoint.is_dir():
            raise UserError(
                f"{pointer} names {checkpoint.name}, which is not there; name a complete one or remove the run"
            )
        return checkpoint
    return max(_complete(directory), default=None)  # killed between the first rename and `latest`


def best_checkpoint(directory: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, or None."""
    pointer = directory / "best"
    return directory / pointer.read_text().strip() if pointer.is_file() else None


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that a crash leaves the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_directory(path.parent)


def _tensors(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    if optimizer is not None:
        for name, parameter in parameters.items():
            state = optimizer.state[parameter]
            tensors |= {f"{key}.{name}": value for key, value in state.items() if key != "step"}
        # Every parameter has taken the same number of steps: skipped ones count for none of them.
        tensors["optimizer.step"] = state["step"].clone()
    return tensors


def _kept_alike(stored: dict, name: str, tensor: torch.Tensor) -> bool:
    """Whether a parameter or moment is stored in the dtype it has now: reading would convert it without a word."""
    if name in stored:
        return stored[name].properties.dtype == tensor.dtype
    kind, _, parameter = name.partition(".")
    # A moment that is not there, of a parameter that is: it is called otherwise, as the 8-bit codes are.
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
    return [path for path in directory.glob("step-*") if path.suffix != ".tmp"]


def _prune(directory: Path, keep_last: int) -> None:
    keep = set(sorted(_complete(directory))[-keep_last:]) | {best_checkpoint(directory), latest_checkpoint(directory)}
    for path in [*_complete(directory), *directory.glob("step-*.tmp")]:
        if path not in keep:
            shutil.rmtree(path)


def check_room(folder: Path, size: int, ranks: Ranks, what: str) -> None:
    """Raise UserError on every rank where the disk has not `size` bytes left, before anything is written.

    Of the disk that rank 0 sees. No rank goes on before rank 0 came here: what it made before is there for all.
    """
    free = broadcast_from_first(shutil.disk_usage(folder).free if ranks.rank == 0 else None, ranks)
    if free < size:
        raise UserError(
            f"{folder}: {what} takes {size / 2**20:,.0f} MiB and the disk has {free / 2**20:,.0f} MiB left; free some and start "
            "again: the run continues from its last checkpoint"
        )


def fsync_directory(path: Path) -> None:
    """Make names in a folder last: what was renamed or made there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def broadcast_from_first(value: object, ranks: Ranks) -> object:
    """What rank 0 saw on its disk, on every rank: two nodes may see a shared file system at different moments."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=ranks.flags)
    return box[0]
