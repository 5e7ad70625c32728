"""Sharded parameters -> safetensors files in the Hugging Face layout, never more than one file's worth in memory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from distributed.checkpoint import check_room
from distributed.process_group import Ranks, barrier


def export_model(
    directory: Path,
    parameters: dict[str, nn.Parameter],
    dtype: torch.dtype,
    ranks: Ranks,
    write_rest: Callable[[Path], None],
    max_file_bytes: int = 5 * 2**30,
) -> None:
    """Write `directory` anew, all of it or nothing. Every rank calls it: each tensor is gathered by all, rank 0 writes.

    A parameter with an attribute `unpadded_rows` (model/language_model.py) is cut to so many rows: padding ends with training.
    write_rest(folder) adds configuration and tokenizer, on rank 0. The layout is that of `save_pretrained`: one
    model.safetensors, or numbered ones with model.safetensors.index.json. Raises UserError where the disk has no room for it.
    """
    temporary = directory.with_name(directory.name + ".tmp")
    if ranks.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    size = sum(_shape(p).numel() for p in parameters.values()) * dtype.itemsize
    check_room(directory.parent, size, ranks, "the export")
    groups = _groups_of_files(parameters, dtype, max_file_bytes)
    weight_map = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        tensors = {}
        for name in names:
            whole = parameters[name].detach()
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            if ranks.rank == 0:
                real = _shape(parameters[name])
                tensors[name] = (whole if whole.shape == real else whole[: real[0]]).to("cpu", dtype).contiguous()
                weight_map[name] = file
        if ranks.rank == 0:
            save_file(tensors, temporary / file, metadata={"format": "pt"})
    if ranks.rank == 0:
        if len(groups) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        write_rest(temporary)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    barrier(ranks)


def _groups_of_files(parameters: dict[str, nn.Parameter], dtype: torch.dtype, max_bytes: int) -> list[list[str]]:
    groups, size = [[]], 0
    for name, parameter in parameters.items():
        bytes_ = _shape(parameter).numel() * dtype.itemsize
        if groups[-1] and size + bytes_ > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += bytes_
    return groups


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter, without rows of padding."""
    rows = getattr(parameter, "unpadded_rows", None)
    return parameter.shape if rows is None else torch.Size((rows, *parameter.shape[1:]))
