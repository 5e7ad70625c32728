"""The items of each source in a step, as a pure function of (seed, step) that does not depend on the number of ranks.

The main source sets the pace. Let C(s) be the number of its target tokens before step s. A mixed-in source is an endless
stream of epochs, each in its own random order. Let r be its share divided by the share of the main source. Step s takes
the stream from r C(s) to r C(s + 1), counted in target tokens, with both ends moved to the nearest place where the stream
may be cut. No state is carried from step to step.

The stream may be cut between two documents. A text, that is a document all of whose tokens but the first are targets of
weight 1, may also be cut within: it consists of equal windows of at most `window` target tokens, and so does a window of a
token store. The part that a step takes is one item, however many of these windows it covers. It begins with the last
token of the part before, so that every token is a target exactly once; it does not see what comes before that token.

The bound. Let w be the number of target tokens between two neighbouring places, at most. Each end moves by w / 2 at most,
so over any range of steps, a single one included, the source brings r times the target tokens of the main source to
within w. Let E be what it brings to a mean step. `window` is E / 4 - 1 (the 1 pays for places that are rounded to whole
tokens), so w <= E / 4 where only texts are longer than that. A step with at least half of the mean target tokens of the
main source should get at least E / 2, and is within a factor of two of what it should get. In general this holds over any
4 w / E steps of the mean size (`Stream.steps_of_promise`). Of a token store, target tokens are estimated from their mean.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from common.permutation import permuted
from data.examples import Documents
from data.sources import Windows

# Target tokens. A part of a text that is shorter than this teaches little; a source that brings less to a mean step brings
# parts of this size to some steps instead.
USEFUL = 16
# (index of an item in its source, first token, end of the tokens, exclusive); end None: the whole item
Part = tuple[int, int, int | None]


@dataclass(frozen=True)
class MainOrder:
    """The order in which the items of the main source are visited."""

    steps_per_epoch: tuple[int, ...]
    items: Callable[[int], list[int]]  # step -> its items
    targets_before: Callable[[int], float]  # step -> target tokens of all steps before it, C(s)
    # With `global_tokens`: steps that may have more target tokens over all sources, and how many these may have at most
    num_too_large: int = 0
    largest: float = 0.0

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, step within that epoch) of a step of the run."""
        for epoch, steps in enumerate(self.steps_per_epoch):
            if step < steps:
                return epoch, step
            step -= steps
        raise IndexError(f"step {step} after the last step of the run")


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
    density: float  # at most so many target tokens are in what counts as one

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


def mean_step_targets(source: Documents | Windows, examples: int | None, tokens: float | None) -> float:
    """Target tokens of the main source in a mean step of `examples` items, or of up to `tokens` target tokens."""
    mean = total_targets(source) / len(source)
    return min(total_targets(source), examples * mean if examples else max(mean, tokens or 0.0))


