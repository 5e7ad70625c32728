"""The examples of data files as tokenised documents, from the cache of an earlier start, or encoded now."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.encoding import ExampleEncoder
from data.example_build import build_examples
from data.example_cache import Cache, describe
from data.example_report import example_report
from data.example_store import ExampleStore, StoredSequence
from data.files import expand, read_file
from data.formats import DEFAULT, Reading
from data.parallel_encoding import ExampleSettings

Say = Callable[[str], None]


@dataclass(frozen=True)
class Documents:
    """Tokenised examples in file order. A chat is one document or several; a long text may be several.

    ids: int64 `(length,)` for each document.
    weights: for each document, the factor of the loss of each of its tokens `(length,)`: bool if all factors are 0 or 1,
    else float32. `weights[t]` is for the prediction of token t from the tokens before it; that of token 0 is 0.
    lengths, targets: `(documents,)`, number of tokens and sum of the weights. The sums are int64, or float64 if a weight is
    not 1. Documents that were read from files map these two from disk and read the others one at a time.
    """

    ids: Sequence[np.ndarray]
    weights: Sequence[np.ndarray]
    lengths: np.ndarray
    targets: np.ndarray
    fingerprint: str  # hash of all tokens and weights in order; a run does not resume with other data
    report: str  # lines: what was read, then remarks such as what was truncated, dropped and skipped
    store: ExampleStore | None = None  # the documents that were read from files

    def __len__(self) -> int:
        return len(self.ids)

    def get(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and weights of one document."""
        return self.ids[index], self.weights[index]

    def num_tokens(self, index: int) -> int:
        """Number of tokens in one document."""
        return int(self.lengths[index])

    def document_lengths(self, index: int) -> tuple[int, ...]:
        """Length in tokens of each document in item `index`. An item here is always one document."""
        return (int(self.lengths[index]),)

    def items_with_targets(self) -> np.ndarray:
        """Indices of the documents that have a target token."""
        return np.flatnonzero(self.targets)

    def num_targets(self, index: int) -> int | float:
        """Sum of the weights of one document: an int unless a weight in the data is not 1."""
        return self.targets[index].item()

    def highest_token(self) -> int:
        """The highest token id in all documents."""
        return int(self.store.info["highest"]) if self.store else max(int(ids.max()) for ids in self.ids)

    def content_keys(self) -> np.ndarray:
        """A key of the content of each example that was read (data/held_out.py), uint64 `(examples,)`."""
        return self.store.hashes() if self.store else np.zeros(0, dtype=np.uint64)


def read_examples(path: str | Path, reading: Reading = DEFAULT) -> list[dict]:
    """All examples of a file (data/files.py), checked for shape. Raises UserError with the file and line."""
    return [example for _, example in read_file(path, reading=reading)]


def load_documents(
    paths: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    too_long: str,
    *,
    encoder: ExampleEncoder | None = None,
    settings: ExampleSettings | None = None,
    cache: str | Path | None = None,
    processes: int | None = None,
    progress: str | None = None,
    say: Say = lambda text: None,
) -> Documents:
    """Read and tokenise the examples of files.

    `too_long` applies to chats of more than `sequence_length` tokens: `drop`, `truncate` (cut off the end) or `error`.
    Longer texts are cut into pieces so that every token is still a target exactly once.

    encoder, settings: how chats are rendered, and the other settings of data. Their defaults are those of a config.
    cache: a directory (data/example_cache.py) in which the result is kept. The processes of a node meet there: one of them
    tokenises, the others wait for it. None: in memory.
    processes: number of processes to tokenise with. None: one per available core if the files are large enough.
    progress: label of a progress bar, drawn by the process that tokenises. say: prints a line about waiting for another
    process. Neither these nor `processes` change the result.

    Raises UserError for a bad file, or if no example or no target token is left.
    """
    encoder = encoder or ExampleEncoder(tokenizer)
    settings = dataclasses.replace(
        settings or ExampleSettings(sequence_length), sequence_length=sequence_length, too_long=too_long
    )
    start = time.perf_counter()

    def build(folder: Path | None) -> ExampleStore:
        return build_examples(paths, tokenizer, encoder, settings, folder, processes, progress)

    if cache is None:
        store = build(None)
        origin = _tokenised(store, start)
    else:
        found = Cache(Path(cache), say).open(paths, describe(paths, tokenizer, encoder, settings), build)
        store = found.store
        if found.is_new:
            origin = f"{_tokenised(store, start)} into {found.folder}{found.remark}"
        else:
            origin = f"from the cache {found.folder}, written {found.written}{found.remark}"
    ids, weights = StoredSequence(store, "ids"), StoredSequence(store, "weights")
    report = f"{example_report(store.info, settings, expand(paths))}\n{origin}"
    return Documents(ids, weights, store.lengths, store.targets, store.info["fingerprint"], report, store)


def _tokenised(store: ExampleStore, start: float) -> str:
    processes = store.info["processes"]
    return f"tokenised in {time.perf_counter() - start:.1f} s" + (f" (on {processes} cores)" if processes > 1 else "")
