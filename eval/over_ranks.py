"""Share independent evaluation work (prompts, sequences) between the ranks."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from tqdm import tqdm

from distributed.process_group import Ranks, gather_objects

Item = TypeVar("Item")
Result = TypeVar("Result")
TIMEOUT_MINUTES = 24 * 60  # of the process group: ranks may finish their shares at very different times


def compute_over_ranks(
    compute: Callable[[list[Item], Callable[[int], object]], list[Result]],
    items: Sequence[Item],
    work: Sequence[int],
    ranks: Ranks,
    description: str,
    finish: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Run `compute(share, advance)` on each rank's share of `items`. A collective.

    Every rank gets all results, in the order of `items`. work: the tokens of each item, by which the items are dealt
    (`deal`). `compute` returns one result per item and calls `advance` with the number of tokens it has just finished, which
    add up to the work of the share or less; rank 0 shows a progress bar. `finish` is called when the share is done
    (eval/load_over_ranks.py).
    """
    mine = deal(work, ranks.world_size)[ranks.rank]
    with token_bar(sum(work[i] for i in mine), description, ranks) as bar:
        share = list(zip(mine, compute([items[i] for i in mine], bar.update), strict=True))
        bar.update(bar.total - bar.n)
    finish()
    gathered = gather_objects(share, ranks)
    return [result for _, result in sorted((pair for part in gathered for pair in part), key=lambda pair: pair[0])]


def deal(work: Sequence[int], ranks: int) -> list[list[int]]:
    """The indices of each rank's items: the largest first, each to the rank with the least work so far."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for i in sorted(range(len(work)), key=lambda i: -work[i]):
        rank = loads.index(min(loads))
        shares[rank].append(i)
        loads[rank] += work[i]
    return shares


def token_bar(total: int, description: str, ranks: Ranks) -> tqdm:
    """A progress bar over tokens, which rank 0 shows of its own work."""
    label = description if ranks.world_size == 1 else f"{description} (rank 0 of {ranks.world_size})"
    # In a file a bar is a line now and then.
    lines = {"mininterval": 600, "bar_format": "{desc}: {percentage:.0f}% after {elapsed}\n"}
    how = {} if sys.stderr.isatty() else lines
    return tqdm(total=total, desc=label, unit="token", unit_scale=True, disable=ranks.rank != 0, **how)
