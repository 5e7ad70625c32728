"""Read the examples of data files, encode them on all cores, and write them into a store (data/store.py).

The reader makes batches of some 128k characters. Worker processes encode them: rendering chats is Python, which holds the
interpreter's lock, and the threads of the tokenizers library help one process with the rest only. Results come back in order,
so what is written does not depend on who did it. A long text is cut between lines into pieces of bounded length, where the
usual pre-tokenizers split anyway, so that its ids are those of the uncut text.
"""

import codecs
import ctypes
import gc
import hashlib
import operator
import os
import signal
import sys
import time
import warnings
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from common.cores import available_cores
from common.durable_files import temporary_path
from common.errors import UserError
from common.node_lock import LOCK_FILE, node_lock
from data.compression import Advance, data_suffix, no_progress, read_chunks
from data.encoding import LISTED, ExampleEncoder, Outcome, Span
from data.files import check_files, describe_files, expand, left_out, read_file
from data.formats import DEFAULT, Reading, kind_of
from data.held_out import content_hash, group_hash, is_held_out, key_of, num_repeated
from data.store import SHARD_TOKENS, STORE_FILE, Store, StoreWriter, is_store, open_store, read_info
from data.tokens import load_tokenizer

PIECE_CHARACTERS = 2**17  # maximum length of a piece
BATCH_CHARACTERS = 2**17
BATCH_EXAMPLES = 256
AHEAD = 3  # batches per worker that are read in advance
PARALLEL_BYTES = 2**20  # of source files: below this, starting processes takes longer than it saves
LOCK = "0" * 32  # of a token store that is being built (common/node_lock.py)
# Cut between lines, to see what the tokenizer does at the beginning of a text.
PROBE = ("The bank's own funds, Grüße.\n", "Below 97.3% the LCR (a) ends.\n", "it reports\n", "3 rows")


@dataclass(frozen=True)
class ExampleSettings:
    """What besides the files and the encoder determines the examples of a source; see configs/config.py."""

    sequence_length: int
    too_long: str = "drop"
    reading: Reading = DEFAULT
    validation_share: float = 0.0
    part: str = "all"  # all | training | validation: which examples, if validation_share holds some out


class Unit(NamedTuple):
    """An example, or a piece of its text."""

    file: int  # of the files that are read, counted from 0
    number: int  # of the example in its file, counted from 0
    where: str  # "FILE, line 3"
    example: dict
    begins: bool = True
    ends: bool = True


# ---- Reading --------------------------------------------------------------------------------------------------------------


def cut_text(parts: Iterable[str]) -> Iterator[tuple[str, bool, bool]]:
    """Cut a text, given in parts, into pieces of at most PIECE_CHARACTERS. Yields (piece, is_first, is_last)."""
    rest, first = "", True
    for part in parts:
        rest, start = rest + part, 0
        while len(rest) - start > PIECE_CHARACTERS:
            end = _piece_end(rest, start)
            yield rest[start:end], first, False
            start, first = end, False
        rest = rest[start:]
    yield rest, first, True


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


def _text_file(path: Path, advance: Advance) -> Iterator[str]:
    """A .txt file, which is one document, in parts that do not stay in memory. Line ends become `\\n`."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    held, blank = "", True  # a \r at the end of a chunk, because the next one may begin with \n
    try:
        for chunk in read_chunks(path, advance):
            text = held + decoder.decode(chunk)
            held = "\r" if text.endswith("\r") else ""
            blank = blank and not text.strip()
            yield text.removesuffix("\r").replace("\r\n", "\n")
        yield held + decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}") from error
    if blank:
        raise UserError(f"{path} contains no text")


def _documents(files: Sequence[Path], after: tuple[int, int], advance: Advance) -> Iterator[Unit]:
    """The texts of all files in order, beginning with example `after` = (file, example). Raises UserError for a chat."""
    for number, path in enumerate(files):
        is_text_file = data_suffix(path) == ".txt"
        if number < after[0] or (is_text_file and (number, 1) <= after):
            advance(path.stat().st_size)
        elif is_text_file:
            pieces = cut_text(_text_file(path, advance))
            yield from (Unit(number, 0, str(path), {"text": text}, begins, ends) for text, begins, ends in pieces)
        else:
            for count, (where, example) in enumerate(read_file(path, advance)):
                if "text" not in example:
                    raise UserError(
                        f"{where} is {kind_of(example)}, but a token store takes only documents with `text`; put such files "
                        "into data.train directly"
                    )
                if (number, count) >= after:  # what comes before is read again but not tokenised again
                    yield from _cut(Unit(number, count, where, example))


def _cut(unit: Unit) -> Iterator[Unit]:
    """The units of a text's pieces."""
    for text, begins, ends in cut_text([unit.example["text"]]):
        yield unit._replace(example=unit.example | {"text": text}, begins=begins, ends=ends)


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


