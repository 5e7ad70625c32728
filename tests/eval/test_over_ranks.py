"""How evaluation work is dealt to ranks, and what the progress bar counts."""

import pytest
import torch.distributed as dist

from distributed.process_group import start_process_group
from eval.in_step import in_turns
from eval.over_ranks import compute_over_ranks, deal


def test_the_largest_goes_to_the_rank_with_the_least_work():
    work = [100, 1, 1, 1, 60, 41, 1, 1]
    shares = deal(work, 2)
    assert [sum(work[i] for i in share) for share in shares] == [103, 103]
    assert sorted(i for share in shares for i in share) == list(range(8))
    assert deal([5, 5, 5], 2) == [[0, 2], [1]] and deal([], 3) == [[], [], []]
    assert deal([3] + [0] * 4, 2)[1] == [1, 2, 3, 4]


@pytest.mark.parametrize("ranks", [2, 8, 32])
def test_skewed_lengths_are_balanced_where_every_other_one_would_not(ranks):
    """Lengths 1:100, as many as 16 per rank: the mean over the largest share."""
    work = [1 + 99 * (7 * i % 16 == 0) + i % 5 for i in range(16 * ranks)]

    def balance(shares):
        loads = [sum(work[i] for i in share) for share in shares]
        return sum(loads) / ranks / max(loads)

    order = sorted(range(len(work)), key=lambda i: -work[i])
    assert balance(deal(work, ranks)) > 0.98
    assert balance(deal(work, ranks)) >= balance([order[rank::ranks] for rank in range(ranks)])


@pytest.fixture
def ranks():
    yield start_process_group()
    dist.destroy_process_group()


def test_the_bar_counts_the_tokens_of_the_share(ranks, capsys, monkeypatch):
    bars = []

    def watched(*arguments, **options):
        bars.append(options | {"done": 0})
        bar = tqdm(*arguments, **options)
        update = bar.update

        def count(number):
            bars[-1]["done"] += number
            update(number)

        bar.update = count
        return bar

    from eval.over_ranks import tqdm

    monkeypatch.setattr("eval.over_ranks.tqdm", watched)

    def compute(share, advance):
        advance(len(share))  # fewer tokens than they could have taken
        return [sum(item) for item in share]

    items = [[1, 2], [3], [4, 5, 6]]
    assert compute_over_ranks(compute, items, [2, 1, 3], ranks, "sums") == [3, 3, 15]

    class Stop:
        def __init__(self):
            self.ranks = ranks

        def agreed(self):
            return False

    assert list(in_turns("ab", [10, 5], Stop(), "turns")) == ["a", "b"]
    assert [(bar["total"], bar["done"], bar["unit"]) for bar in bars] == [(6, 6, "token"), (15, 15, "token")]
