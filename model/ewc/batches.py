"""The documents of the old domain from which the Fisher diagonal is estimated, in groups.

A group is a fixed set of documents whose gradients are added before they are squared (model/ewc/fisher.py). It depends
neither on the number of ranks nor on packing.
"""

import math
from dataclasses import dataclass

import torch

from common.random_bits import permuted
from configs.config import EWC
from data.batches import MicroBatch, collate
from data.dealing import Dealer
from data.examples import Documents
from data.sources import Windows

_DOCUMENT_BITS = 20  # for a document's number within its item; a window has at most as many documents as tokens


@dataclass(frozen=True)
class FisherBatches:
    """Items of a source in groups of `group_size`: group g is items[g * group_size : (g + 1) * group_size]."""

    source: Documents | Windows
    items: tuple[int, ...]
    num_targets: int | float  # of all items, or the sum of their weights
    group_size: int
    dealer: Dealer

    @property
    def num_documents(self) -> int:
        """Number of items in all groups."""
        return len(self.items)

    @property
    def num_groups(self) -> int:
        """Number of groups. The last one may be smaller."""
        return -(-len(self.items) // self.group_size)

    def micro_batches(self, group: int, rank: int, world_size: int) -> list[tuple[MicroBatch, torch.Tensor]]:
        """This rank's micro-batches of a group; every rank gets the same number.

        Each comes with the numbers of its documents in the whole data, int64 `(documents,)`.
        """
        items = self.items[group * self.group_size : (group + 1) * self.group_size]
        dealt = self.dealer.deal(items, self.source, world_size).of_rank(rank)
        return [(collate(mine, self.source), self._document_numbers(mine)) for mine in dealt]

    def _document_numbers(self, items: tuple[int, ...]) -> torch.Tensor:
        numbers = [
            (item << _DOCUMENT_BITS) + number
            for item in items
            for number in range(len(self.source.document_lengths(item)))
        ]
        return torch.tensor(numbers or [0])


def fisher_batches(source: Documents | Windows, settings: EWC, dealer: Dealer) -> FisherBatches:
    """`settings.documents` items of a source, drawn without replacement (all items if it has fewer), in groups.

    Items without a target are left out, because their gradient is zero. `dealer` deals a group to the ranks.
    """
    usable = source.items_with_targets()
    count = min(settings.documents, len(usable))
    items = tuple(int(usable[permuted(i, len(usable), (settings.seed,))]) for i in range(count))
    num_targets = math.fsum(source.num_targets(item) for item in items)
    return FisherBatches(source, items, num_targets, settings.batch, dealer)