def _encoded(units: Iterator[Unit], encoder: UnitEncoder, processes: int) -> Iterator[tuple[Unit, Outcome]]:
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


class _Build:
    """Writes encoded units, and counts what is unusual about their examples."""

    def __init__(self, writer: StoreWriter, on_bad: str, with_spans: bool = True) -> None:
        self.writer, self.on_bad, self.with_spans = writer, on_bad, with_spans
        self.counts: Counter = Counter()
        self.bad: list[str] = []  # sentences about the first examples that are skipped
        self.control: list[str] = []  # locations of the first examples whose content has control tokens
        self.span: Span | None = None  # of a text whose pieces are being written
        self.failed = False

    def skip(self, sentence: str) -> None:
        """Count an example that is malformed, or raise UserError about it."""
        if self.on_bad == "error":
            raise UserError(sentence)
        self.counts["skipped"] += 1
        self.bad += [sentence] if len(self.bad) < LISTED else []

    def left(self) -> None:
        """Count a row that data.row leaves out."""
        self.counts["left"] += 1

    def take(self, unit: Unit, outcome: Outcome) -> None:
        """Write the sequences of an example, or a piece of its text."""
        if unit.begins:
            self.span, self.failed, self.notes = None, False, set()
        if outcome.error is not None and not self.failed:
            self.skip(f"{unit.where}: {outcome.error}")
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
        self.counts.update(f"note:{note}" for note in new)
        self.control += [unit.where] if "control" in new and len(self.control) < LISTED else []
        self.notes |= new
        if len(lengths := [len(sequence.ids) for sequence in outcome.sequences]) > 1:
            self.counts.update(split_tokens=sum(lengths), whole_tokens=max(lengths))


