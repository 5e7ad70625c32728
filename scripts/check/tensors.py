"""The tensors of checkpoints and exports: weights, AdamW's moments, and whether an export equals its checkpoint."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from distributed.checkpoint_directory import read_manifest
from distributed.low_memory import make_code_maps
from model.architectures import read_model_config
from model.language_model import build_on_meta, parameter_names, stored_shape
from model.weight_files import stored_tensors
from model.weights import Weights, tensors_of_checkpoint

WEIGHTS, MOMENTS = "model.", ("exp_avg", "exp_avg_sq")
Bounds = Callable[[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@functools.cache
def stored(checkpoint: Path) -> Weights:
    """Return the tensors of a checkpoint by their full names, such as `model.NAME` and `optimizer.exp_avg.NAME`."""
    return tensors_of_checkpoint(checkpoint, "")


def trained(checkpoint: Path) -> list[str]:
    """Return the names of all trained tensors."""
    return [name.removeprefix(WEIGHTS) for name in stored(checkpoint).shapes if name.startswith(WEIGHTS)]


def registered(checkpoint: Path) -> list[str]:
    """Return `registered.NAME.` of each registered object that has a tensor for every trained one, such as an average."""
    names = [name.split(".", 2) for name in stored(checkpoint).shapes if name.startswith("registered.")]
    prefixes = dict.fromkeys(f"registered.{name}." for _, name, _ in names)
    return [
        prefix for prefix in prefixes if all(prefix + name in stored(checkpoint).shapes for name in trained(checkpoint))
    ]


def load_state(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    """Return {"weight", "exp_avg", "exp_avg_sq"} of a trained tensor, whole, with moments in fp32.

    Moments that the optimizer does not have are left out.
    """
    tensors = stored(checkpoint)
    state = {"weight": tensors.read(WEIGHTS + name)}
    for key in MOMENTS:
        if f"optimizer.{key}.{name}" in tensors.shapes:
            state[key] = tensors.read(f"optimizer.{key}.{name}").float()
        elif f"optimizer.{key}_codes.{name}" in tensors.shapes:  # 6N (distributed/low_memory.py)
            codes, scale = (tensors.read(f"optimizer.{key}_{part}.{name}") for part in ("codes", "scale"))
            value = code_values()[key][codes.int()].view(*scale.shape, -1) * scale[..., None]
            state[key] = (value.square() if key == "exp_avg_sq" else value).view(codes.shape)
    return state


@functools.cache
def code_values() -> dict[str, torch.Tensor]:
    """Return the value of each 8-bit code of optimizer.memory=6N, by moment."""
    return {key: code_map.values for key, code_map in make_code_maps(torch.device("cpu")).items()}


def is_adamw(checkpoint: Path) -> bool:
    """Return whether the optimizer of a checkpoint is AdamW, whose updates can be predicted from its moments."""
    return read_manifest(checkpoint)["values"]["optimizer"]["type"] in ("AdamW", "LowMemoryAdamW")


def compare_export(
    export: Path,
    checkpoint: Path,
    names: Sequence[str],
    bounds: Bounds | None = None,
    prefix: str = WEIGHTS,
    read: Callable[[str], torch.Tensor] | None = None,
) -> dict[str, bool]:
    """Return name -> whether an exported tensor equals the checkpoint in the dtype of the export, for the trained `names`.

    bounds: (name, tensor of the checkpoint) -> the smallest and the largest value of the exported tensor before rounding; None:
    equal to the checkpoint. prefix: the beginning of the tensor's name in the checkpoint. read: reads a tensor from elsewhere.
    """
    model = build_on_meta(read_model_config(str(export)))
    files, form, is_equal = stored_tensors(export), model.stored_form, dict[str, bool]()
    rows = {name: stored_shape(model, parameter)[:1] for name, parameter in parameter_names(model).items()}
    for group in form.groups(names):
        tensors = {name: read(name) if read else stored(checkpoint).read(prefix + name) for name in group}
        for name in group:
            if rows.get(name):  # rows of padding are not exported
                tensors[name] = tensors[name][: rows[name][0]]
        ends = {name: bounds(name, tensor) if bounds else (tensor, tensor) for name, tensor in tensors.items()}
        low, high = (form({name: both[end] for name, both in ends.items()}) for end in (0, 1))
        for part in low:  # transformers may store a tensor in parts, such as single experts
            is_equal[part] = part in files
            if is_equal[part]:
                with safe_open(files[part].file, framework="pt") as file:
                    weight = file.get_tensor(part)
                least, most = (ends[part].to(weight.dtype) for ends in (low, high))
                is_equal[part] = weight.shape == least.shape and bool(((least <= weight) & (weight <= most)).all())
    return is_equal
