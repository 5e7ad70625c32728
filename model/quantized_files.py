"""Dequantise published weights while a rank reads its slices: block-FP8 (DeepSeek V3, MiniMax M2) and MXFP4 (gpt-oss).

The values are those of transformers' `dequantize=True`. Weights of any other format keep their dtype and are refused later.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from model.weight_files import StoredTensor

FORMATS = ("fp8", "mxfp4")  # quant_method of config.json's quantization_config
MXFP4_GROUP = 32  # values with a common scale


@dataclass(frozen=True, kw_only=True)
class Dequantized(StoredTensor):
    """A tensor with scales of its own. `shape` and `dtype` are those of its values; `name` is that of the quantised tensor."""

    scale: StoredTensor

    @property
    def files(self) -> set[Path]:
        """The files with the quantised tensor and its scales."""
        return {self.file, self.scale.file}

    def copy(self) -> torch.Tensor:
        """Return the whole tensor in bf16."""
        return super().copy().bfloat16()


@dataclass(frozen=True, kw_only=True)
class BlockFP8(Dequantized):
    """FP8 values `(..., rows, columns)` with a scale for each block of `block` rows and columns, or a single scale (block None)."""

    block: tuple[int, ...] | None

    def read(
        self, files: dict[Path, Any], dimension: int = 0, start: int = 0, length: int | None = None
    ) -> torch.Tensor:
        """Return the values in fp32, or `length` indices of `dimension` from `start` on."""
        values, scale = super().read(files, dimension, start, length).float(), self.scale.read(files)
        scale = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
        if self.block is None:
            return values * scale
        for axis, size in enumerate(values.shape):
            indices = torch.arange(size) + (start if axis == dimension and length is not None else 0)
            block = ((1,) * (values.dim() - 2) + self.block)[axis]
            scale = scale.index_select(axis, indices // block)
        return values.mul_(scale)


@dataclass(frozen=True, kw_only=True)
class MXFP4(Dequantized):
    """4-bit values of experts `(experts, columns, rows)`, stored as blocks `(experts, rows, groups, 16 bytes)` with a scale each."""

    def read(
        self, files: dict[Path, Any], dimension: int = 0, start: int = 0, length: int | None = None
    ) -> torch.Tensor:
        """Return the values in bf16, which holds them exactly, or `length` indices of `dimension` from `start` on."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        cut = 0
        if length is None:
            part = 0, 0, None
        elif dimension == 1:  # columns, in groups
            first, last = start // MXFP4_GROUP, -(-(start + length) // MXFP4_GROUP)
            part, cut = (2, first, last - first), start - MXFP4_GROUP * first
        else:
            part = min(dimension, 1), start, length
        values = convert_moe_packed_tensors(super().read(files, *part), self.scale.read(files, *part))
        return values if length is None else values.narrow(dimension, cut, length)


def dequantized(stored: dict[str, StoredTensor], path: str | Path) -> dict[str, StoredTensor]:
    """Return the stored tensors of a model directory with each quantised weight, and no scales, as a tensor that `read` dequantises.

    Raises UserError if scales do not fit their weight.
    """
    file = Path(path, "config.json")
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    settings = config.get("quantization_config") or {}
    tensors, method = dict(stored), settings.get("quant_method")
    if method == "fp8":
        block = tuple(settings.get("weight_block_size") or ())
        for name in [name for name, tensor in stored.items() if tensor.dtype == "F8_E4M3"]:
            scale = tensors.pop(f"{name}_scale_inv", None)
            if scale is None:
                continue  # its dtype is refused
            weight, is_single = stored[name], scale.shape in ((), (1,))
            grid = tuple(-(-size // part) for size, part in zip(weight.shape[-2:], block, strict=False))
            if not is_single and (not block or scale.shape != (*weight.shape[:-2], *grid)):
                raise UserError(
                    f"{scale.file}: {scale.name} has shape {scale.shape}, which does not fit {weight.shape} in blocks of {block} "
                    f"(quantization_config of {file}); copy or download the model again"
                )
            sizes = None if is_single else block
            tensors[name] = BlockFP8(weight.file, "BF16", weight.shape, weight.name, scale=scale, block=sizes)
            tensors.pop(f"{name.removesuffix('weight')}activation_scale", None)
    elif method == "mxfp4":
        for name in [name for name in stored if name.endswith("_blocks")]:
            blocks, scale = tensors.pop(name), tensors.pop(f"{name.removesuffix('blocks')}scales", None)
            experts, rows, groups, half = blocks.shape if len(blocks.shape) == 4 else (0, 0, 0, 0)
            if scale is None or 2 * half != MXFP4_GROUP or scale.shape != (experts, rows, groups):
                raise UserError(
                    f"{blocks.file}: {name} has no scales, or is not in MXFP4's form; copy or download it again"
                )
            shape = experts, groups * MXFP4_GROUP, rows
            tensors[name.removesuffix("_blocks")] = MXFP4(blocks.file, "BF16", shape, blocks.name, scale=scale)
    return tensors
