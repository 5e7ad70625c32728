"""Load example files (data/files.py) as tokenised documents in memory, counting dropped, truncated and cut examples."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from data.encoding import ExampleEncoder
from data.files import read_file


@dataclass(frozen=True)
class Documents:
    """Tokenised examples in file order. A chat is one document; a long text may be several.

    ids: int64 `(length,)` for each document.
    is_target: bool `(length,)` for each document. `is_target[t]` means that the prediction of token t from the tokens
    before it counts in the loss; index 0 is always False.
    lengths, targets: int64 `(documents,)`, number of tokens and of target tokens.
    """

    ids: list[np.ndarray]
    is_target: list[np.ndarray]
    lengths: np.ndarray
    targets: np.ndarray
    fingerprint: str  # hash of all tokens and masks in order; a run does not resume with other data
    report: str  # one line: what was read, truncated and dropped

    def __len__(self) -> int:
        return len(self.ids)

    def get(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and target flags of one document."""
        return self.ids[index], self.is_target[index]

    def num_tokens(self, index: int) -> int:
        """Number of tokens in one document."""
        return int(self.lengths[index])

    def document_lengths(self, index: int) -> tuple[int, ...]:
        """Length in tokens of each document in item `index`. An item here is always one document."""
        return (int(self.lengths[index]),)

    def items_with_targets(self) -> np.ndarray:
        """Indices of the documents that have a target token."""
        return np.flatnonzero(self.targets)

    def num_targets(self, index: int) -> int:
        """Number of target tokens in one document."""
        return int(self.targets[index])


def read_examples(path: str | Path) -> list[dict]:
    """All examples of a file (data/files.py), checked for shape. Raises UserError with the file and line."""
    return [example for _, example in read_file(path)]


def load_documents(
    paths: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    too_long: str,
    progress: Callable[[list], Iterable] | None = None,
) -> Documents:
    """Read and tokenise example files.

    `too_long` applies to chats of more than `sequence_length` tokens: `drop`, `truncate` (cut off the end) or `error`.
    Longer texts are cut into pieces so that every token is still a target exactly once. `progress` wraps the list of
    examples, e.g. tqdm. Raises UserError for a bad file, or if no example or no target token is left.
    """
    examples = [(f"{path}, example {i}", example) for path in paths for i, example in enumerate(read_examples(path), 1)]
    ids, is_target, longest = [], [], 0
    shortened: Counter[str] = Counter()  # what was done to examples that are too long
    encoder = ExampleEncoder(tokenizer)
    for where, example in progress(examples) if progress else examples:
        for tokens, flags in _encode(encoder, example, where):
            longest = max(longest, len(tokens))
            pieces = [(tokens, flags)]
            if len(tokens) > sequence_length:
                action = too_long if "messages" in example else "cut"
                if action == "error":
                    raise UserError(
                        f"{where} has {len(tokens)} tokens, more than data.sequence_length={sequence_length}; increase it, or "
                        "set data.too_long to drop or truncate"
                    )
                shortened[action] += 1
                pieces = _shorten(tokens, flags, sequence_length, action)
            for piece, weights in pieces:
                weights[:1] = False  # the first token has no context to be predicted from
                ids.append(piece)
                is_target.append(weights)
    if not ids:
        raise UserError(
            f"all {len(examples)} examples in {', '.join(paths)} are longer than data.sequence_length="
            f"{sequence_length}; increase it (the longest example has {longest} tokens)"
        )
    lengths = np.array([len(tokens) for tokens in ids], dtype=np.int64)
    targets = np.array([flags.sum() for flags in is_target], dtype=np.int64)
    if not targets.any():
        raise UserError(
            f"{', '.join(paths)}: no token carries loss; a chat needs an assistant message within "
            f"data.sequence_length={sequence_length} tokens"
        )
    report = _report(lengths, targets, shortened, sequence_length, longest)
    return Documents(ids, is_target, lengths, targets, _fingerprint(ids, is_target), report)


def _report(lengths: np.ndarray, targets: np.ndarray, shortened: Counter, sequence_length: int, longest: int) -> str:
    report = (
        f"{len(lengths)} examples, {lengths.sum():,} tokens ({lengths.mean():.0f} per example, longest {lengths.max()}), "
        f"{targets.sum():,} of them targets"
    )
    if shortened["drop"]:
        report += f"; DROPPED {shortened['drop']} longer than {sequence_length} (longest {longest})"
    if shortened["truncate"]:
        report += f"; TRUNCATED {shortened['truncate']} to {sequence_length} (longest {longest})"
    if shortened["cut"]:
        report += f"; {shortened['cut']} long texts CUT into pieces of {sequence_length}, each counted as an example"
    without_target = int((targets == 0).sum())
    return report + (f"; {without_target} without any target token" if without_target else "")


def _encode(encoder: ExampleEncoder, example: dict, where: str) -> list[tuple[np.ndarray, np.ndarray]]:
    outcome = encoder.encode([example])[0]
    if outcome.error:
        raise UserError(f"{where}: {outcome.error}")
    return [(sequence.ids, sequence.weights()) for sequence in outcome.sequences]


def _shorten(tokens: np.ndarray, flags: np.ndarray, size: int, action: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(token ids, target flags) of what is kept of an example of more than `size` tokens.

    `cut` makes pieces that each begin with the last token of the one before. The first token of a piece cannot be a
    target, so without this overlap every cut would lose one target.
    """
    if action == "drop":
        return []
    if action == "truncate":
        return [(tokens[:size], flags[:size])]
    pieces = [tokens[i : i + size] for i in range(0, len(tokens) - 1, max(1, size - 1))]
    return [(piece, np.ones(len(piece), dtype=bool)) for piece in pieces]


def _fingerprint(ids: list[np.ndarray], is_target: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for tokens, flags in zip(ids, is_target, strict=True):
        digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes() + flags.tobytes())
    return digest.hexdigest()
