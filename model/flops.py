"""The floating-point operations that a step needs, and the peak against which MFU is measured.

Only necessary work counts: the head for target tokens only, attention within each document only, and nothing for the second
forward of activation checkpointing. This is "model FLOPs utilization" (PaLM, arXiv:2204.02311, appendix B).
"""

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D  # GPT-2's transposed matrix, no convolution

from distributed.process_group import Ranks, barrier, gather_objects
from model.dtypes import dtype_name
from model.language_model import PackedLanguageModel

# Peaks of bf16 matrix products that accumulate in fp32, in FLOP/s without sparsity, by the name that CUDA gives the device
# (without "NVIDIA ", which older drivers leave out). A figure that is printed with sparsity alone is halved. Sources: NVIDIA's
# data sheet of each device; the architecture whitepapers GA102 for the RTX A6000, Ada for the RTX 4090, RTX Blackwell for the
# RTX 5090 and RTX Blackwell PRO for the RTX PRO 6000; AMD's page of the MI300X. The H20 has no data sheet: its figure is the
# one that resellers print. A name is listed only if its own figure is known: NVL and PCIe cards, MIG slices, laptop and "D"
# variants differ from the device whose name they begin with.
CUDA_BF16_PEAKS = {
    "GB200": 2500e12,
    "B300 SXM6 AC": 2250e12,
    "B200": 2250e12,
    "H200": 989.5e12,
    "H20": 148e12,
    "H100 80GB HBM3": 989.5e12,  # SXM
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756.5e12,
    "A100-SXM4-80GB": 312e12,
    "A100-SXM4-40GB": 312e12,
    "A100 80GB PCIe": 312e12,
    "A100-PCIE-80GB": 312e12,
    "A100-PCIE-40GB": 312e12,
    "L40S": 362.05e12,
    "L40": 181.05e12,
    "L4": 121e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "A10G": 70e12,
    "RTX A6000": 154.8e12,
    "RTX PRO 6000 Blackwell Workstation Edition": 503.8e12,
    "GeForce RTX 4090": 165.2e12,
    "GeForce RTX 5090": 209.5e12,
    "AMD Instinct MI300X": 1307.4e12,
}

# The time of a FLOP in attention relative to a FLOP in a matrix product, by kind of device. On an EPYC whose bf16 products reach
# 0.9 TFLOP/s, SmolLM2's attention took 5 to 6 times as long for documents of 500 to 2,000 tokens (docs/LOG.md). The ratio is
# smaller on processors with slower products, so 3 is a compromise. The ratio of CUDA is not measured.
PAIR_WEIGHTS = {"cpu": 3, "cuda": 1}


@dataclass(frozen=True)
class Work:
    """FLOPs of forward and backward per token, per target and per pair of tokens."""

    per_token: float  # in the matrices of all layers
    per_target: float  # in the head
    per_pair: float  # of a query and a key, in one layer
    windows: tuple[tuple[int | None, int], ...]  # (sliding window in tokens or None, number of layers that have it)
    forward: float = 1 / 3  # fraction of `per_token` in forward; more if weights are frozen

    def costs(self, lengths: np.ndarray, targets: np.ndarray, pair_weight: int = 1) -> np.ndarray:
        """Return the relative costs of documents, int64 `(documents,)`, for data/dealing.py.

        lengths, targets: int64 `(documents,)`, in tokens. pair_weight: the time of a FLOP in attention relative to a FLOP in
        a matrix product (`PAIR_WEIGHTS`). The unit is 2**-24 of the FLOPs of one token's matrices, rounded up to a whole
        FLOP: integers have the same sums on every processor, and a sum over a step stays below 2**63.
        """
        unit = (int(self.per_token) >> 24) + 1
        costs = int(self.per_token) // unit * lengths + int(self.per_target) // unit * targets
        for window, layers in self.windows:
            costs += pair_weight * int(self.per_pair * layers) // unit * _pairs(lengths, window)
        return costs


