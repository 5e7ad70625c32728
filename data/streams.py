"""A mixed-in source as an endless stream, of which every step takes the next items.

A stream consists of epochs, each in its own random order, and is measured in target tokens. What a step takes ends where an
item ends: a document, or a window of a token store, is never cut, so that every token is predicted from all that stands before
it there. A source whose items are larger than what it should bring to a step brings one to some steps and nothing to the
others; data/mixing.py says over how many steps it has its share.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from common.random_bits import permuted
from data.examples import Documents
from data.sources import Windows

BLOCK = 2**16  # documents that are looked at together, so that a million of them take little memory


class Cuts(NamedTuple):
    """Places between two items of a stream, each int64 `(places,)` and in order."""

    items: np.ndarray  # items of the stream before the place
    most: np.ndarray  # number of target tokens before it, or of a token store a bound: differences are upper bounds


class Stream(Protocol):
    """A mixed-in source. It brings `ratio` target tokens for each one of the main source."""

    ratio: float
    largest: float  # target tokens of its largest item, of a token store of a mean one: w
    density: float  # `Cuts.most` grows at most so much faster than the target tokens that are expected

    def cuts(self, positions: np.ndarray) -> Cuts: ...
    def index(self, item: int) -> int: ...


def items_of_step(stream: Stream, before: float, after: float) -> Iterator[int]:
    """Indices in the source of what a step takes.

    before, after: target tokens of the main source before the step, and before the next one.
    """
    first, end = stream.cuts(stream.ratio * np.array([before, after], dtype=np.float64)).items.tolist()
    return map(stream.index, range(first, end))


def steps_of_share(stream: Stream, step_targets: float) -> int:
    """N: over so many steps the share is within a factor of two. step_targets: of the main source in a mean step."""
    return max(1, math.ceil(4 * stream.largest / (stream.ratio * step_targets)))


def promise(stream: Stream, name: str, share: float, step_targets: float) -> str:
    """One line for the log: over how many steps the source has its share."""
    steps, expected = steps_of_share(stream, step_targets), stream.ratio * step_targets
    if steps == 1:
        return (
            f"{name}: {share:.1%} of every step, within a factor of two ({expected:.0f} target tokens in a mean step)"
        )
    return (
        f"{name}: {share:.1%} over any {steps} steps, within a factor of two, but not of every step: {expected:.0f} target "
        f"tokens in a mean step, which come up to {stream.largest:.0f} at a time, because no example is cut"
    )


def make_stream(source: Documents | Windows, seed: int, number: int, ratio: float) -> Stream:
    """The stream of the `number`-th mixed-in source, counted from 1."""
    if isinstance(source, Windows):
        return _StreamOfWindows(source, seed, number, ratio)
    return _StreamOfDocuments(source, seed, number, ratio)


class _StreamOfDocuments:
    density = 1.0

    def __init__(self, source: Documents, seed: int, number: int, ratio: float) -> None:
        self.source, self.key, self.ratio = source, (seed, number), ratio
        self.usable = None if source.targets.all() else source.items_with_targets().astype(np.uint32)
        self.size, self.total = int(np.count_nonzero(source.targets)), total(source.targets)
        self.epoch = functools.lru_cache(maxsize=1)(self._epoch)  # 12 bytes per document
        self.largest = float(source.targets.max())

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in order, uint32, and the target tokens up to the end of each."""
        # Not (seed, number, epoch): numpy treats (a, b, 0) like (a, b), and the main source has (seed, epoch).
        order = shuffled(self.size, (self.key[0], epoch, self.key[1]))
        order = order if self.usable is None else self.usable[order]
        return order, cumulative(self.source.targets, order)[1:]

    def cuts(self, positions: np.ndarray) -> Cuts:
        """The nearest place to each position, of two equally near ones the first; fp64 target tokens, in order."""
        epochs = (positions // self.total).astype(np.int64)
        found = []
        for epoch in np.unique(epochs).tolist():
            low, high = np.searchsorted(epochs, [epoch, epoch + 1])
            order, ends = self.epoch(epoch)
            within = positions[low:high] - epoch * self.total
            # For another dtype than that of `ends` numpy would copy all of it. Integers are compared with the floor.
            keys = within if ends.dtype.kind == "f" else np.floor(within).astype(np.int64)
            number = np.minimum(np.searchsorted(ends, keys, side="right"), self.size - 1)
            targets = self.source.targets[order[number]].astype(ends.dtype)
            begin = ends[number] - targets
            is_end = (within - begin) / targets > 0.5
            most = epoch * self.total + np.where(is_end, ends[number], begin)
            found.append((epoch * self.size + number + is_end, most))
        return Cuts(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))

    def index(self, item: int) -> int:
        """The document that an item of the stream is."""
        epoch, number = divmod(item, self.size)
        return int(self.epoch(epoch)[0][number])


class _StreamOfWindows:
    def __init__(self, source: Windows, seed: int, number: int, ratio: float) -> None:
        self.source, self.key, self.ratio, self.largest = source, (seed, number), ratio, source.mean_targets
        self.steps = source.num_tokens(0) - 1  # from the first token of a window to its last
        self.density = self.steps / source.mean_targets

    def cuts(self, positions: np.ndarray) -> Cuts:
        """As for documents. Every window counts with the mean number of target tokens."""
        items = np.ceil(positions / self.source.mean_targets - 0.5).astype(np.int64)
        return Cuts(items, items * self.steps)

    def index(self, item: int) -> int:
        """The window that an item of the stream is."""
        size, (seed, number) = len(self.source), self.key
        return permuted(item % size, size, (seed, item // size, number))


def total(targets: np.ndarray) -> int | float:
    """The sum of target tokens or of weights, added in order: numpy's sum of floats may depend on the processor."""
    return np.cumsum(targets)[-1].item() if targets.dtype.kind == "f" else targets.sum().item()


def cumulative(targets: np.ndarray, order: np.ndarray, start: float = 0) -> np.ndarray:
    """`start` plus the sums of `targets` over the first 0, 1, ... of the documents in `order` `(n,)`.

    int64 or, of fractional weights, fp64 `(n + 1,)`.
    """
    sums = np.empty(len(order) + 1, np.float64 if targets.dtype.kind == "f" else np.int64)
    sums[0] = start
    for low in range(0, len(order), BLOCK):
        block = sums[low + 1 : low + 1 + BLOCK]
        np.cumsum(targets[order[low : low + BLOCK]], out=block)
        block += sums[low]
    return sums


def shuffled(size: int, key: tuple[int, ...]) -> np.ndarray:
    """A random permutation of 0, ..., `size` - 1, uint32: a million documents take 4 MB."""
    return np.random.default_rng(key).permutation(np.arange(size, dtype=np.uint32))
