"""Text files -> a token store (data/token_store.py), in parallel, with flat memory, and resumable after any interruption.

Where shards begin follows from the documents alone. A shard's files get their names when they are complete and on disk,
and `shard-00000.json`, which says where in the sources the next one begins, comes last. So a build that was killed goes on
behind its last complete shard and ends with the same bytes as one that was not.
"""

import codecs
import fcntl
import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from data.files import Advance, chunks, kind, no_one, read_file
from data.token_store import (
    BUILD_FILE,
    FORMAT,
    OFFSET,
    STORE_FILE,
    backend,
    documents_file,
    open_store,
    tokenizer_fingerprint,
    tokens_file,
)

LOCK_FILE = "build.lock"
SHARD_TOKENS = 2**26  # a shard is closed by the document that fills it: 128 MiB in uint16
# Characters that are tokenised together: a piece for each core. Small ones keep reading, tokenising and writing abreast.
BATCH = 2**17 * max(2, os.cpu_count() or 2)
PIECE = 2**17  # characters: a longer text is tokenised in pieces, cut at line ends, so that it is never whole in memory


@dataclass(frozen=True)
class Piece:
    """A text, or a part of one."""

    text: str
    ends: bool  # the document ends here
    file: int  # which source file, and
    examples: int  # how many of its examples are read with this one
    where: str  # for messages


