"""Example files (data/files.py) -> tokenised documents in memory, with everything left out or cut counted."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from data.files import read_file
from data.tokens import encode_example


@dataclass(frozen=True)
class Documents:
    """Tokenised examples in file order: a chat is one document, a long text several.

    ids: per document int64 `(length,)`. is_target: per document bool `(length,)`; `is_target[t]` says that token t is
    predicted from those before it and carries loss, so index 0 never counts. lengths, targets: int64 `(documents,)`.
    """

    ids: list[np.ndarray]
    is_target: list[np.ndarray]
    lengths: np.ndarray
    targets: np.ndarray
    fingerprint: str  # of all tokens and masks, in order: a resume with other data is refused
    report: str  # what was read, truncated and dropped, in a sentence

    def __len__(self) -> int:
        return len(self.ids)

    def get(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and target flags of one document."""
        return self.ids[index], self.is_target[index]

    def document_lengths(self, index: int) -> tuple[int, ...]:
        """Of what stands at `index`: one document here, several in a window of a token store."""
        return (int(self.lengths[index]),)

    def items_with_targets(self) -> np.ndarray:
        """Indices of the documents that have a target."""
        return np.flatnonzero(self.targets)

    def num_targets(self, index: int) -> int:
        """Tokens of one document that carry loss."""
        return int(self.targets[index])


def read_examples(path: str | Path) -> list[dict]:
    """The examples of a file of any kind (data/files.py), checked for shape. Raises UserError with the file and the line."""
    return [example for _, example in read_file(path)]


def load_documents(
    paths: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    too_long: str,
    progress: Callable[[list], Iterable] | None = None,
) -> Documents:
    """Read and tokenise example files.

    too_long says what becomes of chats above `sequence_length` tokens: `drop`, `truncate` (the end is cut) or `error`.
    Longer texts are cut into pieces, so that each of their tokens is still a target once. progress: wraps the list of
    examples, e.g. tqdm. Raises UserError for a bad file or where nothing is left.
    """
    examples = [(f"{path}, example {i}", example) for path in paths for i, example in enumerate(read_examples(path), 1)]
    ids, is_target, dropped, truncated, cut, longest = [], [], 0, 0, 0, 0
    for where, example in progress(examples) if progress else examples:
        tokens, flags = _encoded(tokenizer, example, where)
        longest = max(longest, len(tokens))
        pieces = [(tokens, flags)]
        if len(tokens) > sequence_length:
            if "messages" not in example:
                cut += 1
                pieces = _pieces(tokens, sequence_length)
            elif too_long == "error":
                raise UserError(
                    f"{where} has {len(tokens)} tokens, data.sequence_length={sequence_length}; raise it, or choose "
                    "data.too_long=drop or truncate"
                )
            elif too_long == "drop":
                dropped += 1
                continue
            else:
                truncated += 1
                pieces = [(tokens[:sequence_length], flags[:sequence_length])]
        for tokens, flags in pieces:
            flags[:1] = False  # the first token has nothing to be predicted from
            ids.append(tokens)
            is_target.append(flags)
    if not ids:
        raise UserError(
            f"all {len(examples)} examples of {', '.join(paths)} are longer than data.sequence_length="
            f"{sequence_length}; the longest has {longest} tokens"
        )
    lengths = np.array([len(tokens) for tokens in ids], dtype=np.int64)
    targets = np.array([flags.sum() for flags in is_target], dtype=np.int64)
    if not targets.any():
        raise UserError(f"no token of {', '.join(paths)} carries loss: there is no assistant message in any example")
    silent = int((targets == 0).sum())
    report = (
        f"{len(ids)} examples, {lengths.sum():,} tokens ({lengths.mean():.0f} an example, longest {lengths.max()}), "
        f"{targets.sum():,} of them targets"
    )
    report += f"; DROPPED {dropped} longer than {sequence_length} (longest {longest})" if dropped else ""
    report += f"; TRUNCATED {truncated} to {sequence_length} (longest {longest})" if truncated else ""
    report += f"; {cut} texts CUT into pieces of {sequence_length}, which count as examples" if cut else ""
    report += f"; {silent} without any target token" if silent else ""
    return Documents(ids, is_target, lengths, targets, _fingerprint(ids, is_target), report)


def _encoded(tokenizer: PreTrainedTokenizerBase, example: dict, where: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        tokens, flags = encode_example(tokenizer, example)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return np.array(tokens, dtype=np.int64), np.array(flags, dtype=bool)


def _pieces(tokens: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A long text in pieces of `size` tokens; each begins with the last token of the one before.

    A piece's first token is no target, so without this overlap a token would be lost at every cut.
    """
    pieces = [tokens[i : i + size] for i in range(0, len(tokens) - 1, max(1, size - 1))]
    return [(piece, np.ones(len(piece), dtype=bool)) for piece in pieces]


def _fingerprint(ids: list[np.ndarray], is_target: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for tokens, flags in zip(ids, is_target, strict=True):
        digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes() + flags.tobytes())
    return digest.hexdigest()
