"""The documents of each optimizer step and how they are packed, as a pure function of (seed, step).

There is no data loader state: the step number determines the batch, so resuming is immediate. A plan does not depend on
the number of ranks; `micro_batches` distributes the rows of a step over the ranks.
"""

import functools
import heapq
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from data.examples import Documents
from data.mixing import main_order, mean_step_targets, total_targets
from data.sources import Corpus, Windows, as_corpus, exact_sum
from data.streams import make_stream, parts, promise

T = TypeVar("T")
# Items packed into one sequence of up to `sequence_length` tokens. An item is a document or a window of a token store.
Row = tuple[int, ...]


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step over all ranks and micro-batches."""

    rows: tuple[Row, ...]
    # Divisor of the step's loss: the number of target tokens, or with weights their sum. Never 0: windows of a token store
    # may have no target, and the loss of such a step is 0 / 1
    num_target_tokens: int | float
    num_examples: int  # number of items
    targets_by_source: tuple[int | float, ...]  # number of target tokens, or the sum of their weights
    document_lengths: tuple[int, ...]  # in tokens


@dataclass(frozen=True)
class Plan:
    """Steps over a corpus, each computed on demand."""

    num_steps: int
    batch: Callable[[int], StepBatch]


@dataclass(frozen=True)
class TrainingPlan(Plan):
    """The steps of a run. An epoch contains every item of the main source exactly once."""

    steps_per_epoch: tuple[int, ...]
    passes: Callable[[int], tuple[float, ...]]  # number of steps -> passes over each source
    windows: tuple[int, ...]  # of each mixed-in source, in target tokens (data/mixing.py)
    promises: tuple[str, ...]  # for the log: how evenly the sources are mixed, and steps above `global_tokens`


class TargetWeights:
    """`values`: float32 `(targets,)`. A plain class on purpose: FSDP would cast a dataclass's field to the compute dtype."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass on one rank: documents concatenated without padding.

    input_ids, position_ids: int64 `(1, tokens)`; positions restart at each document.
    document_lengths: in tokens, as Python ints, so that reading them does not synchronise with the device.
    target_positions: int64 `(targets,)`, indices of the hidden states that predict `target_ids` `(targets,)`.
    target_sources: int64 `(targets,)`, index of each target's source. None if there is only one source.
    target_weights: the factor of each target's loss. None if all are 1.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    document_lengths: tuple[int, ...]
    cu_seq_lens: torch.Tensor  # int32 (documents + 1,): document boundaries, for variable-length attention
    target_positions: torch.Tensor
    target_ids: torch.Tensor
    target_sources: torch.Tensor | None = None
    target_weights: TargetWeights | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on another device. The copy to CUDA is asynchronous."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: _to_device(value, device) if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }
        if self.target_weights:
            moved["target_weights"] = TargetWeights(_to_device(self.target_weights.values, device))
        return MicroBatch(**moved)


