"""Counter-based random bits: pure functions of a key and a counter, with no generator state.

The same key and counter give the same bits on every rank, for any number of ranks and in any order of evaluation. The
64-bit hash is splitmix64 (Steele, Lea and Flood, OOPSLA 2014, https://doi.org/10.1145/2660193.2660195). The 32-bit
mixer is lowbias32 (C. Wellons, https://github.com/skeeto/hash-prospector).
"""

import torch

MASK32 = 2**32 - 1
MASK64 = 2**64 - 1
_INCREMENT = 0x9E3779B97F4A7C15
_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def mix64(word: int) -> int:
    """The finalizer of splitmix64: a bijection of unsigned 64-bit integers."""
    for shift, factor in _STEPS:
        word = (word ^ word >> shift) * factor & MASK64
    return word ^ word >> 31


def hash64(*words: int) -> int:
    """An unsigned 64-bit hash of a sequence of integers, each taken modulo 2^64."""
    value = 0
    for word in words:
        value = mix64(value + word + _INCREMENT & MASK64)
    return value


def hash64_tensor(seed: int, *words: torch.Tensor) -> torch.Tensor:
    """`hash64(seed, *words)` for every element of int64 tensors of one shape, with the bits of an int64."""
    value = torch.full_like(words[0], signed64(hash64(seed)))
    for word in words:
        value = value + word + signed64(_INCREMENT)
        for shift, factor in _STEPS:
            value = (value ^ _logical_shift(value, shift)) * signed64(factor)
        value = value ^ _logical_shift(value, 31)
    return value


def mix32_(words: torch.Tensor, key: int | torch.Tensor) -> torch.Tensor:
    """lowbias32 of int32 words, in place, with the int32 `key` added between its two products. Overflows wrap around."""
    for shift, mask, factor, addend in ((16, 0xFFFF, 0x7FEB352D, key), (15, 0x1FFFF, 0x846CA68B, 0)):
        words.bitwise_xor_((words >> shift).bitwise_and_(mask))  # the mask makes the shift a logical one
        words.mul_(signed32(factor)).add_(addend)
    return words.bitwise_xor_((words >> 16).bitwise_and_(0xFFFF))


def signed32(word: int) -> int:
    """The int32 with the low 32 bits of `word`."""
    word &= MASK32
    return word - 2**32 if word >= 2**31 else word


def signed64(word: int) -> int:
    """The int64 with the low 64 bits of `word`."""
    word &= MASK64
    return word - 2**64 if word >= 2**63 else word


def _logical_shift(value: torch.Tensor, shift: int) -> torch.Tensor:
    return value >> shift & (1 << (64 - shift)) - 1
