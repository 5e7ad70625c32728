"""Mixtures of experts, beside what transformers computes: their names in files, and how their routers balance them.

The layers are transformers' own, and all experts of a layer are one product (`experts_implementation`: grouped_mm). A parameter
`(experts, rows, columns)` has the matrices of all of them. Only a model that has experts imports this file.
"""

from collections.abc import Sequence

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from model.weight_files import StoredTensor

# --- Files ------------------------------------------------------------------------------------------------------------


def names_of_experts(model_type: str, name: str, num_experts: int) -> list[str]:
    """The tensors of the files that are the parameter `name`: those of the first expert, of the second, and so on.

    The rows of an expert's tensors, one after the other, are its matrix. transformers has the names, by which it loads and saves
    the model. [] if the files of this type of model have the parameter as one tensor.
    """
    for conversion in get_checkpoint_conversion_mapping(model_type) or ():
        operations = [type(operation).__name__ for operation in getattr(conversion, "operations", ())]
        target = conversion.target_patterns[0]
        if operations[:1] == ["MergeModulelist"] and name.endswith(target):
            patterns, prefix = conversion.source_patterns, name.removesuffix(target)
            return [prefix + one.replace("*", str(expert)) for expert in range(num_experts) for one in patterns]
    return []


def read_experts(
    sources: Sequence[tuple[str, StoredTensor]], local: torch.Tensor, start: int, num_experts: int
) -> None:
    """Read this rank's experts, from `start` on, into `local` `(experts, rows, columns)`.

    sources: of all experts, as `names_of_experts` orders them.
    """
    of_each, files = len(sources) // num_experts, {}
    for index, rows in enumerate((rows for matrix in local for rows in matrix.chunk(of_each)), start * of_each):
        files.setdefault(sources[index][1].file, []).append((sources[index][0], rows))
    for file, wanted in files.items():
        with safe_open(file, framework="pt") as tensors:
            for name, rows in wanted:
                rows.copy_(tensors.get_tensor(name))


def as_stored(model_type: str, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter as the files of this type of model have it: itself, or views of it, one for each matrix of an expert."""
    names = names_of_experts(model_type, name, len(tensor)) if tensor.dim() == 3 else []
    if not names:
        return {name: tensor}
    return dict(zip(names, tensor.reshape(len(names), -1, tensor.shape[2]), strict=True))
