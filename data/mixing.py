"""The items of each source in a step, as a pure function of (seed, step) that does not depend on the number of ranks.

The main source sets the pace. Let C(s) be the number of its target tokens before step s, and r the share of a mixed-in
source divided by the share of the main source. Step s takes the source's stream (data/streams.py) from r C(s) to
r C(s + 1), with both ends moved to the nearest place between two items. No state is carried from step to step.

What follows. Let w be the target tokens of the source's largest item. Each end moves by w / 2 at most, so over any range of
steps, a single one included, the source brings r times the target tokens of the main source to within w. Let E be what it
should bring to a step of the mean size. Over N = 4 w / E steps or more that have at least half of the mean target tokens of the
main source, it should bring 2 w or more, and is within a factor of two of that. Target tokens of a token store are estimated
from their mean per window, and its shares are as even as its windows are.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from common.random_bits import permuted
from data.examples import Documents
from data.sources import Windows
from data.streams import BLOCK, Stream, cumulative, shuffled, total


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
    streams: Sequence[Stream] = (),
) -> MainOrder:
    """`epochs` passes over a source, each in its own random order. The last step of an epoch may be smaller.

    A step has `examples` items; or as many, but at least one, as leave room for what `streams` bring to the step: it then
    has at most `tokens` target tokens over all sources, unless one item and what is mixed in with it has more. That needs 24
    bytes of memory for each item while the steps are found; windows of a token store need none, except with both `tokens` and
    `streams`.
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

    def items(step: int) -> list[int]:
        epoch, within = main.epoch_of(step)
        low, high, *_ = *starts[epoch][within : within + 2].tolist(), size
        if isinstance(source, Windows):
            return [permuted(i, size, (seed, epoch)) for i in range(low, high)]
        return order(epoch)[low:high].tolist()

    def targets_before(step: int) -> float:
        return before_step[step].item()

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
