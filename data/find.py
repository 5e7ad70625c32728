"""Find the items of a corpus that were made from given examples, for `scripts/verify.py --seen`.

An example is named by its content hash (data/held_out.py), which `--seen` prints, or by the value of any key that is not content,
such as `id`. A data file names all of its examples. A token store keeps no examples, so none can be found in it.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from configs.config import Data
from data.examples import Documents
from data.files import SUFFIXES, check_files, data_suffix, expand, reading_of
from data.formats import Noticed, example_text, read_files
from data.held_out import CONTENT_KEYS, content_hash
from data.rows import text_of
from data.sources import Corpus, Windows
from data.tokenise import read_placed

LISTED = 5


@dataclass(frozen=True)
class Query:
    """A search for examples by hashes and ids. text: also find examples that contain it."""

    names: frozenset[str]
    text: str | None = None

    def names_of(self, example: dict, digest: str) -> set[str]:
        """Return the names in the query that fit an example with this content hash."""
        ids = [str(value) for key, value in example.items() if key not in CONTENT_KEYS and isinstance(value, str | int)]
        has_text = self.text is not None and "input_ids" not in example and self.text in example_text(example)
        return ({digest, *ids} & self.names) | ({str(self.text)} if has_text else set())


@dataclass(frozen=True)
class Match:
    """An example that a query fits. where: "FILE, line 3". items: its items in the corpus; empty if it is not trained on."""

    where: str
    digest: str
    names: set[str]
    items: tuple[int, ...]


def unmatched_names(query: Query, matches: Iterable[Match], corpus: Corpus) -> list[str]:
    """Return warnings about names in the query without a match, and about sources that keep no examples."""
    names = sorted(query.names.difference(*(match.names for match in matches)))
    lines = [f"{len(names):,} names are of no example: {', '.join(names[:LISTED])}"] if names else []
    stores = [name for name, source in zip(corpus.names, corpus.sources, strict=True) if isinstance(source, Windows)]
    return lines + [f"the token store of source {name} keeps no examples: none can be found in it" for name in stores]


def query_from_file(path: Path, data: Data) -> Query:
    """Read a query from a file: one id or hash in each line of a text file, or the examples of any data file."""
    check_files([path])
    if data_suffix(path) in SUFFIXES and data_suffix(path) != ".txt":
        reading = replace(reading_of(data, "error"), max_samples=None)
        return Query(frozenset(content_hash(example).hex() for _, example in read_files([path], reading)))
    return Query(frozenset(filter(None, map(str.strip, text_of(path).splitlines()))))


def query_by_name(name: str) -> Query:
    """Return a query for examples with this hash or id. Unless it looks like a hash, examples that contain it as text fit too."""
    return Query(frozenset([name]), None if re.fullmatch("[0-9a-f]{32}", name) else name)


def find_examples(corpus: Corpus, data: Data, query: Query) -> list[Match]:
    """Return the examples of a corpus that the query fits and their copies, in file order. data: with local paths.

    Examples that validation holds out are left out. Raise UserError as reading the files does.
    """
    matches = list(_matches(corpus, data, query))
    if digests := {match.digest for match in matches} - query.names:  # a copy with equal content may have another id
        return list(_matches(corpus, data, replace(query, names=query.names | digests)))
    return matches


def _matches(corpus: Corpus, data: Data, query: Query) -> Iterator[Match]:
    readings = [(source.paths, reading_of(source, data.on_bad)) for source in data.mix]
    readings.insert(0, (data.train, reading_of(data, data.on_bad)))
    for (paths, reading), source, offset in zip(readings, corpus.sources, corpus.offsets, strict=False):
        if not isinstance(source, Documents) or source.store is None:
            continue
        rows = np.concatenate([shard.rows("documents") for shard in source.store.shards])
        keys = (rows["file"].astype(np.int64) << 40 | rows["example"].astype(np.int64))[source.examples]
        order = np.argsort(keys, kind="stable")  # items, sorted by their example
        # Any column may be an id, so all are read.
        for placed in read_placed(expand(paths), Noticed(replace(reading, all_columns=True))):
            digest = content_hash(placed.example).hex()
            if names := query.names_of(placed.example, digest):
                key = placed.file << 40 | placed.number
                low, high = np.searchsorted(keys, [key, key + 1], sorter=order)
                items = tuple(sorted(int(offset + item) for item in order[low:high]))
                if items or not reading.validation_share:
                    yield Match(placed.where, digest, names, items)