def total_targets(source: Documents | Windows) -> float:
    """Number of target tokens in one pass. For a token store it is computed from the mean per window."""
    return source.mean_targets * len(source) if isinstance(source, Windows) else float(source.targets.sum())


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
        usable = source.items_with_targets()
        self.size, self.total = len(usable), source.targets.sum().item()
        self.usable = usable.astype(np.uint32) if self.size < len(source) else None
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)
        targets, pieces = source.targets, self._pieces(slice(None))
        self.spacing = float(np.max(np.where(pieces > 1, targets / pieces + 1, targets)))

    def _pieces(self, documents: np.ndarray | slice) -> np.ndarray:
        """Number of equal windows that each document consists of."""
        targets = self.source.targets[documents]
        is_text = targets == self.source.lengths[documents] - 1
        return np.where(is_text, -(-targets // self.window), 1)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in order, uint32, and the target tokens up to the end of each."""
        # Not (seed, number, epoch): numpy treats (a, b, 0) like (a, b), and the main source has (seed, epoch).
        order = _shuffled(self.size, (self.key[0], epoch, self.key[1]))
        order = order if self.usable is None else self.usable[order]
        return order, np.cumsum(self.source.targets[order])

    def cuts(self, positions: np.ndarray) -> Cuts:
        """The nearest place to each position, of two equally near ones the first; fp64 target tokens, in order."""
        epochs = (positions // self.total).astype(np.int64)
        found = []
        for epoch in np.unique(epochs).tolist():
            low, high = np.searchsorted(epochs, [epoch, epoch + 1])
            order, ends = self.epoch(epoch)
            within = positions[low:high] - epoch * self.total
            number = np.minimum(np.searchsorted(ends, within, side="right"), self.size - 1)
            targets, pieces = self.source.targets[order[number]], self._pieces(order[number])
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


def main_order(
    source: Documents | Windows,
    epochs: int,
    seed: int,
    examples: int | None,
    tokens: int | None,
    streams: Sequence[Stream] = (),
) -> MainOrder:
    """`epochs` passes over a source, each in its own random order. The last step of an epoch may be smaller.

    A step has `examples` items; or as many, but at least one, as leave room for what `streams` bring to the step: it then
    has at most `tokens` target tokens over all sources, unless one item and what is mixed in with it has more.
    """
    if isinstance(source, Windows):
        return _order_of_windows(source, epochs, seed, examples, tokens, streams)
    return _order_of_documents(source, epochs, seed, examples, tokens, streams)


def _order_of_documents(
    documents: Documents,
    epochs: int,
    seed: int,
    examples: int | None,
    tokens: int | None,
    streams: Sequence[Stream],
) -> MainOrder:
    order = functools.lru_cache(maxsize=1)(lambda epoch: _shuffled(len(documents), (seed, epoch)))
    starts, ends = [], []  # for each epoch: the index in its order at which each step begins, and C at its end
    done, too_large, largest = 0, 0, 0.0
    for epoch in range(epochs):
        before = np.concatenate([[0], np.cumsum(documents.targets[order(epoch)])]) + done
        if tokens is None:
            first = np.arange(0, len(documents), examples)
        else:
            # What a step from any document to any other would have, over all sources, is a difference of these.
            most = before + sum(stream.cuts(stream.ratio * before.astype(np.float64)).most for stream in streams)
            first = _step_starts(most, tokens)
            sizes = np.diff(most[[*first, -1]])
            too_large, largest = too_large + int((sizes > tokens).sum()), max(largest, float(sizes.max()))
        starts.append(first.astype(np.uint32))
        ends.append(before[[*first[1:], -1]])
        done = before[-1].item()
    all_ends = np.concatenate(ends)

    def items(step: int) -> list[int]:
        epoch, within = main.epoch_of(step)
        bounds = [*starts[epoch][within : within + 2].tolist(), len(documents)]
        return order(epoch)[bounds[0] : bounds[1]].tolist()

    def targets_before(step: int) -> float:
        return all_ends[step - 1].item() if step else 0

    main = MainOrder(tuple(len(s) for s in starts), items, targets_before, too_large, largest)
    return main


def _step_starts(before: np.ndarray, tokens: int) -> np.ndarray:
    """Index at which each step begins, given the target tokens before each document, and in total as the last element."""
    starts = [0]
    while True:
        fit = int(np.searchsorted(before, before[starts[-1]] + tokens, side="right")) - 1
        following = max(fit, starts[-1] + 1)
        if following >= len(before) - 1:
            return np.array(starts)
        starts.append(following)


def _order_of_windows(
    windows: Windows,
    epochs: int,
    seed: int,
    examples: int | None,
    tokens: int | None,
    streams: Sequence[Stream],
) -> MainOrder:
    size, mean, too_large, largest = len(windows), windows.mean_targets, 0, 0.0
    per_step = examples or 1
    if tokens is not None:
        # No window is read to count its target tokens: they are at most all tokens but the first.
        rest = sum((stream.spacing + 1) * stream.density for stream in streams)
        each = windows.num_tokens(0) - 1 + sum(stream.ratio * mean * stream.density for stream in streams)
        per_step = max(1, int((tokens - rest) / each))
        largest = per_step * each + rest
    steps = -(-size // per_step)
    if tokens is not None and largest > tokens:
        too_large = steps * epochs

    def items(step: int) -> list[int]:
        epoch, within = divmod(step, steps)
        positions = range(within * per_step, min(size, (within + 1) * per_step))
        return [permuted(i, size, (seed, epoch)) for i in positions]

    def targets_before(step: int) -> float:
        epoch, within = divmod(step, steps)
        return (epoch * size + min(size, within * per_step)) * mean

    return MainOrder((steps,) * epochs, items, targets_before, too_large, largest)


def _shuffled(size: int, key: tuple[int, ...]) -> np.ndarray:
    """A random permutation of 0, ..., `size` - 1, uint32: a million documents take 4 MB."""
    return np.random.default_rng(key).permutation(np.arange(size, dtype=np.uint32))
