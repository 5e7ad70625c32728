"""Which items of a corpus are made of given examples, and a plan without them: data.exclude, and `scripts/verify.py --seen`.

An example is named by the value of one of its keys that is no content, such as `id` or `bank`; by the hash of what it says
(data/held_out.py), as `--seen` prints it; or by itself, in a data file. A token store keeps no examples.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.errors import UserError
from configs.config import Data
from data.batches import StepBatch, TrainingPlan, step_batch
from data.examples import Documents
from data.files import SUFFIXES, check_files, data_suffix, expand, reading_of
from data.formats import Noticed, example_text, read_files
from data.held_out import CONTENT_KEYS, content_hash
from data.rows import text_of
from data.sources import Corpus, Windows
from data.tokenise import read_placed

SHOWN = 5


@dataclass(frozen=True)
class Wanted:
    """Examples by their hashes and ids. text: also those that contain it."""

    names: frozenset[str]
    text: str | None = None

    def names_of(self, example: dict, digest: str) -> set[str]:
        """By which of its names an example is wanted; none if it is not."""
        others = [value for key, value in example.items() if key not in CONTENT_KEYS]
        found = {digest, *(str(value) for value in others if isinstance(value, str | int))} & self.names
        is_text = self.text is not None and "input_ids" not in example and self.text in example_text(example)
        return found | ({str(self.text)} if is_text else set())


@dataclass(frozen=True)
class Found:
    """An example of a corpus. where: "FILE, line 3". items: of the corpus; none if nothing of it is trained on."""

    where: str
    digest: str
    names: set[str]
    items: tuple[int, ...]


@dataclass(frozen=True)
class Exclusion:
    """What data.exclude leaves out.

    digests: the hashes of the examples, in order. items: of the corpus. whole: the plan with all documents. lines: for the log.
    """

    digests: list[str]
    items: set[int]
    whole: TrainingPlan
    lines: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of all digests."""
        return hashlib.sha256(json.dumps(self.digests).encode()).hexdigest()

    def first_step(self, steps: int) -> int | None:
        """Of the first `steps` steps, counted from 0, the first with one of the examples. None: there is none."""
        return next((step for step in range(steps) if not self.items.isdisjoint(self.whole.items(step))), None)


def exclude(plan: TrainingPlan, corpus: Corpus, data: Data) -> tuple[TrainingPlan, Exclusion]:
    """(the plan without the examples that data.exclude names, what it leaves out). The other documents stay in their steps.

    data: with paths on this machine. Raises UserError if the file names no example of the corpus.
    """
    assert data.exclude is not None
    wanted = wanted_by(Path(data.exclude), data)
    found = find(corpus, data, wanted)
    items, what = {item for one in found for item in one.items}, f"data.exclude={data.exclude}"
    if not items:
        raise UserError(f"{what} names no example that is trained on; check its ids or hashes")
    lines = [f"{what}: {len(found):,} examples, {len(items):,} documents are not trained on"]
    lines += [f"warning: {what}: {line}" for line in not_found(wanted, found, corpus)]

    def items_of(step: int) -> list[int]:
        return [item for item in plan.items(step) if item not in items]

    @functools.lru_cache(maxsize=16)
    def batch(step: int) -> StepBatch:
        return step_batch(items_of(step), corpus)

    digests = sorted({one.digest for one in found})
    return replace(plan, batch=batch, items=items_of), Exclusion(digests, items, plan, tuple(lines))


def not_found(wanted: Wanted, found: Iterable[Found], corpus: Corpus) -> list[str]:
    """Lines about the names that are of none of the examples `found`, and about sources in which none can be found."""
    names = sorted(wanted.names.difference(*(one.names for one in found)))
    lines = [f"{len(names):,} names are of no example: {', '.join(names[:SHOWN])}"] if names else []
    stores = [name for name, source in zip(corpus.names, corpus.sources, strict=True) if isinstance(source, Windows)]
    return lines + [f"the token store of source {name} keeps no examples: it stays as it is" for name in stores]


def wanted_by(path: Path, data: Data) -> Wanted:
    """The examples that a file names: one id or hash in each line of a text file, or the examples of any data file."""
    check_files([path])
    if data_suffix(path) in SUFFIXES and data_suffix(path) != ".txt":
        reading = replace(reading_of(data, "error"), max_samples=None)
        return Wanted(frozenset(content_hash(example).hex() for _, example in read_files([path], reading)))
    return Wanted(frozenset(filter(None, map(str.strip, text_of(path).splitlines()))))


def called(name: str) -> Wanted:
    """The examples with this hash or id, or else with this text in them."""
    return Wanted(frozenset([name]), None if re.fullmatch("[0-9a-f]{32}", name) else name)


def find(corpus: Corpus, data: Data, wanted: Wanted) -> list[Found]:
    """The examples of a corpus that are wanted and their copies, in the order of its files. data: with paths on this machine.

    Examples that validation holds out are left out. Raises UserError as reading the files does.
    """
    found = list(_find(corpus, data, wanted))
    if by_other_names := {one.digest for one in found} - wanted.names:  # the same words may have another id elsewhere
        return list(_find(corpus, data, replace(wanted, names=wanted.names | by_other_names)))
    return found


def _find(corpus: Corpus, data: Data, wanted: Wanted) -> Iterator[Found]:
    readings = [(source.paths, reading_of(source, data.on_bad)) for source in data.mix]
    readings.insert(0, (data.train, reading_of(data, data.on_bad)))
    for (paths, reading), source, offset in zip(readings, corpus.sources, corpus.offsets, strict=False):
        if not isinstance(source, Documents) or source.store is None:
            continue
        rows = np.concatenate([shard.rows("documents") for shard in source.store.shards])
        keys = (rows["file"].astype(np.int64) << 40 | rows["example"].astype(np.int64))[source.examples]
        order = np.argsort(keys, kind="stable")  # of the items, by their example
        for placed in read_placed(expand(paths), Noticed(replace(reading, all_columns=True))):  # an id may be in any
            digest = content_hash(placed.example).hex()
            if names := wanted.names_of(placed.example, digest):
                key = placed.file << 40 | placed.number
                low, high = np.searchsorted(keys, [key, key + 1], sorter=order)
                items = tuple(sorted(int(offset + item) for item in order[low:high]))
                if items or not reading.validation_share:
                    yield Found(placed.where, digest, names, items)
