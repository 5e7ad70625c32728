"""Data sources: example files in memory, a token store on disk, or several of these as one corpus.

A source is a `Documents` (data/examples.py) or a `Windows`. Both have `len`, `get(i)`, `num_tokens(i)`,
`document_lengths(i)`, `num_targets(i)`, `items_with_targets()`, `fingerprint` and `report`.
"""

import functools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.examples import Documents
from data.store import WindowStore

MAIN = "main"  # name of the source given by data.train and data.validation


@dataclass(frozen=True)
class Windows:
    """A token store as a source. Item i is its i-th window of `sequence_length` tokens."""

    store: WindowStore
    fingerprint: str
    report: str
    mean_targets: float  # target tokens per window, on average; known without reading any window

    def __len__(self) -> int:
        return len(self.store)

    def get(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and target flags. All tokens are targets except the first of each document part in the window."""
        ids, lengths = self.store.window(index)
        is_target = np.ones(len(ids), dtype=bool)
        is_target[np.cumsum((0, *lengths[:-1]))] = False
        return ids, is_target

    def num_tokens(self, index: int) -> int:
        """Number of tokens in the window. Unlike `document_lengths`, it reads no file."""
        return self.store.window_length(index)

    def document_lengths(self, index: int) -> tuple[int, ...]:
        """Number of tokens of each document that are in the window."""
        return self.store.document_lengths(index)

    def items_with_targets(self) -> range:
        """All windows. Windows without a target could only be found by reading them."""
        return range(len(self))

    def num_targets(self, index: int) -> int:
        """Exact number of target tokens in the window, computed from the document offsets."""
        lengths = self.document_lengths(index)
        return sum(lengths) - len(lengths)


@dataclass(frozen=True)
class Corpus:
    """Several sources under one global item index: item `offsets[s] + i` is item i of source s.

    Source 0 is the main one.
    shares: fraction of all target tokens that each source provides. They add up to 1.
    """

    sources: tuple[Documents | Windows, ...]
    names: tuple[str, ...] = (MAIN,)
    shares: tuple[float, ...] = (1.0,)

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """Global index of the first item of each source, and the total number of items."""
        return tuple(int(n) for n in np.cumsum([0, *(len(source) for source in self.sources)]))

    def locate(self, item: int) -> tuple[int, int]:
        """(source, index within the source) of an item."""
        source = bisect_right(self.offsets, item) - 1
        return source, item - self.offsets[source]

    def __len__(self) -> int:
        return self.offsets[-1]

    def get(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """(token ids int64, weights) of an item, both `(tokens,)`.

        weights: bool or float32, the factor of each token's loss; 0 or False is no target.
        """
        source, index = self.locate(item)
        return self.sources[source].get(index)

    def num_tokens(self, item: int) -> int:
        """Number of tokens in an item."""
        source, index = self.locate(item)
        return self.sources[source].num_tokens(index)

    def document_lengths(self, item: int) -> tuple[int, ...]:
        """Number of tokens of each document in an item."""
        source, index = self.locate(item)
        return self.sources[source].document_lengths(index)

    def num_targets(self, item: int) -> int | float:
        """Sum of the weights of an item: its number of target tokens, if all of them have weight 1."""
        source, index = self.locate(item)
        return self.sources[source].num_targets(index)

    def mixture(self) -> list | None:
        """[name, share, fingerprint] of each mixed-in source, for JSON; None if there are none.

        A run resumes only if this is unchanged, because it determines which documents each step takes.
        """
        parts = zip(self.names, self.shares, self.sources, strict=True)
        return [[name, share, source.fingerprint] for name, share, source in parts][1:] or None

    def lines(self, what: str, passes: Sequence[float] | None = None) -> list[str]:
        """What is to be logged about each source: a line, and an indented one for each remark. `passes` is the number of passes that the run makes over each source."""
        lines = []
        for number, (name, share, source) in enumerate(zip(self.names, self.shares, self.sources, strict=True)):
            text = what if name == MAIN else f"{what}, {name}"
            if passes and len(self.sources) > 1:
                text += f" ({share:.1%} of the target tokens, {passes[number]:.2f} passes)"
            report, *remarks = source.report.split("\n")
            lines += [f"{text}: {report}", *(f"  {remark}" for remark in remarks)]
        return lines


def exact_sum(weights: Sequence[int | float]) -> int | float:
    """The sum, whatever the order: an int if all weights are ints or bools, else the correctly rounded float64."""
    return math.fsum(weights) if any(isinstance(weight, float) for weight in weights) else sum(weights)


def mean_losses(corpus: Corpus, sums: Sequence[float], targets: np.ndarray | Sequence[float]) -> dict[str, float]:
    """Map each source name to its mean loss per target token. Sources without targets are left out.

    `sums` and `targets` are, for each source, the sum of its weighted losses and the sum of its weights.
    """
    return {name: total / count for name, total, count in zip(corpus.names, sums, targets, strict=True) if count}


def as_corpus(source: Corpus | Documents | Windows) -> Corpus:
    """Wrap a single source as a corpus; return a corpus unchanged."""
    return source if isinstance(source, Corpus) else Corpus((source,))
