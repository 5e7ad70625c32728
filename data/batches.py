"""`batch(step)`: which documents make up an optimizer step, and how they are packed. Pure in (seed, step).

There is no loader state to save: the step number is the state, and resuming costs nothing. The plan knows nothing of
ranks; `micro_batches` deals a step's rows out to however many there are.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from data.examples import Documents
from data.mixing import main_order, stream, total_targets
from data.sources import Corpus, Windows, corpus_of

T = TypeVar("T")
# Items packed together, at most `sequence_length` tokens. An item is a document, or a window of a token store.
Row = tuple[int, ...]


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step over all ranks and micro-batches."""

    rows: tuple[Row, ...]
    num_target_tokens: int  # the divisor of the step's loss
    num_examples: int  # items
    targets_by_source: tuple[int, ...]
    document_lengths: tuple[int, ...]  # tokens of each document


@dataclass(frozen=True)
class Plan:
    """All steps of a run, each computed when it is asked for. Of the main source no item is lost or repeated in an epoch."""

    num_steps: int
    batch: Callable[[int], StepBatch]
    steps_per_epoch: tuple[int, ...]
    passes: Callable[[int], tuple[float, ...]] | None = None  # through each source, after so many steps


@dataclass(frozen=True)
class MicroBatch:
    """Documents of one forward on one rank, end to end without padding.

    input_ids, position_ids: `(1, tokens)`; positions restart with each document. document_lengths: tokens of each
    document, as Python ints, so that nothing waits on a device to know them. target_positions `(targets,)` points at
    the hidden states that predict `target_ids` `(targets,)`. target_sources `(targets,)`: the source of each, where there
    is more than one.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    document_lengths: tuple[int, ...]
    cu_seq_lens: torch.Tensor  # int32 (documents + 1): where each document begins, for the varlen kernel
    target_positions: torch.Tensor
    target_ids: torch.Tensor
    target_sources: torch.Tensor | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on another device; on CUDA the copy does not wait."""
        if device.type == "cpu":
            return self
        moved = {
            name: value.pin_memory().to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }
        return MicroBatch(**moved)


def plan_training(
    source: Corpus | Documents | Windows,
    epochs: int,
    seed: int,
    sequence_length: int,
    global_examples: int | None = None,
    global_tokens: int | None = None,
    packing: bool = True,
) -> Plan:
    """The steps of `epochs` passes over the main source, with what is mixed in (data/mixing.py).

    A step is `global_examples` examples of the main source, to which the others' are added; or `global_tokens` target
    tokens of all sources together: at most, or one example's; what is mixed in is rounded to whole examples.
    """
    corpus = corpus_of(source)
    main_tokens = global_tokens and global_tokens * corpus.shares[0]
    order = main_order(corpus.sources[0], epochs, seed, global_examples, main_tokens)
    # Targets of each source for one of the main one's, and where its items begin.
    ratios = [share / corpus.shares[0] for share in corpus.shares[1:]]
    mixed = [stream(part, seed, number) for number, part in enumerate(corpus.sources[1:], 1)]

    @functools.lru_cache(maxsize=16)  # asked for by the thread that makes micro-batches, then by the loop
    def batch(step: int) -> StepBatch:
        items = order.items(step)
        before, after = order.targets_before(step), order.targets_before(step + 1)
        for offset, ratio, between in zip(corpus.offsets[1:-1], ratios, mixed, strict=True):
            items += [offset + i for i in between(int(ratio * before), int(ratio * after))]
        return _step_batch(items, corpus, sequence_length if packing else 0)

    def passes(steps: int) -> tuple[float, ...]:
        targets = order.targets_before(steps)
        others = (r * targets / total_targets(part) for r, part in zip(ratios, corpus.sources[1:], strict=True))
        return _epochs(steps, order.steps_per_epoch), *others

    return Plan(sum(order.steps_per_epoch), batch, order.steps_per_epoch, passes)