def count_work(model: PackedLanguageModel, config: PretrainedConfig) -> Work:
    """Count the FLOPs of a model, which may be on meta or sharded.

    Per token, a matrix parameter costs 2 FLOPs in forward and 4 in backward, or 2 in backward if it is frozen and has no
    gradient. (The gradient of the first layer's input is counted, although a frozen model does not need it.) A token counts
    only at the experts it is sent to. Attention costs 4 FLOPs per pair, head dimension and head in forward (two products)
    and 8 in backward, for the pairs that the mask allows.
    """
    experts_per_token = getattr(config, "num_experts_per_tok", None) or 0
    matrices = [
        (parameter, experts_per_token / parameter.shape[0] if parameter.dim() == 3 else 1)  # `(experts, rows, columns)`
        for module in model.modules()
        if module is not model.head and (isinstance(module, torch.nn.Linear | Conv1D) or hasattr(module, "num_experts"))
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 3 or parameter is getattr(module, "weight", None)
    ]
    heads, _, head_dim = attention_heads(config)
    per_token = sum(share * _matrix_flops(matrix) for matrix, share in matrices)
    return Work(
        per_token=per_token,
        per_target=_matrix_flops(model.head.weight),
        per_pair=12.0 * heads * head_dim,
        windows=tuple(Counter(layer_windows(config)).items()),
        forward=2.0 * sum(share * matrix.numel() for matrix, share in matrices) / per_token,
    )


def _matrix_flops(matrix: torch.Tensor) -> float:
    return (6.0 if matrix.requires_grad else 4.0) * matrix.numel()


def attention_heads(config: PretrainedConfig) -> tuple[int, int, int]:
    """Return a layer's number of query heads, its number of key-value heads, and the head dimension.

    If layers differ (Gemma 4), the head dimension is the largest one.
    """
    heads = getattr(config, "num_attention_heads", 0)
    if not isinstance(heads, int) or not heads:  # no attention (Mamba), or another number of heads in each layer
        return 0, 0, 0
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    largest = max(getattr(layer, "head_dim", None) or 0 for layer in config.per_layer_config)
    return heads, kv_heads, largest or config.hidden_size // heads


def document_costs(work: Work) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return `Work.costs` for the kind of device that this process computes on."""
    weight = PAIR_WEIGHTS["cuda" if torch.cuda.device_count() else "cpu"]
    return functools.partial(work.costs, pair_weight=weight)


def layer_windows(config: PretrainedConfig) -> list[int | None]:
    """Return the sliding window of each layer with attention: the tokens that a query sees, itself included. None: all before it."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    attention = [kind for kind in kinds if "attention" in str(kind) and kind != "linear_attention"]
    return [window if kind == "sliding_attention" else None for kind in attention]


def step_flops(work: Work, document_lengths: Sequence[int], num_targets: float) -> float:
    """Return the FLOPs of a step over documents of these lengths (tokens) with `num_targets` target tokens in total."""
    lengths = np.asarray(document_lengths, dtype=np.int64)
    pairs = sum(layers * float(_pairs(lengths, window).sum()) for window, layers in work.windows)
    return float(work.per_token * lengths.sum() + work.per_target * num_targets + work.per_pair * pairs)


def _pairs(lengths: np.ndarray, window: int | None) -> np.ndarray:
    """Return the number of (query, key) pairs of each document in a layer, int64 `(documents,)`."""
    full = lengths if window is None else np.minimum(lengths, window)  # tokens that see all tokens before them
    return full * (full + 1) // 2 + (lengths - full) * full


def data_sheet_peak(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of the GPU with exactly this name (`torch.cuda.get_device_name`), or None if not listed."""
    return CUDA_BF16_PEAKS.get(device_name.removeprefix("NVIDIA "))


@dataclass(frozen=True)
class Peak:
    """The most FLOP/s that all ranks can reach together, the source of the number, and its dtype."""

    flops: float
    source: str
    dtype: torch.dtype


def find_peak(dtype: torch.dtype, ranks: Ranks) -> Peak:
    """Return the peak of all ranks: each takes its data sheet or times a matrix product. Every rank must call this.

    A measurement is too low if another program uses the processor all the while; MFU may then exceed 100%.
    """
    device, flops, why = ranks.device, None, ""
    barrier(ranks)  # on every rank: with GPUs of two kinds, only some may have a data sheet
    if device.type == "cuda" and dtype == torch.bfloat16:  # data sheets give no fp32 peak without tensor cores
        name = torch.cuda.get_device_name(device)
        flops, source = data_sheet_peak(name), f"data sheet of {name}, dense bf16"
        why = f", as no data sheet figure of {name} is known"
    if flops is None:
        size = 8192 if device.type == "cuda" else 1024
        flops, source = (
            measured_flops(device, dtype, size),
            f"measured: {size} x {size} product in {dtype_name(dtype)}{why}",
        )
    return Peak(math.fsum(gather_objects(flops, ranks)), source, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return the FLOP/s of the fastest of 24 products of two `size` x `size` matrices."""
    generator = torch.Generator(device).manual_seed(0)  # the run's random state must not change
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(24):  # fewer may all fall into a moment in which another program computes
        start = time.perf_counter()
        torch.matmul(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