def plan_training(
    source: Corpus | Documents | Windows,
    epochs: int,
    seed: int,
    sequence_length: int,
    global_examples: int | None = None,
    global_tokens: int | None = None,
    packing: bool = True,
) -> TrainingPlan:
    """Plan `epochs` passes over the main source, with the other sources mixed in (data/mixing.py).

    Give one of the two step sizes. With `global_examples`, a step has that many examples of the main source, and what is
    mixed in comes on top. With `global_tokens`, a step has at most that many target tokens over all sources, except where
    one example of the main source and what is mixed in with it has more.
    """
    corpus = as_corpus(source)
    main, main_share = corpus.sources[0], corpus.shares[0]
    step_targets = mean_step_targets(main, global_examples, global_tokens and global_tokens * main_share)
    streams = [
        make_stream(part, seed, number, share / main_share, step_targets)
        for number, (part, share) in enumerate(zip(corpus.sources[1:], corpus.shares[1:], strict=True), 1)
    ]
    order = main_order(main, epochs, seed, global_examples, global_tokens, streams)

    @functools.lru_cache(maxsize=16)  # called by the thread that makes micro-batches, then by the training loop
    def batch(step: int) -> StepBatch:
        items = order.items(step)
        before, after = order.targets_before(step), order.targets_before(step + 1)
        for offset, stream in zip(corpus.offsets[1:-1], streams, strict=True):
            for index, first, end in parts(stream, before, after):
                items.append(offset + index if end is None else corpus.part(offset + index, first, end))
        return _step_batch(items, _pack(items, corpus, sequence_length if packing else 0), corpus)

    def passes(steps: int) -> tuple[float, ...]:
        targets = order.targets_before(steps)
        others = (
            stream.ratio * targets / total_targets(part)
            for stream, part in zip(streams, corpus.sources[1:], strict=True)
        )
        return _num_epochs(steps, order.steps_per_epoch), *others

    promises = [
        promise(stream, name, share, step_targets)
        for name, share, stream in zip(corpus.names[1:], corpus.shares[1:], streams, strict=True)
    ]
    if order.num_too_large:
        promises.append(
            f"warning: {order.num_too_large} of {sum(order.steps_per_epoch)} steps may have more than batch.global_tokens="
            f"{global_tokens} target tokens, up to {order.largest:,.0f}: one example of the main source, with what is mixed "
            "in with it, has more"
        )
    windows = tuple(stream.window for stream in streams)
    return TrainingPlan(sum(order.steps_per_epoch), batch, order.steps_per_epoch, passes, windows, tuple(promises))


def plan_validation(
    source: Corpus | Documents | Windows, sequence_length: int, world_size: int, micro_batch: int
) -> Plan:
    """Plan one pass over every item of every source, in file order, in steps of one micro-batch per rank.

    A step has at most `world_size * micro_batch` rows, so the number of steps falls as ranks are added. Each item goes
    into the row with the most room, and the item that fits into none begins the next step. Items and target tokens of
    the whole pass are the same for any number of ranks.
    """
    corpus = as_corpus(source)
    num_rows = world_size * micro_batch
    # Only the first item of each step is kept; rows are packed again, in the same way, when a step is asked for.
    starts = [0]
    fill = _EvenFill(num_rows, sequence_length)
    for item in range(len(corpus)):
        length = corpus.num_tokens(item)
        if fill.place(length) is None:
            starts.append(item)
            fill = _EvenFill(num_rows, sequence_length)
            fill.place(length)
    bounds = [*starts, len(corpus)]

    @functools.lru_cache(maxsize=16)
    def batch(step: int) -> StepBatch:
        items = list(range(bounds[step], bounds[step + 1]))
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        fill = _EvenFill(num_rows, sequence_length)
        for item in items:
            row = fill.place(corpus.num_tokens(item))
            assert row is not None
            rows[row].append(item)
        return _step_batch(items, tuple(tuple(row) for row in rows if row), corpus)

    return Plan(len(starts) if len(corpus) else 0, batch)


def plan_one_step(source: Corpus | Documents | Windows, sequence_length: int) -> Plan:
    """A plan with every item in a single step, packed into as few rows as best-fit finds. For small sources."""
    corpus = as_corpus(source)
    items = list(range(len(corpus)))
    return Plan(1, lambda step: _step_batch(items, _pack(items, corpus, sequence_length), corpus))


def micro_batches(
    rows: tuple[Row, ...], source: Corpus | Documents | Windows, rank: int, world_size: int, size: int
) -> list[Row]:
    """The items of each of this rank's micro-batches in a step. A micro-batch has up to `size` rows.

    Every rank gets the same number of micro-batches; some may be empty (`()`). Rows are assigned, the longest first, to
    the rank with the fewest tokens so far, so that ranks finish together. Each rank computes the whole assignment.
    """
    count = -(-len(rows) // (world_size * size))
    load, assigned = [0] * world_size, [[] for _ in range(world_size)]
    tokens = [sum(source.num_tokens(item) for item in row) for row in rows]
    for i in sorted(range(len(rows)), key=lambda i: (-tokens[i], i)):
        chosen = min((r for r in range(world_size) if len(assigned[r]) < count * size), key=lambda r: (load[r], r))
        assigned[chosen].append(i)
        load[chosen] += tokens[i]
    mine = assigned[rank]
    # Round-robin, so that the micro-batches have similar sizes and peak memory stays low.
    return [tuple(item for i in mine[m::count] for item in rows[i]) for m in range(count)]


def prefetch(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """Yield the same items, computed by a thread up to `depth` items in advance. Items must not be None."""
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, items, None))
            yield item


