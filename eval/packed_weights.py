"""Packed weights, which make the forwards of an evaluation faster on a CPU.

`F.linear` rearranges a weight for the processor in every call. With the few rows of a decoding step that takes longer than
the product. oneDNN can keep the rearranged weight instead, by the operators that torch.compile uses when it freezes a model.
"""

import functools

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

# Private operators of torch. Without them, nothing is packed.
OPERATORS = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
ROWS = 32  # oneDNN chooses the layout of a weight for inputs of so many rows


def pack_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Pack the weights of a model in place, for forwards without gradients. A no-op on a GPU and for sharded weights.

    A packed weight takes the place of the plain one, except that a tied head keeps both: the embedding needs the plain one.
    """
    if model.device.type == "cpu" and _can_pack(model.dtype):
        shared = model.get_input_embeddings().weight
        for module in model.modules():
            if type(module) is nn.Linear and not isinstance(module.weight, DTensor):
                _pack(module, keep=module.weight is shared)
    return model


def _can_pack(dtype: torch.dtype) -> bool:
    """Return whether oneDNN can pack `dtype`. It packs bf16 only on a processor with AVX512 or AVX-NE-CONVERT."""
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _pack(linear: nn.Linear, keep: bool) -> None:
    packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
    if not keep:
        linear.weight = nn.Parameter(packed, requires_grad=False)
    linear.forward = functools.partial(_packed_linear, packed, linear.bias)


def _packed_linear(weight: torch.Tensor, bias: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
