"""Counter-based random bits, permutations and labels: pure functions of a key and a counter, without generator state.

The same key and counter give the same bits on every rank, for any number of ranks and in any order of evaluation. The
64-bit hash is splitmix64 (Steele, Lea and Flood, OOPSLA 2014, https://doi.org/10.1145/2660193.2660195). The 32-bit
mixer is lowbias32 (C. Wellons, https://github.com/skeeto/hash-prospector).
"""

import hashlib

import torch

MASK32 = 2**32 - 1
MASK64 = 2**64 - 1
_INCREMENT = 0x9E3779B97F4A7C15
_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_ROUNDS = 6


def _mix64(word: int) -> int:
    """Apply the finalizer of splitmix64, a bijection of unsigned 64-bit integers."""
    for shift, factor in _STEPS:
        word = (word ^ word >> shift) * factor & MASK64
    return word ^ word >> 31


def hash64(*words: int) -> int:
    """Return an unsigned 64-bit hash of a sequence of integers, each taken modulo 2^64."""
    value = 0
    for word in words:
        value = _mix64(value + word + _INCREMENT & MASK64)
    return value


def hash64_tensor(seed: int, *words: torch.Tensor) -> torch.Tensor:
    """Return `hash64(seed, *words)` for each element of int64 tensors of equal shape, as int64 with the same bits."""
    value = torch.full_like(words[0], signed64(hash64(seed)))
    for word in words:
        value = value + word + signed64(_INCREMENT)
        for shift, factor in _STEPS:
            value = (value ^ _logical_shift(value, shift)) * signed64(factor)
        value = value ^ _logical_shift(value, 31)
    return value


def mix32_(words: torch.Tensor, key: int | torch.Tensor) -> torch.Tensor:
    """Apply lowbias32 to int32 words in place, adding the int32 `key` between the two products. Products wrap."""
    for shift, mask, factor, addend in ((16, 0xFFFF, 0x7FEB352D, key), (15, 0x1FFFF, 0x846CA68B, 0)):
        words.bitwise_xor_((words >> shift).bitwise_and_(mask))  # the mask makes the shift a logical one
        words.mul_(signed32(factor)).add_(addend)
    return words.bitwise_xor_((words >> 16).bitwise_and_(0xFFFF))


def signed32(word: int) -> int:
    """Return the int32 with the low 32 bits of `word`."""
    word &= MASK32
    return word - 2**32 if word >= 2**31 else word


def signed64(word: int) -> int:
    """Return the int64 with the low 64 bits of `word`."""
    word &= MASK64
    return word - 2**64 if word >= 2**63 else word


def _logical_shift(value: torch.Tensor, shift: int) -> torch.Tensor:
    return value >> shift & (1 << (64 - shift)) - 1


def permuted(index: int, size: int, key: tuple[int, ...]) -> int:
    """Return element `index` of the permutation of 0, ..., `size` - 1 selected by `key`, in O(1) time and memory.

    A Feistel network permutes the integers with an even number of bits, whatever its round function (Luby and Rackoff, 1988).
    A result that is too large is permuted again ("cycle walking", Black and Rogaway, 2002), at most 4 times on average,
    because the domain of the network has at most 4 x `size` elements. Raise IndexError if `index` is out of range.
    """
    if not 0 <= index < size:
        raise IndexError(f"index {index} is outside a permutation of {size} elements")
    half = max(1, -(-(size - 1).bit_length() // 2))  # bits in each half
    low = (1 << half) - 1
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
    keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8)]
    while True:
        left, right = index >> half, index & low
        for round_key in keys:
            left, right = right, left ^ (_mix64(right ^ round_key) & low)
        index = left << half | right
        if index < size:
            return index


def sample_labels(logits: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Sample a label for each row of `logits` `(rows, vocabulary)` from its softmax. Return int64 `(rows,)`.

    keys: int64 `(rows,)`, which determine the samples. The label is the argmax after the Gumbel-max trick, written as the
    first of exponential clocks with rates exp(logits). A rounding error of the logits changes the label only if two clocks
    are that close; a sample by the inverse of the distribution function would not have this property.
    """
    words = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    low, high = (keys & 0xFFFFFFFF).int(), (keys >> 32).int()
    words = mix32_(words + low[:, None], high[:, None])
    # 31 bits, exact near zero, where an unlikely label's clock must ring to win.
    time = words.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(-(2.0**-31)).log1p_().neg_()
    return torch.sub(logits, time.log_(), out=time).argmax(dim=1)
