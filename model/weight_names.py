"""Which tensors of published files make up each tensor of a model, and the names and forms in which an export stores them.

transformers knows for each model type how to rename, stack, concatenate and split the tensors of files
(`transformers.conversion_mapping`). Its own transforms are applied here: to names and to tensors on `meta` in order to check the
files, to this rank's part in order to read them, and in reverse order in order to write them as `save_pretrained` does.
"""

import copy
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from common.errors import UserError
from distributed.export import Unchanged
from model.weight_files import StoredTensor, opened


@dataclass(frozen=True)
class StoredParts:
    """The stored tensors of a tensor of the model, and the converter that makes one out of the others; None: it is stored as it is.

    `by_pattern` has, for each source pattern of the converter, the tensors that match it, expert by expert. `first` is the name of
    the converter's first result.
    """

    causal_lm: PreTrainedModel
    name: str
    first: str
    converter: WeightConverter | None
    by_pattern: dict[str, list[StoredTensor]]

    @property
    def tensors(self) -> list[StoredTensor]:
        """All stored tensors."""
        return [tensor for tensors in self.by_pattern.values() for tensor in tensors]

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the converter's results by name, computed on `meta`; {} if the stored tensors do not fit together."""
        try:
            results = self.convert(lambda tensor: torch.empty(tensor.shape, device="meta"))
        except (RuntimeError, ValueError, IndexError):
            return {}
        return {name: tuple(result.shape) for name, result in results.items()}

    def has_shape(self, shape: tuple[int, ...]) -> bool:
        """Return whether the stored tensors make up a tensor of this shape."""
        return self.shapes.get(self.name) == shape

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise UserError if the stored tensors do not make up a tensor of this shape."""
        if not self.has_shape(shape):
            tensor, actual = self.tensors[0], self.shapes.get(self.name, "no common shape")
            what = f"{self.name}, of {tensor.name} and others," if self.converter else tensor.name
            raise UserError(f"{tensor.file}: {what} has shape {actual}, but config.json needs {shape}")

    def convert(self, read: Callable[[StoredTensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the converter's results by name, whole."""
        if self.converter is None:
            return {self.name: read(self.tensors[0])}
        converter = copy.deepcopy(self.converter)
        for pattern, tensors in self.by_pattern.items():
            for tensor in tensors:
                converter.add_tensor(self.first, tensor.name, pattern, read(tensor))  # pyright: ignore[reportArgumentType]
        results = converter.convert(self.first, model=self.causal_lm, config=self.causal_lm.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in results.items()}

    def read(self) -> torch.Tensor:
        """Return the whole tensor in its stored dtype."""
        with opened(self.tensors) as files:
            return self.convert(lambda tensor: tensor.read(files))[self.name]

    def read_into(self, local: torch.Tensor, dimension: int, start: int) -> None:
        """Read the part of the tensor that begins at index `start` of `dimension` into `local`, which may end in rows of padding.

        Only the slices of this part are read, be they of a single tensor or of experts' matrices, stacked and concatenated by
        rows. For other converters the whole tensor is read.
        """
        if not local.numel():
            return
        with opened(self.tensors) as files:
            if self.converter is None:
                tensor = self.tensors[0]
                rows = min(local.shape[dimension], tensor.shape[dimension] - start) if local.dim() else None
                if rows is None or rows > 0:
                    target = local if rows is None else local.narrow(dimension, 0, rows)
                    target.copy_(tensor.read(files, dimension, start, rows))
            elif dimension < 2 and self._is_stacked:
                self._read_experts(local, dimension, start, files)
            else:
                whole = self.convert(lambda tensor: tensor.read(files))[self.name]
                local.copy_(whole.narrow(dimension, start, local.shape[dimension]) if local.dim() else whole)

    @property
    def _is_stacked(self) -> bool:
        operations = self.converter.operations if self.converter else []
        dims = [(type(operation), getattr(operation, "dim", None)) for operation in operations]
        return dims in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])

    def _read_experts(self, local: torch.Tensor, dimension: int, start: int, files: dict[Path, Any]) -> None:
        assert self.converter
        parts = [self.by_pattern[pattern] for pattern in self.converter.source_patterns if pattern in self.by_pattern]
        first_expert, first_row = (0, start) if dimension else (start, 0)
        for expert, matrix in enumerate(local, first_expert):
            offset = 0  # row of the expert's matrix at which the tensor begins
            for tensor in (tensors[expert] for tensors in parts):
                begin, end = max(offset, first_row), min(offset + tensor.shape[0], first_row + len(matrix))
                if begin < end:
                    rows = tensor.read(files, 0, begin - offset, end - begin)
                    matrix[begin - first_row : end - first_row].copy_(rows)
                offset += tensor.shape[0]


