"""The items of each source in a step, as a pure function of (seed, step) that does not depend on the number of ranks.

The main source sets the pace. Let C(s) be the number of its target tokens before step s, and r the share of a mixed-in
source divided by the share of the main source. Such a source is an endless stream, measured in target tokens: epochs, each in
its own random order. Step s takes the stream from r C(s) to r C(s + 1), with both ends moved to the nearest place between two
items. A document, or a window of a token store, is never cut, so that every token is predicted from all that stands before it
there. No state is carried from step to step.

Let w be the target tokens of the source's largest item. Each end moves by w / 2 at most, so over any range of steps the
source brings r times the target tokens of the main source to within w. Let E be what it should bring to a mean step: over
N = 4 w / E steps or more it is within a factor of two of its share. Target tokens of a token store are estimated from their
mean per window.
"""

import functools
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common.random_bits import permuted
from data.examples import Documents
from data.sources import Windows

BLOCK = 2**16  # documents that are looked at together, so that a million of them take little memory


# ---- the main source -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MainOrder:
    """The order in which the items of the main source are visited."""

    steps_per_epoch: tuple[int, ...]
    items: Callable[[int], list[int]]  # step -> its items
    targets_before: Callable[[int], float]  # step -> target tokens of all steps before it, C(s)
    # With `global_tokens`: steps that may have more target tokens over all sources, and how many these may have at most
    num_too_large: int = 0
    largest: float = 0.0


def mean_step_targets(source: Documents | Windows, examples: int | None, tokens: float | None) -> float:
    """Target tokens of the main source in a mean step of `examples` items, or of up to `tokens` target tokens."""
    mean = total_targets(source) / len(source)
    return min(total_targets(source), examples * mean if examples else max(mean, tokens or 0.0))


def total_targets(source: Documents | Windows) -> float:
    """Number of target tokens in one pass. For a token store it is computed from the mean per window."""
    return source.mean_targets * len(source) if isinstance(source, Windows) else float(total(source.targets))


def main_order(
    source: Documents | Windows,
    epochs: int,
    seed: int,
    examples: int | None,
    tokens: int | None,
    streams: "Sequence[Stream]" = (),
) -> MainOrder:
    """`epochs` passes over a source, each in its own random order. The last step of an epoch may be smaller.

    A step has `examples` items; or as many, but at least one, as leave room for what `streams` bring to the step: it then
    has at most `tokens` target tokens over all sources, unless one item and what is mixed in with it has more.
    """
    if isinstance(source, Windows) and (tokens is None or not streams):
        return _order_of_windows(source, epochs, seed, examples, tokens)
    size = len(source)
    order = functools.lru_cache(maxsize=1)(lambda epoch: shuffled(size, (seed, epoch)))
    # For each epoch: the index at which each step begins, and C after each step
    starts: list[np.ndarray] = []
    ends: list[np.ndarray] = [np.zeros(1)]
    too_large, largest = 0, 0.0
    for epoch in range(epochs):
        if isinstance(source, Windows):
            # No window is read to count its target tokens: they are at most all tokens but the first.
            before = np.arange(epoch * size, (epoch + 1) * size + 1) * source.mean_targets
            bound = np.arange(size + 1) * (source.num_tokens(0) - 1)
        else:
            before = bound = cumulative(source.targets, order(epoch), ends[-1][-1].item())
        if tokens is None:
            first = np.arange(0, size, examples)
        else:
            # What a step from any item to any other would have, over all sources, is a difference of these.
            most = bound.astype(np.float64) if streams else bound
            for stream, low in itertools.product(streams, range(0, len(most), BLOCK)):
                most[low : low + BLOCK] += stream.cuts(stream.ratio * before[low : low + BLOCK]).most
            first = _step_starts(most, tokens)
            sizes = np.diff(most[[*first, -1]])
            too_large, largest = too_large + int((sizes > tokens).sum()), max(largest, float(sizes.max()))
        starts.append(first.astype(np.uint32))
        ends.append(before[[*first[1:], -1]])
    before_step = np.concatenate(ends)
    steps_per_epoch = tuple(len(s) for s in starts)
    begins = np.cumsum([0, *steps_per_epoch]).tolist()  # the first step of each epoch

    def items(step: int) -> list[int]:
        epoch = bisect_right(begins, step) - 1
        within = step - begins[epoch]
        low, high, *_ = *starts[epoch][within : within + 2].tolist(), size
        if isinstance(source, Windows):
            return [permuted(i, size, (seed, epoch)) for i in range(low, high)]
        return order(epoch)[low:high].tolist()

    def targets_before(step: int) -> float:
        return before_step[step].item()

    return MainOrder(steps_per_epoch, items, targets_before, too_large, largest)