def collate(items: Row, source: Corpus | Documents | Windows) -> MicroBatch:
    """Concatenate the documents of `items` into tensors. An empty micro-batch becomes two tokens without a target.

    A rank with an empty micro-batch still runs forward and backward, because all ranks take part in the all-gathers.
    """
    corpus = as_corpus(source)
    found = [corpus.get(item) for item in items] or [(np.zeros(2, dtype=np.int64), np.zeros(2, dtype=bool))]
    lengths = tuple(length for item in items for length in corpus.document_lengths(item)) or (2,)
    flat = np.concatenate([ids for ids, _ in found])
    weights = np.concatenate([weights for _, weights in found])
    target_indices = np.flatnonzero(weights)
    weights = weights[target_indices]
    target_sources = None
    if len(corpus.sources) > 1:
        targets = [np.count_nonzero(weights) for _, weights in found]
        numbers = [corpus.locate(item)[0] for item in items] or [0]
        target_sources = torch.from_numpy(np.repeat(numbers, targets))
    return MicroBatch(
        input_ids=torch.from_numpy(flat)[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        document_lengths=lengths,
        cu_seq_lens=torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32),
        target_positions=torch.from_numpy(target_indices - 1),  # position t - 1 predicts token t of the same document
        target_ids=torch.from_numpy(flat[target_indices]),
        target_sources=target_sources,
        target_weights=None if (weights == 1).all() else TargetWeights(torch.from_numpy(weights)),
    )


def _step_batch(items: list[int], rows: tuple[Row, ...], corpus: Corpus) -> StepBatch:
    targets = [[] for _ in corpus.sources]
    for item in items:
        targets[corpus.locate(item)[0]].append(corpus.num_targets(item))
    sums = tuple(exact_sum(weights) for weights in targets)
    documents = tuple(length for item in items for length in corpus.document_lengths(item))
    return StepBatch(rows, exact_sum(sums) or 1, len(items), sums, documents)


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True)


def _pack(items: list[int], corpus: Corpus, capacity: int) -> tuple[Row, ...]:
    """Best-fit decreasing bin packing: longest item first, each into the fullest row that has room for it."""
    lengths = {item: corpus.num_tokens(item) for item in items}
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(items, key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        best = min((r for r in range(len(rows)) if room[r] >= length), key=lambda r: (room[r], r), default=None)
        if best is None:
            rows.append([item])
            room.append(capacity - length)
        else:
            rows[best].append(item)
            room[best] -= length
    return tuple(tuple(row) for row in rows)


class _EvenFill:
    """A fixed number of rows, filled evenly: each item goes into the row with the most room, the first of equal ones."""

    def __init__(self, num_rows: int, capacity: int) -> None:
        self.capacity = capacity
        self.heap = [(-capacity, row) for row in range(num_rows)]  # (-room, row), in heap order

    def place(self, length: int) -> int | None:
        """The row that takes an item of `length` tokens, or None if no row has room. An empty row takes any item."""
        room, row = -self.heap[0][0], self.heap[0][1]
        if length > room and room < self.capacity:
            return None
        heapq.heapreplace(self.heap, (length - room, row))
        return row


def _num_epochs(step: int, steps_per_epoch: tuple[int, ...]) -> float:
    """Number of epochs after `step` steps, as a fraction."""
    for done, steps in enumerate(steps_per_epoch):
        if step <= steps:
            return done + step / steps
        step -= steps
    return float(len(steps_per_epoch))
