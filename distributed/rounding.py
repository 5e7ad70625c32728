"""Stochastic rounding of fp32 to bf16, with noise that is a function of (seed, tensor, step, element).

A bf16 number has 8 bits of precision, so an update of 2e-5 to a weight of 0.02 is usually less than half of the gap to the
next number. Rounding to nearest loses such an update in every step. Stochastic rounding goes up or down with the
probability that makes the mean exact (Zamirai et al., arXiv:2010.06192).
"""

import torch

from common.random_bits import MASK32, hash64, mix32_, signed32

NoiseKey = tuple[int, int]  # two 32-bit words


def noise_key(seed: int, stream: int, step: int) -> NoiseKey:
    """The key of one tensor's noise in one step. `stream` numbers the tensor in the whole model."""
    key = hash64(seed, stream, step)
    return key & MASK32, key >> 32


def noise(key: NoiseKey, first: int, count: int, device: torch.device) -> torch.Tensor:
    """int32 `(count,)`, uniform in 0 ... 65535: a pure function of the key and the global indices first, first + 1, ...

    The noise is therefore the same however a tensor is sharded. One 32-bit word, hashed from half the index, serves two
    neighbours; beyond 2^33 elements of one tensor the noise repeats.
    """
    words = torch.arange((first + count + 1) // 2 - first // 2, dtype=torch.int32, device=device)
    words.add_(signed32(first // 2 + key[0]))
    mix32_(words, signed32(key[1]))
    return words.view(torch.int16)[first % 2 : first % 2 + count].int().bitwise_and_(0xFFFF)


def stochastic_round_(value: torch.Tensor, key: NoiseKey, first: int) -> torch.Tensor:
    """Round flat fp32 values to bf16 values in place, up or down so that the mean is exact.

    `first` is the global index of value[0]. Adds 16 random bits to the 16 bits that bf16 lacks and cuts them off after
    the carry. A value that bf16 holds exactly is unchanged.
    """
    bits = value.view(torch.int32)
    bits.add_(noise(key, first, value.numel(), value.device)).bitwise_and_(-0x10000)
    return value
