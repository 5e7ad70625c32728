"""A corpus larger than memory: token ids in memory-mapped shards on disk, read as windows of a fixed length.

scripts/data.py build builds a store. It is a directory with these files:

- `store.json`: dtype, end-of-sequence and beginning-of-sequence ids, fingerprint of the tokenizer, source files, shards;
- `shard-00000.tokens`: token ids, little-endian uint16 if the vocabulary fits, else uint32. Each document ends with
  EOS, and begins with the ids that the tokenizer adds before a text (BOS), if any;
- `shard-00000.documents`: little-endian uint64, the offset in the shard at which each document ends. No document spans
  two shards;
- `shard-00000.checksums`: the CRC-32 of each block of these two files (data/checked_file.py).

Opening a store reads `store.json` and checks the sizes of the files. Reading a window checks the blocks that it reads.
Nothing stays in memory, which therefore grows neither with the size of the corpus nor with what has been read.
`verify_store` reads all of a store.
"""

import hashlib
import json
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from data.checked_file import CHECKSUM, CheckedFile, num_blocks
from data.tokens import bos_ids

STORE_FILE = "store.json"  # written last: a store that has it is complete
BUILD_FILE = "build.json"  # tokenizer, files and settings of an unfinished build
OFFSET = np.dtype("<u8")
FORMAT = 2
REBUILD = "remove the directory and build the store again"


