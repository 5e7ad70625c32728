"""Which items of which source make up step s: a pure function of (seed, s), the same for any number of ranks.

The main source sets the pace. C(s) is the number of its target tokens before step s. A source mixed in is an endless
stream, epoch after epoch, each in an order of its own; with r = its share / the main share, step s takes the part of the
stream from r C(s) to r C(s + 1) target tokens: every item whose middle lies in it. So over any steps, wherever they begin,
a source has r times the targets of the main one, to within one item; nothing has to be remembered between steps.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.permutation import permuted
from data.examples import Documents
from data.sources import Windows

Stream = Callable[[int, int], list[int]]  # (start, end) in target tokens of the stream -> the items between


@dataclass(frozen=True)
class MainOrder:
    """The main source's items, step by step."""

    steps_per_epoch: tuple[int, ...]
    items: Callable[[int], list[int]]  # of a step
    targets_before: Callable[[int], float]  # target tokens of all steps before this one: C(s)

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, step within it)."""
        for epoch, steps in enumerate(self.steps_per_epoch):
            if step < steps:
                return epoch, step
            step -= steps
        raise IndexError("beyond the last step")


def main_order(
    source: Documents | Windows, epochs: int, seed: int, global_examples: int | None, global_tokens: float | None
) -> MainOrder:
    """`epochs` passes over a source, each in its own order. An epoch's last step is smaller and is taken.

    A step is `global_examples` items (windows of a token store), or as many as fit into `global_tokens` target tokens (at
    least one).
    """
    if isinstance(source, Windows):
        return _order_of_windows(source, epochs, seed, global_examples, global_tokens)
    return _order_of_documents(source, epochs, seed, global_examples, global_tokens)


def stream(source: Documents | Windows, seed: int, number: int) -> Stream:
    """The endless stream of a source mixed in, `number` 1 for the first. Documents without a target are not in it."""
    return (_stream_of_windows if isinstance(source, Windows) else _stream_of_documents)(source, seed, number)


def total_targets(source: Documents | Windows) -> float:
    """Target tokens of one pass; of a token store on average over its orders' parts, without reading it."""
    return source.mean_targets * len(source) if isinstance(source, Windows) else float(source.targets.sum())


def _order_of_documents(
    documents: Documents, epochs: int, seed: int, examples: int | None, tokens: float | None
) -> MainOrder:
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(len(documents))

    starts, targets = [], [np.zeros(1, dtype=np.int64)]  # starts[epoch]: where each step begins in the epoch's order
    for epoch in range(epochs):
        starts.append(_starts(documents.targets[order(epoch)], examples, tokens))
        targets.append(np.add.reduceat(documents.targets[order(epoch)], starts[-1]))
    before = np.cumsum(np.concatenate(targets))

    def items(step: int) -> list[int]:
        epoch, within = main.epoch_of(step)
        bounds = [*starts[epoch][within : within + 2], len(documents)]
        return order(epoch)[bounds[0] : bounds[1]].tolist()

    main = MainOrder(tuple(len(s) for s in starts), items, lambda step: int(before[step]))
    return main


def _starts(targets: np.ndarray, examples: int | None, tokens: float | None) -> np.ndarray:
    """Where each step begins, for target counts in the order of an epoch."""
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
    per_step = examples if examples is not None else max(1, int(tokens / mean))
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
        """The documents of an epoch, and where the middle of each is in its targets."""
        # Not (seed, number, epoch): numpy takes (a, b) and (a, b, 0) for the same seed, and (seed, epoch) is the main one's.
        documents_then = usable[np.random.default_rng((seed, epoch, number)).permutation(len(usable))]
        targets = documents.targets[documents_then]
        return documents_then, np.cumsum(targets) - targets / 2

    def between(start: int, end: int) -> list[int]:
        found = []
        for epoch in range(start // total, end // total + 1):
            documents_then, middles = order(epoch)
            first, last = np.searchsorted(middles, (start - epoch * total, end - epoch * total))
            found += documents_then[first:last].tolist()
        return found

    return between


def _stream_of_windows(windows: Windows, seed: int, number: int) -> Stream:
    size, mean = len(windows), windows.mean_targets

    def between(start: int, end: int) -> list[int]:
        first, last = (math.ceil(x / mean - 0.5) for x in (start, end))
        return [permuted(i % size, size, (seed, i // size, number)) for i in range(first, last)]

    return between
