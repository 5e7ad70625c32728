"""The items of each source in a step, as a pure function of (seed, step) that does not depend on the number of ranks.

The main source sets the pace. Let C(s) be the number of its target tokens before step s. A mixed-in source is an
endless stream of epochs, each in its own random order. Let r be its share divided by the share of the main source. Step
s takes the items whose midpoint, counted in target tokens of the stream, is at least r C(s) and below r C(s + 1). Over
any range of steps the source therefore has r times the target tokens of the main source, to within one item, and no
state is carried from step to step.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.permutation import permuted
from data.examples import Documents
from data.sources import Windows

Stream = Callable[
    [int, int], list[int]
]  # (start, end) in target tokens of the stream -> items whose midpoint is between them


@dataclass(frozen=True)
class MainOrder:
    """The order in which the items of the main source are visited."""

    steps_per_epoch: tuple[int, ...]
    items: Callable[[int], list[int]]  # step -> its items
    targets_before: Callable[[int], float]  # step -> target tokens of all steps before it, C(s)

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, step within that epoch) of a step of the run."""
        for epoch, steps in enumerate(self.steps_per_epoch):
            if step < steps:
                return epoch, step
            step -= steps
        raise IndexError(f"step {step} after the last step of the run")


def main_order(
    source: Documents | Windows, epochs: int, seed: int, global_examples: int | None, global_tokens: float | None
) -> MainOrder:
    """`epochs` passes over a source, each in its own random order. The last step of an epoch may be smaller.

    A step has `global_examples` items, or as many items as fit into `global_tokens` target tokens, but at least one.
    """
    if isinstance(source, Windows):
        return _order_of_windows(source, epochs, seed, global_examples, global_tokens)
    return _order_of_documents(source, epochs, seed, global_examples, global_tokens)


def make_stream(source: Documents | Windows, seed: int, number: int) -> Stream:
    """The endless stream of the `number`-th mixed-in source, counted from 1. It skips documents without a target."""
    if isinstance(source, Windows):
        return _stream_of_windows(source, seed, number)
    return _stream_of_documents(source, seed, number)


def total_targets(source: Documents | Windows) -> float:
    """Number of target tokens in one pass. For a token store it is computed from the mean per window."""
    return source.mean_targets * len(source) if isinstance(source, Windows) else float(source.targets.sum())


def _order_of_documents(
    documents: Documents, epochs: int, seed: int, examples: int | None, tokens: float | None
) -> MainOrder:
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(len(documents))

    starts = []  # starts[epoch]: index in the order of that epoch at which each step begins
    targets = [np.zeros(1, dtype=np.int64)]
    for epoch in range(epochs):
        starts.append(_step_starts(documents.targets[order(epoch)], examples, tokens))
        targets.append(np.add.reduceat(documents.targets[order(epoch)], starts[-1]))
    before = np.cumsum(np.concatenate(targets))

    def items(step: int) -> list[int]:
        epoch, within = main.epoch_of(step)
        bounds = [*starts[epoch][within : within + 2], len(documents)]
        return order(epoch)[bounds[0] : bounds[1]].tolist()

    main = MainOrder(tuple(len(s) for s in starts), items, lambda step: int(before[step]))
    return main


def _step_starts(targets: np.ndarray, examples: int | None, tokens: float | None) -> np.ndarray:
    """Index at which each step begins, given the target counts of the documents in the order of an epoch."""
    if examples is not None:
        return np.arange(0, len(targets), examples)
    starts, used = [0], 0
    for i, count in enumerate(targets.tolist()):
        if i > starts[-1] and used + count > tokens:
            starts.append(i)
            used = 0
        used += count
    return np.array(starts)


def _order_of_windows(
    windows: Windows, epochs: int, seed: int, examples: int | None, tokens: float | None
) -> MainOrder:
    size, mean = len(windows), windows.mean_targets
    if examples is not None:
        per_step = examples
    else:
        assert tokens is not None  # one of the two step sizes is given
        per_step = max(1, int(tokens / mean))
    steps = -(-size // per_step)

    def items(step: int) -> list[int]:
        epoch, within = divmod(step, steps)
        positions = range(within * per_step, min(size, (within + 1) * per_step))
        return [permuted(i, size, (seed, epoch)) for i in positions]

    def targets_before(step: int) -> float:
        epoch, within = divmod(step, steps)
        return (epoch * size + min(size, within * per_step)) * mean

    return MainOrder((steps,) * epochs, items, targets_before)


def _stream_of_documents(documents: Documents, seed: int, number: int) -> Stream:
    usable = documents.items_with_targets()
    total = int(documents.targets.sum())

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in order, and the midpoint of each in target tokens since the epoch began."""
        # Not (seed, number, epoch): numpy treats (a, b, 0) like (a, b), and the main source has (seed, epoch).
        shuffled = usable[np.random.default_rng((seed, epoch, number)).permutation(len(usable))]
        targets = documents.targets[shuffled]
        return shuffled, np.cumsum(targets) - targets / 2

    def between(start: int, end: int) -> list[int]:
        found = []
        for epoch in range(start // total, end // total + 1):
            shuffled, midpoints = order(epoch)
            first, last = np.searchsorted(midpoints, (start - epoch * total, end - epoch * total))
            found += shuffled[first:last].tolist()
        return found

    return between


def _stream_of_windows(windows: Windows, seed: int, number: int) -> Stream:
    size, mean = len(windows), windows.mean_targets

    def between(start: int, end: int) -> list[int]:
        first, last = (math.ceil(x / mean - 0.5) for x in (start, end))
        return [permuted(i % size, size, (seed, i // size, number)) for i in range(first, last)]

    return between
