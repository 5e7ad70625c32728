"""Layers that carry a state from token to token, over packed documents: each document begins with an empty state.

Such mixers are convolutions and recurrences: GatedDeltaNet (Qwen3-Next, Qwen3.5, OLMo hybrid), Kimi's delta attention, Mamba 1
and 2 (Granite 4, Bamba, Nemotron-H, Falcon-H1, Jamba), the short convolutions of LFM2, RWKV. transformers' own code computes
each document by itself. It takes a kernel of flash-linear-attention, mamba-ssm or causal-conv1d if the user has installed
it, and otherwise plain torch. So no kernel gets more than one document, and none needs boundaries (`cu_seqlens`, `seq_idx`):
with a boundary that only one of two kernels knows, Qwen3.5's convolution reads across documents (ms-swift#9618).
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Recurrences without a convolution, by the end of their class's name; a module with a convolution over tokens is found by it.
RECURRENT = re.compile("LightningAttention|LinearAttention|RwkvSelfAttention|RwkvFeedForward|xLSTMLayer|DeltaAttention$")


class Boundaries:
    """The lengths of the documents in the micro-batch of the current forward, in tokens. False if no mixer reads them."""

    def __init__(self) -> None:
        self.lengths: tuple[int, ...] = ()
        self.num_mixers = 0

    def __bool__(self) -> bool:
        return self.num_mixers > 0


def split_documents(causal_lm: nn.Module) -> Boundaries:
    """Let each mixer of the model compute one document after the other, in place. Return what tells them the lengths."""
    boundaries, inside = Boundaries(), ()
    for name, module in causal_lm.named_modules():
        if name.startswith(inside):
            continue
        if any(isinstance(child, nn.Conv1d) for child in module.children()) or RECURRENT.search(type(module).__name__):
            inside = (*inside, f"{name}.")
            boundaries.num_mixers += 1
            module.forward = functools.partial(_document_by_document, boundaries, module.forward)
    return boundaries


def _document_by_document(boundaries: Boundaries, forward: Callable, *arguments: Any, **options: Any) -> Any:
    """Call the mixer's `forward` for each document, and join the states `(1, tokens, ...)` that it returns.

    Arguments that have a value per token are cut in the same way.
    """
    lengths = boundaries.lengths
    hidden = arguments[0] if arguments else options["hidden_states"]
    if len(lengths) < 2 or hidden.shape[1] != sum(lengths):
        return forward(*arguments, **options)

    def part(value: Any, index: int) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == sum(lengths):
            return value.split(lengths, dim=1)[index]
        return tuple(part(item, index) for item in value) if isinstance(value, tuple) else value

    outputs = [
        forward(*part(arguments, index), **{name: part(value, index) for name, value in options.items()})
        for index in range(len(lengths))
    ]
    if isinstance(outputs[0], tuple):
        return (torch.cat([output[0] for output in outputs], dim=1), *outputs[0][1:])
    return torch.cat(outputs, dim=1)
