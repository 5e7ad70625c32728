"""Tensors of a model by name, read one at a time: converting a model of any size takes the memory of a single file."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from common.errors import UserError
from distributed.checkpoint_directory import CheckpointReader
from distributed.export import AS_IS, NOTHING, Unchanged, files_of, write_file, write_index
from model.dtypes import dtype_name
from model.language_model import (
    BUFFERS,
    PackedLanguageModel,
    check_weights,
    parameter_names,
    persistent_buffers,
    stored_shapes,
    vocabulary_names,
)
from model.weight_files import StoredTensor

MAX_FILE_BYTES = 5 * 2**30


@dataclass(frozen=True)
class Weights:
    """The tensors of a model.

    `shapes` has the shape of each tensor by name, without rows of padding. `read` returns a tensor on the CPU in its stored
    dtype. `vocabulary` has the names of the tensors with one row per token, `buffers` those of buffers, which keep their dtype.
    """

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    vocabulary: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()


def weights_of_directory(path: str | Path, model: PackedLanguageModel) -> Weights:
    """Return the weights of `model` from a model directory. `model` may be on meta. Raises UserError as `check_weights` does."""
    sources, buffers = check_weights(model, str(path)), frozenset(persistent_buffers(model.causal_lm))
    return Weights(stored_shapes(model), lambda name: sources[name].read(), vocabulary_names(model), buffers)


def weights_of_checkpoint(checkpoint: Path, model: PackedLanguageModel, base: Callable[[], Weights]) -> Weights:
    """Return the weights of `model` from a checkpoint. Any number of ranks may have written it, and `model` may be on meta.

    A checkpoint contains the trained parameters only. Frozen parameters come from `base()`, the weights that the run started
    from. Raises UserError if the checkpoint belongs to another model.
    """
    trained, parameters = tensors_of_checkpoint(checkpoint), parameter_names(model)
    frozen = [name for name in parameters if name not in trained.shapes]
    if len(frozen) == len(parameters):
        raise UserError(
            f"{checkpoint} has no tensor {frozen[0]}: it belongs to another model than its run's model.path"
        )
    rest = base() if frozen else trained
    for name, parameter in parameters.items():
        shape, expected = trained.shapes.get(name), tuple(parameter.shape)
        if shape not in (None, expected):
            raise UserError(
                f"{checkpoint}: {name} has shape {shape}, but the model has {expected}; name the base that the run "
                "was started from with --base"
            )
    shapes, saved = stored_shapes(model), tensors_of_checkpoint(checkpoint, f"registered.{BUFFERS}.")

    def read(name: str) -> torch.Tensor:
        if name in saved.shapes:
            return saved.read(name)
        padded = (trained if name in trained.shapes else rest).read(name)
        return padded[: shapes[name][0]] if padded.dim() else padded

    return Weights(shapes, read, vocabulary_names(model), frozenset(persistent_buffers(model.causal_lm)))


def tensors_of_checkpoint(checkpoint: Path, prefix: str = "model.") -> Weights:
    """Return the whole tensors of a checkpoint whose names begin with `prefix`, by name without the prefix.

    Any number of ranks may have written the checkpoint. Only this process reads, with or without a process group. Raises
    UserError if its run removes the checkpoint meanwhile, or if it holds something else.
    """
    reader = CheckpointReader(checkpoint)
    stored = {
        key.removeprefix(prefix): metadata
        for key, metadata in reader.metadata.state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(metadata, TensorStorageMetadata)
    }

    def read(name: str) -> torch.Tensor:
        tensor = torch.empty(stored[name].size, dtype=stored[name].properties.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # dcp warns that there is no process group, despite no_dist
            try:
                dcp.load({prefix + name: tensor}, storage_reader=reader, no_dist=True)
            except dcp.CheckpointException as error:
                for reason, _ in error.failures.values():
                    if isinstance(reason, UserError):
                        raise UserError(str(reason)) from error
                if checkpoint.is_dir():
                    raise
                raise UserError(f"{checkpoint} is gone: its run has removed it; read a newer checkpoint") from error
        return tensor

    return Weights({name: tuple(metadata.size) for name, metadata in stored.items()}, read)


def average(base: Weights, tuned: Weights, share: float, new_row: int | None = None) -> Weights:
    """Return W = (1 - share) * base + share * tuned in fp32, tensor by tensor: WiSE-FT (arXiv:2109.01903, section 3).

    `base` must be the weights from which `tuned` was trained. Rows from `new_row` on belong to new tokens. The base has only
    initial values there, so the tuned rows are returned. Raises UserError if `share` is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise UserError(
            f"the share of the tuned weights must be from 0 (the base) to 1 (the tuned model), not {share:g}"
        )

    def read(name: str) -> torch.Tensor:
        if name in tuned.buffers:
            return tuned.read(name)
        mixed = tuned.read(name).to(torch.float32, copy=True)
        rows = slice(new_row) if name in tuned.vocabulary else ...
        mixed[rows].mul_(share).add_(base.read(name)[rows].float(), alpha=1 - share)
        return mixed

    return Weights(tuned.shapes, read, tuned.vocabulary, tuned.buffers)


def write_weights(
    folder: Path,
    weights: Weights,
    dtype: torch.dtype,
    max_file_bytes: int = MAX_FILE_BYTES,
    form: Unchanged = AS_IS,
    copied: Mapping[str, StoredTensor] = NOTHING,
) -> int:
    """Write the safetensors files of a model directory in `dtype`, with one file's tensors in memory. Return their size in bytes.

    `form` is the `stored_form` of the model; `copied` are tensors of the base that the directory repeats. Raises UserError if a
    tensor has values that are not finite or that `dtype` cannot hold, or if a file cannot be written.
    """
    groups = {group[0]: group for group in form.groups(weights.shapes)}
    sizes = {
        first: sum(torch.Size(weights.shapes[name]).numel() * dtype.itemsize for name in group)
        for first, group in groups.items()
    } | {name: tensor.num_bytes for name, tensor in copied.items()}
    written, size = {}, 0
    for file, firsts in files_of(sizes, max_file_bytes).items():
        tensors: dict[str, torch.Tensor] = {}
        for first in firsts:
            tensors |= form({name: rounded(weights, name, dtype) for name in groups.get(first, [])})
        copies = {first: copied[first] for first in firsts if first in copied}
        write_file(tensors, folder / file, copies)
        written[file] = [*tensors, *copies]
        size += sum(tensor.nbytes for tensor in tensors.values()) + sum(copy.num_bytes for copy in copies.values())
    write_index(folder, written, size)
    return size


def rounded(weights: Weights, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in `dtype`, or a buffer in its own dtype. Raises UserError as `converted` does."""
    tensor = weights.read(name)
    return tensor if name in weights.buffers else converted(name, tensor, dtype)


def converted(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor in `dtype`. Raises UserError if a value is not finite, or if `dtype` cannot hold it."""
    result = tensor.to(dtype).contiguous()
    if not torch.isfinite(result).all():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name} has values that are not finite; export another step")
        largest = tensor.abs().max().item()
        raise UserError(f"{name} has a value of {largest:.3g}, which {dtype_name(dtype)} cannot hold; use --dtype bf16")
    return result