def plan_validation(source: Corpus | Documents | Windows, sequence_length: int, examples_per_step: int = 64) -> Plan:
    """Every item of every source once, in file order."""
    corpus = corpus_of(source)
    num_steps = -(-len(corpus) // examples_per_step)

    @functools.lru_cache(maxsize=16)
    def batch(step: int) -> StepBatch:
        start = step * examples_per_step
        items = list(range(start, min(len(corpus), start + examples_per_step)))
        return _step_batch(items, corpus, sequence_length)

    return Plan(num_steps, batch, (num_steps,))


def micro_batches(
    rows: tuple[Row, ...], source: Corpus | Documents | Windows, rank: int, world_size: int, size: int
) -> list[Row]:
    """This rank's share of a step: for each micro-batch the items of up to `size` rows.

    Every rank gets the same number of micro-batches, empty ones (`()`) included. Rows go to the rank that has the
    fewest tokens so far, so that ranks finish together; each rank computes the whole deal and takes its own.
    """
    count = -(-len(rows) // (world_size * size))
    load, dealt = [0] * world_size, [[] for _ in range(world_size)]
    tokens = [sum(sum(source.document_lengths(item)) for item in row) for row in rows]
    for i in sorted(range(len(rows)), key=lambda i: (-tokens[i], i)):
        target = min((r for r in range(world_size) if len(dealt[r]) < count * size), key=lambda r: (load[r], r))
        dealt[target].append(i)
        load[target] += tokens[i]
    mine = dealt[rank]
    # Spread over the micro-batches like cards, so that none is much larger (memory) than another.
    return [tuple(item for i in mine[m::count] for item in rows[i]) for m in range(count)]


def ahead(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The same items, made by a thread up to `depth` before they are asked for. None is not an item."""
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, items, None))
            yield item


def collate(items: Row, source: Corpus | Documents | Windows) -> MicroBatch:
    """The items' documents end to end as tensors. An empty micro-batch becomes two tokens without a target.

    A rank with nothing to do still runs forward and backward: the others wait for it in the all-gathers.
    """
    corpus = corpus_of(source)
    parts = [corpus.get(item) for item in items] or [(np.zeros(2, dtype=np.int64), np.zeros(2, dtype=bool))]
    lengths = tuple(length for item in items for length in corpus.document_lengths(item)) or (2,)
    flat = np.concatenate([ids for ids, _ in parts])
    where = np.flatnonzero(np.concatenate([is_target for _, is_target in parts]))
    target_sources = None
    if len(corpus.sources) > 1:
        targets = [int(is_target.sum()) for _, is_target in parts]
        numbers = [corpus.locate(item)[0] for item in items] or [0]
        target_sources = torch.from_numpy(np.repeat(numbers, targets))
    return MicroBatch(
        input_ids=torch.from_numpy(flat)[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        document_lengths=lengths,
        cu_seq_lens=torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32),
        target_positions=torch.from_numpy(where - 1),  # token t is predicted at t - 1, in the same document
        target_ids=torch.from_numpy(flat[where]),
        target_sources=target_sources,
    )


def _step_batch(items: list[int], corpus: Corpus, capacity: int) -> StepBatch:
    lengths = {item: corpus.document_lengths(item) for item in items}
    targets = [0] * len(corpus.sources)
    for item in items:
        targets[corpus.locate(item)[0]] += corpus.num_targets(item)
    rows = _pack(items, {item: sum(documents) for item, documents in lengths.items()}, capacity)
    documents = tuple(length for item in items for length in lengths[item])
    return StepBatch(rows, sum(targets), len(items), tuple(targets), documents)


def _pack(items: list[int], lengths: dict[int, int], capacity: int) -> tuple[Row, ...]:
    """Best-fit decreasing: the longest item first, each into the fullest row that still holds it."""
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


def _epochs(step: int, steps_per_epoch: tuple[int, ...]) -> float:
    """Epochs finished after `step` steps."""
    for done, steps in enumerate(steps_per_epoch):
        if step <= steps:
            return done + step / steps
        step -= steps
    return float(len(steps_per_epoch))
