"""The pseudo-random permutation with random access."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from common.random_bits import permuted


@settings(max_examples=80)
@given(st.integers(1, 300), st.integers(0, 2**40), st.integers(0, 50))
def test_it_is_a_permutation(size, seed, epoch) -> None:
    assert sorted(permuted(i, size, (seed, epoch)) for i in range(size)) == list(range(size))


def test_it_looks_random() -> None:
    size = 100_003
    order = np.array([permuted(i, size, (0, 0)) for i in range(2000)])
    assert order.max() > 0.98 * size and order.min() < 0.02 * size
    assert abs(order.mean() / size - 0.5) < 0.02  # 3 standard errors
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.07
    assert not np.array_equal(order[:50], [permuted(i, size, (0, 1)) for i in range(50)])
    assert permuted(10**15, 10**18, (0, 0)) == permuted(10**15, 10**18, (0, 0))  # needs no memory of that size
