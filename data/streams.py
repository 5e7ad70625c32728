"""A mixed-in source as an endless stream, of which every step takes the next part.

A stream consists of epochs, each in its own random order, and is measured in target tokens. It may be cut between two
documents. A text, that is a document all of whose tokens but the first are targets of weight 1, may also be cut within: it
consists of equal windows of at most `window` target tokens. So does a window of a token store. What a step takes of a text
is one item, however many of these windows it covers. Every token is a target exactly once per epoch. A part is read with up
to 64 tokens before it (data/sources.py), which are no targets; it does not see what comes before them.

Let E be the target tokens that the source brings to a mean step. `window` is E / 4 - 1, where the 1 pays for places that
are rounded to whole tokens. data/mixing.py proves from this what is promised.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from common.random_bits import permuted
from data.examples import Documents
from data.sources import Windows

# Target tokens. A part of a text that is shorter than this teaches little; a source that brings less to a mean step brings
# parts of this size to some steps instead.
USEFUL = 16
BLOCK = 2**16  # documents that are looked at together, so that a million of them take little memory
# (index of an item in its source, first token, end of the tokens, exclusive); end None: the whole item
Part = tuple[int, int, int | None]


class Cuts(NamedTuple):
    """Places in a stream, each int64 `(places,)` and in order."""

    items: np.ndarray  # items of the stream before the place
    offsets: np.ndarray  # target tokens (of a token store: tokens) of the next item before it
    most: np.ndarray  # number of target tokens before it, or of a token store a bound: differences are upper bounds


class Stream(Protocol):
    """A mixed-in source. It brings `ratio` target tokens for each one of the main source."""

    ratio: float
    window: int  # target tokens
    spacing: float  # target tokens between two places where the stream may be cut, at most: w
    density: float  # `Cuts.most` grows at most so much faster than the target tokens that are expected

    def cuts(self, positions: np.ndarray) -> Cuts: ...
    def part_of(self, item: int, first: int, last: int | None) -> Part | None: ...


def parts(stream: Stream, before: float, after: float) -> Iterator[Part]:
    """What a step takes; before, after: target tokens of the main source before the step, and before the next one."""
    (item, end), (first, last), _ = stream.cuts(stream.ratio * np.array([before, after], dtype=np.float64))
    for number in range(int(item), int(end) + (last > 0)):
        part = stream.part_of(number, int(first) if number == item else 0, int(last) if number == end else None)
        if part:
            yield part


def steps_of_promise(stream: Stream, step_targets: float) -> int:
    """Over so many steps the share is within a factor of two; step_targets: of the main source in a mean step."""
    return max(1, math.ceil(4 * stream.spacing / (stream.ratio * step_targets)))


def promise(stream: Stream, name: str, share: float, step_targets: float) -> str:
    """One line for the log: over how many steps the source has its share."""
    steps, expected = steps_of_promise(stream, step_targets), stream.ratio * step_targets
    if steps == 1:
        return (
            f"{name}: {share:.1%} of every step, within a factor of two ({expected:.0f} target tokens in a mean step)"
        )
    return (
        f"{name}: {share:.1%} over any {steps} steps, within a factor of two, but not of every step: {expected:.0f} target "
        f"tokens in a mean step, which come up to {stream.spacing:.0f} at a time"
    )


def make_stream(source: Documents | Windows, seed: int, number: int, ratio: float, step_targets: float) -> Stream:
    """The stream of the `number`-th mixed-in source, counted from 1. step_targets: of the main source in a mean step."""
    expected = ratio * step_targets
    window = max(1, int(expected / 4) - 1) if expected >= USEFUL else USEFUL
    if isinstance(source, Windows):
        return _StreamOfWindows(source, seed, number, ratio, window)
    return _StreamOfDocuments(source, seed, number, ratio, window)


class _StreamOfDocuments:
    density = 1.0

    def __init__(self, source: Documents, seed: int, number: int, ratio: float, window: int) -> None:
        self.source, self.key, self.ratio, self.window = source, (seed, number), ratio, window
        self.usable = None if source.targets.all() else source.items_with_targets().astype(np.uint32)
        self.size, self.total = int(np.count_nonzero(source.targets)), total(source.targets)
        self.epoch = functools.lru_cache(maxsize=1)(self._epoch)  # 12 bytes per document
        blocks = (np.arange(low, min(low + BLOCK, len(source))) for low in range(0, len(source), BLOCK))
        self.spacing = max(self._largest_window(block) for block in blocks)

    def _largest_window(self, documents: np.ndarray) -> float:
        targets, pieces = self.source.targets[documents], self._pieces(documents)
        return float(np.where(pieces > 1, targets / np.maximum(pieces, 1) + 1, targets).max())

    def _pieces(self, documents: np.ndarray) -> np.ndarray:
        """Number of equal windows that each document consists of."""
        targets, lengths = self.source.targets[documents], self.source.lengths[documents]
        is_text = lengths - targets.astype(np.float64) == 1
        return np.where(is_text, np.ceil(targets / self.window), 1).astype(np.int64)

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
            targets, pieces = self.source.targets[order[number]].astype(ends.dtype), self._pieces(order[number])
            begin = ends[number] - targets
            piece = np.clip(np.ceil((within - begin) / targets * pieces - 0.5), 0, pieces)
            is_end = piece == pieces
            offset = np.where(is_end, 0, np.floor(piece * targets / pieces + 0.5)).astype(np.int64)
            most = epoch * self.total + np.where(is_end, ends[number], begin + offset)
            found.append((epoch * self.size + number + is_end, offset, most))
        return Cuts(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))

    def part_of(self, item: int, first: int, last: int | None) -> Part | None:
        """Of an item of the stream, the target tokens from `first` to `last` (None: the end)."""
        epoch, number = divmod(item, self.size)
        index = int(self.epoch(epoch)[0][number])
        if last is None:
            return (index, first, self.source.num_tokens(index)) if first else (index, 0, None)
        return (index, first, last + 1) if last > first else None


class _StreamOfWindows:
    def __init__(self, source: Windows, seed: int, number: int, ratio: float, window: int) -> None:
        self.source, self.key, self.ratio, self.window = source, (seed, number), ratio, window
        self.pieces = math.ceil(source.mean_targets / window)
        self.steps = source.num_tokens(0) - 1  # from the first token of a window to its last
        self.spacing = source.mean_targets / self.pieces + (self.pieces > 1)
        self.density = self.steps / source.mean_targets

    def cuts(self, positions: np.ndarray) -> Cuts:
        """As for documents. Every window counts with the mean number of target tokens."""
        windows = positions / self.source.mean_targets
        number = np.floor(windows)
        piece = np.ceil((windows - number) * self.pieces - 0.5)
        is_end = piece == self.pieces
        offset = np.where(is_end, 0, np.floor(piece * self.steps / self.pieces + 0.5)).astype(np.int64)
        items = number.astype(np.int64) + is_end
        return Cuts(items, offset, items * self.steps + offset)

    def part_of(self, item: int, first: int, last: int | None) -> Part | None:
        """Of an item of the stream, the tokens after `first` up to `last` (None: the end)."""
        size, (seed, number) = len(self.source), self.key
        index = permuted(item % size, size, (seed, item // size, number))
        if not first and last is None:
            return index, 0, None
        length = self.source.num_tokens(index)  # the last window of a store may be shorter
        end = length if last is None else min(last + 1, length)
        return (index, first, end) if end > first + 1 else None


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
