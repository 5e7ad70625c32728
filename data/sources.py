"""Data sources: example files in memory, a token store on disk, or several of these as one corpus.

A source is a `Documents` (data/examples.py) or a `Windows`. Both have `len`, `get(i)`, `num_tokens(i)`,
`document_lengths(i)`, `num_targets(i)`, `items_with_targets()`, `fingerprint` and `report`.
"""

import dataclasses
import functools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from configs.config import Source
from data.encoding import ExampleEncoder
from data.examples import Documents, load_documents
from data.formats import DEFAULT, Reading
from data.held_out import num_shared
from data.parallel_encoding import ExampleSettings
from data.token_store import TokenStore, is_store, open_store, tokenizer_fingerprint

MAIN = "main"  # name of the source given by data.train and data.validation
CONTEXT = 64  # tokens before a part of a text that are read with it
_MOST_TOKENS = 2**32  # more than any item has; the index of a part (Corpus.part) is a Python int of any size


@dataclass(frozen=True)
class Windows:
    """A token store as a source. Item i is its i-th window of `sequence_length` tokens."""

    store: TokenStore
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


def with_shared_examples_reported(validation: Corpus, train: Corpus) -> Corpus:
    """The validation corpus, with a warning in the report of each source whose examples are also trained on."""
    sources = tuple(_with_shared_reported(source, train.sources, "the") for source in validation.sources)
    return dataclasses.replace(validation, sources=sources)


def _with_shared_reported(
    source: Documents | Windows, trained: Sequence[Documents | Windows], where: str
) -> Documents | Windows:
    """The source, with a warning in its report if some of its examples are in `trained`. Token stores are not compared."""
    keys = [other.content_keys() for other in trained if isinstance(other, Documents)]
    if not isinstance(source, Documents) or not keys:
        return source
    shared = num_shared(source.content_keys(), np.concatenate(keys))
    warning = f"\nWARNING: {shared:,} of its examples are also in {where} training data" if shared else ""
    return dataclasses.replace(source, report=source.report + warning)


def as_corpus(source: Corpus | Documents | Windows) -> Corpus:
    """Wrap a single source as a corpus; return a corpus unchanged."""
    return source if isinstance(source, Corpus) else Corpus((source,))


@dataclass(frozen=True)
class Reader:
    """Reads the sources of a run, all with the same tokenizer and sequence length."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int  # number of rows of the model's embedding
    sequence_length: int
    too_long: str  # drop | truncate | error, as in load_documents
    show_progress: bool = False  # a bar on the process that tokenises
    encoder: ExampleEncoder | None = None  # how chats are rendered; None: as the tokenizer's template says
    cache: str | None = None  # directory of tokenised files, as in load_documents
    reading: Reading = DEFAULT  # of data.train and data.validation; its on_bad holds for all sources
    validation_share: float = 0.0
    say: Callable[[str], None] = lambda text: None  # prints a line about waiting

    def training(self, train: tuple[str, ...], mix: Sequence[Source]) -> Corpus:
        """The main source followed by the mixed-in ones.

        Raises UserError for a bad file and for a token id that has no row in the model's embedding.
        """
        part = "training" if self.validation_share else "all"
        main = self._load(train, "training", self.reading, part)
        others = [self._load(source.paths, source.name, self._reading(source)) for source in mix]
        others = [
            _with_shared_reported(source, [main, *others[:i]], "another source of") for i, source in enumerate(others)
        ]
        shares = [s.share for s in mix]
        return Corpus((main, *others), (MAIN, *(s.name for s in mix)), (1 - sum(shares), *shares))

    def validation(
        self, validation: tuple[str, ...], mix: Sequence[Source], train: tuple[str, ...] = ()
    ) -> Corpus | None:
        """The validation files of all sources that have some, or None if no source has any. The shares are unused.

        With a `validation_share`, those of the main source are the examples that it holds out of `train`.
        """
        loaded = {}
        if self.validation_share:
            loaded[MAIN] = self._load(train, f"validation of {MAIN}", self.reading, "validation")
        elif validation:
            loaded[MAIN] = self._load(validation, f"validation of {MAIN}", self.reading)
        for source in mix:
            if source.validation:
                what = f"validation of {source.name}"
                loaded[source.name] = self._load(source.validation, what, self._reading(source))
        if not loaded:
            return None
        return Corpus(tuple(loaded.values()), tuple(loaded), (1 / len(loaded),) * len(loaded))

    def source(self, paths: tuple[str, ...], what: str) -> Documents | Windows:
        """A single source besides those of training, whole and of any form. `what` is its name in messages."""
        return self._load(paths, what, Reading(on_bad=self.reading.on_bad))

    def _reading(self, source: Source) -> Reading:
        return Reading(source.format, source.fields, self.reading.on_bad)

    def _load(self, paths: tuple[str, ...], what: str, reading: Reading, part: str = "all") -> Documents | Windows:
        stores = [path for path in paths if is_store(path)]
        if stores and len(paths) > 1:
            raise UserError(
                f"{stores[0]} is a directory among other files of {what}; a token store must be the only path of its "
                "source, so add it to data.mix as a separate source"
            )
        if stores and part != "all":
            raise UserError(
                f"data.validation_share cannot be used with the token store {stores[0]}; build a second store of held-out "
                "texts and name it in data.validation"
            )
        if stores:
            return self._open_store(Path(stores[0]))
        settings = ExampleSettings(self.sequence_length, self.too_long, reading, self.validation_share, part)
        documents = load_documents(
            paths,
            self.tokenizer,
            self.sequence_length,
            self.too_long,
            encoder=self.encoder,
            settings=settings,
            cache=self.cache,
            progress=what if self.show_progress else None,
            say=self.say,
        )
        self._check_highest(documents.highest_token())
        return documents

    def _open_store(self, path: Path) -> Windows:
        store = open_store(path, tokenizer_fingerprint(self.tokenizer), self.sequence_length)
        if not store.mean_targets:
            raise UserError(
                f"no token of {path} carries loss in windows of data.sequence_length={self.sequence_length}; increase it"
            )
        self._check_highest(len(self.tokenizer) - 1)  # checking every token of the store would take too long
        report = (
            f"token store {path}: {store.num_tokens:,} tokens of {store.num_documents:,} documents in {len(store):,} "
            f"windows of {self.sequence_length}"
        )
        return Windows(store, store.fingerprint, report, store.mean_targets)

    def _check_highest(self, token: int) -> None:
        if token >= self.vocab_size:
            raise UserError(
                f"token id {token} of the tokenizer is outside the model's embedding of {self.vocab_size} rows; use the "
                "tokenizer of the model"
            )
