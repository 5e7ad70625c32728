"""A source of training in memory, with the interface of data/sources.py: whatever tokens and weights a test needs."""

from dataclasses import dataclass

import numpy as np

VOCABULARY = 259  # ids that every tiny model has (tests/tiny.py)


@dataclass(frozen=True)
class InMemory:
    """Documents with given tokens and weights. weights: bool or float32; the first of each document is 0."""

    ids: list[np.ndarray]
    weights: list[np.ndarray]
    fingerprint: str = "in memory"
    report: str = "in memory"

    def __post_init__(self) -> None:
        sums = [weights.sum(dtype=np.float64 if weights.dtype == np.float32 else np.int64) for weights in self.weights]
        object.__setattr__(self, "targets", np.array(sums))
        object.__setattr__(self, "lengths", np.array([len(ids) for ids in self.ids]))

    def __len__(self) -> int:
        return len(self.ids)

    def get(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.ids[index], self.weights[index]

    def num_tokens(self, index: int) -> int:
        return int(self.lengths[index])

    def document_lengths(self, index: int) -> tuple[int, ...]:
        return (int(self.lengths[index]),)

    def num_targets(self, index: int) -> int | float:
        return self.targets[index].item()

    def items_with_targets(self) -> np.ndarray:
        return np.flatnonzero(self.targets)


def texts(lengths) -> InMemory:
    """Documents of these lengths. All tokens but the first are targets, and no two tokens are equal."""
    edges = np.cumsum([0, *lengths])
    ids = [np.arange(low, high) for low, high in zip(edges, edges[1:], strict=False)]
    return InMemory(ids, [np.arange(len(tokens)) > 0 for tokens in ids])


def chats(lengths) -> InMemory:
    """Like `texts`, with targets in the second half only, so that they cannot be cut."""
    made = texts(lengths)
    return InMemory(made.ids, [np.arange(n) >= max(1, n // 2) for n in lengths])


def weighted(choices: tuple[float, ...], count: int = 18, seed: int = 0) -> InMemory:
    """Random documents of 10 to 60 tokens, each token with one of these weights. Every document has a target."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, VOCABULARY, n) for n in rng.integers(10, 61, count)]
    factors = [rng.choice(choices, len(tokens)).astype(np.float32) for tokens in ids]
    for weights in factors:
        weights[0], weights[-1] = 0, choices[-1]
    return InMemory(ids, factors)
