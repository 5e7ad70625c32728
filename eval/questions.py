"""A small closed set of general questions, answered by likelihood: which of the options does the model find most probable?

Written for this project (eval/questions.jsonl, the first option is the right one): facts, arithmetic, grammar, meanings of
words, sequences, common sense, code. They are plain beginnings of text, so that a base model can answer them too, and no
chat template is involved, whose answers fine-tuning would change for other reasons than forgetting.

An option's score is its summed log-likelihood after the prompt, divided by its bytes in UTF-8. The sum alone favours short
options, since each further token can only lower it. Bytes and not tokens, since a vocabulary that was extended cuts the same
option into other tokens, and a mean per token would change although the model's opinion did not.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

FILE = Path(__file__).with_name("questions.jsonl")


@dataclass(frozen=True)
class Question:
    """A beginning of text and its continuations, the first of which is the right one."""

    kind: str
    prompt: str
    options: tuple[str, ...]  # each with the space before it, where one belongs there


def read_questions(path: Path = FILE) -> list[Question]:
    """All questions, in the order of the file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Question(q["kind"], q["prompt"], tuple(q["options"])) for q in map(json.loads, lines)]


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before a text, so that its first token is predicted from something: BOS where the tokenizer puts one,
    else a line break. So all bytes of a text count, with any tokenizer."""
    return tokenizer.encode("") or tokenizer.encode("\n", add_special_tokens=False)


def encode_options(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> list[tuple[list[int], list[bool]]]:
    """(token ids, is_target) of every option of every question, in order; the option's own tokens are the targets.

    Prompt and option are encoded together. A token that holds the end of one and the beginning of the other is a target.
    """
    first, sequences = beginning(tokenizer), []
    for question in questions:
        prompt = tokenizer.encode(question.prompt, add_special_tokens=False)
        for option in question.options:
            ids = tokenizer.encode(question.prompt + option, add_special_tokens=False)
            pairs = zip(prompt, ids, strict=False)
            common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(ids) - 1))
            given = len(first) + common
            sequences.append((first + ids, [False] * given + [True] * (len(ids) - common)))
    return sequences


def right_answers(questions: Sequence[Question], nats: Sequence[float]) -> list[bool]:
    """Of each question whether its first option is the most probable per byte. nats: -log-likelihood of every option, in order."""
    right, start = [], 0
    for question in questions:
        per_byte = [
            loss / len(option.encode())
            for option, loss in zip(question.options, nats[start : start + len(question.options)], strict=True)
        ]
        right.append(all(per_byte[0] < other for other in per_byte[1:]))
        start += len(question.options)
    return right
