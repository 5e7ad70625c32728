"""A pseudo-random permutation of 0, ..., n - 1 whose i-th element is computed in O(1) time and memory.

A Feistel network is a permutation of the integers with an even number of bits, whatever its round function (Luby and
Rackoff, 1988). A result of n or more is permuted again until it is below n ("cycle walking", Black and Rogaway, 2002).
This takes at most 4 passes on average, because the domain of the network has at most 4 n elements.
"""

import hashlib

from common.random_bits import mix64

_ROUNDS = 6


def permuted(index: int, size: int, key: tuple[int, ...]) -> int:
    """Element `index` of the permutation of 0, ..., `size` - 1 selected by `key`. Raises IndexError if out of range."""
    if not 0 <= index < size:
        raise IndexError(f"index {index} is outside a permutation of {size} elements")
    half = max(1, -(-(size - 1).bit_length() // 2))  # bits in each half
    low = (1 << half) - 1
    keys = _round_keys(key)
    while True:
        left, right = index >> half, index & low
        for round_key in keys:
            left, right = right, left ^ (mix64(right ^ round_key) & low)
        index = left << half | right
        if index < size:
            return index


def _round_keys(key: tuple[int, ...]) -> list[int]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8)]