def build_store(
    files: list[Path],
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    shard_tokens: int = SHARD_TOKENS,
    advance: Advance = no_one,
) -> dict:
    """Build the store in `out`, or finish the build that was interrupted there; returns what store.json holds.

    advance: of a progress bar over the bytes of the files. Raises UserError for a file that cannot be read, for texts there
    are none of, and where `out` holds something else or is written by another process.
    """
    what = describe(files, tokenizer, shard_tokens)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in out.iterdir()}
    if names and not names & {STORE_FILE, BUILD_FILE, LOCK_FILE}:
        raise UserError(f"{out} holds other files; choose another folder")
    with _only_writer(out):
        if (out / STORE_FILE).is_file():
            store = _read_json(out / STORE_FILE)
            _check_same({key: store.get(key) for key in what}, what, out)
            open_store(out, what["tokenizer"], 1)  # all of its files are there
            _tidy(out)
            return store
        shards, position = _begin_or_resume(out, what)
        dtype = np.dtype(what["dtype"])
        written = _write_shards(out, len(shards), files, position, tokenizer, dtype, shard_tokens, advance)
        for shard, following in written:
            _write_json(out / note_file(len(shards)), shard | {"next": following})
            shards.append(shard)
        if not shards:
            raise UserError(f"there is no text in {', '.join(map(str, files))}")
        totals = {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents")}
        store = what | totals | {"shards": shards}
        _write_json(out / STORE_FILE, store)
        _tidy(out)
        return store


def check_files(files: list[Path]) -> None:
    """Raises UserError for one that is missing."""
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is a folder; name its files" if path.is_dir() else f"{path} does not exist")


def describe(files: list[Path], tokenizer: PreTrainedTokenizerBase, shard_tokens: int) -> dict:
    """What a build is of; one that differs in any of this cannot be resumed."""
    check_files(files)
    return {
        "format": FORMAT,
        "dtype": "<u2" if max(tokenizer.get_vocab().values()) < 2**16 else "<u4",
        "eos": tokenizer.eos_token_id,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "shard_tokens": shard_tokens,
        "files": [{"path": str(path), "bytes": path.stat().st_size} for path in files],
    }


def note_file(shard: int) -> str:
    """Name of the file that says that a shard is complete and where the next begins; gone when the store is complete."""
    return f"shard-{shard:05d}.json"


def encoder_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer's backend that neither pads nor truncates."""
    copy = Tokenizer.from_str(backend(tokenizer).to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


def read_pieces(files: list[Path], position: tuple[int, int] = (0, 0), advance: Advance = no_one) -> Iterator[Piece]:
    """The texts of all files in order, from `position` (file, examples of it that are done) on."""
    for number, path in enumerate(files):
        if number < position[0] or (kind(path) == ".txt" and (number, 1) <= position):
            advance(path.stat().st_size)
            continue
        if kind(path) == ".txt":
            yield from (Piece(text, ends, number, 1, str(path)) for text, ends in _text_file(path, advance))
            continue
        for count, (where, example) in enumerate(read_file(path, advance), 1):
            if "text" not in example:
                raise UserError(f"{where} is a chat; a token store is for texts, and chats go into data.train as files")
            if (number, count) <= position:  # read again, but not tokenised
                continue
            yield from (Piece(text, ends, number, count, where) for text, ends in cut([example["text"]]))


def cut(stream: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """A text that comes in parts -> (piece of at most about `PIECE` characters, whether the text ends with it)."""
    rest = ""
    for part in stream:
        rest, start = rest + part, 0
        while len(rest) - start > PIECE:
            at = _cut_at(rest, start)
            yield rest[start:at], False
            start = at
        rest = rest[start:]
    yield rest, True


def _cut_at(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends, at most `PIECE` characters on.

    Between two lines, neither of them blank: there the usual pre-tokenizers split anyway, and the ids are those of the whole
    text. Where there is no such place, before a space; where there is none either, anywhere.
    """
    at = start + PIECE
    while (at := text.rfind("\n", start + 1, at)) > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
    space = text.rfind(" ", start + 1, start + PIECE)
    return space if space > 0 else start + PIECE


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces of about `BATCH` characters together."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(encoder: Tokenizer, batch: list[Piece]) -> list:
    """Encodings of a batch, on all cores (`tokenizers` has its own threads, and lets go of Python's lock)."""
    try:
        return encoder.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
    except (TypeError, UnicodeError):
        for piece in batch:
            try:
                piece.text.encode()
            except UnicodeError as error:
                raise UserError(f"{piece.where} is not a valid text: {error.reason}") from error
        raise


def _write_shards(
    out: Path,
    shard: int,
    files: list[Path],
    position: tuple[int, int],
    tokenizer: PreTrainedTokenizerBase,
    dtype: np.dtype,
    shard_tokens: int,
    advance: Advance,
) -> Iterator[tuple[dict, tuple[int, int]]]:
    """Write shards from number `shard` on; after each (what store.json says of it, where the next begins)."""
    encoder = encoder_of(tokenizer)
    eos = np.array([tokenizer.eos_token_id], dtype=dtype)
    names, sinks, tokens, documents, digest = (), [], 0, 0, None
    piece = None

    def finished() -> tuple[dict, tuple[int, int]]:
        _keep(out, names, sinks)
        said = {"tokens": tokens, "documents": documents, "sha256": digest.hexdigest()}
        return said, (piece.file, piece.examples)

    def write(sink: int, data: bytes) -> None:
        sinks[sink].write(data)
        digest.update(data)

    try:
        for batch, encodings in _encoded(encoder, batches(read_pieces(files, position, advance))):
            for piece, encoding in zip(batch, encodings, strict=True):
                if not sinks:
                    names = tokens_file(shard), documents_file(shard)
                    sinks, digest = [(out / f"{name}.partial").open("wb") for name in names], hashlib.sha256()
                ids = np.array(encoding.ids, dtype=dtype)
                write(0, ids.tobytes())
                tokens += len(ids)
                if not piece.ends:
                    continue
                write(0, eos.tobytes())
                tokens, documents = tokens + 1, documents + 1
                write(1, np.array([tokens], dtype=OFFSET).tobytes())
                if tokens >= shard_tokens:
                    yield finished()
                    shard, sinks, tokens, documents = shard + 1, [], 0, 0
        if sinks:
            yield finished()
    finally:
        for sink in sinks:
            sink.close()


def _encoded(encoder: Tokenizer, source: Iterator[list[Piece]]) -> Iterator[tuple[list[Piece], list]]:
    """Batches with their encodings, in order. While one is tokenised, the last is written and the next is read."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque = deque()
        for batch in source:
            waiting.append((batch, pool.submit(encode, encoder, batch)))
            if len(waiting) > 1:
                done, future = waiting.popleft()
                yield done, future.result()
        for batch, future in waiting:
            yield batch, future.result()


def _begin_or_resume(out: Path, what: dict) -> tuple[list[dict], tuple[int, int]]:
    """(complete shards, where the next begins); what an interruption left half-done is removed."""
    if (out / BUILD_FILE).is_file():
        _check_same(_read_json(out / BUILD_FILE), what, out)
    else:
        _write_json(out / BUILD_FILE, what)
    shards, position = [], (0, 0)
    while (note := out / note_file(len(shards))).is_file():
        shard = _read_json(note)
        position = tuple(shard.pop("next"))
        shards.append(shard)
    known = {name for i in range(len(shards)) for name in (tokens_file(i), documents_file(i), note_file(i))}
    for path in out.iterdir():
        if path.name not in known and (path.name.startswith("shard-") or path.name.endswith(".partial")):
            path.unlink()
    return shards, position


def _tidy(out: Path) -> None:
    """Remove what only a build that goes on needs."""
    for leftover in [out / BUILD_FILE, out / LOCK_FILE, *out.glob("shard-*.json")]:
        leftover.unlink(missing_ok=True)


def _check_same(found: dict, wanted: dict, out: Path) -> None:
    for key, name in (("tokenizer", "another tokenizer"), ("files", "other files, or files that have changed")):
        if found.get(key) != wanted[key]:
            raise UserError(f"{out} holds a store of {name}; choose another folder, or remove it")
    if found != wanted:
        raise UserError(f"{out} holds a store with other settings; choose another folder, or remove it")


def _text_file(path: Path, advance: Advance) -> Iterator[tuple[str, bool]]:
    """A .txt file as one document, piece by piece."""

    def decoded() -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        held = ""  # a \r whose \n may come next
        try:
            for chunk in chunks(path, advance):
                text = held + decoder.decode(chunk)
                held = "\r" if text.endswith("\r") else ""
                yield text.removesuffix("\r").replace("\r\n", "\n")
            yield held + decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error.reason}") from error

    blank = True
    for text, ends in cut(decoded()):
        blank = blank and not text.strip()
        if ends and blank:
            raise UserError(f"{path} holds no text")
        yield text, ends


def _keep(out: Path, names: tuple[str, str], sinks: list) -> None:
    for name, sink in zip(names, sinks, strict=True):
        sink.flush()
        os.fsync(sink.fileno())
        sink.close()
        os.replace(out / f"{name}.partial", out / name)
    _sync_folder(out)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged; remove {path.parent} and build the store again") from error


def _write_json(path: Path, content: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    # A file opened for writing: network file systems lock nothing else. The lock goes when the process ends, killed or not.
    with (out / LOCK_FILE).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is building {out}") from error
        except OSError:
            pass  # a file system without locks: then two builds at once are for the user to avoid
        yield
