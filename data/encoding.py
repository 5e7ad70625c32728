"""Examples -> token ids and the spans of tokens that carry loss. The one place where training, evaluation and
scripts/show_example.py turn an example into what the model gets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from data.tokens import encode_chat, encode_document


class Span(NamedTuple):
    """Tokens `start` to `end` (exclusive) are targets. `weight` is the factor of their loss, above 0."""

    start: int  # at least 1: the first token has no context to be predicted from
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class Encoded:
    """One sequence of tokens. ids: int64 `(length,)`. spans: disjoint and in order; empty if nothing carries loss."""

    ids: np.ndarray
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of one example: its sequences, or an error.

    A chat has several sequences if its template rewrites earlier turns. notes: what is unusual about it, keys of `NOTES`.
    """

    sequences: tuple[Encoded, ...] = ()
    notes: tuple[str, ...] = ()
    error: str | None = None  # one sentence without the file and line


# What the report of a data file says about the examples that have a note; {n} is their number.
NOTES: dict[str, str] = {}


@dataclass(frozen=True)
class ChatSettings:
    """How chats are rendered: the settings data.chat_template (its text), chat_template_options, chat_date and train_on."""

    template: str | None = None
    options: dict[str, object] = field(default_factory=dict)
    date: str | None = None
    train_on: str = "all"


class ExampleEncoder:
    """Encodes examples with one tokenizer and one set of settings. The result depends on nothing else."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: ChatSettings | None = None) -> None:
        self.tokenizer = tokenizer
        self.settings = settings or ChatSettings()

    def fingerprint(self) -> dict[str, object]:
        """Everything besides the example that determines an outcome, as plain JSON: a key for caches."""
        return {}

    def encode(self, examples: Sequence[dict]) -> list[Outcome]:
        """One outcome per example (the canonical form of data/formats.py), in order. Tokenises the batch in one call."""
        return [self._encode_one(example) for example in examples]

    def _encode_one(self, example: dict) -> Outcome:
        try:
            if "messages" in example:
                ids, flags = encode_chat(self.tokenizer, example["messages"])
            else:
                ids, flags = encode_document(self.tokenizer, example["text"])
        except UserError as error:
            return Outcome(error=str(error))
        flags[:1] = [False]
        edges = np.flatnonzero(np.diff(np.array([False, *flags, False], dtype=np.int8))).tolist()
        spans = tuple(Span(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True))
        return Outcome((Encoded(np.array(ids, dtype=np.int64), spans),))
