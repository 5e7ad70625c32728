"""Save and load checkpoints that survive a kill at any moment: written to a temporary name, fsynced, renamed, `latest` last.

Tensors are stored by torch.distributed.checkpoint (DCP), so that any number of ranks can read them.
distributed/checkpoint_directory.py describes the files.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from common.dtypes import dtype_name
from common.durable_files import publish, start_directory, temporary_path
from common.errors import UserError
from distributed.checkpoint_directory import checkpoint_name, checksums, prune, set_latest, write_manifest
from distributed.disks import check_free_space
from distributed.process_group import Ranks, gather_objects, read_on_first

Registered = dict[str, Any]
"""Name -> an object with `state_dict()`, a flat dictionary of tensors, and `load_state_dict(state)`."""


@dataclass(frozen=True)
class SaveTimes:
    """Seconds of one save on this rank. Training waits for `pause`; `checksum` is part of `total`."""

    step: int
    pause: float
    total: float
    checksum: float

    def curves(self) -> dict[str, float]:
        """The times by the names of their curves."""
        return {
            "save/pause_seconds": self.pause,
            "save/total_seconds": self.total,
            "save/checksum_seconds": self.checksum,
        }

    def line(self, grace_seconds: float | None) -> str:
        """The times in words, with a warning if the save took longer than torchrun grants after a signal (None: no limit)."""
        text = (
            f"saved step {self.step} in {self.total:.1f} s; training waited {self.pause:.1f} s, checksums took "
            f"{self.checksum:.1f} s"
        )
        if grace_seconds is None or self.total <= grace_seconds:
            return text
        return (
            f"warning: {text}: longer than the {grace_seconds:g} s that torchrun grants after a signal; start torchrun with "
            f"--shutdown-timeout={math.ceil(1.5 * self.total)}"
        )


def save_checkpoint(
    directory: Path,
    state: dict,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    keep_last: int,
    registered: Registered | None = None,
) -> SaveTimes:
    """Save step `state["step"]`, prune older checkpoints beyond `keep_last`, and return when it is durable. A collective.

    Raises UserError on all ranks, and leaves the existing checkpoints as they are, if it cannot be written.
    """
    begin = time.perf_counter()
    tensors = checkpoint_tensors(parameters, optimizer, ranks, registered)
    start_save(directory, state["step"], tensors, ranks)
    checksum = write_checkpoint(directory, state, tensors, ranks, keep_last)
    seconds = time.perf_counter() - begin
    return SaveTimes(state["step"], seconds, seconds, checksum)


def start_save(directory: Path, step: int, tensors: dict[str, torch.Tensor], ranks: Ranks) -> None:
    """Check that the disk has room, and create the temporary directory. A collective on `ranks.flags`."""
    check_free_space(directory, stored_bytes(tensors), ranks, f"the checkpoint of step {step}")
    read_on_first(lambda: start_directory(directory / checkpoint_name(step)), ranks)


def write_checkpoint(
    directory: Path, state: dict, tensors: dict[str, torch.Tensor], ranks: Ranks, keep_last: int
) -> float:
    """Write a checkpoint after `start_save`. A collective on `ranks.flags`: a background thread has a group for itself.

    Returns the seconds spent on checksums. Raises UserError on all ranks if a file cannot be written or read back.
    """
    step = state["step"]
    final = directory / checkpoint_name(step)
    folder = temporary_path(final)
    failed = "mend the disk and start again: the run continues from its last checkpoint"
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder, sync_files=True), process_group=ranks.flags)
    except dcp.CheckpointException as error:  # DCP raises it on all ranks
        reasons = [reason for reason, _ in error.failures.values()]
        if not all(isinstance(reason, OSError) for reason in reasons):
            raise
        raise UserError(
            f"{folder}: the checkpoint of step {step} could not be written ({reasons[0]}); {failed}"
        ) from error
    begin = time.perf_counter()
    try:  # Each rank reads back what it wrote. .metadata belongs to all: rank 0 wrote it.
        mine = checksums(sorted(folder.glob(f"__{ranks.rank}_*")) + [folder / ".metadata"] * (ranks.rank == 0))
    except OSError as error:
        mine = str(error)
    files = {}
    for part in gather_objects(mine, ranks):
        if isinstance(part, str):
            raise UserError(f"{folder}: the checkpoint of step {step} could not be read back ({part}); {failed}")
        files |= part
    seconds = time.perf_counter() - begin

    def complete() -> None:
        write_manifest(folder, state, files)
        publish(final)  # replaces at most one that `latest` does not name
        set_latest(directory, final)
        prune(directory, keep_last)

    read_on_first(complete, ranks)
    return seconds


def load_checkpoint(
    checkpoint: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    ranks: Ranks,
    registered: Registered | None = None,
) -> None:
    """Read parameters, the optimizer's state, what is registered and random state in place, for any number of ranks.

    With `optimizer=None` only the parameters are read (evaluation, export). Nothing is converted: a checkpoint of another
    `optimizer.memory` is refused. (14N and 12N store the same tensors; train.py tells them apart by the saved state.)
    Raises UserError if the checkpoint does not fit the model or the optimizer. `check_whole` finds damaged files.
    """
    try:
        stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except Exception as error:
        raise UserError(f"{checkpoint} is not a complete checkpoint: {error}") from error
    tensors = _tensors(parameters, optimizer) | _registered_tensors(registered)
    for name, tensor in tensors.items():
        if optimizer and not _same_format(stored, name, tensor):
            raise UserError(
                f"{checkpoint} was saved with another optimizer.memory: {name} is not stored as "
                f"{dtype_name(tensor.dtype)}; set it back, or start a new run with another run.name"
            )
        metadata = stored.get(name)
        if not isinstance(metadata, TensorStorageMetadata):
            raise UserError(
                f"{checkpoint} has no tensor {name}: it belongs to another model, optimizer or version of train.py; use another "
                "run.name"
            )
        if tuple(metadata.size) != tuple(tensor.shape):
            raise UserError(
                f"{checkpoint}: {name} has shape {tuple(metadata.size)}, but the model has {tuple(tensor.shape)}; "
                "resume with the model and vocabulary of the checkpoint"
            )
    random_state = {name: value for name, value in _random_state(ranks).items() if name in stored} if optimizer else {}
    dcp.load(tensors | random_state, storage_reader=dcp.FileSystemReader(checkpoint))
    for name, thing in (registered or {}).items():
        prefix = f"registered.{name}."
        thing.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    if optimizer:
        _set_random_state(random_state, ranks)


def checkpoint_tensors(
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    registered: Registered | None = None,
) -> dict[str, torch.Tensor]:
    """What a checkpoint stores, by name: parameters, the optimizer's state, what is registered, this rank's random state."""
    return _tensors(parameters, optimizer) | _registered_tensors(registered) | _random_state(ranks)


def stored_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of whole tensors: a DTensor counts the elements of all ranks."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def allocate_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer of torch allocate the state that it makes in its first step, so that a checkpoint can be read into it.

    torch does that with a step of learning rate 0 and gradients of 0. Nothing happens if there is a state already.
    """
    get_optimizer_state_dict(model, optimizer)


def _tensors(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    """The tensors themselves, not copies. Those of an optimizer are named KEY.PARAMETER, such as exp_avg.lm_head.weight."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    if optimizer is None:
        return tensors
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            if not isinstance(value, torch.Tensor):
                raise UserError(
                    f"{type(optimizer).__name__} keeps {key} of a parameter as {type(value).__name__}; a checkpoint stores tensors"
                )
            tensors[f"{key}.{name}"] = value
    return tensors


def _registered_tensors(registered: Registered | None) -> dict[str, torch.Tensor]:
    """The tensors of the state_dict of each registered object, named registered.NAME.KEY. Raises ValueError for others."""
    tensors = {}
    for name, thing in (registered or {}).items():
        for key, value in thing.state_dict().items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"{name}.state_dict() has {key}, a {type(value).__name__}; register tensors")
            tensors[f"registered.{name}.{key}"] = value.detach()
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
