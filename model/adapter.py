"""LoRA adapters (arXiv:2106.09685) as peft stores them, and the weights with the adapters merged: W + alpha / r * B @ A.

A directory of peft holds adapter_config.json and adapter_model.safetensors, whose tensors are named
`base_model.model.MODULE.lora_A.weight` `(r, in)` and `...lora_B.weight` `(out, r)`
(https://huggingface.co/docs/peft/developer_guides/checkpoint). peft itself is not needed to read, write or merge one.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from common.errors import UserError
from distributed.export import write_file
from model.weights import Weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SIDES = (".lora_A.weight", ".lora_B.weight")
# Settings of peft that change what is computed, with the values for which it is W + scale * B @ A.
PLAIN = {
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


@dataclass(frozen=True)
class Adapter:
    """The tensors of an adapter by peft's names without PREFIX, and its settings as in adapter_config.json."""

    weights: Weights
    settings: dict

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
        rank = self.settings["r"]
        return self.settings["lora_alpha"] / (rank**0.5 if self.settings.get("use_rslora") else rank)

    @property
    def modules(self) -> list[str]:
        """The names of the matrices that have an adapter, without `.weight`."""
        return sorted(
            {name.removesuffix(side) for name in self.weights.shapes for side in SIDES if name.endswith(side)}
        )


def adapter_of_directory(path: Path) -> Adapter:
    """The adapter in a directory of peft. Raises UserError if it is damaged, or more than plain LoRA of matrices."""
    try:
        settings = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kind, rank, alpha = settings["peft_type"], settings["r"], settings["lora_alpha"]
        if kind != "LORA" or not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float)):
            raise ValueError(f"peft_type={kind}, r={rank}, lora_alpha={alpha}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / CONFIG} is not the configuration of a LoRA adapter ({error})") from error
    for key, plain in PLAIN.items():
        if settings.get(key, plain[0]) not in plain:
            raise UserError(f"{path / CONFIG}: {key}={settings[key]} is not supported; merge this adapter with peft")
    file = path / WEIGHTS
    try:
        with safe_open(file, framework="pt") as tensors:
            stored = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is missing or damaged ({error}); copy it again") from error
    names = {name.removeprefix(PREFIX): name for name in stored}

    def read(name: str) -> torch.Tensor:
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(names[name])

    return _checked(Adapter(Weights({short: stored[name] for short, name in names.items()}, read), settings), file)


def adapter_of_checkpoint(checkpoint: Path, rank: int, alpha: float, dropout: float) -> Adapter:
    """The adapter in a checkpoint of a LoRA run (model/lora.py). Needs a process group, which may be of one rank."""
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    names, shapes, dtypes = {}, {}, {}
    for key, metadata in stored.items():
        if key.startswith("model.") and ".lora_" in key and isinstance(metadata, TensorStorageMetadata):
            name = key.removeprefix("model.").replace(".default.", ".")  # peft's name of a model's only adapter
            names[name], shapes[name], dtypes[name] = key, tuple(metadata.size), metadata.properties.dtype

    def read(name: str) -> torch.Tensor:
        tensor = torch.empty(shapes[name], dtype=dtypes[name])
        dcp.load({names[name]: tensor}, storage_reader=dcp.FileSystemReader(checkpoint))
        return tensor

    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "inference_mode": True,
    }
    adapter = _checked(Adapter(Weights(shapes, read), settings), checkpoint)
    settings["target_modules"] = sorted({name.rpartition(".")[2] for name in adapter.modules})
    return adapter


def _checked(adapter: Adapter, where: Path) -> Adapter:
    """The adapter, if it has a pair of matrices of its rank for each of its modules and nothing else."""
    shapes, rank = adapter.weights.shapes, adapter.settings["r"]
    if not shapes:
        raise UserError(f"{where} has no adapter")
    for name in shapes:
        if not name.endswith(SIDES):
            raise UserError(
                f"{where} has a tensor {name}, which is no part of a plain LoRA adapter; merge it with peft"
            )
    for module in adapter.modules:
        a, b = (shapes.get(module + side) for side in SIDES)
        if a is None or b is None or len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank:
            raise UserError(f"{where}: the adapter of {module} has the shapes {a} and {b}, which do not fit r={rank}")
    return adapter


def merge(base: Weights, adapter: Adapter, base_dtype: torch.dtype | None = None) -> Weights:
    """The base's weights with `scale * B @ A` added to each matrix that has an adapter, in fp32.

    base_dtype: the dtype in which the base was frozen in training; None: as it is stored. Raises UserError if the adapter
    belongs to another model.
    """
    for module in adapter.modules:
        shape = base.shapes.get(f"{module}.weight")
        product = (adapter.weights.shapes[module + SIDES[1]][0], adapter.weights.shapes[module + SIDES[0]][1])
        if shape != product:
            has = "does not have it" if shape is None else f"has it with {shape}"
            raise UserError(
                f"the adapter changes {module} of shape {product}, but the base {has}; name the adapter's base with --base"
            )
    changed = {f"{module}.weight": module for module in adapter.modules}

    def read(name: str) -> torch.Tensor:
        weight = base.read(name)
        weight = weight if base_dtype is None else weight.to(base_dtype)
        if name not in changed:
            return weight
        a, b = (adapter.weights.read(changed[name] + side).float() for side in SIDES)
        return weight.float() + b @ a * adapter.scale

    return Weights(base.shapes, read, base.vocabulary)


def write_adapter(
    folder: Path, adapter: Adapter, base_name: str, convert: Callable[[str, torch.Tensor], torch.Tensor]
) -> int:
    """Write the adapter as peft's `PeftModel.from_pretrained` reads it. Returns the bytes of its tensors.

    base_name: the base's id on the hub or its directory. convert: changes the dtype of a tensor.
    """
    tensors = {PREFIX + name: convert(name, adapter.weights.read(name)) for name in adapter.weights.shapes}
    write_file(tensors, folder / WEIGHTS)
    settings = adapter.settings | {"base_model_name_or_path": base_name, "inference_mode": True}
    (folder / CONFIG).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
