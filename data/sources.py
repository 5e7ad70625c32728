"""Data sources: example files, a token store on disk, or several sources as one corpus.

A source is a `Documents` (data/examples.py) or a `Windows`. Both have `len`, `get(i)`, `num_tokens(i)`,
`document_lengths(i)`, `num_targets(i)`, `items_with_targets()`, `fingerprint` and `report`.
"""

import functools
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data.examples import Documents
from data.store import Store

# Number of windows whose lengths are cached: plan, deal and loop ask for the lengths of a whole step, one after the other.
LENGTHS = 2**13
MAIN = "main"  # name of the source in data.train and data.validation


@dataclass(frozen=True)
class Windows:
    """A token store as a source: windows of `sequence_length` tokens over all its documents. The last may be shorter.

    A document may begin in an earlier window or end in a later one. Then only its part in the window counts.
    """

    store: Store
    sequence_length: int

    @property
    def fingerprint(self) -> str:
        """Hash of all ids and document ends."""
        return self.store.fingerprint

    @property
    def report(self) -> str:
        """The size of the store, for the log."""
        return (
            f"token store {self.store.path}: {self.store.num_tokens:,} tokens of {self.store.num_documents:,} documents in "
            f"{len(self):,} windows of {self.sequence_length}"
        )

    @cached_property
    def mean_targets(self) -> float:
        """Mean number of target tokens per window. A target is a token whose predecessor in the document is in the window.

        It is computed without reading any window, assuming that only the first one begins with a document. Each other window
        that does has one target more.
        """
        return max(0, self.store.num_tokens - self.store.num_documents - len(self) + 1) / len(self)

    def __len__(self) -> int:
        return -(-self.store.num_tokens // self.sequence_length)

    def get(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and target flags. All tokens are targets except the first of each document part in the window."""
        ids = self.store.tokens(*self._ends(index))
        is_target = np.ones(len(ids), dtype=bool)
        is_target[np.cumsum((0, *self.document_lengths(index)[:-1]))] = False
        return ids, is_target

    def num_tokens(self, index: int) -> int:
        """Return the number of tokens in the window: `sequence_length`, except for the last. Reads no file."""
        begin, end = self._ends(index)
        return end - begin

    @cached_property
    def document_lengths(self) -> Callable[[int], tuple[int, ...]]:
        """Function from a window to the number of tokens of each document in it, computed from the document ends alone."""
        return functools.lru_cache(maxsize=LENGTHS)(self._read_lengths)

    def _read_lengths(self, index: int) -> tuple[int, ...]:
        begin, end = self._ends(index)
        cuts = [begin, *self.store.ends_between(begin, end)]
        cuts += [end] if cuts[-1] != end else []
        return tuple(after - before for before, after in itertools.pairwise(cuts))

    def items_with_targets(self) -> range:
        """Return all windows. Only a read could tell which have no target."""
        return range(len(self))

    def num_targets(self, index: int) -> int:
        """Return the exact number of target tokens in the window, computed from the document ends."""
        lengths = self.document_lengths(index)
        return sum(lengths) - len(lengths)

    def _ends(self, index: int) -> tuple[int, int]:
        """Return a window's first token and the token after its last."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} is outside a store of {len(self)} windows")
        begin = index * self.sequence_length
        return begin, min(begin + self.sequence_length, self.store.num_tokens)


@dataclass(frozen=True)
class Corpus:
    """Several sources under one global item index: item `offsets[s] + i` is item i of source s.

    Source 0 is the main one.
    shares: fraction of all target tokens that each source provides. They add up to 1.
    anchored: names of the sources that are trained by KL to the base model. anchor_weight: factor of their loss.
    """

    sources: tuple[Documents | Windows, ...]
    names: tuple[str, ...] = (MAIN,)
    shares: tuple[float, ...] = (1.0,)
    anchored: tuple[str, ...] = ()
    anchor_weight: float = 1.0

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Global index of the first item of each source, and the total number of items."""
        return tuple(int(n) for n in np.cumsum([0, *(len(source) for source in self.sources)]))

    def locate(self, item: int) -> tuple[int, int]:
        """Return (source, index within the source) of an item."""
        source = bisect_right(self.offsets, item) - 1
        return source, item - self.offsets[source]

    def __len__(self) -> int:
        return self.offsets[-1]

    def get(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (token ids int64, weights) of an item, both `(tokens,)`.

        weights: bool or float32, the factor of each token's loss; a token with 0 or False is no target.
        """
        source, index = self.locate(item)
        return self.sources[source].get(index)

    def num_tokens(self, item: int) -> int:
        """Return the number of tokens in an item."""
        source, index = self.locate(item)
        return self.sources[source].num_tokens(index)

    def document_lengths(self, item: int) -> tuple[int, ...]:
        """Return the number of tokens of each document in an item."""
        source, index = self.locate(item)
        return self.sources[source].document_lengths(index)

    def num_targets(self, item: int) -> int | float:
        """Return the sum of an item's weights: its number of target tokens, if all weights are 1."""
        source, index = self.locate(item)
        return self.sources[source].num_targets(index)

    def mixture(self) -> list | None:
        """Return [name, share, fingerprint] and, if anchored, "anchor" of each mixed-in source, for JSON; None without any.

        A run resumes only if this is unchanged, because it determines the documents of each step.
        """
        parts = zip(self.names, self.shares, self.sources, strict=True)
        flags = {name: ["anchor"] for name in self.anchored}
        return [[name, share, s.fingerprint, *flags.get(name, [])] for name, share, s in parts][1:] or None

    def lines(self, label: str, passes: Sequence[float] | None = None) -> list[str]:
        """Return lines for the log: one for each source, which begins with `label`, and an indented one for each remark.

        passes: number of passes that the run makes over each source.
        """
        lines = []
        for number, (name, share, source) in enumerate(zip(self.names, self.shares, self.sources, strict=True)):
            text = label if name == MAIN else f"{label}, {name}"
            if passes and len(self.sources) > 1:
                text += f" ({share:.1%} of the target tokens, {passes[number]:.2f} passes)"
            report, *remarks = source.report.split("\n")
            lines += [f"{text}: {report}", *(f"  {remark}" for remark in remarks)]
        return lines


def exact_sum(weights: Sequence[int | float]) -> int | float:
    """Return the sum, whatever the order: an int if all weights are ints or bools, else the correctly rounded float64."""
    return math.fsum(weights) if any(isinstance(weight, float) for weight in weights) else sum(weights)


def mean_losses(corpus: Corpus, sums: Sequence[float], targets: np.ndarray | Sequence[float]) -> dict[str, float]:
    """Return each source's mean loss per target token, by name. Sources without targets are left out.

    sums, targets: for each source the sum of its weighted losses and the sum of its weights. The losses of anchored sources are
    divided by their factor, so that they are the KL in nats.
    """
    factors = [corpus.anchor_weight if name in corpus.anchored else 1 for name in corpus.names]
    of_sources = zip(corpus.names, sums, targets, factors, strict=True)
    return {name: total / factor / count for name, total, count, factor in of_sources if count}


def as_corpus(source: Corpus | Documents | Windows) -> Corpus:
    """Wrap a single source as a corpus; return a corpus unchanged."""
    return source if isinstance(source, Corpus) else Corpus((source,))
