"""Build a token store (data/token_store.py) from text files, in parallel and in constant memory.

An interrupted build can be continued. Where shards begin depends on the documents alone. The files of a shard get their
final names when they are complete and on disk. `shard-00000.json` is written last and says where in the source files
the next shard begins. The same command therefore resumes after the last complete shard, and the finished store has the
same bytes as one built without interruption.
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from common.durable_files import SUFFIX, publish, temporary_path, write_json
from common.errors import UserError
from data.checked_file import CheckedWriter, hash_files
from data.files import Advance, check_files, no_progress
from data.text_pieces import Piece, encode_pieces, read_pieces
from data.token_store import (
    BUILD_FILE,
    FORMAT,
    OFFSET,
    STORE_FILE,
    checksums_file,
    documents_file,
    open_store,
    tokenizer_fingerprint,
    tokens_file,
)
from data.tokens import bos_ids, load_tokenizer

LOCK_FILE = "build.lock"
SHARD_TOKENS = 2**26  # a shard is complete with the document that reaches this size: 128 MiB in uint16
Position = tuple[int, int]  # (index of a source file, number of its examples that are done)


def build_store(
    files: list[Path],
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    shard_tokens: int = SHARD_TOKENS,
    advance: Advance = no_progress,
) -> dict:
    """Build a store in the directory `out`, or finish an interrupted build there. Returns the content of store.json.

    `advance` is called with the number of bytes of `files` that have been read. Raises UserError for a bad file, if the
    files contain no text, if `out` contains anything else, and if another process is building there.
    """
    description = describe(files, tokenizer, shard_tokens)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in out.iterdir()}
    if names and not names & {STORE_FILE, BUILD_FILE, LOCK_FILE}:
        raise UserError(f"{out} contains other files; choose another directory")
    with _exclusive(out):
        if (out / STORE_FILE).is_file():
            store = _read_json(out / STORE_FILE)
            _check_same({key: store.get(key) for key in description}, description, out)
            open_store(out, description["tokenizer"], 1)  # checks that all of its files exist
            _remove_build_files(out)
            return store
        shards, position = _start_or_resume(out, description)
        pieces = encode_pieces(tokenizer, read_pieces(files, position, advance))
        for shard, next_position in _write_shards(out, len(shards), pieces, description):
            write_json(out / marker_file(len(shards)), shard | {"next": next_position})
            shards.append(shard)
        if not shards:
            raise UserError(f"there is no text in {', '.join(map(str, files))}")
        totals = {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents")}
        store = description | totals | {"shards": shards}
        write_json(out / STORE_FILE, store)
        _remove_build_files(out)
        return store


def describe(files: list[Path], tokenizer: PreTrainedTokenizerBase, shard_tokens: int) -> dict:
    """What determines the content of a store. A build can be resumed only if all of it is the same."""
    check_files(files)
    return {
        "format": FORMAT,
        "dtype": "<u2" if max(tokenizer.get_vocab().values()) < 2**16 else "<u4",
        "bos": bos_ids(tokenizer),
        "eos": tokenizer.eos_token_id,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "shard_tokens": shard_tokens,
        "files": [
            {"path": str(path), "bytes": path.stat().st_size, "blake2b": content}
            for path, content in zip(files, hash_files(files), strict=True)
        ],
    }


def marker_file(shard: int) -> str:
    """Name of the file that marks a shard as complete during a build and says where the next one begins."""
    return f"shard-{shard:05d}.json"


class ShardWriter:
    """Writes one shard under temporary names, then publishes it."""

    def __init__(self, folder: Path, number: int, dtype: np.dtype) -> None:
        self.paths = folder / tokens_file(number), folder / documents_file(number)
        self.checksums = folder / checksums_file(number)
        self.dtype = dtype
        self.files = [temporary_path(path).open("wb") for path in self.paths]
        self.writers = [CheckedWriter(file) for file in self.files]
        self.num_tokens = self.num_documents = 0

    def add_tokens(self, ids: list[int]) -> None:
        """Append token ids to the current document."""
        self.writers[0].write(np.array(ids, dtype=self.dtype))
        self.num_tokens += len(ids)

    def end_document(self) -> None:
        """End the current document here."""
        self.writers[1].write(np.array([self.num_tokens], dtype=OFFSET))
        self.num_documents += 1

    def publish(self) -> dict:
        """Flush the files to disk and give them their final names. Returns the shard's entry in store.json."""
        self.close()
        checksums = np.concatenate([writer.checksums() for writer in self.writers])
        temporary_path(self.checksums).write_bytes(checksums.tobytes())
        for path in (*self.paths, self.checksums):
            publish(path)
        hashes = [writer.digest.hexdigest() for writer in self.writers]
        sha256 = dict(zip(("tokens", "documents"), hashes, strict=True))
        return {"tokens": self.num_tokens, "documents": self.num_documents, "sha256": sha256}

    def close(self) -> None:
        """Close the files. Unless the shard was published, they are left behind and removed by the next build."""
        for file in self.files:
            file.close()


