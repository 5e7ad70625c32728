"""How evaluation work is dealt to ranks."""

from eval.over_ranks import deal


def test_the_largest_goes_to_the_rank_with_the_least_work():
    work = [100, 1, 1, 1, 60, 41, 1, 1]
    shares = deal(work, 2)
    assert [sum(work[i] for i in share) for share in shares] == [103, 103]
    assert sorted(i for share in shares for i in share) == list(range(8))
    assert deal([5, 5, 5], 2) == [[0, 2], [1]] and deal([], 3) == [[], [], []]
    assert deal([3] + [0] * 4, 2)[1] == [1, 2, 3, 4]
