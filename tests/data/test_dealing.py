"""The deal of a step: every document once, bins that fit, the fewest micro-batches, and ranks that are equally busy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dealing import Deal, Dealer, balance, length_as_cost
from tests.in_memory import chats as documents


def squares(lengths: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the cost of attention alone."""
    return lengths**2


def one_step(lengths, ranks: int, capacity: int, costs=squares, packing: bool = True) -> Deal:
    return Dealer(capacity, costs, packing).deal(range(len(lengths)), documents(list(lengths)), ranks)


@settings(max_examples=40)
@given(st.lists(st.integers(2, 64), min_size=0, max_size=60), st.integers(1, 9), st.integers(1, 4))
def test_every_document_is_dealt_once_within_capacity(lengths, ranks, rows) -> None:
    deal = one_step(lengths, ranks, 64 * rows)
    per_rank = [deal.of_rank(rank) for rank in range(ranks)]
    assert {len(mine) for mine in per_rank} == {len(deal.items)}  # as many forwards on every rank
    bins = [[per_rank[rank][m] for rank in range(ranks)] for m in range(len(deal.items))]
    assert sorted(item for micro_batch in bins for items in micro_batch for item in items) == list(range(len(lengths)))
    tokens = np.array([[sum(lengths[i] for i in items) for items in micro_batch] for micro_batch in bins])
    assert tokens.max() <= 64 * rows
    assert deal.costs.tolist() == [[sum(lengths[i] ** 2 for i in items) for items in mb] for mb in bins]
    # Best fit needs at most 11/9 of the fewest bins (Johnson, 1973) plus 4: a loose bound on the micro-batches.
    assert len(deal.items) <= -(-(11 * -(-sum(lengths) // (64 * rows)) // 9 + 4) // ranks) + 1
    assert deal.slowest == deal.costs.max(axis=1).sum() and 0 < balance([deal]) <= 1


def test_long_item_gets_its_own_micro_batch() -> None:
    deal = one_step([10, 100, 10, 30], 1, 64)
    assert sorted(deal.of_rank(0)) == [(1,), (3, 0, 2)]
    assert sorted(one_step([100, 100, 10], 1, 64).of_rank(0)) == [(0,), (1,), (2,)]


def test_without_packing_micro_batches_count_examples() -> None:
    deal = one_step([5, 60, 7, 50, 9, 40], 2, 2, packing=False)
    assert sorted(len(items) for rank in (0, 1) for items in deal.of_rank(rank)) == [1, 1, 2, 2]
    assert len(deal.of_rank(0)) == 2


@pytest.mark.parametrize(
    ("make", "ranks", "capacity", "least"),
    [
        # Many documents of similar length. Dealing whole rows to the rank with the fewest tokens gives 0.89 and 0.74.
        (lambda rng: np.clip(rng.normal(2860, 500, 64), 1500, 4500), 8, 8192, 0.975),
        (lambda rng: np.clip(rng.normal(2860, 500, 64), 1500, 4500), 16, 8192, 0.975),
        # Lengths 1:100. Whole rows give 0.77 and 0.94.
        (lambda rng: np.exp(rng.uniform(np.log(80), np.log(8000), 64)), 8, 8192, 0.97),
        (lambda rng: np.exp(rng.uniform(np.log(80), np.log(8000), 64)), 2, 8192, 0.99),
        # Lengths 1:100, in several micro-batches with one long document each. Whole rows give 0.80.
        (lambda rng: np.exp(rng.uniform(np.log(80), np.log(8000), 300)), 32, 8192, 0.97),
    ],
)
def test_ranks_are_equally_busy(make, ranks, capacity, least) -> None:
    def costs(lengths: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Costs of an 8B model: attention is 1.4% of a document of 1,000 tokens, and 11% of 8,000."""
        return 41_000_000 * lengths + 1_770 * lengths**2 // 2

    rng = np.random.default_rng(0)
    assert balance([one_step(make(rng).astype(int), ranks, capacity, costs) for _ in range(10)]) >= least


def test_both_dealing_rules_are_needed() -> None:
    skewed = one_step([100, *[1] * 100], 2, 100, length_as_cost)
    assert skewed.costs.tolist() == [[100, 100]]  # longest first would leave two micro-batches of 100 and 50
    even = one_step([40, 30, 30, 20, 20, 20], 2, 200, length_as_cost)
    assert even.costs.tolist() == [[80, 80]]


def test_targets_count_through_the_head() -> None:
    source = documents([8, 8, 8, 8])
    source.targets[:] = [1, 1, 1, 5]
    deal = Dealer(100, lambda lengths, targets: 1 + 10 * targets).deal(range(4), source, 2)
    assert sorted(deal.costs[0].tolist()) == [33, 51]


def test_giant_weight_does_not_change_the_deal() -> None:
    """The weights of an example and of its answer are up to 1e12 each; their product exceeds a 64-bit integer."""
    source = documents([5, 9])
    source.num_targets = lambda index: 1e24 if index else 1.0
    costs = Dealer(64, lambda lengths, targets: targets).costs_of_items([0, 1], source)
    assert costs.tolist() == [1, 9]
