"""Rounding, as banks do it."""

import random
from decimal import Decimal


def ratio(part: Decimal, of: Decimal, places: int) -> Decimal:
    """A ratio to `places` decimal places."""
    return rounded(part / of, places)


def rounded(value: Decimal, places: int) -> Decimal:
    """`value` to `places` decimal places; -3 is to the nearest thousand. Always written without an exponent."""
    value = value.quantize(Decimal(1).scaleb(-places))
    return value if places > 0 else value.quantize(Decimal(1))


def share(rng: random.Random, low: int, high: int) -> Decimal:
    """A share between `low` and `high` per thousand."""
    return Decimal(rng.randint(low * 10, high * 10)) / 10_000
