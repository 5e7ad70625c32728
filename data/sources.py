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
CONTEXT = 64  # tokens before a part of a text that are read with it
_MOST_TOKENS = 2**32  # more than any item has; the index of a part (Corpus.part) is a Python int of any size


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

    Source 0 is the main one. An index of `len(corpus)` or more is a part of an item (`part`); an evaluation has none.
    shares: fraction of the target tokens of every step that each source provides. They add up to 1.
    """

    sources: tuple[Documents | Windows, ...]
    names: tuple[str, ...] = (MAIN,)
    shares: tuple[float, ...] = (1.0,)

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """Global index of the first item of each source, and the total number of items."""
        return tuple(int(n) for n in np.cumsum([0, *(len(source) for source in self.sources)]))

    def part(self, item: int, first: int, end: int) -> int:
        """The index of the targets after token `first`, up to token `end` (exclusive), of an item as an item of its own.

        It begins up to `CONTEXT` tokens of the same document earlier: these are read, but are no targets.
        """
        ends = np.cumsum(self.document_lengths(item))
        document = int(np.searchsorted(ends, first, side="right"))
        begin = max(first - CONTEXT, 0 if document == 0 else int(ends[document - 1]))
        index = item
        for number in (begin, first, end):
            index = index * _MOST_TOKENS + number
        return len(self) + index

    def _whole(self, item: int) -> tuple[int, slice, int]:
        """(item, the tokens taken of it, the first of them that may be a target) of an index, which may be that of a part."""
        if item < len(self):
            return item, slice(None), 0
        rest, end = divmod(item - len(self), _MOST_TOKENS)
        rest, first = divmod(rest, _MOST_TOKENS)
        rest, begin = divmod(rest, _MOST_TOKENS)
        return rest, slice(begin, end), first + 1

    def locate(self, item: int) -> tuple[int, int]:
        """(source, index within the source) of an item."""
        item = self._whole(item)[0]
        source = bisect_right(self.offsets, item) - 1
        return source, item - self.offsets[source]

    def __len__(self) -> int:
        """Number of items, not counting parts."""
        return self.offsets[-1]

    def get(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """(token ids int64, weights) of an item, both `(tokens,)`.

        weights: bool or float32, the factor of each token's loss; 0 or False is no target.
        """
        source, index = self.locate(item)
        ids, weights = self.sources[source].get(index)
        _, taken, first = self._whole(item)
        if taken.start is None:
            return ids, weights
        weights = weights[taken].copy()
        weights[: first - taken.start] = 0
        return ids[taken], weights

    def num_tokens(self, item: int) -> int:
        """Number of tokens in an item."""
        _, taken, _ = self._whole(item)
        if taken.start is not None:
            return taken.stop - taken.start
        source, index = self.locate(item)
        return self.sources[source].num_tokens(index)

    def document_lengths(self, item: int) -> tuple[int, ...]:
        """Number of tokens of each document in an item."""
        source, index = self.locate(item)
        lengths = self.sources[source].document_lengths(index)
        _, taken, _ = self._whole(item)
        if taken.start is None:
            return lengths
        edges = np.unique(np.clip(np.cumsum([0, *lengths]), taken.start, taken.stop))
        return tuple(np.diff(edges).tolist())

    def num_targets(self, item: int) -> int | float:
        """Sum of the weights of an item: its number of target tokens, if all of them have weight 1."""
        source, index = self.locate(item)
        if item < len(self):
            return self.sources[source].num_targets(index)
        return exact_sum(self.get(item)[1].tolist())

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
