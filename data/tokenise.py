"""Read the examples of data files, encode them on all cores, and write them into a store (data/store.py).

The reader makes batches of some 128k characters. Worker processes encode them: rendering chats is Python, which holds the
interpreter's lock, and the threads of the tokenizers library help one process with the rest only. Results come back in order,
so what is written does not depend on who did it. A long text is cut between lines into pieces of bounded length, where the
usual pre-tokenizers split anyway, so that its ids are those of the uncut text.
"""

import ctypes
import gc
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
from dataclasses import replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from tqdm import tqdm

from common.cores import available_cores
from common.errors import UserError
from data.encoding import LISTED, ExampleEncoder, Outcome, Span
from data.files import Reading, expand, left_out
from data.formats import Noticed, read_files
from data.held_out import content_hash, group_hash, is_held_out, key_of, num_repeated
from data.rows import Advance
from data.store import Store, StoreWriter

PIECE_CHARACTERS = 2**17  # maximum length of a piece
BATCH_CHARACTERS = 2**17
BATCH_EXAMPLES = 256
AHEAD = 3  # batches per worker that are read in advance
PARALLEL_BYTES = 2**20  # of source files: below this, starting processes takes longer than it saves
# Cut between lines, to see what the tokenizer does at the beginning of a text.
PROBE = ("The bank's own funds, Grüße.\n", "Below 97.3% the LCR (a) ends.\n", "it reports\n", "3 rows")


class Unit(NamedTuple):
    """An example, or a piece of its text."""

    file: int  # of the files that are read, counted from 0
    number: int  # of the example in its file, counted from 0
    where: str  # "FILE, line 3"
    example: dict
    begins: bool = True
    ends: bool = True


# ---- Reading --------------------------------------------------------------------------------------------------------------


def read_units(files: Sequence[Path], noticed: Noticed, advance: Advance, first: int = 0) -> Iterator[Unit]:
    """The examples of files with their numbers, from the file number `first` on. What `read_files` notices is in `noticed`."""
    counts: Counter = Counter()
    for where, example in read_files(files[first:], noticed.reading, noticed, advance):
        file = first + len(noticed.opened) - 1
        yield Unit(file, counts[file], where, example)
        counts[file] += 1


def cut(unit: Unit) -> Iterator[Unit]:
    """The pieces of a text, each of at most PIECE_CHARACTERS."""
    text, start = unit.example["text"], 0
    while len(text) - start > PIECE_CHARACTERS:
        end = _piece_end(text, start)
        yield unit._replace(example=unit.example | {"text": text[start:end]}, begins=start == 0, ends=False)
        start = end
    yield unit._replace(example=unit.example | {"text": text[start:]}, begins=start == 0)


def _piece_end(text: str, start: int) -> int:
    """End of the piece that begins at `start`, at most PIECE_CHARACTERS later.

    The cut is made between two lines that are not blank. If there is no such place, it is made between a word and a space, and
    otherwise at the maximum length.
    """
    limit = end = start + PIECE_CHARACTERS
    while (end := text.rfind("\n", start + 1, end)) > 0:
        if not text[end - 1].isspace() and not text[end + 1].isspace():
            return end + 1
    end = limit
    while (end := text.rfind(" ", start + 1, end)) > 0:
        if text[end - 1].isalnum():
            return end
    return limit


def _batches(units: Iterator[Unit]) -> Iterator[list[Unit]]:
    batch, size = [], 0
    for unit in units:
        batch.append(unit)
        size += _characters(unit.example)
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_EXAMPLES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(example: dict) -> int:
    if "messages" not in example:
        return sum(len(value) for value in example.values() if isinstance(value, str))
    return sum(len(m["content"]) if isinstance(m.get("content"), str) else 100 for m in example["messages"])


# ---- Encoding -------------------------------------------------------------------------------------------------------------