@dataclass(frozen=True)
class TokenStore:
    """Windows of `sequence_length` tokens over the concatenation of all shards. The last window may be shorter.

    Reading has no side effects, so any thread and any process with a copy may read it.
    """

    path: Path
    sequence_length: int
    dtype: np.dtype
    num_tokens: int
    num_documents: int
    shard_starts: tuple[int, ...] = field(repr=False)  # global index of the first token of each shard, and the total
    shard_documents: tuple[int, ...] = field(repr=False)  # number of documents in each shard
    fingerprint: str = ""  # hash of all tokens and document ends in order; the names of the source files do not matter

    def __len__(self) -> int:
        """Number of windows, including a shorter one at the end."""
        return -(-self.num_tokens // self.sequence_length)

    @property
    def mean_targets(self) -> float:
        """Mean number of target tokens per window: tokens with a preceding token of their document in the window.

        This assumes that no window but the first begins with a document. Each one that does has one more target.
        """
        return max(0, self.num_tokens - self.num_documents - len(self) + 1) / len(self)

    def window(self, index: int) -> tuple[np.ndarray, tuple[int, ...]]:
        """(ids, document_lengths): token ids int64 `(tokens,)`, and the number of them in each document.

        Of a document that begins in an earlier window or ends in a later one, only the part in this window counts.
        """
        begin, end = self._span(index)
        ids = np.empty(end - begin, dtype=np.int64)
        for shard, first, last in self._shards(begin, end):
            start, size = self.shard_starts[shard], self.dtype.itemsize
            part = self.tokens(shard).read((first - start) * size, (last - first) * size)
            ids[first - begin : last - begin] = np.frombuffer(part, self.dtype)
        return ids, self.document_lengths(index)

    def document_lengths(self, index: int) -> tuple[int, ...]:
        """Number of tokens of each document in a window, computed from the document offsets alone."""
        begin, end = self._span(index)
        cuts = [begin]
        for shard, first, last in self._shards(begin, end):
            start = self.shard_starts[shard]
            cuts += (self._ends_between(shard, first - start, last - start) + start).tolist()
        if cuts[-1] != end:
            cuts.append(end)
        return tuple(after - before for before, after in zip(cuts, cuts[1:], strict=False))

    def window_length(self, index: int) -> int:
        """Number of tokens of a window: `sequence_length`, except for the last. Reads no file."""
        begin, end = self._span(index)
        return end - begin

    def tokens(self, shard: int) -> CheckedFile:
        """The file with the token ids of a shard."""
        size = (self.shard_starts[shard + 1] - self.shard_starts[shard]) * self.dtype.itemsize
        return CheckedFile(self.path / tokens_file(shard), size, self.path / checksums_file(shard), 0, REBUILD)

    def documents(self, shard: int) -> CheckedFile:
        """The file with the document ends of a shard."""
        path, size = self.path / documents_file(shard), self.shard_documents[shard] * OFFSET.itemsize
        return CheckedFile(path, size, self.path / checksums_file(shard), num_blocks(self.tokens(shard).size), REBUILD)

    def ends(self, shard: int, first: int, last: int) -> np.ndarray:
        """The ends of the documents from `first` to `last` (exclusive) of a shard, int64."""
        data = self.documents(shard).read(first * OFFSET.itemsize, (last - first) * OFFSET.itemsize)
        return np.frombuffer(data, OFFSET).astype(np.int64)

    def _ends_between(self, shard: int, first: int, last: int) -> np.ndarray:
        """The document ends above `first` and up to `last`, all counted in tokens of the shard."""
        count = self.shard_documents[shard]
        mapped = np.memmap(self.path / documents_file(shard), OFFSET, "r", 0, (count,))
        # The keys must have the dtype of `mapped`. Otherwise numpy would convert, and so read, the whole array.
        low, high = np.searchsorted(mapped, np.array([first, last], dtype=OFFSET), side="right").tolist()
        # The search reads without checks. That its result is right shows in the checked values around it.
        before, after = max(0, low - 1), min(count, high + 1)
        found = self.ends(shard, before, after)
        inside = found[low - before : high - before]
        ordered = [*([found[0]] if low else []), first, *inside, last, *([found[-1]] if high < count else [])]
        steps = np.diff(ordered)
        if (
            (steps < 0).any()
            or (np.diff(found) <= 0).any()
            or (len(inside) and inside[0] <= first)
            or (high < count and found[-1] <= last)
        ):
            raise UserError(f"{self.documents(shard).path} is damaged: its offsets do not increase; {REBUILD}")
        return inside

    def _span(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} is outside a store of {len(self)} windows")
        begin = index * self.sequence_length
        return begin, min(begin + self.sequence_length, self.num_tokens)

    def _shards(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """(shard, first, end) for each shard with tokens from `begin` to `end`. All are global token indices."""
        parts = []
        shard = bisect_right(self.shard_starts, begin) - 1
        while begin < end:
            last = min(end, self.shard_starts[shard + 1])
            parts.append((shard, begin, last))
            begin, shard = last, shard + 1
        return parts


def is_store(path: str | Path) -> bool:
    """Whether a path is the directory of a token store, complete or not."""
    return any((Path(path) / name).is_file() for name in (STORE_FILE, BUILD_FILE))


def open_store(path: str | Path, tokenizer_fingerprint: str, sequence_length: int) -> TokenStore:
    """Open the store in the directory `path`. `tokenizer_fingerprint` is that of the tokenizer the model uses.

    Raises UserError if the build is incomplete, a shard is missing or truncated, or the tokenizer is another one.
    """
    path = Path(path)
    if not (path / STORE_FILE).is_file():
        if (path / BUILD_FILE).is_file():
            raise UserError(
                f"the token store {path} is incomplete; run the same scripts/data.py build command again to finish it"
            )
        raise UserError(
            f"{path} is a directory without {STORE_FILE}; name data files, or a token store made by scripts/data.py build"
        )
    store, found = _read_store(path, sequence_length)
    if found["tokenizer"] != tokenizer_fingerprint:
        raise UserError(
            f"the token store {path} was made with a different tokenizer from the model's; run scripts/data.py build with "
            "--model set to this model"
        )
    return store


def verify_store(path: str | Path) -> TokenStore:
    """Read and check every byte of a store. Raises UserError at the first damage."""
    path = Path(path)
    if not (path / STORE_FILE).is_file():
        raise UserError(f"{path} has no {STORE_FILE}: it is not a token store, or its build is incomplete")
    store, content = _read_store(path, 1)
    for shard, entry in enumerate(content["shards"]):
        files = {"tokens": store.tokens(shard), "documents": store.documents(shard)}
        for name, file in files.items():
            file.verify()
            with file.path.open("rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != entry["sha256"][name]:
                    raise UserError(f"{file.path} is not the file that was written; {REBUILD}")
        if (np.diff(store.ends(shard, 0, entry["documents"]), prepend=0) <= 0).any():
            raise UserError(f"{files['documents'].path} is damaged: its offsets do not increase; {REBUILD}")
    return store


def _read_store(path: Path, sequence_length: int) -> tuple[TokenStore, dict]:
    """(the store, the content of store.json), after all checks that read little."""
    try:
        content = json.loads((path / STORE_FILE).read_text(encoding="utf-8"))
        if (version := content["format"]) != FORMAT:
            raise UserError(f"{path} has store format {version}, but this version reads format {FORMAT}; {REBUILD}")
        dtype = np.dtype(content["dtype"])
        shards = [(int(shard["tokens"]), int(shard["documents"])) for shard in content["shards"]]
        hashes = [content["dtype"], *(shard["sha256"] for shard in content["shards"])]
        content["tokenizer"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / STORE_FILE} is damaged ({error!r}); {REBUILD}") from error
    starts = tuple(accumulate((tokens for tokens, _ in shards), initial=0))
    documents = tuple(documents for _, documents in shards)
    fingerprint = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    store = TokenStore(path, sequence_length, dtype, starts[-1], sum(documents), starts, documents, fingerprint)
    for shard, (tokens, count) in enumerate(shards):
        files = store.tokens(shard), store.documents(shard)
        for file in files:
            _check_size(file.path, file.size)
        _check_size(path / checksums_file(shard), CHECKSUM.itemsize * sum(num_blocks(file.size) for file in files))
        if store.ends(shard, count - 1, count).tolist() != [tokens]:
            raise UserError(f"{files[1].path} is damaged: its last document ends elsewhere than the shard; {REBUILD}")
    return store, content


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that determines the ids of a text.

    That is vocabulary, merges, added tokens, normaliser, pre-tokenizer, BOS and EOS. Raises UserError for a tokenizer without
    a `tokenizers` backend.
    """
    parts = json.loads(backend(tokenizer).to_str())
    relevant = {name: parts.get(name) for name in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    relevant["eos"], relevant["bos"] = tokenizer.eos_token_id, bos_ids(tokenizer)
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The `tokenizers` object inside a fast tokenizer. Raises UserError for a slow one."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        raise UserError(
            f"{tokenizer.name_or_path} has no fast tokenizer (tokenizer.json), which a token store requires"
        )
    return inner


def tokens_file(shard: int) -> str:
    """Name of the file with the token ids of a shard."""
    return f"shard-{shard:05d}.tokens"


def documents_file(shard: int) -> str:
    """Name of the file with the document ends of a shard."""
    return f"shard-{shard:05d}.documents"


def checksums_file(shard: int) -> str:
    """Name of the file with the checksums of a shard's blocks: those of the token ids, then of the document ends."""
    return f"shard-{shard:05d}.checksums"


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing; {REBUILD}")
    if path.stat().st_size != expected:
        raise UserError(f"{path} has {path.stat().st_size} bytes instead of {expected}; {REBUILD}")
