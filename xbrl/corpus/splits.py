"""Assign examples to the splits of a corpus: training, validation and test have different banks."""

import random
from collections.abc import Iterable, Sequence

from common.errors import UserError

SPLITS = ("train", "validation", "test")
DEFAULT_SHARES = (0.8, 0.1, 0.1)


def group_by_split(examples: Sequence, splits: Sequence[str]) -> dict[str, list]:
    """Split name -> its examples, in their order. `splits` has the split of each example."""
    return {name: [one for one, split in zip(examples, splits, strict=True) if split == name] for name in SPLITS}


def check_shares(shares: Sequence[float]) -> None:
    """Raises `UserError` unless there is one share for each of `SPLITS`, none is negative, and they add up to 1."""
    # A share that is not a number fails the comparison, which is why it is not written the other way round.
    if len(shares) != len(SPLITS) or not (all(share >= 0 for share in shares) and abs(sum(shares) - 1) <= 1e-9):
        raise UserError(
            f"the splits {list(shares)} must be {len(SPLITS)} shares ({', '.join(SPLITS)}), none negative, that add up to 1."
        )


def check_counts(what: str, counts: Iterable[int], shares: Sequence[float]) -> None:
    """Raises `UserError` if a split with a share above 0 would get nothing. `what` is divided: `20 examples`."""
    for split, count, share in zip(SPLITS, counts, shares, strict=True):
        if share > 0 and not count:
            raise UserError(f"{what} are too few for a share of {share:.3g} in {split!r}; give more.")


def split_banks(banks: Sequence[str], shares: Sequence[float], seed: int) -> dict[str, str]:
    """Bank -> split, at random. `shares` are the fractions of the banks for train, validation and test.

    Raises `UserError` if they do not add up to 1, or if a split with a share above 0 would get no bank.
    """
    check_shares(shares)
    order = list(banks)
    random.Random(f"splits {seed}").shuffle(order)
    first = round(len(order) * shares[0])
    second = first + round(len(order) * shares[1])
    parts = dict(zip(SPLITS, (order[:first], order[first:second], order[second:]), strict=True))
    check_counts(f"{len(order)} banks", map(len, parts.values()), shares)
    return {bank: split for split, members in parts.items() for bank in members}
