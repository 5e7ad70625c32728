"""How the items of an evaluation become the batches of all ranks."""

import pytest

from eval.over_ranks import make_turns


@pytest.mark.parametrize(
    ("tokens", "world_size", "limits", "turns"),
    [
        ([3, 9, 4, 8, 5], 2, (2, 100), [[1, 3, 4], [2, 0]]),  # equal turns, the longest items first
        ([3, 9, 4], 4, (8, 100), [[1, 2, 0]]),  # the last rank has no item, and takes part in the turn
        ([40, 10, 10, 10, 10], 1, (8, 40), [[0], [1, 2, 3, 4]]),  # 40 tokens: one long item, or four short ones
        ([90, 90], 1, (8, 40), [[0], [1]]),  # an item that is too long for a batch has one of its own
        ([0, 0, 0], 2, (8, 40), [[0, 1, 2]]),
        ([], 2, (8, 40), []),
    ],
)
def test_turns_hold_similar_items(tokens, world_size, limits, turns):
    assert make_turns(tokens, world_size, *limits) == turns
