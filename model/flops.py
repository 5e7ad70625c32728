"""How many floating-point operations a step needs, and the peak they are measured against.

Only what the work needs is counted: the head for target tokens alone, attention within each document alone, nothing
for activation checkpointing's second forward. So MFU is "model FLOPs utilisation" (PaLM, arXiv:2204.02311, app. B).
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig

from model.language_model import PackedLanguageModel

# Dense bf16 peaks in FLOP/s, from the vendors' data sheets (without sparsity).
CUDA_BF16_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "L4": 121e12}


@dataclass(frozen=True)
class Work:
    """FLOPs of forward and backward for one of each unit."""

    per_token: float  # in the matrices of all layers
    per_target: float  # in the head
    per_pair: float  # query x key, in one layer
    windows: tuple[tuple[int | None, int], ...]  # (sliding window in tokens or None, layers that have it)


def count_work(model: PackedLanguageModel, config: PretrainedConfig) -> Work:
    """Count a model's matrices (on meta or sharded, it does not matter).

    A matrix parameter costs 2 in forward and 4 in backward per token; attention 4 per pair, head dimension and head in
    forward (two products) and twice that in backward, over the pairs that a query may see.
    """
    head = model.causal_lm.get_output_embeddings()
    matrices = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Work(
        per_token=6.0 * sum(m.weight.numel() for m in matrices),
        per_target=6.0 * head.weight.numel(),
        per_pair=12.0 * heads * head_dim,
        windows=tuple(Counter(layer_windows(config)).items()),
    )


def layer_windows(config: PretrainedConfig) -> list[int | None]:
    """Of each layer the number of tokens a query sees, itself included; None: all before it."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def step_flops(work: Work, document_lengths: Sequence[int], num_targets: int) -> float:
    """FLOPs that a step over these documents needs; lengths in tokens, targets over the whole step."""
    lengths = np.asarray(document_lengths, dtype=np.float64)
    pairs = 0.0
    for window, layers in work.windows:
        full = lengths if window is None else np.minimum(lengths, window)  # tokens that see all before them
        pairs += layers * (full * (full + 1) / 2 + (lengths - full) * full).sum()
    return float(work.per_token * lengths.sum() + work.per_target * num_targets + work.per_pair * pairs)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s this process can reach at most, and where the figure is from.

    A CUDA device by its data sheet (fp32 without tensor cores is not listed); anything else by a short matrix product.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in CUDA_BF16_PEAKS.items():
            if known in name:
                return peak, f"data sheet of {known}, dense bf16"
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best, f"measured: {size} x {size} product in {str(dtype).removeprefix('torch.')}"