def find_sources(
    causal_lm: PreTrainedModel, names: Collection[str], stored: dict[str, StoredTensor]
) -> tuple[dict[str, StoredParts], dict[str, StoredTensor]]:
    """Return ({name: source} for those of `names` that the files have, {name: stored tensor} of those that transformers ignores).

    It repeats the steps by which transformers matches a state dict with a model (`convert_and_load_state_dict_in_model`).
    """
    transforms = get_model_conversion_mapping(causal_lm)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, expected = causal_lm.base_model_prefix, dict.fromkeys(names, True)
    sources, unexpected = dict[str, StoredParts](), dict[str, str]()
    for original in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(original, renamings, converters, prefix, expected)
        if name not in expected and original in expected:
            name, pattern = rename_source_key(original, [], [], prefix, expected)
        if name in expected:
            converter = None if pattern is None else by_pattern[pattern]
            source = sources.setdefault(name, StoredParts(causal_lm, name, name, converter, defaultdict(list)))
            source.by_pattern[pattern or ""].append(stored[original])
        else:
            unexpected[original] = name
    for source in list(sources.values()):
        if source.converter and len(source.converter.target_patterns) > 1:
            for name in source.shapes:
                sources[name] = StoredParts(causal_lm, name, source.first, source.converter, source.by_pattern)
    ignored = re.compile("|".join(causal_lm._keys_to_ignore_on_load_unexpected or ["(?!)"]))
    return sources, {key: stored[key] for key, name in unexpected.items() if ignored.search(name)}


class StoredForm(Unchanged):
    """The names and forms in which files store the tensors of a model: those of `save_pretrained`."""

    def __init__(self, causal_lm: PreTrainedModel, name_in_it: Callable[[str], str] = str) -> None:
        """Reverse the conversions of a model, which may be on `meta`. `name_in_it`: of a tensor, if its caller trains only a part of it."""
        self.causal_lm, self.name_in_it = causal_lm, name_in_it
        transforms = get_model_conversion_mapping(causal_lm, add_legacy=False)
        # transformers also leaves out a change of the prefix: only a load tells whether its files had one.
        kept = [transform.reverse_transform() for transform in transforms if not isinstance(transform, PrefixChange)]
        self.renamings = [transform for transform in kept[::-1] if isinstance(transform, WeightRenaming)]
        self.converters = [transform for transform in kept[::-1] if isinstance(transform, WeightConverter)]
        self.by_pattern = {pattern: converter for converter in self.converters for pattern in converter.source_patterns}

    def groups(self, names: Collection[str]) -> list[list[str]]:
        groups = defaultdict(list)
        for name in names:
            groups[apply_converters(self.name_in_it(name), self.converters)[0]].append(name)
        return list(groups.values())

    def __call__(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pending, results = dict[str, Any](), dict[str, torch.Tensor]()
        tensors = {self.name_in_it(name): tensor for name, tensor in tensors.items()}
        for name in sorted(tensors, key=dot_natural_key):
            renamed, pattern = apply_converters(name, self.converters)
            if pattern is None:
                results[apply_renamings(name, self.renamings)] = tensors[name]
            else:
                converter = pending.setdefault(renamed, copy.deepcopy(self.by_pattern[pattern]))
                converter.add_tensor(renamed, name, pattern, tensors[name])
        for first, converter in pending.items():
            for name, value in converter.convert(first, model=self.causal_lm, config=self.causal_lm.config).items():
                value = value[0] if isinstance(value, list) else value
                results[apply_renamings(name, self.renamings)] = value.contiguous()
        return results
