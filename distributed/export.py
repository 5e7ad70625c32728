"""Write sharded parameters as safetensors in the Hugging Face layout, with at most one file's tensors in memory."""

import functools
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from common.durable_files import publish, start_directory
from common.errors import UserError
from distributed.checkpoint_directory import check_free_space
from distributed.process_group import Ranks, read_on_first
from distributed.sharding import whole

if TYPE_CHECKING:
    from model.weight_files import StoredTensor

Merge = Callable[[str, torch.Tensor], torch.Tensor]  # (name, whole value) -> the value to write; a collective


class Unchanged:
    """The form of files that store every tensor of the model as it is, under its own name."""

    def groups(self, names: Collection[str]) -> list[list[str]]:
        """Divide the names into groups whose tensors must be converted together. Most groups have one name."""
        return [[name] for name in names]

    def __call__(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of whole groups as files store them, by name."""
        return tensors


AS_IS, NOTHING = Unchanged(), MappingProxyType[str, "StoredTensor"]({})


def export_model(
    directory: Path,
    parameters: dict[str, torch.Tensor],
    dtype: torch.dtype,
    ranks: Ranks,
    write_rest: Callable[[Path], None],
    max_file_bytes: int = 5 * 2**30,
    merge: Merge = lambda name, value: value,
    form: Unchanged = AS_IS,
    copied: Mapping[str, "StoredTensor"] = NOTHING,
) -> None:
    """Write `directory` in the layout of `save_pretrained`, replacing an older export. It is complete or absent at any moment.

    Every rank must call this: all ranks gather, and rank 0 writes. A parameter with the attribute `unpadded_rows`
    (model/language_model.py) is cut to this number of rows. `parameters` may have buffers, which keep their dtype. write_rest:
    adds configuration and tokenizer to a folder, on rank 0. merge: from `model.language_model.merged`. form: from
    `model.language_model.stored_form`. copied: tensors of the base that the export repeats. Raise UserError if a file cannot be
    written.
    """
    shapes = {name: _unpadded_shape(parameter) for name, parameter in parameters.items()}
    dtypes = {name: dtype if isinstance(tensor, nn.Parameter) else tensor.dtype for name, tensor in parameters.items()}
    groups = {group[0]: group for group in form.groups(parameters)}
    sizes = {
        first: sum(shapes[name].numel() * dtypes[name].itemsize for name in group) for first, group in groups.items()
    } | {name: tensor.num_bytes for name, tensor in copied.items()}
    check_free_space(directory.parent, sum(sizes.values()), ranks, "the export")
    temporary = read_on_first(lambda: start_directory(directory), ranks)
    written = {}
    for file, firsts in files_of(sizes, max_file_bytes).items():
        ranks.watch.tick()  # each file has run.timeout_minutes
        tensors: dict[str, torch.Tensor] = {}
        for first in firsts:
            group: dict[str, torch.Tensor] = {}
            for name in groups.get(first, []):
                value = merge(name, whole(parameters[name]))
                if ranks.rank == 0:
                    value = value[: shapes[name][0]] if shapes[name] else value
                    group[name] = value.to("cpu", dtypes[name]).contiguous()
            tensors |= form(group)
        copies = {first: copied[first] for first in firsts if first in copied}
        written[file] = [*tensors, *copies]
        read_on_first(functools.partial(write_file, tensors, temporary / file, copies), ranks)

    def complete() -> None:
        write_index(temporary, written, sum(sizes.values()))
        write_rest(temporary)
        publish(directory)  # fsyncs every file before the rename

    read_on_first(complete, ranks)


def write_file(tensors: dict[str, torch.Tensor], path: Path, copied: Mapping[str, "StoredTensor"] = NOTHING) -> None:
    """Write one safetensors file, which repeats the tensors `copied`. Raise UserError if it cannot be written."""
    try:
        copies = {name: tensor.copy() for name, tensor in copied.items()}
        save_file(tensors | copies, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors creates files that only their owner can read
    except SafetensorError as error:
        raise UserError(f"{path} could not be written ({error}); mend the disk and start again") from error


def write_index(folder: Path, files: dict[str, list[str]], size: int) -> None:
    """Write model.safetensors.index.json if there are several files. `size`: bytes of all tensors."""
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def files_of(sizes: dict[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Distribute tensors of these sizes over files, in order: return file name -> names of its tensors.

    A file has at most `max_bytes`, or a single tensor.
    """
    groups, size = [[]], 0
    for name, num_bytes in sizes.items():
        if groups[-1] and size + num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _unpadded_shape(parameter: torch.Tensor) -> torch.Size:
    """Return the shape of the whole parameter without rows of padding."""
    rows = getattr(parameter, "unpadded_rows", None)
    return parameter.shape if rows is None else torch.Size((rows, *parameter.shape[1:]))