class UnitEncoder:
    """Encodes units. A copy of it is in each worker.

    The pieces of a text get the ids that the text has. A tokenizer with a mark before every text (Llama 2, Mistral) would put
    one before every piece: a piece that continues a text is encoded after a line end, whose ids are then taken away.
    """

    def __init__(self, encoder: ExampleEncoder) -> None:
        self.encoder = encoder

    def __call__(self, units: Sequence[Unit]) -> list[Outcome]:
        """The outcome of each unit; the ids of a piece are without BOS, unless it is the first, and EOS, unless the last."""
        lead = self.lead if any(not unit.begins for unit in units) else None
        return self._with_lead(units, lead or ("", len(self.encoder.bos)))

    @cached_property
    def lead(self) -> tuple[str, int] | None:
        """(text before a piece that continues a text, number of its ids and of BOS); None if pieces have other ids."""
        whole = self.encoder.encode([{"text": "".join(PROBE)}])[0].sequences[0].ids.tolist()
        units = [Unit(0, 0, "", {"text": text}, i == 0, text == PROBE[-1]) for i, text in enumerate(PROBE)]
        num_bos = len(self.encoder.bos)
        for text in ("\n", ""):
            alone = len(self.encoder.encode([{"text": text}])[0].sequences[0].ids) - 1 if text else num_bos
            if whole == [i for o in self._with_lead(units, (text, alone)) for i in o.sequences[0].ids.tolist()]:
                return text, alone
        return None

    def _with_lead(self, units: Sequence[Unit], lead: tuple[str, int]) -> list[Outcome]:
        examples = [u.example if u.begins else u.example | {"text": lead[0] + u.example["text"]} for u in units]
        outcomes = self.encoder.encode(examples)
        for i, (unit, outcome) in enumerate(zip(units, outcomes, strict=True)):
            if outcome.sequences and not (unit.begins and unit.ends):
                (whole,) = outcome.sequences
                ids = whole.ids[0 if unit.begins else lead[1] : len(whole.ids) - (not unit.ends)]
                outcomes[i] = replace(outcome, sequences=(replace(whole, ids=ids),))
        return outcomes


def encoded(units: Iterator[Unit], encoder: UnitEncoder, processes: int) -> Iterator[tuple[Unit, Outcome]]:
    """Yield (unit, its outcome) in order. With one process, or where processes cannot be forked, it is done here."""
    if processes < 2 or sys.platform != "linux":
        for batch in _batches(units):
            yield from zip(batch, encoder(batch), strict=True)
        return
    pending: deque = deque()
    with _workers(encoder, processes) as pool:
        try:
            for batch in _batches(units):
                pending.append((batch, pool.submit(_encode, batch)))
                if len(pending) >= AHEAD * processes:
                    done, future = pending.popleft()
                    yield from zip(done, future.result(), strict=True)
            for done, future in pending:
                yield from zip(done, future.result(), strict=True)
        except BrokenProcessPool as error:
            raise UserError(
                "a process that tokenises the data was killed, probably for lack of memory; free some memory and run the "
                "same command again"
            ) from error


_encoder: UnitEncoder | None = None  # of a worker


