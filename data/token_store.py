"""A corpus larger than memory: token ids in memory-mapped shards on disk, read as windows of a fixed length.

scripts/build_tokens.py makes a store. A folder holds

- `store.json`: what the store is: dtype, end-of-sequence id, the tokenizer's fingerprint, source files, shards;
- `shard-00000.tokens`: token ids, little-endian uint16 where the vocabulary fits, else uint32; each document ends with EOS;
- `shard-00000.documents`: little-endian uint64, where in the shard each document ends. No document crosses shards.

Opening looks at `store.json` and at the sizes of the files; reading maps the pages of a window and lets go of them, so that
memory does not grow with the corpus, nor with what has been read.
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

STORE_FILE = "store.json"  # written last: its presence says that the build is complete
BUILD_FILE = "build.json"  # what an unfinished build is of
OFFSET = np.dtype("<u8")
FORMAT = 1
AGAIN = "remove the folder and build the store again"


@dataclass(frozen=True)
class TokenStore:
    """Windows of `sequence_length` tokens over all shards end to end; the last one may be shorter.

    Stateless: any thread, and any process that got a copy, may read it.
    """

    path: Path
    sequence_length: int
    dtype: np.dtype
    num_tokens: int
    num_documents: int
    shard_starts: tuple[int, ...] = field(repr=False)  # the first token of each shard, and the end of the last
    shard_documents: tuple[int, ...] = field(repr=False)
    fingerprint: str = ""  # of all tokens and documents, in order, wherever their texts came from

    def __len__(self) -> int:
        """Windows, the partial one at the end included."""
        return -(-self.num_tokens // self.sequence_length)

    @property
    def mean_targets(self) -> float:
        """Tokens of a window that have one before them in their document, on average, as if no window began where a
        document does (a few do: one target fewer is lost for each)."""
        return max(0, self.num_tokens - self.num_documents - len(self) + 1) / len(self)

    def window(self, index: int) -> tuple[np.ndarray, tuple[int, ...]]:
        """(ids, document_lengths): int64 `(tokens,)`, and how many of them belong to each document.

        A document that began in an earlier window, or goes on in the next, is a piece of its own here.
        """
        begin, end = self._span(index)
        ids = np.empty(end - begin, dtype=np.int64)
        for shard, first, last in self._shards(begin, end):
            start = self.shard_starts[shard]
            part = np.memmap(
                self.path / tokens_file(shard), self.dtype, "r", (first - start) * self.dtype.itemsize, (last - first,)
            )
            ids[first - begin : last - begin] = part
        return ids, self.document_lengths(index)

    def document_lengths(self, index: int) -> tuple[int, ...]:
        """Tokens of each document in a window, from the document offsets alone."""
        begin, end = self._span(index)
        cuts = [begin]
        for shard, first, last in self._shards(begin, end):
            start = self.shard_starts[shard]
            ends = np.memmap(self.path / documents_file(shard), OFFSET, "r", 0, (self.shard_documents[shard],))
            # Keys of the same type: any other would make numpy convert, and so read, the whole array.
            low, high = np.searchsorted(ends, np.array([first - start, last - start], dtype=OFFSET), side="right")
            cuts += (np.asarray(ends[low:high]).astype(np.int64) + start).tolist()
        if cuts[-1] != end:
            cuts.append(end)
        return tuple(after - before for before, after in zip(cuts, cuts[1:], strict=False))

    def _span(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        begin = index * self.sequence_length
        return begin, min(begin + self.sequence_length, self.num_tokens)

    def _shards(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """(shard, first token, end) of what `begin` to `end` takes from each shard, counted over all shards."""
        parts = []
        shard = bisect_right(self.shard_starts, begin) - 1
        while begin < end:
            last = min(end, self.shard_starts[shard + 1])
            parts.append((shard, begin, last))
            begin, shard = last, shard + 1
        return parts


def open_store(path: str | Path, tokenizer_fingerprint: str, sequence_length: int) -> TokenStore:
    """The store in folder `path`. `tokenizer_fingerprint`: of the tokenizer that reads it, by the function of that name.

    Raises UserError for an incomplete build, a shard that is missing or cut off, and another tokenizer.
    """
    path = Path(path)
    if not (path / STORE_FILE).is_file():
        if (path / BUILD_FILE).is_file():
            raise UserError(
                f"the token store {path} is not complete; run the same scripts/build_tokens.py command again"
            )
        raise UserError(f"{path} is a folder without {STORE_FILE}; name files, or a store by scripts/build_tokens.py")
    try:
        store = json.loads((path / STORE_FILE).read_text(encoding="utf-8"))
        dtype = np.dtype(store["dtype"])
        shards = [(int(shard["tokens"]), int(shard["documents"])) for shard in store["shards"]]
        written_with, version = store["tokenizer"], store["format"]
        contents = [store["dtype"], *(shard["sha256"] for shard in store["shards"])]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / STORE_FILE} is damaged ({error!r}); {AGAIN}") from error
    if version != FORMAT:
        raise UserError(f"{path} has format {version}, and this version reads {FORMAT}; {AGAIN}")
    if written_with != tokenizer_fingerprint:
        raise UserError(
            f"the token store {path} was made with another tokenizer than the model's; run scripts/build_tokens.py with "
            "this model"
        )
    for shard, (tokens, documents) in enumerate(shards):
        for name, size in ((tokens_file(shard), tokens * dtype.itemsize), (documents_file(shard), documents * 8)):
            _check_size(path / name, size)
    starts = tuple(accumulate((tokens for tokens, _ in shards), initial=0))
    documents = tuple(documents for _, documents in shards)
    fingerprint = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
    return TokenStore(path, sequence_length, dtype, starts[-1], sum(documents), starts, documents, fingerprint)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides which ids a text gets: vocabulary, merges, added tokens, normaliser, splitting, and EOS.

    Raises UserError for a tokenizer without a `tokenizers` backend.
    """
    parts = json.loads(backend(tokenizer).to_str())
    relevant = {name: parts.get(name) for name in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    relevant["eos"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The `tokenizers` object inside. Raises UserError where there is none."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        raise UserError(f"{tokenizer.name_or_path} has no fast tokenizer (tokenizer.json), which a token store needs")
    return inner


def tokens_file(shard: int) -> str:
    """Name of the file with a shard's token ids."""
    return f"shard-{shard:05d}.tokens"


def documents_file(shard: int) -> str:
    """Name of the file with the ends of a shard's documents."""
    return f"shard-{shard:05d}.documents"


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing; {AGAIN}")
    if path.stat().st_size != expected:
        raise UserError(f"{path} has {path.stat().st_size} bytes instead of {expected}; {AGAIN}")
