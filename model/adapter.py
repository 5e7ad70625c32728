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
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from distributed.export import write_file
from model.weights import Weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SIDES = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class Adapter:
    """The tensors of an adapter by peft's names without PREFIX, and its settings as in adapter_config.json."""

    weights: Weights
    settings: dict

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.settings["lora_alpha"] / self.settings["r"]

    @property
    def modules(self) -> list[str]:
        """The names of the matrices that have an adapter, without `.weight`."""
        return sorted(
            {name.removesuffix(side) for name in self.weights.shapes for side in SIDES if name.endswith(side)}
        )


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
    adapter = Adapter(Weights(shapes, read), settings)
    settings["target_modules"] = sorted({name.rpartition(".")[2] for name in adapter.modules})
    return adapter


def merge(base: Weights, adapter: Adapter, base_dtype: torch.dtype | None = None) -> Weights:
    """The base's weights with `scale * B @ A` added to each matrix that has an adapter, in fp32.

    base_dtype: the dtype in which the base was frozen in training; None: as it is stored.
    """
    changed = {f"{module}.weight": module for module in adapter.modules}
    assert changed.keys() <= base.shapes.keys()

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
