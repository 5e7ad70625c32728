"""`batch(step)`: which documents make up an optimizer step, and how they are packed. Pure in (seed, step).

There is no loader state to save: the step number is the state, and resuming costs nothing. The plan knows nothing of
ranks; `micro_batches` deals a step's rows out to however many there are.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from data.examples import Documents

T = TypeVar("T")
Row = tuple[int, ...]  # documents packed together, at most `sequence_length` tokens


@dataclass(frozen=True)
class Plan:
    """All steps of a run: `steps[s]` is the rows of step s; no document is lost or repeated within an epoch."""

    steps: tuple[tuple[Row, ...], ...]
    steps_per_epoch: tuple[int, ...]
    num_target_tokens: tuple[int, ...]  # of each step, over all ranks and micro-batches: the divisor of its loss
    num_examples: tuple[int, ...]


@dataclass(frozen=True)
class MicroBatch:
    """Documents of one forward on one rank, end to end without padding.

    input_ids, position_ids: `(1, tokens)`; positions restart with each document. document_lengths: tokens of each
    document, as Python ints, so that nothing waits on a device to know them. target_positions `(targets,)` points at
    the hidden states that predict `target_ids` `(targets,)`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    document_lengths: tuple[int, ...]
    cu_seq_lens: torch.Tensor  # int32 (documents + 1): where each document begins, for the varlen kernel
    target_positions: torch.Tensor
    target_ids: torch.Tensor

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
    documents: Documents,
    epochs: int,
    seed: int,
    sequence_length: int,
    global_examples: int | None = None,
    global_tokens: int | None = None,
    packing: bool = True,
) -> Plan:
    """The steps of `epochs` passes, each in its own order. An epoch's last step is smaller and is taken.

    A step is `global_examples` examples, or as many as fit into `global_tokens` target tokens (at least one).
    """
    steps, per_epoch = [], []
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(documents))
        groups = _groups(order, documents.targets, global_examples, global_tokens)
        steps += [_pack(group, documents.lengths, sequence_length if packing else 0) for group in groups]
        per_epoch.append(len(groups))
    return _plan(steps, per_epoch, documents)


def plan_validation(documents: Documents, sequence_length: int, examples_per_step: int = 64) -> Plan:
    """Every document once, in file order."""
    groups = _groups(np.arange(len(documents)), documents.targets, examples_per_step, None)
    return _plan([_pack(group, documents.lengths, sequence_length) for group in groups], [len(groups)], documents)


def micro_batches(rows: tuple[Row, ...], documents: Documents, rank: int, world_size: int, size: int) -> list[Row]:
    """This rank's share of a step: for each micro-batch the documents of up to `size` rows.

    Every rank gets the same number of micro-batches, empty ones (`()`) included. Rows go to the rank that has the
    fewest tokens so far, so that ranks finish together; each rank computes the whole deal and takes its own.
    """
    count = -(-len(rows) // (world_size * size))
    load, dealt = [0] * world_size, [[] for _ in range(world_size)]
    tokens = [int(documents.lengths[list(row)].sum()) for row in rows]
    for i in sorted(range(len(rows)), key=lambda i: (-tokens[i], i)):
        target = min((r for r in range(world_size) if len(dealt[r]) < count * size), key=lambda r: (load[r], r))
        dealt[target].append(i)
        load[target] += tokens[i]
    mine = dealt[rank]
    # Spread over the micro-batches like cards, so that none is much larger (memory) than another.
    return [tuple(d for i in mine[m::count] for d in rows[i]) for m in range(count)]


def ahead(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The same items, made by a thread up to `depth` before they are asked for. None is not an item."""
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, items, None))
            yield item


def collate(document_indices: Row, documents: Documents) -> MicroBatch:
    """The documents end to end as tensors. An empty micro-batch becomes two tokens without a target.

    A rank with nothing to do still runs forward and backward: the others wait for it in the all-gathers.
    """
    if document_indices:
        ids = [documents.ids[d] for d in document_indices]
        is_target = np.concatenate([documents.is_target[d] for d in document_indices])
    else:
        ids, is_target = [np.zeros(2, dtype=np.int64)], np.zeros(2, dtype=bool)
    lengths = tuple(len(tokens) for tokens in ids)
    flat = np.concatenate(ids)
    where = np.flatnonzero(is_target)
    return MicroBatch(
        input_ids=torch.from_numpy(flat)[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        document_lengths=lengths,
        cu_seq_lens=torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32),
        target_positions=torch.from_numpy(where - 1),  # token t is predicted at t - 1, in the same document
        target_ids=torch.from_numpy(flat[where]),
    )


def _groups(order: np.ndarray, targets: np.ndarray, examples: int | None, tokens: int | None) -> list[np.ndarray]:
    if examples is not None:
        return [order[i : i + examples] for i in range(0, len(order), examples)]
    groups, start, used = [], 0, 0
    for i, document in enumerate(order):
        if i > start and used + targets[document] > tokens:
            groups.append(order[start:i])
            start, used = i, 0
        used += int(targets[document])
    return groups + [order[start:]]


def _pack(group: np.ndarray, lengths: np.ndarray, capacity: int) -> tuple[Row, ...]:
    """Best-fit decreasing: the longest document first, each into the fullest row that still holds it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for document in sorted(group.tolist(), key=lambda d: (-lengths[d], d)):
        length = int(lengths[document])
        best = min((r for r in range(len(rows)) if room[r] >= length), key=lambda r: (room[r], r), default=None)
        if best is None:
            rows.append([document])
            room.append(capacity - length)
        else:
            rows[best].append(document)
            room[best] -= length
    return tuple(tuple(row) for row in rows)


def _plan(steps: list[tuple[Row, ...]], per_epoch: list[int], documents: Documents) -> Plan:
    flat = [np.array([d for row in rows for d in row]) for rows in steps]
    targets = tuple(int(documents.targets[group].sum()) for group in flat)
    return Plan(tuple(steps), tuple(per_epoch), targets, tuple(len(group) for group in flat))
