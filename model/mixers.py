"""Layers that carry a state from token to token, over packed documents: each document begins with an empty state.

Such mixers are convolutions and recurrences: GatedDeltaNet (Qwen3-Next, Qwen3.5, OLMo hybrid), Kimi's delta attention, Mamba 1
and 2 (Granite 4, Bamba, Nemotron-H, Falcon-H1, Jamba), the short convolutions of LFM2, RWKV. transformers' own code computes
each document by itself. It takes a kernel of flash-linear-attention, mamba-ssm or causal-conv1d if the user has installed
it, and otherwise plain torch. So no kernel gets more than one document, and none needs boundaries (`cu_seqlens`, `seq_idx`):
with a boundary that only one of two kernels knows, Qwen3.5's convolution reads across documents (ms-swift#9618).
"""

import functools
import re
from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import nn

# Recurrences without a convolution, by the end of their class's name; a module with a convolution over tokens is found by it.
RECURRENT = re.compile(
    "LightningAttention|LinearAttention|RwkvSelfAttention|RwkvFeedForward|xLSTMLayer|DeltaAttention$"
)

CHUNK = 64  # tokens that the recurrences of transformers compute together


class Boundaries:
    """The lengths of the documents in the micro-batch of the current forward, in tokens, and the number of mixers that read them."""

    def __init__(self) -> None:
        self.lengths: tuple[int, ...] = ()
        self.num_mixers = 0


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
    """Call the mixer's `forward` on batches of documents of similar length, and join the states `(1, tokens, ...)` that it returns.

    Documents are filled up at their end to a multiple of CHUNK tokens. A mixer is causal, so no token of the document sees the
    filling. Arguments that have a value per token are cut in the same way.
    """
    lengths = boundaries.lengths
    first = arguments[0] if arguments else options["hidden_states"]
    if len(lengths) < 2 or first.shape[1] != sum(lengths):
        return forward(*arguments, **options)

    def rows(value: Any, index: torch.Tensor) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[:2] == (1, len(order)):
            return value[0, index]
        return tuple(rows(item, index) for item in value) if isinstance(value, tuple) else value

    order, outputs, rest = torch.empty(sum(lengths), dtype=torch.int64), [], ()
    done = 0
    for index, is_inside in _batches(lengths):
        index, is_inside = index.to(first.device), is_inside.to(first.device)
        output = forward(*rows(arguments, index), **{name: rows(value, index) for name, value in options.items()})
        if isinstance(output, tuple):
            output, rest = output[0], output[1:]
        outputs.append(output[is_inside])
        order[index[is_inside].cpu()] = torch.arange(done, done + len(outputs[-1]))
        done += len(outputs[-1])
    states = torch.cat(outputs)[None, order.to(first.device)]
    return (states, *rest) if rest else states


@functools.lru_cache(maxsize=64)  # all mixers of a forward, and of its recomputation, ask for the same lengths
def _batches(lengths: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return for each batch of documents (tokens in the row, whether each is of the document), both `(documents, longest)`."""
    starts, by_size = [0, *accumulate(lengths)], defaultdict(list)
    for start, length in zip(starts, lengths, strict=False):
        by_size[-(-length // CHUNK) * CHUNK].append((start, length))
    batches = []
    for size, documents in sorted(by_size.items()):
        place, (start, length) = torch.arange(size), torch.tensor(documents).T[..., None]
        batches.append((start + place.minimum(length - 1), place < length))
    return batches