def _write_shards(
    out: Path, number: int, pieces: Iterator[tuple[Piece, list[int]]], description: dict
) -> Iterator[tuple[dict, Position]]:
    """Write shards, the first of which is shard `number`. Yields (entry in store.json, position of the next shard)."""
    dtype = np.dtype(description["dtype"])
    shard = None
    position = (0, 0)
    try:
        for piece, ids in pieces:
            position = (piece.file, piece.examples)
            shard = shard or ShardWriter(out, number, dtype)
            shard.add_tokens([*description["bos"], *ids] if piece.begins_document else ids)
            if not piece.ends_document:
                continue
            shard.add_tokens([description["eos"]])
            shard.end_document()
            if shard.num_tokens >= description["shard_tokens"]:
                yield shard.publish(), position
                number, shard = number + 1, None
        if shard:
            yield shard.publish(), position
    finally:
        if shard:
            shard.close()


def _start_or_resume(out: Path, description: dict) -> tuple[list[dict], Position]:
    """(entries of the complete shards, position of the next one). Removes incomplete files of an interrupted build."""
    if (out / BUILD_FILE).is_file():
        _check_same(_read_json(out / BUILD_FILE), description, out)
    else:
        write_json(out / BUILD_FILE, description)
    shards, position = [], (0, 0)
    while (marker := out / marker_file(len(shards))).is_file():
        shard = _read_json(marker)
        position = tuple(shard.pop("next"))
        shards.append(shard)
    complete = {
        name(i) for i in range(len(shards)) for name in (tokens_file, documents_file, checksums_file, marker_file)
    }
    for path in out.iterdir():
        if path.name not in complete and (path.name.startswith("shard-") or path.name.endswith(SUFFIX)):
            path.unlink()
    return shards, position


def _remove_build_files(out: Path) -> None:
    """Remove the files that only an unfinished build needs."""
    for path in [out / BUILD_FILE, out / LOCK_FILE, *out.glob("shard-*.json")]:
        path.unlink(missing_ok=True)


def _check_same(found: dict, wanted: dict, out: Path) -> None:
    if found.get("tokenizer") != wanted["tokenizer"]:
        difference = "was made with another tokenizer"
    elif found.get("files") != wanted["files"]:
        difference = "was made from other files, or the files have changed"
    elif found != wanted:
        difference = "was made with other settings"
    else:
        return
    raise UserError(f"the store in {out} {difference}; remove that directory or choose another one")


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged; remove {path.parent} and build the store again") from error


@contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    """Lock a build directory. The operating system releases the lock when the process ends, even if it is killed."""
    with (out / LOCK_FILE).open("w") as file:  # network file systems lock only files that are open for writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is building {out}") from error
        except OSError:
            pass  # a file system without locks: the user must not start two builds at once
        yield


def build_and_describe(files: list[Path], model: str, out: Path, shard_tokens: int) -> str:
    """`build_store` with the tokenizer of a model, behind a progress bar. Returns what was built, as a sentence."""
    check_files(files)
    size = sum(path.stat().st_size for path in files)
    tokenizer = load_tokenizer(model)
    with tqdm(desc="tokenise", total=size, unit="B", unit_scale=True, mininterval=0.5, disable=None) as bar:
        store = build_store(files, tokenizer, out, shard_tokens, bar.update)
    return (
        f"{out}: {store['tokens']:,} tokens of {store['documents']:,} documents in {len(store['shards'])} shards, "
        f"{'uint16' if store['dtype'] == '<u2' else 'uint32'}, tokenizer {store['tokenizer'][:12]}"
    )
