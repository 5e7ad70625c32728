"""The deal: which rank computes which documents of a step, in which micro-batch.

Under FSDP all ranks meet in every layer of every micro-batch, so a micro-batch takes as long as its slowest rank. A step's
items are therefore dealt into `micro-batches x ranks` bins by FLOPs, not by number or tokens. The deal has the smallest number
of micro-batches that holds the step, because each of them gathers the parameters once more.

The time of a step is the sum over its micro-batches of the largest bin. Three rules propose bins, and the fastest proposal
wins: no rule is best for every step (docs/LOG.md has the figures). Each rule takes the costliest item first.

- Longest processing time first (Graham, 1969, doi:10.1137/0117039) puts the item into the cheapest bin with room. This is best
  for many items of similar cost.
- Least increase puts it where it lengthens the step least. This is best if a few items are much longer than the others.
- Best fit puts it into the fullest bin with room. This needs the fewest bins, and so it sets the number of micro-batches.

Every rank computes the whole deal. It uses integers alone, so that processors of different kinds agree on it.

With `sharding.context`, a group of neighbouring ranks takes the place of a rank and shares each of the group's micro-batches.
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


def length_as_cost(lengths: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the number of tokens as the cost of each document, for callers without a model."""
    return lengths


@dataclass(frozen=True)
class Deal:
    """The micro-batches of a step. items: `[micro-batch][rank]`; costs: int64 `(micro-batches, ranks)`.

    context: number of ranks that share a micro-batch. If it is above 1, `rank` in these shapes is the number of a group.
    """

    items: tuple[tuple[Items, ...], ...]
    costs: np.ndarray
    context: int = 1

    def of_rank(self, rank: int) -> list[Items]:
        """Return the micro-batches of one rank. Every rank gets the same number; some may be empty (`()`)."""
        return [micro_batch[rank // self.context] for micro_batch in self.items]

    def ranks_of(self, group: int) -> str:
        """Name the ranks that compute the items of a group: `rank 3`, or `ranks 4 to 7` that share them."""
        first = group * self.context
        return f"rank {first}" if self.context == 1 else f"ranks {first} to {first + self.context - 1}"

    def part_of_rank(self, batch: "MicroBatch", rank: int) -> "MicroBatch":
        """Return one rank's share of a micro-batch: all of it, unless several ranks share it."""
        return batch if self.context == 1 else batch.part(rank % self.context, self.context)

    @property
    def mean(self) -> float:
        """Mean cost of a rank: the time of the step if all ranks were equally busy."""
        return float(self.costs.sum(dtype=np.float64)) / self.costs.shape[1]

    @property
    def slowest(self) -> float:
        """Cost of the slowest rank, summed over the micro-batches: the time of the step."""
        return float(self.costs.max(axis=1).sum(dtype=np.float64))


def balance(deals: Iterable[Deal]) -> float:
    """Return the fraction of the time during which the average rank computes, by cost. 1: no rank ever waits."""
    pairs = [(deal.mean, deal.slowest) for deal in deals]
    slowest = sum(slowest for _, slowest in pairs)
    return sum(mean for mean, _ in pairs) / slowest if slowest else 1.0


@dataclass(frozen=True)
class Dealer:
    """The settings by which a step is dealt into micro-batches.

    capacity: the most tokens of a micro-batch on one rank, or with `packing` off the most items. A longer item gets a
    micro-batch of its own. context: number of ranks that share a micro-batch and its capacity. costs: the FLOPs of documents
    (`model.flops.Work.costs`).
    """

    capacity: int
    costs: Costs
    packing: bool = True
    context: int = 1

    def deal(self, items: Sequence[int], source: Corpus | Documents | Windows, ranks: int) -> Deal:
        """Deal the items of a step to `ranks` ranks. A pure function with the same result on every rank."""
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
        """Return the cost of each item, int64 `(items,)`."""
        lengths = [source.document_lengths(item) for item in items]
        first = np.cumsum([0, *(len(documents) for documents in lengths)])[:-1]  # number of each item's first document
        targets = np.zeros(sum(map(len, lengths)), dtype=np.int64)
        # All targets of an item count for its first document: the head's cost is linear, so only their sum matters. Targets
        # count by their weights, which may be too large for numpy's integers.
        targets[first] = [int(min(source.num_targets(i), sum(n))) for i, n in zip(items, lengths, strict=True)]
        costs = self.costs(np.array([n for documents in lengths for n in documents], dtype=np.int64), targets)
        return np.add.reduceat(costs, first) if len(items) else costs


def _fewest_bins(sizes: np.ndarray, costs: np.ndarray, ranks: int, capacity: int) -> Bins:
    """Return the fastest proposal for the smallest number of micro-batches. Bins of a micro-batch are neighbours."""

    def increase(cost: int, loads: np.ndarray, room: np.ndarray, fits: np.ndarray) -> np.ndarray:
        largest = np.repeat(loads.reshape(-1, ranks).max(axis=1), ranks)  # of each bin's micro-batch
        more = np.where(fits, np.maximum(loads + cost - largest, 0), _FULL)
        return np.where(more == more.min(), loads, _FULL)  # among equal increases, prefer the cheapest bin

    # Best fit fills any two successive bins with more than one capacity, hence this bound.
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
    """Put the items in this order into `count` bins, each into the bin with room and the least `rank`. None if one fits nowhere.

    rank: (cost of the item, loads of the bins, their free room, whether the item fits) -> int64 `(bins,)`.
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
    """Sort the bins by cost, so that bins of similar cost end up in the same micro-batch."""
    return [bins[b] for b in _descending(np.array([costs[bin].sum() for bin in bins]))]


def _time(bins: Bins, costs: np.ndarray, ranks: int) -> int:
    return sum(max(int(costs[bin].sum()) for bin in bins[m : m + ranks]) for m in range(0, len(bins), ranks))


def _descending(values: np.ndarray) -> list[int]:
    """Return the positions of the values in descending order; equal values keep their order."""

    return np.argsort(-values, kind="stable").tolist()
