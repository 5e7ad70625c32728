"""Encode examples in batches, on all cores.

The reader makes jobs of some 128k characters; results come back in the order of the jobs, so what is written does not depend
on who did them. Worker processes do chats rather than threads, because rendering a chat template holds Python's lock: on two
cores that is a fifth faster. Texts on few cores are left to threads, which is a tenth faster; taking ids out of the library
holds the lock too, so on many cores processes do them. Processes are forked: a spawned process would import transformers first, which takes longer than tokenising 10 MB. A
worker uses nothing but Python, numpy and the tokenizer. Small files are encoded in this process.
"""

import gc
import itertools
import os
import signal
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from sys import platform
from typing import cast

import numpy as np

from common.errors import UserError
from data import text_pieces
from data.encoding import Encoded, ExampleEncoder, Outcome, Span, kept_parts
from data.example_store import SPAN, Sequences
from data.formats import DEFAULT, Reading
from data.text_pieces import PieceEncoder, cut_text

JOB_CHARACTERS = 2**17
JOB_EXAMPLES = 256
FEW = 4  # cores
AHEAD = 3  # jobs per worker that are read in advance
PARALLEL_BYTES = 2**20  # of source files: below this, starting processes takes longer than it saves


@dataclass(frozen=True)
class ExampleSettings:
    """What besides the files and the encoder determines the examples of a source; see configs/config.py."""

    sequence_length: int
    too_long: str = "drop"
    reading: Reading = DEFAULT
    validation_share: float = 0.0
    part: str = "all"  # all | training | validation: which examples, if validation_share holds some out


@dataclass(frozen=True)
class Job:
    """Whole examples with their locations, or pieces of long texts: (text, begins, ends, location, example)."""

    examples: list[tuple[str, dict]] = field(default_factory=list)
    pieces: list[tuple[str, bool, bool, str, dict]] = field(default_factory=list)


@dataclass
class Result:
    """What became of examples.

    counts: by reason, keys as in `data.example_report`. bad: (location, sentence) of examples that cannot be encoded.
    control: the locations of those with control tokens in their content. refused: a sentence about an example that is too long, if that is an error.
    """

    sequences: Sequences
    counts: Counter = field(default_factory=Counter)
    bad: list[tuple[str, str]] = field(default_factory=list)
    refused: str | None = None
    control: list[str] = field(default_factory=list)


class JobEncoder:
    """Encodes jobs. A copy of it is in each worker."""

    def __init__(self, encoder: ExampleEncoder, settings: ExampleSettings) -> None:
        self.encoder = encoder
        self.settings = settings
        self.pieces = PieceEncoder(encoder.encoder)

    def can_cut(self, example: dict) -> bool:
        """Whether an example is a text so long that its pieces are encoded separately."""
        return "text" in example and len(example["text"]) > text_pieces.PIECE_CHARACTERS and self.pieces.can_cut

    def __call__(self, job: Job) -> Result | list[np.ndarray]:
        """The result of whole examples, or the ids of each piece."""
        if job.pieces:
            texts, begins = [piece[0] for piece in job.pieces], [piece[1] for piece in job.pieces]
            return [np.array(ids, dtype=np.uint32) for ids in self.pieces(texts, begins)]
        outcomes = self.encoder.encode([example for _, example in job.examples])
        result = _Collector(self.settings)
        for (where, example), outcome in zip(job.examples, outcomes, strict=True):
            if outcome.error is not None:
                result.bad.append((where, outcome.error))
                continue
            result.note(outcome, where)
            for encoded in outcome.sequences:
                result.add(encoded, "text" in example, where)
        return result.finish()

    def join(self, ids: Sequence[np.ndarray], where: str, example: dict) -> Result:
        """The result of a long text from the ids of its pieces."""
        result = _Collector(self.settings)
        outcome = self.encoder.encode([example | {"text": "x"}])[0]
        try:
            if self.encoder.control_tokens_of(example):
                outcome = replace(outcome, notes=(*outcome.notes, "control"))
        except UserError as error:
            result.bad.append((where, str(error)))
            return result.finish()
        result.note(outcome, where)
        if outcome.sequences:
            # What the encoder puts before and after a short text, unless the text has it already.
            short, alone = outcome.sequences[0], self.pieces(["x"], [True])[0]
            around = short.ids.tolist()
            start = next(i for i in range(len(around)) if around[i : i + len(alone)] == alone)
            before, after = around[:start], around[start + len(alone) :]
            whole = np.concatenate(ids).astype(np.int64)
            before = before if whole[: len(before)].tolist() != before else []
            after = after if whole[len(whole) - len(after) :].tolist() != after else []
            whole = np.concatenate([np.array(before, dtype=np.int64), whole, np.array(after, dtype=np.int64)])
            spans = (Span(max(1, len(before)), len(whole), span.weight) for span in short.spans)
            result.add(Encoded(whole, tuple(spans)), True, where)
        return result.finish()