@contextmanager
def _workers(encoder: UnitEncoder, processes: int) -> Iterator[ProcessPoolExecutor]:
    """Forked workers, each with one thread: a spawned one would import transformers, which takes longer than 10 MB of text."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in the workers; with it, the library does not warn of the fork
    pool = ProcessPoolExecutor(
        processes, get_context("fork"), initializer=_start_worker, initargs=(encoder, os.getpid())
    )
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns if other threads exist. Those of numpy and torch are idle here and hold no lock.
            warnings.simplefilter("ignore", DeprecationWarning)
            pool.submit(int).result()  # starts all of them
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _start_worker(encoder: UnitEncoder, parent: int) -> None:
    global _encoder
    _encoder = encoder
    gc.freeze()  # a collection would visit, and so copy, all objects of the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent, even if that is killed
    if os.getppid() != parent:
        os._exit(1)


def _encode(units: list[Unit]) -> list[Outcome]:
    return cast(UnitEncoder, _encoder)(units)


# ---- Writing --------------------------------------------------------------------------------------------------------------


class Build:
    """Writes encoded units, and counts in `noticed` what is unusual about their examples."""

    def __init__(self, writer: StoreWriter, noticed: Noticed, with_spans: bool = True) -> None:
        self.writer, self.noticed, self.with_spans = writer, noticed, with_spans
        self.control: list[str] = []  # locations of the first examples whose content has control tokens
        self.span: Span | None = None  # of a text whose pieces are being written
        self.failed = False

    def take(self, unit: Unit, outcome: Outcome) -> None:
        """Write the sequences of an example, or a piece of its text."""
        if unit.begins:
            self.span, self.failed, self.notes = None, False, set()
        if outcome.error is not None and not self.failed:
            self.noticed.skip(f"{unit.where}: {outcome.error}")
            self.failed = True
        self._note(unit, outcome)
        for sequence in outcome.sequences:
            self.writer.add(sequence.ids)
            if unit.begins and unit.ends:
                self._end(unit, sequence.spans)
            elif unit.begins:
                self.span = sequence.spans[0]
        if unit.ends and not unit.begins and self.writer.size:
            is_whole = self.span is not None and not self.failed
            self._end(unit, [cast(Span, self.span)._replace(end=self.writer.size)] if is_whole else [])

    def _end(self, unit: Unit, spans: Sequence[Span]) -> None:
        self.writer.end_document(spans if self.with_spans else [], unit.file, unit.number, "text" in unit.example)

    def _note(self, unit: Unit, outcome: Outcome) -> None:
        new = set(outcome.notes) - self.notes  # once for all pieces of a text
        self.noticed.counts.update(f"note:{note}" for note in new)
        self.control += [unit.where] if "control" in new and len(self.control) < LISTED else []
        self.notes |= new
        if len(lengths := [len(sequence.ids) for sequence in outcome.sequences]) > 1:
            self.noticed.counts.update(split_tokens=sum(lengths), whole_tokens=max(lengths))


def build_examples(
    paths: tuple[str, ...],
    encoder: ExampleEncoder,
    reading: Reading,
    folder: Path | None,
    processes: int | None = None,
    progress: str = "",
) -> Store:
    """Encode the examples of `paths` into the empty directory `folder`, or into memory if it is None.

    `processes` and `progress` are as in `load_documents`. Raises UserError for a bad file, and for an example that cannot be
    encoded, unless reading.on_bad is skip.
    """
    files = expand(paths)
    size = sum(file.stat().st_size for file in files)
    if processes is None:
        # In memory, each rank has its own.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if folder is None else 1
        processes = max(1, available_cores() // ranks) if size >= PARALLEL_BYTES else 1
    writer = StoreWriter(folder, description(encoder))
    noticed, unit_encoder, keys = Noticed(reading), UnitEncoder(encoder), array("Q")
    build, split_by = Build(writer, noticed), reading.split_by

    def is_other_part(where: str, example: dict, content: bytes) -> bool:
        group = group_hash(example, split_by) if split_by else content
        if group is None:
            noticed.skip(
                f"{where} has no `{split_by}` beside the keys of its form, by whose value data.split_by splits"
            )
            return True
        other = is_held_out(group, reading.validation_share) != (reading.part == "validation")
        noticed.counts["other_part"] += other
        return other

    def units(advance: Advance) -> Iterator[Unit]:
        """The examples of this part, whose content is counted and hashed on the way; a long text as pieces."""
        for unit in read_units(files, noticed, advance):
            content = content_hash(unit.example)
            if reading.part != "all" and is_other_part(unit.where, unit.example, content):
                continue
            noticed.counts["examples"] += 1
            keys.append(key_of(content))
            writer.add_hash(keys[-1])
            is_long = len(unit.example.get("text", "")) > PIECE_CHARACTERS and unit_encoder.lead
            yield from cut(unit) if is_long else [unit]

    with progress_bar(f"tokenise {progress}", size, leave=False) as bar:
        try:
            for unit, outcome in encoded(units(bar.update), unit_encoder, processes):
                build.take(unit, outcome)
            info = {
                "counts": dict(noticed.counts),
                "bad": noticed.bad,
                "control": build.control,
                "repeated": num_repeated(np.array(keys, dtype=np.uint64)),
                "paths": [str(file) for file in files],
                "left_out": [str(file) for file in left_out(paths)],
                "files": len(noticed.opened),
                "forms": noticed.forms(),
                "processes": processes,
                "written": time.strftime("%Y-%m-%d"),
                "entry": folder.name.partition(".")[0] if folder else "",  # without what makes the name a temporary one
            }
            return writer.finish(info)
        finally:
            writer.close()


def description(encoder: ExampleEncoder) -> dict:
    """What every store says of its ids: their type, and the fingerprint of the tokenizer."""
    highest = max(encoder.tokenizer.get_vocab().values(), default=0)
    return {"dtype": "<u2" if highest < 2**16 else "<u4", "tokenizer": encoder.of_tokenizer}


def progress_bar(label: str, size: int, leave: bool = True) -> tqdm:
    """A progress bar. None is drawn where stderr is no terminal: an error that ends a start then begins a line."""
    return tqdm(desc=label, total=size, unit="B", unit_scale=True, mininterval=0.5, leave=leave, disable=None)
