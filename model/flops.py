"""How many floating-point operations a step needs, and the peak they are measured against.

Only what the work needs is counted: the head for target tokens alone, attention within each document alone, nothing
for activation checkpointing's second forward. So MFU is "model FLOPs utilisation" (PaLM, arXiv:2204.02311, app. B).
"""

import time
from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

# Dense bf16 peaks in FLOP/s, from the vendors' data sheets (without sparsity).
CUDA_BF16_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "L4": 121e12}


def flops_per_unit(config: PretrainedConfig) -> tuple[float, float, float]:
    """FLOPs of forward and backward for (a token in the layers, a target token in the head, a pair query x key).

    A matrix parameter costs 2 in forward and 4 in backward per token; attention 4 per pair, head dimension and head in
    forward (two products) and twice that in backward, over the causal half of the pairs.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attention = config.hidden_size * head_dim * (2 * heads + 2 * kv_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    per_token = 6.0 * config.num_hidden_layers * (attention + mlp)
    per_target = 6.0 * config.hidden_size * config.vocab_size
    per_pair = 12.0 * config.num_hidden_layers * heads * head_dim
    return per_token, per_target, per_pair


def step_flops(config: PretrainedConfig, document_lengths: Sequence[int], num_targets: int) -> float:
    """FLOPs that a step over these documents needs; lengths in tokens, targets over the whole step."""
    per_token, per_target, per_pair = flops_per_unit(config)
    pairs = sum(float(n) * (n + 1) / 2 for n in document_lengths)
    return per_token * float(sum(document_lengths)) + per_target * num_targets + per_pair * pairs


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
