"""Rounding of reported amounts and ratios, and random shares."""

import random
from decimal import Decimal


def ratio(part: Decimal, of: Decimal, places: int) -> Decimal:
    """`part / of`, rounded to `places` decimal places."""
    return rounded(part / of, places)


def rounded(value: Decimal, places: int) -> Decimal:
    """`value` rounded to `places` decimal places (-3: to thousands), represented without an exponent."""
    value = value.quantize(Decimal(1).scaleb(-places))
    return value if places > 0 else value.quantize(Decimal(1))


def exponent(value: Decimal) -> int:
    """The exponent of the last digit of a finite number: -2 for 1.25 and for 1.20."""
    number = value.as_tuple().exponent
    assert isinstance(number, int), f"{value} is not a finite number"
    return number


def share(rng: random.Random, low: int, high: int) -> Decimal:
    """A random share between `low` and `high` per mille, a multiple of 0.0001."""
    return Decimal(rng.randint(low * 10, high * 10)) / 10_000