def _step_starts(before: np.ndarray, tokens: int) -> np.ndarray:
    """Index at which each step begins, given the target tokens before each document, and in total as the last element."""
    starts = [0]
    while True:
        fit = int(np.searchsorted(before, before[starts[-1]] + tokens, side="right")) - 1
        following = max(fit, starts[-1] + 1)
        if following >= len(before) - 1:
            return np.array(starts)
        starts.append(following)


def _order_of_windows(windows: Windows, epochs: int, seed: int, examples: int | None, tokens: int | None) -> MainOrder:
    """Every step has the same number of windows, so that no list of them is needed: a token store may have billions."""
    size, mean, bound = len(windows), windows.mean_targets, windows.num_tokens(0) - 1
    # No window is read to count its target tokens: they are at most all tokens but the first.
    per_step = examples or max(1, (tokens or 0) // bound)
    steps, largest = -(-size // per_step), per_step * bound
    too_large = steps * epochs if tokens and largest > tokens else 0

    def items(step: int) -> list[int]:
        epoch, within = divmod(step, steps)
        return [permuted(i, size, (seed, epoch)) for i in range(within * per_step, min(size, (within + 1) * per_step))]

    def targets_before(step: int) -> float:
        epoch, within = divmod(step, steps)
        return (epoch * size + min(size, within * per_step)) * mean

    return MainOrder((steps,) * epochs, items, targets_before, too_large, largest)


# ---- mixed-in sources ------------------------------------------------------------------------------------------------------


class Cuts(NamedTuple):
    """Places between two items of a stream, each int64 `(places,)` and in order."""

    items: np.ndarray  # items of the stream before the place
    most: np.ndarray  # number of target tokens before it, or of a token store a bound: differences are upper bounds


class Stream:
    """A mixed-in source. It brings `ratio` target tokens for each one of the main source."""

    ratio: float
    largest: float  # target tokens of its largest item, of a token store of a mean one: w

    def cuts(self, positions: np.ndarray) -> Cuts:
        """The nearest place to each position, of two equally near ones the first. positions: fp64 target tokens, in order."""
        raise NotImplementedError

    def index(self, item: int) -> int:
        """The item of the source that an item of the stream is."""
        raise NotImplementedError

    def items_of_step(self, before: float, after: float) -> list[int]:
        """Items of the source that a step takes. before, after: target tokens of the main source up to the step, and with it."""
        first, end = self.cuts(self.ratio * np.array([before, after], dtype=np.float64)).items.tolist()
        return [self.index(item) for item in range(first, end)]

    def steps_of_share(self, step_targets: float) -> int:
        """N: over so many steps the share is within a factor of two. step_targets: of the main source in a mean step."""
        return max(1, math.ceil(4 * self.largest / (self.ratio * step_targets)))


class StreamOfDocuments(Stream):
    """A mixed-in source of documents."""

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
        """The cuts of `Stream`. Each epoch has an order of its own."""
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
        epoch, number = divmod(item, self.size)
        return int(self.epoch(epoch)[0][number])


class StreamOfWindows(Stream):
    """A mixed-in token store. Every window counts with the mean number of target tokens."""

    def __init__(self, source: Windows, seed: int, number: int, ratio: float) -> None:
        self.source, self.key, self.ratio, self.largest = source, (seed, number), ratio, source.mean_targets
        self.steps = source.num_tokens(0) - 1  # from the first token of a window to its last

    def cuts(self, positions: np.ndarray) -> Cuts:
        items = np.ceil(positions / self.source.mean_targets - 0.5).astype(np.int64)
        return Cuts(items, items * self.steps)

    def index(self, item: int) -> int:
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
