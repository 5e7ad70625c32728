"""Share the work of an evaluation between the ranks, in as many batches on every rank.

A sharded model gathers its parameters in every forward, for which all ranks are needed. Hence a rank without an item also
calls the model.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn, TypeVar

from tqdm import tqdm

from distributed.process_group import Ranks, StopSignal, agree_any, gather_objects

Item = TypeVar("Item")
Result = TypeVar("Result")
Turn = TypeVar("Turn")
TIMEOUT_MINUTES = 24 * 60  # of the process group: ranks may finish their batches at very different times
BATCH_TOKENS = 32_768  # of the prompts and answers of a batch, with padding; bounds the memory of keys and values


def compute_over_ranks(
    compute: Callable[[list[Item]], list[Result]],
    items: Sequence[Item],
    tokens: Sequence[int],
    ranks: Ranks,
    description: str,
    stop: StopSignal | None = None,
    max_items: int | None = None,
    max_tokens: int = BATCH_TOKENS,
) -> list[Result]:
    """Call `compute` with each batch of items, and return the results of all ranks in the order of `items`. A collective.

    tokens: the number of tokens of each item. A batch has at most `max_items` items, and at most `max_tokens` tokens with its
    padding. `compute` returns one result per item. Every rank calls it equally often, in the last turn possibly with an empty
    list. stop: the stop signal of a sharded model, after which all ranks raise KeyboardInterrupt together.
    """
    turns = make_turns(tokens, ranks.world_size, max_items or len(items), max_tokens)
    batches = [turn[ranks.rank :: ranks.world_size] for turn in turns]
    results: dict[int, Result] = {}
    for batch in in_turns(batches, [sum(tokens[i] for i in batch) for batch in batches], description, ranks, stop):
        results |= zip(batch, compute([items[i] for i in batch]), strict=True)
    every = {number: result for part in gather_objects(results, ranks) for number, result in part.items()}
    return [every[number] for number in range(len(items))]


def make_turns(tokens: Sequence[int], world_size: int, max_items: int, max_tokens: int) -> list[list[int]]:
    """Return the indices of the items of each turn, the longest items first. Rank r takes `turn[r::world_size]`.

    The turns depend only on the arguments, so all ranks compute the same ones. A turn's items have similar lengths, and its
    ranks get equal numbers of items, give or take one.
    """
    order = sorted(range(len(tokens)), key=lambda i: -tokens[i])
    turns, start = [], 0
    while start < len(order):
        longest = max(1, tokens[order[start]])
        most = world_size * max(1, min(max_items, max_tokens // longest))
        left = len(order) - start
        count = -(-left // -(-left // most))  # equal turns, rather than a last turn of a single item
        turns.append(order[start : start + count])
        start += count
    return turns


def in_turns(
    turns: Iterable[Turn], tokens: Sequence[int], description: str, ranks: Ranks, stop: StopSignal | None
) -> Iterator[Turn]:
    """Yield each of `turns`, of which every rank has the same number. A collective if `stop` is given.

    After a signal on any rank, all ranks end with KeyboardInterrupt when the turn is over. tokens: the number of tokens of
    each turn of this rank, for rank 0's progress bar.
    """
    with token_bar(sum(tokens), description, ranks) as bar:
        for turn, number in zip(turns, tokens, strict=True):
            yield turn
            if stop and signal_on_any(stop):
                stop_all(ranks)
            bar.update(number)


def signal_on_any(stop: StopSignal) -> bool:
    """Return whether any rank has received a signal by now. A collective.

    Unlike `StopSignal.agreed`, which returns the answer of the call before, it is true for a signal that has just cut a batch
    short.
    """
    stop.ranks.watch.tick()
    stop.stopped = agree_any(stop.stopped or stop.name is not None, stop.ranks)
    return stop.stopped


def stop_all(ranks: Ranks) -> NoReturn:
    """End an evaluation after a signal that all ranks have agreed on: one line on rank 0, then KeyboardInterrupt."""
    if ranks.rank == 0:
        tqdm.write("stopped by a signal, before the result", file=sys.stderr)
    raise KeyboardInterrupt


def token_bar(total: int, description: str, ranks: Ranks) -> tqdm:
    """Return a progress bar over tokens, in which rank 0 shows its own work. Into a file it writes a line every ten minutes."""
    label = description if ranks.world_size == 1 else f"{description} (rank 0 of {ranks.world_size})"
    lines = {"mininterval": 600, "bar_format": "{desc}: {percentage:.0f}% after {elapsed}\n"}
    options = {} if sys.stderr.isatty() else lines
    return tqdm(total=total, desc=label, unit="token", unit_scale=True, disable=ranks.rank != 0, **options)
