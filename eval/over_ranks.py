"""Share independent evaluation work (prompts, sequences) between the ranks."""

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch.distributed as dist
from tqdm import tqdm

from common.errors import UserError
from distributed.process_group import Ranks

Result = TypeVar("Result")
TIMEOUT_MINUTES = 24 * 60  # of the process group: ranks may finish their shares at very different times


def compute_over_ranks(
    compute: Callable[[list, Callable[[int], object]], list[Result]],
    items: Sequence[list[int] | tuple[list[int], list[bool]]],
    ranks: Ranks,
    description: str,
    finish: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Run `compute(share, advance)` on each rank's share of `items`. A collective.

    Every rank gets all results, in the order of `items`. items: prompts (token ids), or pairs (token ids, is_target).
    They are dealt out in order of length, so that long ones are spread evenly over the ranks. `compute` returns one
    result per item and calls `advance` with the number of items it has just finished; rank 0 shows a progress bar.
    `finish` is called when the share is done (eval/load_over_ranks.py).
    """
    order = sorted(range(len(items)), key=lambda i: (-_num_tokens(items[i]), i))
    mine = order[ranks.rank :: ranks.world_size]
    description = label_of_first_rank(description, ranks)
    with tqdm(total=len(mine), desc=description, unit="example", disable=ranks.rank != 0) as bar:
        share = list(zip(mine, compute([items[i] for i in mine], bar.update), strict=True))
    finish()
    gathered = [None] * ranks.world_size
    dist.all_gather_object(gathered, share, group=ranks.flags)
    return [result for _, result in sorted((pair for part in gathered for pair in part), key=lambda pair: pair[0])]


def on_every_rank(action: Callable[[], Result], ranks: Ranks) -> Result:
    """Run `action()` on every rank. A collective.

    If it raises UserError on some ranks, all ranks raise that of the first of them, with its number if others succeeded.
    `action` itself must not contain a collective.
    """
    result = problem = None
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    problems: list[str | None] = [None] * ranks.world_size
    dist.all_gather_object(problems, problem, group=ranks.flags)
    failed = [rank for rank, text in enumerate(problems) if text is not None]
    if failed:
        where = "" if len(failed) == ranks.world_size else f"rank {failed[0]}: "
        raise UserError(f"{where}{problems[failed[0]]}")
    return cast(Result, result)


def label_of_first_rank(description: str, ranks: Ranks) -> str:
    """The label of a progress bar that shows only the work of rank 0."""
    return description if ranks.world_size == 1 else f"{description} (rank 0 of {ranks.world_size})"


def _num_tokens(item: list[int] | tuple[list[int], list[bool]]) -> int:
    return len(item[0]) if isinstance(item, tuple) else len(item)
