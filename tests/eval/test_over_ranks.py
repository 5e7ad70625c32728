"""How evaluation work is dealt to ranks, and what the progress bar counts."""

from types import SimpleNamespace

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


def test_the_bar_counts_the_tokens_of_the_share_and_is_few_lines_in_a_file(ranks, capsys, monkeypatch):
    made = []

    def watched(**options):
        made.append(tqdm(**options))
        return made[-1]

    from eval.over_ranks import tqdm

    monkeypatch.setattr("eval.over_ranks.tqdm", watched)

    def compute(share, advance):
        for _ in range(2000):
            advance(0)
        advance(len(share))  # fewer tokens than they could have taken
        return [sum(item) for item in share]

    items = [[1, 2], [3], [4, 5, 6]]
    assert compute_over_ranks(compute, items, [2, 1, 3], ranks, "sums") == [3, 3, 15]
    stop = SimpleNamespace(ranks=ranks, agreed=lambda: False)
    assert list(in_turns("ab", [10, 5], stop, "turns")) == ["a", "b"]
    assert [(bar.total, bar.n) for bar in made] == [(6, 6), (15, 15)]
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) <= 4 and all(line.startswith(("sums: ", "turns: ")) for line in lines)
