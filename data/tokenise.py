"""Read the examples of data files, encode them on all cores, and write them into a store (data/store.py).

The reader makes batches of some 128k characters, and worker processes encode them. Processes are needed because rendering chats
is Python code, which holds the interpreter's lock; the tokenizers library's threads would speed up the rest only. Results come
back in order, so the store does not depend on the number of workers.
"""

import ctypes
import gc
import itertools
import os
import signal
import sys
import time
import warnings
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from tqdm import tqdm

from common.cores import available_cores
from common.errors import UserError
from data.encoding import LISTED, ExampleEncoder, Outcome
from data.files import Reading, expand, left_out
from data.formats import Noticed, read_files
from data.held_out import content_hash, group_hash, is_held_out, key_of
from data.store import Store, StoreWriter

BATCH_CHARACTERS = 2**17
BATCH_EXAMPLES = 256
AHEAD = 3  # batches per worker that are read in advance
PARALLEL_BYTES = 2**20  # of source files; below this size, starting processes costs more time than it saves


class Placed(NamedTuple):
    """An example and its place in the files."""

    file: int  # counted from 0
    number: int  # of the example in its file, counted from 0
    where: str  # "FILE, line 3"
    example: dict


def read_placed(files: Sequence[Path], noticed: Noticed, first: int = 0) -> Iterator[Placed]:
    """Yield the examples of files with their places, from file number `first` on. `noticed` gets the readers' observations."""
    counts: Counter = Counter()
    for where, example in read_files(files[first:], noticed.reading, noticed):
        file = first + len(noticed.opened) - 1
        yield Placed(file, counts[file], where, example)
        counts[file] += 1


def _batches(examples: Iterator[Placed]) -> Iterator[list[Placed]]:
    batch, size = [], 0
    for placed in examples:
        batch.append(placed)
        size += _characters(placed.example)
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_EXAMPLES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(example: dict) -> int:
    if "messages" not in example:
        return sum(len(value) for value in example.values() if isinstance(value, str))
    return sum(len(m["content"]) if isinstance(m.get("content"), str) else 100 for m in example["messages"])


def encoded(
    examples: Iterator[Placed], encoder: ExampleEncoder, files: Sequence[Path], ranks: int = 1
) -> Iterator[tuple[Placed, Outcome]]:
    """Yield (example, its outcome) in order, encoded on all cores. `ranks` processes of the node do the same at once.

    If `files` are small, or processes cannot be forked, encode in this process.
    """
    processes = available_cores() // ranks if sum(file.stat().st_size for file in files) >= PARALLEL_BYTES else 1
    if processes < 2 or sys.platform != "linux":
        for batch in _batches(examples):
            yield from zip(batch, encoder.encode([placed.example for placed in batch]), strict=True)
        return
    pending: deque = deque()
    with _workers(encoder, processes) as pool:
        try:
            # The empty batch at the end waits for all others.
            for batch in itertools.chain(_batches(examples), [[]]):
                pending.append((batch, pool.submit(_encode, [placed.example for placed in batch])))
                while len(pending) >= AHEAD * processes or (pending and not batch):
                    batch_done, outcomes = pending.popleft()
                    yield from zip(batch_done, outcomes.result(), strict=True)
        except BrokenProcessPool as error:
            raise UserError(
                "a process that tokenises the data was killed, probably for lack of memory; free some memory and run the "
                "same command again"
            ) from error


_encoder: ExampleEncoder | None = None  # in a worker process


