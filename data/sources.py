"""Where examples come from: example files in memory, or a token store on disk; several of them side by side.

A source is anything with `len`, `get(i)`, `document_lengths(i)`, `num_targets(i)`, `fingerprint` and `report`: `Documents`
(data/examples.py) or `Windows`.
"""

import functools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from data.examples import Documents, load_documents
from data.token_store import TokenStore, open_store, tokenizer_fingerprint

MAIN = "main"  # the name of the source that data.train and data.validation are


@dataclass(frozen=True)
class Windows:
    """A token store as a source: item i is its i-th window of `sequence_length` tokens."""

    store: TokenStore
    fingerprint: str
    report: str
    mean_targets: float  # targets of a window, on average over all of them, known without reading any

    def __len__(self) -> int:
        return len(self.store)

    def get(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and target flags: all but the first token of each document, or of what the window holds of it."""
        ids, lengths = self.store.window(index)
        is_target = np.ones(len(ids), dtype=bool)
        is_target[np.cumsum((0, *lengths[:-1]))] = False
        return ids, is_target

    def document_lengths(self, index: int) -> tuple[int, ...]:
        """Tokens of each document in the window, or of what it holds of them."""
        return self.store.document_lengths(index)

    def items_with_targets(self) -> range:
        """All windows: which of them have no target is not known without reading them."""
        return range(len(self))

    def num_targets(self, index: int) -> int:
        """Exactly, from the store's document offsets."""
        lengths = self.document_lengths(index)
        return sum(lengths) - len(lengths)


@dataclass(frozen=True)
class Corpus:
    """Sources numbered through: item `offsets[s] + i` is item i of source s. The first is the main one.

    shares: of the target tokens of every step, one for each source; together 1.
    """

    sources: tuple[Documents | Windows, ...]
    names: tuple[str, ...] = (MAIN,)
    shares: tuple[float, ...] = (1.0,)

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each source begins, and the end."""
        return tuple(int(n) for n in np.cumsum([0, *(len(source) for source in self.sources)]))

    def locate(self, item: int) -> tuple[int, int]:
        """(source, index in it) of an item."""
        source = bisect_right(self.offsets, item) - 1
        return source, item - self.offsets[source]

    def __len__(self) -> int:
        return self.offsets[-1]

    def get(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and target flags of an item."""
        source, index = self.locate(item)
        return self.sources[source].get(index)

    def document_lengths(self, item: int) -> tuple[int, ...]:
        """Tokens of each document in an item."""
        source, index = self.locate(item)
        return self.sources[source].document_lengths(index)

    def num_targets(self, item: int) -> int:
        """Tokens of an item that carry loss."""
        source, index = self.locate(item)
        return self.sources[source].num_targets(index)

    def mixture(self) -> list | None:
        """What is mixed in, as JSON: two runs that agree in it take the same documents in every step. None: nothing is."""
        parts = zip(self.names, self.shares, self.sources, strict=True)
        return [[name, share, source.fingerprint] for name, share, source in parts][1:] or None

    def lines(self, what: str, passes: Sequence[float] | None = None) -> list[str]:
        """What each source holds, for the run's log. passes: how often the run goes through it."""
        lines = []
        for number, (name, share, source) in enumerate(zip(self.names, self.shares, self.sources, strict=True)):
            text = what if name == MAIN else f"{what}, {name}"
            if passes and len(self.sources) > 1:
                text += f" ({share:.1%} of the target tokens, {passes[number]:.2f} passes)"
            lines.append(f"{text}: {source.report}")
        return lines


def mean_losses(corpus: Corpus, sums: Sequence[float], targets: Sequence[int]) -> dict[str, float]:
    """Source name -> mean loss per target token, for the sources that had any. `sums` and `targets` are by source."""
    return {name: total / count for name, total, count in zip(corpus.names, sums, targets, strict=True) if count}


def corpus_of(source: Corpus | Documents | Windows) -> Corpus:
    """A source by itself as a corpus."""
    return source if isinstance(source, Corpus) else Corpus((source,))


class SourceFiles(Protocol):
    """What is read of configs.config.Source."""

    name: str
    share: float
    paths: tuple[str, ...]
    validation: tuple[str, ...]


@dataclass(frozen=True)
class Reader:
    """How all sources of a run are read."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int  # rows of the model's embedding
    sequence_length: int
    too_long: str
    show_progress: bool = False

    def training(self, train: tuple[str, ...], mix: Sequence[SourceFiles]) -> Corpus:
        """The main source, then those mixed in. Raises UserError for a bad file or a token id the model has no row for."""
        sources = [self._load(train, "training"), *(self._load(s.paths, s.name) for s in mix)]
        shares = [s.share for s in mix]
        return Corpus(tuple(sources), (MAIN, *(s.name for s in mix)), (1 - sum(shares), *shares))

    def validation(self, validation: tuple[str, ...], mix: Sequence[SourceFiles]) -> Corpus | None:
        """The validation files of all sources that have some; None where none has. Their shares mean nothing."""
        named = {MAIN: validation} | {s.name: s.validation for s in mix}
        named = {name: paths for name, paths in named.items() if paths}
        if not named:
            return None
        sources = tuple(self._load(paths, f"validation of {name}") for name, paths in named.items())
        return Corpus(sources, tuple(named), (1 / len(sources),) * len(sources))

    def _load(self, paths: tuple[str, ...], what: str) -> Documents | Windows:
        folders = [path for path in paths if Path(path).is_dir()]
        if folders and len(paths) > 1:
            raise UserError(
                f"{folders[0]} is a folder among other files of {what}: a token store is a source of its own, in data.mix"
            )
        if folders:
            return self._open_store(Path(folders[0]))
        bar = functools.partial(tqdm, desc=f"tokenise {what}", unit="example", leave=False)
        progress = bar if self.show_progress else None
        documents = load_documents(paths, self.tokenizer, self.sequence_length, self.too_long, progress)
        self._check_highest(max(int(ids.max()) for ids in documents.ids))
        return documents

    def _open_store(self, path: Path) -> Windows:
        store = open_store(path, tokenizer_fingerprint(self.tokenizer), self.sequence_length)
        if not store.mean_targets:
            raise UserError(
                f"no token of {path} carries loss in windows of data.sequence_length={self.sequence_length}"
            )
        self._check_highest(len(self.tokenizer) - 1)  # looking at every token would take as long as training
        report = (
            f"token store {path}: {store.num_tokens:,} tokens of {store.num_documents:,} documents in {len(store):,} "
            f"windows of {self.sequence_length}"
        )
        return Windows(store, store.fingerprint, report, store.mean_targets)

    def _check_highest(self, token: int) -> None:
        if token >= self.vocab_size:
            raise UserError(f"token id {token} of the tokenizer is outside the model's {self.vocab_size} rows")
