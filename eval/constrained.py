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
    """What an answer may be. `free_after`: once the text contains it, everything may follow."""

    pattern: str
    free_after: str
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]


@dataclass
class ConstrainedAnswer:
    """One answer that grows token by token."""

    grammar: Grammar
    ids: list[int] = field(default_factory=list)
    text: str = ""

    def choose(self, candidates: Iterable[int]) -> int:
        """Append the first of `candidates` (from the most probable on) that the grammar allows, and return it.

        A stop token is allowed where the answer is complete. If nothing is allowed, the answer ends.
        """
        for token in candidates:
            if token in self.grammar.stop_ids:
                if self._matches(self.text, partial=False):
                    return token
                continue
            text = self.grammar.tokenizer.decode([*self.ids, token], skip_special_tokens=True)
            # Special tokens add no text. The bytes of a character may be spread over several tokens.
            if len(text) > len(self.text) and self._matches(text.rstrip("\ufffd"), partial=True):
                self.ids.append(token)
                self.text = text
                return token
        return min(self.grammar.stop_ids)

    def _matches(self, text: str, partial: bool) -> bool:
        if self.grammar.free_after in text and partial:
            return True
        return regex.fullmatch(self.grammar.pattern, text, flags=regex.DOTALL, partial=partial) is not None


def most_probable_allowed(grammar: Grammar):  # noqa: ANN201 (an eval.generate.SelectTokens)
    """The token selection of one batch: the most probable token of each row that `grammar` allows."""
    answers: dict[int, ConstrainedAnswer] = {}

    def select(logits: torch.Tensor, rows: list[int], step: int) -> torch.Tensor:
        tokens = [
            answers.setdefault(row, ConstrainedAnswer(grammar)).choose(_by_probability(scores))
            for row, scores in zip(rows, logits, strict=True)
        ]
        return torch.tensor(tokens, device=logits.device)

    return select


def _by_probability(scores: torch.Tensor) -> Iterator[int]:
    """The tokens of one row `(vocabulary,)`, the most probable first."""
    first = scores.topk(min(FIRST_TRIES, len(scores))).indices.tolist()
    yield from first
    tried = set(first)
    yield from (token for token in scores.argsort(descending=True).tolist() if token not in tried)
