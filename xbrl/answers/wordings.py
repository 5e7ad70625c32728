"""Which of several equivalent wordings a text uses: some are kept for the tests and never stand in training."""

import random
from collections.abc import Sequence
from typing import TypeVar

Option = TypeVar("Option")


class Wordings:
    """A replacement for `random.choice` that draws texts from one of two disjoint parts of each tuple of wordings.

    With `held_out` it draws from the last third of a tuple (at least one wording), otherwise from the others. A tuple of
    one wording has no part to hold out. Options that are not texts are drawn from all.
    """

    def __init__(self, rng: random.Random, held_out: bool) -> None:
        self._rng = rng
        self._held_out = held_out

    def __call__(self, options: Sequence[Option], /) -> Option:
        """One of the options, at random."""
        return self._rng.choice(self._part(options))

    def at(self, options: Sequence[Option], number: int) -> Option:
        """The option with this number, counted round and round: consecutive numbers give different options."""
        part = self._part(options)
        return part[number % len(part)]

    def _part(self, options: Sequence[Option]) -> Sequence[Option]:
        if not isinstance(options[0], str) or len(options) == 1:
            return options
        kept = len(options) - max(1, round(len(options) / 3))
        return options[kept:] if self._held_out else options[:kept]


def is_held_out(split: str) -> bool:
    """Whether the letters of this split use the wordings that are held out."""
    return split.startswith("test")
