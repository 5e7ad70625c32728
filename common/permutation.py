"""A pseudo-random order of 0 ... n-1 whose i-th element is computed alone: nothing of size n is ever built.

A Feistel network permutes the numbers of an even count of bits, whatever its round function does (Luby and Rackoff,
1988); numbers beyond n are permuted again until one falls below it ("cycle walking", Black and Rogaway, 2002), fewer than
4 times on average, since the network's domain is at most 4 n.
"""

import hashlib

_MASK = (1 << 64) - 1
_ROUNDS = 6


def permuted(index: int, size: int, key: tuple[int, ...]) -> int:
    """What stands at `index` in the order of `size` numbers that belongs to `key`. O(1)."""
    if not 0 <= index < size:
        raise IndexError(f"{index} is not in an order of {size}")
    half = max(1, -(-(size - 1).bit_length() // 2))  # bits of each half
    low = (1 << half) - 1
    keys = _round_keys(key)
    while True:
        left, right = index >> half, index & low
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & low)
        index = left << half | right
        if index < size:
            return index


def _round_keys(key: tuple[int, ...]) -> list[int]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8)]


def _mixed(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31
