"""Which rank computes which documents of a step, in which micro-batch: the deal.

Under FSDP all ranks meet in every layer of every micro-batch, so a micro-batch takes as long as its slowest rank. A step's
items are therefore dealt into `micro-batches x ranks` bins by their FLOPs, and not by their number or tokens. The deal has
the smallest number of micro-batches that holds the step, because each of them gathers the parameters once more.

The time of a step is the sum over its micro-batches of the largest bin. Three rules propose bins, and the fastest proposal
wins: none of them is the best for every step (docs/LOG.md has the figures). Each takes the costliest item first.

- Longest processing time first (Graham, 1969, doi:10.1137/0117039) puts it into the bin with the least cost that has room. It
  is the best for many items of similar cost.
- Least increase puts it where it lengthens the step least. It is the best where a few items are much longer than the others.
- Best fit puts it into the fullest bin that has room. It needs the fewest bins, and so it sets the number of micro-batches.

All ranks compute the whole deal. It is made of integers alone, so that processors of different kinds agree on it.

With `sharding.context` a group of neighbouring ranks takes the place of a rank: they share each of the group's micro-batches.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data.examples import Documents
from data.sources import Corpus, Windows

if TYPE_CHECKING:
    from data.batches import MicroBatch

# Items of one micro-batch on one rank: documents, or windows of a token store.
Items = tuple[int, ...]
Bins = list[list[int]]  # positions in the list of items
_FULL = np.iinfo(np.int64).max


# (lengths of documents in tokens int64 (documents,), number of target tokens int64 (documents,)) -> cost int64 (documents,)
Costs = Callable[[np.ndarray, np.ndarray], np.ndarray]


def one_per_token(lengths: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Costs where no model is at hand: the number of tokens."""
    return lengths