def build_examples(
    paths: tuple[str, ...],
    encoder: ExampleEncoder,
    settings: ExampleSettings,
    folder: Path | None,
    processes: int | None = None,
    progress: str | None = None,
) -> Store:
    """Encode the examples of `paths` into the empty directory `folder`, or into memory if it is None.

    `processes` and `progress` are as in `load_documents`. Raises UserError for a bad file, and for an example that cannot be
    encoded, unless settings.reading.on_bad is skip.
    """
    files = expand(paths)
    size = sum(file.stat().st_size for file in files)
    if processes is None:
        # In memory, each rank has its own.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if folder is None else 1
        processes = max(1, available_cores() // ranks) if size >= PARALLEL_BYTES else 1
    writer = StoreWriter(folder, _description(encoder))
    build, unit_encoder, keys = _Build(writer, settings.reading.on_bad), UnitEncoder(encoder), array("Q")

    reading, opened = settings.reading, []
    rest = iter(range(reading.max_samples or sys.maxsize))  # an item for each row that may still be read

    def is_other_part(where: str, example: dict, content: bytes) -> bool:
        group = group_hash(example, reading.split_by) if reading.split_by else content
        if group is None:
            build.skip(
                f"{where} has no `{reading.split_by}` beside the keys of its form, by whose value data.split_by splits"
            )
            return True
        other = is_held_out(group, settings.validation_share) != (settings.part == "validation")
        build.counts["other_part"] += other
        return other

    def units(advance: Advance) -> Iterator[Unit]:
        """The examples of this part, whose content is counted and hashed on the way; a long text as pieces."""
        for number, path in enumerate(files):
            opened.append(path)
            found = read_file(path, advance, reading, build.skip, build.left, rest)
            for count, (where, example) in enumerate(found):
                content = content_hash(example)
                if settings.part != "all" and is_other_part(where, example, content):
                    continue
                build.counts["examples"] += 1
                keys.append(key_of(content))
                writer.add_hash(keys[-1])
                unit = Unit(number, count, where, example)
                yield from (
                    _cut(unit) if len(example.get("text", "")) > PIECE_CHARACTERS and unit_encoder.lead else [unit]
                )
            if not operator.length_hint(rest):
                return  # data.max_samples: no further file is opened

    with _bar(f"tokenise {progress}", size, leave=False, disable=None if progress else True) as bar:
        try:
            for unit, outcome in _encoded(units(bar.update), unit_encoder, processes):
                build.take(unit, outcome)
            info = {
                "counts": dict(build.counts),
                "bad": build.bad,
                "control": build.control,
                "repeated": num_repeated(np.array(keys, dtype=np.uint64)),
                "paths": [str(file) for file in files],
                "left_out": [str(file) for file in left_out(paths)],
                "files": len(opened),
                "forms": describe_files(opened, reading),
                "processes": processes,
                "written": time.strftime("%Y-%m-%d"),
                "entry": folder.name.partition(".")[0] if folder else "",  # without what makes the name a temporary one
            }
            return writer.finish(info)
        finally:
            writer.close()


def build_store(
    files: list[Path],
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    shard_tokens: int = SHARD_TOKENS,
    advance: Advance = no_progress,
    processes: int | None = None,
) -> Store:
    """Build a token store of the texts of `files` in the directory `out`, or finish an interrupted build there.

    `advance` is called with the number of bytes of `files` that have been read. If another process is building it, this one
    waits. Raises UserError for a bad file, if the files contain no text, and if `out` contains anything else.
    """
    check_files(files)
    encoder = ExampleEncoder(tokenizer)
    sources = [
        {"path": str(path), "bytes": path.stat().st_size, "blake2b": content}
        for path, content in zip(files, hash_files(files), strict=True)
    ]
    info = _description(encoder) | {"files": sources}
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    begun = {LOCK_FILE, temporary_path(out / STORE_FILE).name}  # by another process, perhaps at this moment
    if not {path.name for path in out.iterdir()} <= begun and not is_store(out):
        raise UserError(f"{out} contains other files; choose another directory")
    with node_lock(out, LOCK, lambda: print(f"waiting for another process, which is building {out}", flush=True)):
        if is_store(out):
            _check_same(read_info(out), info | {"shard_tokens": shard_tokens}, out)
            if read_info(out)["complete"]:
                return open_store(out)
        writer = StoreWriter(out, info, shard_tokens)
        build, unit_encoder = _Build(writer, "error", with_spans=False), UnitEncoder(encoder)
        size = sum(source["bytes"] for source in sources)
        if processes is None:
            processes = available_cores() if size >= PARALLEL_BYTES else 1
        try:
            for unit, outcome in _encoded(_documents(files, writer.next, advance), unit_encoder, processes):
                build.take(unit, outcome)
            writer.end_shard()
        finally:
            writer.close()
        if not writer.info["shards"]:
            raise UserError(f"there is no text in {', '.join(map(str, files))}")
        return writer.finish({})


def build_and_describe(files: list[Path], model: str, out: Path, shard_tokens: int) -> str:
    """`build_store` with the tokenizer of a model, behind a progress bar. Returns what was built, as a sentence."""
    check_files(files)
    tokenizer = load_tokenizer(model)
    with _bar("tokenise", sum(path.stat().st_size for path in files)) as bar:
        store = build_store(files, tokenizer, out, shard_tokens, bar.update)
    return (
        f"{out}: {store.num_tokens:,} tokens of {store.num_documents:,} documents in {len(store.shards)} shards, "
        f"{'uint16' if store.info['dtype'] == '<u2' else 'uint32'}, tokenizer {store.info['tokenizer'][:12]}"
    )


def hash_files(files: Sequence[Path]) -> list[str]:
    """The hash of each file's content, BLAKE2b in hexadecimal digits. Reads several files at once, 1 GB/s per core."""

    def hash_file(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, hashlib.blake2b).hexdigest()[:64]

    with ThreadPoolExecutor(available_cores()) as pool:
        return list(pool.map(hash_file, files))


def _description(encoder: ExampleEncoder) -> dict:
    highest = max(encoder.tokenizer.get_vocab().values(), default=0)
    return {"dtype": "<u2" if highest < 2**16 else "<u4", "tokenizer": encoder.of_tokenizer}


def _check_same(found: dict, wanted: dict, out: Path) -> None:
    if found["tokenizer"] != wanted["tokenizer"]:
        difference = "was made with another tokenizer"
    elif found.get("files") != wanted["files"]:
        difference = "was made from other files, or the files have changed"
    elif {key: found.get(key) for key in wanted} != wanted:
        difference = "was made with other settings"
    else:
        return
    raise UserError(f"the store in {out} {difference}; remove that directory or choose another one")


def _bar(label: str, size: int, leave: bool = True, disable: bool | None = None) -> tqdm:
    """A progress bar. disable: None: where stderr is no terminal, on which an error begins a line."""
    return tqdm(desc=label, total=size, unit="B", unit_scale=True, mininterval=0.5, leave=leave, disable=disable)