@contextmanager
def _workers(encoder: ExampleEncoder, processes: int) -> Iterator[ProcessPoolExecutor]:
    """Start forked workers of one thread each. A spawned one would import transformers, which takes longer than 10 MB of text."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # for the workers; it also avoids the library's warning of the fork
    pool = ProcessPoolExecutor(
        processes, get_context("fork"), initializer=_start_worker, initargs=(encoder, os.getpid())
    )
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of forks beside other threads. The threads of numpy and torch are idle here and hold no lock.
            warnings.simplefilter("ignore", DeprecationWarning)
            pool.submit(int).result()  # starts all workers
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _start_worker(encoder: ExampleEncoder, parent: int) -> None:
    global _encoder
    _encoder = encoder
    gc.freeze()  # a collection would visit all objects of the parent, and so copy their pages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent, even if it is killed
    if os.getppid() != parent:
        os._exit(1)


def _encode(examples: list[dict]) -> list[Outcome]:
    return cast(ExampleEncoder, _encoder).encode(examples)


def write(
    pairs: Iterator[tuple[Placed, Outcome]], writer: StoreWriter, noticed: Noticed, with_spans: bool = True
) -> None:
    """Write encoded examples to the store, and count their notes in `noticed`."""
    for placed, outcome in pairs:
        if outcome.error is not None:
            noticed.skip(f"{placed.where}: {outcome.error}")
        noticed.counts.update(f"note:{note}" for note in outcome.notes)
        noticed.control += [placed.where] if "control" in outcome.notes and len(noticed.control) < LISTED else []
        if len(lengths := [len(sequence.ids) for sequence in outcome.sequences]) > 1:
            noticed.counts.update(split_tokens=sum(lengths), whole_tokens=max(lengths))
        for sequence in outcome.sequences:
            writer.add(
                sequence.ids, sequence.spans if with_spans else (), placed.file, placed.number, "text" in placed.example
            )


def build_examples(
    paths: tuple[str, ...], encoder: ExampleEncoder, reading: Reading, folder: Path | None, progress: str
) -> Store:
    """Encode the examples of `paths` into the empty directory `folder`, or into memory if `folder` is None.

    progress: label of the progress bar on a terminal. Raise UserError for a bad file, and for an example that cannot be
    encoded, unless reading.on_bad is skip.
    """
    files = expand(paths)
    ranks = 1 if folder else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # without a folder, every rank encodes all
    writer, noticed, keys = StoreWriter(folder, description(encoder)), Noticed(reading), array("Q")

    def is_other_part(placed: Placed, content: bytes) -> bool:
        group = group_hash(placed.example, reading.split_by) if reading.split_by else content
        if group is None:
            why = f"has no value of `{reading.split_by}` beside the keys of its form, by which data.split_by splits"
            noticed.skip(f"{placed.where} {why}")
            return True
        is_other = is_held_out(group, reading.validation_share) != (reading.part == "validation")
        noticed.counts["other_part"] += is_other
        return is_other

    def examples() -> Iterator[Placed]:
        """Yield the examples of this part, and count and hash their content on the way."""
        for placed in with_bar(read_placed(files, noticed), progress):
            content = content_hash(placed.example)
            if reading.part != "all" and is_other_part(placed, content):
                continue
            noticed.counts["examples"] += 1
            keys.append(key_of(content))
            writer.add_hash(keys[-1])
            yield placed

    with writer:
        write(encoded(examples(), encoder, files, ranks), writer, noticed)
        info = {
            "counts": dict(noticed.counts),
            "bad": noticed.bad,
            "control": noticed.control,
            "repeated": len(keys) - len(np.unique(keys)),  # examples with the content of an earlier one
            "left_out": [str(file) for file in left_out(paths)],
            "files": len(noticed.opened),
            "forms": noticed.forms(),
            "written": time.strftime("%Y-%m-%d"),
            "entry": folder.name.partition(".")[0] if folder else "",  # without the end of its temporary name
        }
        return writer.finish(info)


def description(encoder: ExampleEncoder) -> dict:
    """Return the first fields of every store: the type of its ids, and the fingerprint of the tokenizer."""
    highest = max(encoder.tokenizer.get_vocab().values(), default=0)
    return {"dtype": "<u2" if highest < 2**16 else "<u4", "tokenizer": encoder.tokenizer_digest}


def with_bar(examples: Iterator[Placed], label: str) -> Iterator[Placed]:
    """Count examples on a terminal while they are read. Without a terminal nothing is printed, so that error lines stay whole."""

    return iter(tqdm(examples, f"tokenise {label}", unit=" examples", mininterval=0.5, leave=False, disable=None))