@dataclass(frozen=True)
class Deal:
    """The micro-batches of a step. items: `[micro-batch][rank]`; costs: int64 `(micro-batches, ranks)`.

    context: so many ranks share a micro-batch, and `rank` above is then the number of a group of them.
    """

    items: tuple[tuple[Items, ...], ...]
    costs: np.ndarray
    context: int = 1

    def of_rank(self, rank: int) -> list[Items]:
        """The micro-batches of one rank. Every rank gets the same number; some may be empty (`()`)."""
        return [micro_batch[rank // self.context] for micro_batch in self.items]

    def ranks_of(self, group: int) -> str:
        """Who computes the items at the place `group`: `rank 3`, or `ranks 4 to 7` that share them."""
        first = group * self.context
        return f"rank {first}" if self.context == 1 else f"ranks {first} to {first + self.context - 1}"

    def part_of_rank(self, batch: "MicroBatch", rank: int) -> "MicroBatch":
        """What one rank computes of a micro-batch of its items: all of it, unless ranks share it."""
        return batch if self.context == 1 else batch.part(rank % self.context, self.context)

    @property
    def mean(self) -> float:
        """Cost of a mean rank: the time of the step if all ranks were equally busy."""
        return float(self.costs.sum(dtype=np.float64)) / self.costs.shape[1]

    @property
    def slowest(self) -> float:
        """Cost of the slowest rank of each micro-batch, summed: the time of the step."""
        return float(self.costs.max(axis=1).sum(dtype=np.float64))


def balance(deals: Iterable[Deal]) -> float:
    """Share of the time in which a mean rank computes, by cost. 1: no rank ever waits for another one."""
    pairs = [(deal.mean, deal.slowest) for deal in deals]
    slowest = sum(slowest for _, slowest in pairs)
    return sum(mean for mean, _ in pairs) / slowest if slowest else 1.0


@dataclass(frozen=True)
class Dealer:
    """How micro-batches are made.

    capacity: a micro-batch on one rank has at most so many tokens, or with `packing` off so many items. An item that is
    longer has a micro-batch of its own. context: so many ranks share a micro-batch, and its capacity.
    costs: the FLOPs of documents (`model.flops.Work.costs`).
    """

    capacity: int
    costs: Costs
    packing: bool = True
    context: int = 1

    def deal(self, items: Sequence[int], source: Corpus | Documents | Windows, ranks: int) -> Deal:
        """Deal the items of a step to `ranks` ranks. A pure function, the same on every rank."""
        ranks = max(1, ranks // self.context)
        sizes = np.ones(len(items), dtype=np.int64)
        if self.packing:
            sizes = np.array([source.num_tokens(item) for item in items], dtype=np.int64).clip(max=self.capacity)
        costs = self.costs_of_items(items, source)
        bins = _fewest_bins(sizes, costs, ranks, self.capacity)
        totals = np.array([costs[bin].sum() for bin in bins], dtype=np.int64).reshape(-1, ranks)
        dealt = [tuple(items[i] for i in bin) for bin in bins]
        return Deal(tuple(tuple(dealt[m : m + ranks]) for m in range(0, len(dealt), ranks)), totals, self.context)

    def costs_of_items(self, items: Sequence[int], source: Corpus | Documents | Windows) -> np.ndarray:
        """The cost of each item, int64 `(items,)`."""
        lengths = [source.document_lengths(item) for item in items]
        first = np.cumsum([0, *(len(documents) for documents in lengths)])[:-1]  # first document of each item
        targets = np.zeros(sum(map(len, lengths)), dtype=np.int64)
        # How the targets are spread over an item's documents makes no difference: the head's cost is linear. Targets count by
        # their weights, which may be larger than any integer of numpy.
        targets[first] = [int(min(source.num_targets(i), sum(n))) for i, n in zip(items, lengths, strict=True)]
        costs = self.costs(np.array([n for documents in lengths for n in documents], dtype=np.int64), targets)
        return np.add.reduceat(costs, first) if len(items) else costs


def _fewest_bins(sizes: np.ndarray, costs: np.ndarray, ranks: int, capacity: int) -> Bins:
    """Bins of the fastest proposal for the smallest number of micro-batches; bins of one micro-batch are neighbours."""

    def increase(cost: int, loads: np.ndarray, room: np.ndarray, fits: np.ndarray) -> np.ndarray:
        largest = np.repeat(loads.reshape(-1, ranks).max(axis=1), ranks)  # of each bin's micro-batch
        more = np.where(fits, np.maximum(loads + cost - largest, 0), _FULL)
        return np.where(more == more.min(), loads, _FULL)  # of equal increases the bin with the least cost

    # Of two bins that best fit has filled one after the other, more than one capacity is used.
    most = 2 * int(sizes.sum()) // capacity + 1
    fullest = _filled(_descending(sizes), sizes, costs, most, capacity, lambda cost, loads, room, fits: room)
    fullest = [bin for bin in fullest or [] if bin]
    count = max(1, -(-len(fullest) // ranks)) * ranks
    fullest += [[] for _ in range(count - len(fullest))]
    order = _descending(costs)
    longest = _filled(order, sizes, costs, count, capacity, lambda cost, loads, room, fits: loads)
    least = _filled(order, sizes, costs, count, capacity, increase) if count > ranks else None  # as `longest`
    proposals = [longest and _alike(longest, costs), least, _alike(fullest, costs)]
    return min((bins for bins in proposals if bins is not None), key=lambda bins: _time(bins, costs, ranks))


def _filled(
    order: list[int],
    sizes: np.ndarray,
    costs: np.ndarray,
    count: int,
    capacity: int,
    rank: Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray],
) -> Bins | None:
    """`count` bins with the items in this order, each in the bin that has room for it and the least `rank`; None if one finds no room.

    rank: (cost of the item, loads of the bins, their room, which have room for it) -> int64 `(bins,)`.
    """
    bins: Bins = [[] for _ in range(count)]
    loads, room = np.zeros(count, dtype=np.int64), np.full(count, capacity, dtype=np.int64)
    for i in order:
        fits = room >= sizes[i]
        chosen = int(np.where(fits, rank(costs[i], loads, room, fits), _FULL).argmin())
        if not fits[chosen]:
            return None
        bins[chosen].append(i)
        loads[chosen] += costs[i]
        room[chosen] -= sizes[i]
    return bins


def _alike(bins: Bins, costs: np.ndarray) -> Bins:
    """The bins in order of their cost, so that those of one micro-batch are alike."""
    return [bins[b] for b in _descending(np.array([costs[bin].sum() for bin in bins]))]


def _time(bins: Bins, costs: np.ndarray, ranks: int) -> int:
    return sum(max(int(costs[bin].sum()) for bin in bins[m : m + ranks]) for m in range(0, len(bins), ranks))


def _descending(values: np.ndarray) -> list[int]:
    """Positions of the largest values first; of equal ones the first."""
    return np.argsort(-values, kind="stable").tolist()