class _Collector:
    """Collects encoded sequences, applying `too_long` and leaving out what has no target."""

    def __init__(self, settings: ExampleSettings) -> None:
        self.settings = settings
        self.kept: list[Encoded] = []
        self.counts: Counter = Counter()
        self.bad: list[tuple[str, str]] = []
        self.refused: str | None = None
        self.control: list[str] = []

    def note(self, outcome: Outcome, where: str) -> None:
        """Count the notes of an example, and the tokens that its sequences have where one sequence would do."""
        self.counts.update(f"note:{note}" for note in outcome.notes)
        self.control += [where] if "control" in outcome.notes else []
        if len(lengths := [len(encoded.ids) for encoded in outcome.sequences]) > 1:
            self.counts.update(split_tokens=sum(lengths), whole_tokens=max(lengths))

    def add(self, encoded: Encoded, is_text: bool, where: str) -> None:
        """Add one sequence: what is kept of it, and why the rest is not."""
        size, too_long, length = self.settings.sequence_length, self.settings.too_long, len(encoded.ids)
        self.counts["longest"] = max(self.counts["longest"], length)
        reason = "empty"
        if length > size:
            action = "cut" if is_text else too_long
            if action == "error":
                self.refused = self.refused or (
                    f"{where} has {length} tokens, more than data.sequence_length={size}; increase it, or set "
                    "data.too_long to drop or truncate"
                )
            if action == "truncate":
                reason = "empty_truncated"
            self.counts[action] += 1
        pieces = [encoded.part(*ends) for ends in kept_parts(length, is_text, size, too_long)]
        with_targets = [piece for piece in pieces if piece.spans]
        self.counts[reason] += len(pieces) - len(with_targets)
        self.kept += with_targets

    def finish(self) -> Result:
        """The result of what was added."""
        spans = [span for encoded in self.kept for span in encoded.spans]
        sequences = Sequences(
            np.concatenate([encoded.ids for encoded in self.kept] or [np.zeros(0)]).astype(np.uint32),
            np.array([len(encoded.ids) for encoded in self.kept], dtype=np.int64),
            np.array([tuple(span) for span in spans], dtype=SPAN),
            np.array([len(encoded.spans) for encoded in self.kept], dtype=np.int64),
        )
        return Result(sequences, self.counts, self.bad, self.refused, self.control)


def make_jobs(examples: Iterable[tuple[str, dict]], can_cut: Callable[[dict], bool]) -> Iterator[Job]:
    """Group (location, example) pairs into jobs of about `JOB_CHARACTERS` characters, in order."""
    job, size = Job(), 0
    for where, example in examples:
        is_cut = can_cut(example)
        if is_cut and job.examples or not is_cut and job.pieces:
            yield job
            job, size = Job(), 0
        if is_cut:
            begins = True
            for text, ends in cut_text([example["text"]]):
                job.pieces.append((text, begins, ends, where, {k: v for k, v in example.items() if k != "text"}))
                begins, size = False, size + len(text)
                if size >= JOB_CHARACTERS:
                    yield job
                    job, size = Job(), 0
        else:
            job.examples.append((where, example))
            size += _characters(example)
        if size >= JOB_CHARACTERS or len(job.examples) >= JOB_EXAMPLES:
            yield job
            job, size = Job(), 0
    if job.examples or job.pieces:
        yield job


def encode_jobs(
    jobs: Iterator[Job], encoder: JobEncoder, processes: int
) -> Iterator[tuple[Job, Result | list[np.ndarray]]]:
    """Yield (job, its result) in order. With one process, or where processes cannot be forked, it is done here."""
    if processes < 2 or platform != "linux":
        yield from ((job, encoder(job)) for job in jobs)
        return
    first = next(jobs, None)
    jobs = itertools.chain([] if first is None else [first], jobs)
    if first and processes <= FEW and not any("messages" in example for _, example in first.examples):
        with ThreadPoolExecutor(processes) as pool:
            yield from _in_order(jobs, lambda job: pool.submit(encoder, job), AHEAD * processes)
        return
    with _workers(encoder, processes) as pool:
        try:
            yield from _in_order(jobs, lambda job: pool.submit(_encode, job), AHEAD * processes)
        except BrokenProcessPool as error:
            raise UserError(
                "a process that tokenises the data was killed, probably for lack of memory; free some memory and run the "
                "same command again"
            ) from error


def _in_order(
    jobs: Iterator[Job], submit: Callable[[Job], Future], ahead: int
) -> Iterator[tuple[Job, Result | list[np.ndarray]]]:
    """Yield (job, its result) in order, while up to `ahead` jobs are being done."""
    pending: deque[tuple[Job, Future]] = deque()
    try:
        for job in jobs:
            pending.append((job, submit(job)))
            if len(pending) >= ahead:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    finally:
        for _, future in pending:
            future.cancel()


def _characters(example: dict) -> int:
    if "messages" not in example:
        return sum(len(value) for value in example.values() if isinstance(value, str))
    return sum(len(m["content"]) if isinstance(m.get("content"), str) else 100 for m in example["messages"])


_encoder: JobEncoder | None = None  # of a worker


@contextmanager
def _workers(encoder: JobEncoder, processes: int) -> Iterator[ProcessPoolExecutor]:
    """Forked workers, each with one thread. They end with this process, even if it is killed."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"  # read by the tokenizers library in the child; with it, it does not warn of the fork
    try:
        initial = (encoder, os.getpid())
        pool = ProcessPoolExecutor(processes, get_context("fork"), initializer=_start_worker, initargs=initial)
        try:
            with warnings.catch_warnings():
                # Python 3.12 warns if other threads exist. Those of numpy and torch are idle here and hold no lock.
                warnings.simplefilter("ignore", DeprecationWarning)
                pool.submit(int).result()  # starts all of them
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _start_worker(encoder: JobEncoder, parent: int) -> None:
    global _encoder
    _encoder = encoder
    gc.freeze()  # a collection would visit, and so copy, all objects of the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode(job: Job) -> Result | list[np.ndarray]:
    return cast(JobEncoder, _encoder)(job)
