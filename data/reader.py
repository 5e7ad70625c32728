"""Read the sources of a run, from files through the cache or from token stores, and report examples in two sources."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.errors import UserError
from configs.config import Source
from data.cache import Cache, describe, tokenised
from data.encoding import ExampleEncoder
from data.examples import Documents, documents_of
from data.files import DEFAULT, Reading, reading_of
from data.held_out import BUT_FOR, num_shared
from data.sources import MAIN, Corpus, Windows
from data.store import Store, is_store, open_store


def with_shared_examples_reported(validation: Corpus, train: Corpus) -> Corpus:
    """Return the validation corpus, with a remark in the report of each source whose examples are also trained on."""
    return replace(validation, sources=tuple(_with_shared(part, train.sources, "the") for part in validation.sources))


def _with_shared(
    source: Documents | Windows, trained: Sequence[Documents | Windows], where: str
) -> Documents | Windows:
    """Return the source, with a remark in its report if `trained` has some of its examples. Token stores are not compared."""
    trained_keys = [part.content_keys() for part in trained if isinstance(part, Documents)]
    if not isinstance(source, Documents) or not trained_keys:
        return source
    keys = source.content_keys()
    if not (shared := num_shared(keys, np.concatenate(trained_keys))):
        return source
    remark = f"SHARED: {shared:,} of {len(keys):,} examples are also in {where} training data, {BUT_FOR}"
    return replace(source, report=f"{source.report}\n{remark}")


@dataclass(frozen=True)
class Reader:
    """Reads the sources of a run, all with the same tokenizer and sequence length."""

    encoder: ExampleEncoder  # how chats are rendered, and the tokenizer
    vocab_size: int  # number of rows of the model's embedding
    sequence_length: int
    too_long: str  # drop | truncate | error, as in `documents_of`
    cache: Cache | None = None  # None: keep tokenised examples in memory
    reading: Reading = DEFAULT  # for data.train and data.validation; its on_bad holds for all sources
    digest_of_row: Callable[[str | None], str] = lambda row: ""  # returns a digest of the code of a source's `row`

    def training(self, train: tuple[str, ...], mix: Sequence[Source], anchor_weight: float = 1.0) -> Corpus:
        """Read the main source and the mixed-in ones. anchor_weight: forgetting.anchor_weight.

        Raise UserError for a bad file and for a token id that has no row in the model's embedding.
        """
        for paths, row in ((train, self.reading.row), *((source.paths, source.row) for source in mix)):
            if row and is_store(paths[0]):  # as validation, a store may stand beside rows
                raise UserError(
                    f"row={row} cannot be used with the token store {paths[0]}, which has windows and no rows; leave it out, or "
                    "name data files in place of the store"
                )
        part = "training" if self.reading.validation_share else "all"
        sources = [self.read(train, "training", replace(self.reading, part=part))]
        for source in mix:
            read = self.read(source.paths, source.name, reading_of(source, self.reading.on_bad))
            sources.append(_with_shared(read, sources, "another source of"))
        names, shares = (MAIN, *(source.name for source in mix)), [source.share for source in mix]
        anchored = tuple(source.name for source in mix if source.anchor)
        return Corpus(tuple(sources), names, (1 - sum(shares), *shares), anchored, anchor_weight)

    def validation(
        self, validation: tuple[str, ...], mix: Sequence[Source], train: tuple[str, ...] = ()
    ) -> Corpus | None:
        """Read the validation files of all sources; None if no source has any. The shares of the corpus are unused.

        With data.validation_share, the main source's validation is the part that it holds out of `train`.
        """
        loaded, is_split = {}, self.reading.validation_share > 0
        if is_split or validation:
            of_main = replace(self.reading, part="validation") if is_split else replace(self.reading, max_samples=None)
            loaded[MAIN] = self.read(train if is_split else validation, f"validation of {MAIN}", of_main)
        for source in mix:
            if source.validation:
                reading = replace(reading_of(source, self.reading.on_bad), max_samples=None)
                loaded[source.name] = self.read(source.validation, f"validation of {source.name}", reading)
        if not loaded:
            return None
        return Corpus(tuple(loaded.values()), tuple(loaded), (1 / len(loaded),) * len(loaded))

    def read(self, paths: tuple[str, ...], label: str, reading: Reading = DEFAULT) -> Documents | Windows:
        """Read the examples of files, or the windows of a token store. label: for the progress bar.

        Raise UserError as `documents_of` does, for a bad file, and for a token id without a row in the model's embedding.
        """
        if len(paths) == 1 and is_store(paths[0]):
            if reading.part != "all":
                raise UserError(
                    f"data.validation_share cannot be used with the token store {paths[0]}; set it to 0, build a second "
                    "store of held-out texts, and name that in data.validation"
                )
            if reading.max_samples:
                raise UserError(
                    f"max_samples cannot be used with the token store {paths[0]}, which has windows and no rows; leave it out, or "
                    "build a smaller store (scripts/data.py build --max-samples)"
                )
            return self._open_store(Path(paths[0]))
        store, origin = self._open_examples(paths, label, reading)
        documents = documents_of(store, origin, paths, self.sequence_length, self.too_long, reading)
        self._check_highest(store.highest)
        return documents

    def lengths(self, train: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return the whole length in tokens of each training example, and whether it is a text: both `(examples,)`.

        Both are empty for a token store, whose windows have any length. Raise UserError for a bad file.
        """
        arrays = [(np.zeros(0, np.int64), np.zeros(0, bool))]
        if not (len(train) == 1 and is_store(train[0])):
            part = "training" if self.reading.validation_share else "all"
            store, _ = self._open_examples(train, "training", replace(self.reading, part=part))
            rows = [shard.rows("documents") for shard in store.shards]
            arrays += [(np.diff(row["ids"].astype(np.int64), prepend=0), row["is_text"] > 0) for row in rows]
        lengths, is_text = map(np.concatenate, zip(*arrays, strict=True))
        return lengths, is_text

    def _open_examples(self, paths: tuple[str, ...], label: str, reading: Reading) -> tuple[Store, str]:
        """Return the store of the examples of files, from the cache or tokenised now, and its origin in words."""
        start = time.perf_counter()

        def build(folder: Path | None) -> Store:
            from data.tokenise import build_examples  # not needed if the cache has all examples

            return build_examples(paths, self.encoder, reading, folder, label)

        if self.cache is None:
            return build(None), tokenised(start)
        described = describe(paths, self.encoder, reading, self.digest_of_row(reading.row))
        return self.cache.open(paths, described, build)

    def _open_store(self, path: Path) -> Windows:
        store = open_store(path)
        if store.info.get("entry"):
            raise UserError(f"{path} is an entry of the cache, which is no token store; name the data files")
        if store.info["tokenizer"] != self.encoder.tokenizer_digest:
            raise UserError(
                f"the token store {path} was made with a different tokenizer from the model's; run scripts/data.py build with "
                "--model set to this model"
            )
        windows = Windows(store, self.sequence_length)
        if not windows.mean_targets:
            raise UserError(
                f"no token of {path} carries loss in windows of data.sequence_length={self.sequence_length}; increase it"
            )
        self._check_highest(store.highest)
        return windows

    def _check_highest(self, token: int) -> None:
        if token >= self.vocab_size:
            raise UserError(
                f"token id {token} of the tokenizer is outside the model's embedding of {self.vocab_size} rows; use the "
                "tokenizer of the model"
            )
