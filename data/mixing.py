"""The items of each source in a step, as a pure function of (seed, step) that does not depend on the number of ranks.

The main source sets the pace. Let C(s) be the number of its target tokens before step s, and r the share of a mixed-in
source divided by the share of the main source. A mixed-in source is an endless stream, measured in target tokens: epochs, each in
its own random order. Step s takes the stream from r C(s) to r C(s + 1), with both ends moved to the nearest boundary between two
items. Documents and windows of a token store are never cut, so every token is predicted from its whole context. No state is
carried from step to step.

Let w be the number of target tokens of the source's largest item. Each end moves by w / 2 at most, so over any range of steps the
source contributes r times the target tokens of the main source to within w. Let E be its expected target tokens in an average
step: over N = 4 w / E steps or more its fraction is within a factor of two of its share. Target tokens of a token store are
estimated from the mean per window.
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

BLOCK = 2**16  # documents that are processed together, so that a million of them take little memory


# ---- the main source -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MainOrder:
    """The order in which the items of the main source are visited."""

    steps_per_epoch: tuple[int, ...]
    items: Callable[[int], list[int]]  # step -> its items
    targets_before: Callable[[int], float]  # step -> C(s), the target tokens of all steps before it
    # With `global_tokens`: number of steps that may exceed it over all sources, and the most target tokens of such a step
    num_too_large: int = 0
    largest: float = 0.0


def mean_step_targets(source: Documents | Windows, examples: int | None, tokens: float | None) -> float:
    """Return the main source's target tokens in an average step of `examples` items, or of up to `tokens` target tokens."""
    mean = total_targets(source) / len(source)
    return min(total_targets(source), examples * mean if examples else max(mean, tokens or 0.0))


def total_targets(source: Documents | Windows) -> float:
    """Return the number of target tokens in one pass, for a token store estimated from the mean per window."""
    return source.mean_targets * len(source) if isinstance(source, Windows) else float(total(source.targets))


def main_order(
    source: Documents | Windows,
    epochs: int,
    seed: int,
    examples: int | None,
    tokens: int | None,
    streams: "Sequence[Stream]" = (),
) -> MainOrder:
    """Plan `epochs` passes over a source, each in its own random order. The last step of an epoch may be smaller.

    A step has `examples` items. Or it has as many items, at least one, as leave room for the contribution of `streams`: then
    it has at most `tokens` target tokens over all sources, unless a single item and the contribution to it have more.
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
            # An upper bound of a window's target tokens is all but its first token. The exact number would need a read.
            before = np.arange(epoch * size, (epoch + 1) * size + 1) * source.mean_targets
            bound = np.arange(size + 1) * (source.num_tokens(0) - 1)
        else:
            before = bound = cumulative(source.targets, order(epoch), ends[-1][-1].item())
        if tokens is None:
            first = np.arange(0, size, examples)
        else:
            # The difference of two of these is the number of target tokens, over all sources, of a step between two items.
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
    """Return the index at which each step begins. before: target tokens before each document, and in total as last element."""
    starts = [0]
    while True:
        fit = int(np.searchsorted(before, before[starts[-1]] + tokens, side="right")) - 1
        following = max(fit, starts[-1] + 1)
        if following >= len(before) - 1:
            return np.array(starts)
        starts.append(following)


def _order_of_windows(windows: Windows, epochs: int, seed: int, examples: int | None, tokens: int | None) -> MainOrder:
    """Order a token store. Every step has the same number of windows, so that no list is needed: there may be billions."""
    size, mean, bound = len(windows), windows.mean_targets, windows.num_tokens(0) - 1
    # `bound`: a window's target tokens are at most all but its first token. The exact number would need a read.
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
    """Boundaries between two items of a stream, each int64 `(places,)` and in order."""

    items: np.ndarray  # number of items before the boundary
    most: np.ndarray  # target tokens before it; for a token store a value whose differences are upper bounds


class Stream:
    """A mixed-in source. It contributes `ratio` target tokens for each target token of the main source."""

    ratio: float
    largest: float  # w: target tokens of its largest item; for a token store, of an average window

    def cuts(self, positions: np.ndarray) -> Cuts:
        """Return the nearest boundary to each position, the first of two at equal distance. positions: fp64, in order."""
        raise NotImplementedError

    def index(self, item: int) -> int:
        """Return the index in the source of the stream's item number `item`."""
        raise NotImplementedError

    def items_of_step(self, before: float, after: float) -> list[int]:
        """Return the items that a step takes. before, after: target tokens of the main source before and after the step."""
        first, end = self.cuts(self.ratio * np.array([before, after], dtype=np.float64)).items.tolist()
        return [self.index(item) for item in range(first, end)]

    def steps_of_share(self, step_targets: float) -> int:
        """Return N, the steps over which the share holds within a factor of two. step_targets: of the main source, on average."""
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
        """Return the documents of an epoch in order, uint32, and the target tokens up to the end of each."""
        # Not (seed, number, epoch): numpy treats (a, b, 0) like (a, b), and the main source has (seed, epoch).
        order = shuffled(self.size, (self.key[0], epoch, self.key[1]))
        order = order if self.usable is None else self.usable[order]
        return order, cumulative(self.source.targets, order)[1:]

    def cuts(self, positions: np.ndarray) -> Cuts:
        """See `Stream.cuts`. Each epoch has an order of its own."""
        epochs = (positions // self.total).astype(np.int64)
        cuts_by_epoch = []
        for epoch in np.unique(epochs).tolist():
            low, high = np.searchsorted(epochs, [epoch, epoch + 1])
            order, ends = self.epoch(epoch)
            within = positions[low:high] - epoch * self.total
            # For keys of another dtype numpy would copy all of `ends`. Integers are compared with the floor.
            keys = within if ends.dtype.kind == "f" else np.floor(within).astype(np.int64)
            number = np.minimum(np.searchsorted(ends, keys, side="right"), self.size - 1)
            targets = self.source.targets[order[number]].astype(ends.dtype)
            begin = ends[number] - targets
            is_end = (within - begin) / targets > 0.5
            most = epoch * self.total + np.where(is_end, ends[number], begin)
            cuts_by_epoch.append((epoch * self.size + number + is_end, most))
        return Cuts(*(np.concatenate(arrays) for arrays in zip(*cuts_by_epoch, strict=True)))

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
    """Return the sum of target tokens or of weights, added in order: numpy's sum of floats depends on the processor."""
    return np.cumsum(targets)[-1].item() if targets.dtype.kind == "f" else targets.sum().item()


def cumulative(targets: np.ndarray, order: np.ndarray, start: float = 0) -> np.ndarray:
    """Return `start` plus the sums of `targets` over the first 0, 1, ... of the documents in `order` `(n,)`.

    int64, or fp64 for fractional weights, `(n + 1,)`.
    """
    sums = np.empty(len(order) + 1, np.float64 if targets.dtype.kind == "f" else np.int64)
    sums[0] = start
    for low in range(0, len(order), BLOCK):
        block = sums[low + 1 : low + 1 + BLOCK]
        np.cumsum(targets[order[low : low + BLOCK]], out=block)
        block += sums[low]
    return sums


def shuffled(size: int, key: tuple[int, ...]) -> np.ndarray:
    """Return a random permutation of 0, ..., `size` - 1, uint32: a million documents take 4 MB."""
    return np.random.default_rng(key).permutation(np.arange(size, dtype=np.uint32))
