"""Which documents of the old domain the Fisher diagonal is estimated from, square by square (model/ewc/fisher.py).

A square is a fixed set of documents, whose gradients are added up before they are squared. Which documents it holds
depends neither on the ranks nor on packing.
"""

from dataclasses import dataclass

import numpy as np
import torch

from common.permutation import permuted
from data.batches import MicroBatch, collate, micro_batches
from data.examples import Documents
from data.sources import Windows

_NUMBER_BITS = 20  # of a document's number in its item: a window holds at most as many documents as tokens


@dataclass(frozen=True)
class FisherBatches:
    """Items of a source (a document each, or a window of a token store), and how they are gone through."""

    source: Documents | Windows
    items: tuple[int, ...]  # square s is items[s * batch : (s + 1) * batch]
    num_targets: int  # of all items
    batch: int
    capacity: int  # tokens of a micro-batch on one rank; 0: `micro_batch` items whatever their length
    micro_batch: int

    @property
    def num_documents(self) -> int:
        """Items of all squares."""
        return len(self.items)

    @property
    def num_squares(self) -> int:
        """The last one may be smaller."""
        return -(-len(self.items) // self.batch)

    @property
    def fingerprint(self) -> str:
        """Of the whole source."""
        return self.source.fingerprint

    def micro_batches(self, square: int, rank: int, world_size: int) -> list[tuple[MicroBatch, torch.Tensor]]:
        """Those of a rank, as many on every one, each with the numbers of its documents in the whole data, int64 `(documents,)`.

        Every rank gets its share of a square, however short the documents are: they are dealt out before they are packed.
        """
        items = self.items[square * self.batch : (square + 1) * self.batch]
        size = self.micro_batch
        if self.capacity:
            size = max(1, self.capacity // max(sum(self.source.document_lengths(item)) for item in items))
        dealt = micro_batches(tuple((item,) for item in items), self.source, rank, world_size, size)
        return [(collate(mine, self.source), self._numbers(mine)) for mine in dealt]

    def _numbers(self, items: tuple[int, ...]) -> torch.Tensor:
        numbers = [
            (item << _NUMBER_BITS) + number
            for item in items
            for number in range(len(self.source.document_lengths(item)))
        ]
        return torch.tensor(numbers or [0])


def fisher_batches(
    source: Documents | Windows,
    documents: int,
    batch: int,
    seed: int,
    sequence_length: int,
    micro_batch: int,
    packing: bool,
) -> FisherBatches:
    """`documents` items of a source, drawn without replacement, `batch` a square over all ranks; all where it has fewer.

    Items without a target are left out: their gradient is zero. A forward on one rank takes what fits into `micro_batch`
    rows of `sequence_length` tokens, or without packing `micro_batch` items.
    """
    usable = range(len(source)) if isinstance(source, Windows) else np.flatnonzero(source.targets)
    count = min(documents, len(usable))
    items = tuple(int(usable[permuted(i, len(usable), (seed,))]) for i in range(count))
    num_targets = sum(source.num_targets(item) for item in items)
    capacity = micro_batch * sequence_length if packing else 0
    return FisherBatches(source, items, num_targets, batch, capacity, micro_batch)
