"""Greedy decoding inside a grammar: of the tokens that keep the answer well-formed, the most probable one is taken.

The grammar is a regular expression over the text of the answer. A text is inside it as long as some continuation matches
(partial matching of the `regex` module), so no table of the vocabulary is needed and any tokenizer works.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import regex
import torch
from transformers import PreTrainedTokenizerBase

FIRST_TRIES = 32  # tokens that are tried before the whole vocabulary is sorted


@dataclass(frozen=True)
class Grammar:
    """What an answer may be. `free_after`: once the text contains it, everything but a special token may follow."""

    pattern: str
    free_after: str
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]

    def is_complete(self, text: str) -> bool:
        """Whether an answer may end here."""
        return regex.fullmatch(self.pattern, text, flags=regex.DOTALL) is not None

    def can_be_continued(self, text: str) -> bool:
        """Whether some continuation of a text is a complete answer. A part of a character (U+FFFD) is none."""
        match = regex.fullmatch(self.pattern, text, flags=regex.DOTALL, partial=True)
        return match is not None and not text.endswith("\ufffd")


@dataclass
class ConstrainedAnswer:
    """One answer that grows token by token."""

    grammar: Grammar
    ids: list[int] = field(default_factory=list)
    is_free: bool = False

    def choose(self, candidates: Iterable[int]) -> int:
        """Append the first of `candidates` (from the most probable on) that the grammar allows, and return it.

        A stop token is allowed where the answer is complete. If nothing is allowed, the answer ends.
        """
        special = {*self.grammar.tokenizer.all_special_ids, *self.grammar.stop_ids}
        for token in candidates:
            if token in self.grammar.stop_ids and self.grammar.is_complete(self._text()):
                return token
            if token not in special and (self.is_free or self._allows(token)):
                self.ids.append(token)
                return token
        return min(self.grammar.stop_ids)

    def _allows(self, token: int) -> bool:
        text = self._text(token)
        self.is_free = self.grammar.free_after in text
        return self.is_free or self.grammar.can_be_continued(text)

    def _text(self, *more: int) -> str:
        return str(self.grammar.tokenizer.decode([*self.ids, *more]))


def most_probable_allowed(grammar: Grammar):  # noqa: ANN201 (an eval.generate.SelectTokens)
    """The token selection of one set of prompts: the most probable token of each row that `grammar` allows."""
    answers: dict[int, ConstrainedAnswer] = {}

    def select(logits: torch.Tensor, rows: list[int], steps: list[int]) -> torch.Tensor:
        tokens = [
            answers.setdefault(row, ConstrainedAnswer(grammar)).choose(_by_probability(scores))
            for row, scores in zip(rows, logits, strict=True)
        ]
        return torch.tensor(tokens, device=logits.device)

    return select


def _by_probability(scores: torch.Tensor) -> Iterator[int]:
    """The tokens of one row `(vocabulary,)`, the most probable first; of equal ones the first, as `argmax` takes it.

    In bf16 the two most probable tokens are often equal.
    """
    top = scores.topk(min(FIRST_TRIES, len(scores))).indices.sort().values
    first = top[scores[top].argsort(descending=True, stable=True)].tolist()
    yield from first
    tried = set(first)
    yield from (token for token in scores.argsort(descending=True, stable=True).tolist() if token not in tried)
