"""Example files (JSONL, `messages` or `text`) -> tokenised documents in memory, with everything left out counted."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.tokens import encode_chat, encode_document
from errors import UserError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Documents:
    """Tokenised examples, one document each, in file order.

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


def read_examples(path: str | Path) -> list[dict]:
    """The examples of a JSONL file, checked for shape. Raises UserError with the file and the line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; data files are JSONL with `messages` or `text` in each line")
    examples = []
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    examples.append(_checked(line, f"{path}, line {number}"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not examples:
        raise UserError(f"{path} holds no example")
    return examples


def load_documents(
    paths: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    too_long: str,
    progress: Callable[[list], Iterable] | None = None,
) -> Documents:
    """Read and tokenise example files.

    too_long says what becomes of examples above `sequence_length` tokens: `drop`, `truncate` (the end is cut) or
    `error`. progress: wraps the list of examples, e.g. tqdm. Raises UserError for a bad file or where nothing is left.
    """
    examples = [(f"{path}, example {i}", example) for path in paths for i, example in enumerate(read_examples(path), 1)]
    ids, is_target, dropped, truncated, silent, longest = [], [], 0, 0, 0, 0
    for where, example in progress(examples) if progress else examples:
        try:
            if "messages" in example:
                tokens, flags = encode_chat(tokenizer, example["messages"])
            else:
                tokens, flags = encode_document(tokenizer, example["text"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        longest = max(longest, len(tokens))
        if len(tokens) > sequence_length:
            if too_long == "error":
                raise UserError(
                    f"{where} has {len(tokens)} tokens, data.sequence_length={sequence_length}; raise it, or choose "
                    "data.too_long=drop or truncate"
                )
            if too_long == "drop":
                dropped += 1
                continue
            truncated += 1
            tokens, flags = tokens[:sequence_length], flags[:sequence_length]
        flags = np.array(flags, dtype=bool)
        flags[:1] = False  # the first token has nothing to be predicted from
        silent += not flags.any()
        ids.append(np.array(tokens, dtype=np.int64))
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
    report = (
        f"{len(ids)} examples, {lengths.sum():,} tokens ({lengths.mean():.0f} an example, longest {lengths.max()}), "
        f"{targets.sum():,} of them targets"
    )
    report += f"; DROPPED {dropped} longer than {sequence_length} (longest {longest})" if dropped else ""
    report += f"; TRUNCATED {truncated} to {sequence_length} (longest {longest})" if truncated else ""
    report += f"; {silent} without any target token" if silent else ""
    return Documents(ids, is_target, lengths, targets, _fingerprint(ids, is_target), report)


def _checked(line: str, where: str) -> dict:
    try:
        example = json.loads(line.strip())
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(example, dict) or not ("messages" in example or "text" in example):
        raise UserError(f"{where} has neither `messages` nor `text`")
    if "messages" not in example:
        if not isinstance(example["text"], str) or not example["text"]:
            raise UserError(f"{where}: `text` must be a text that is not empty")
        return example
    messages = example["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: `messages` must be a list that is not empty")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(f"{where}: message {i} needs a `role`, one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"{where}: message {i} needs `content`, a text")
    return example


def _fingerprint(ids: list[np.ndarray], is_target: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for tokens, flags in zip(ids, is_target, strict=True):
        digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes() + flags.tobytes())
    return digest.hexdigest()
