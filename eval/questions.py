"""A small closed set of general questions, scored by which option the model finds most probable.

The questions were written for this project (eval/questions.jsonl; the first option is the right one): facts,
arithmetic, grammar, word meanings, sequences, common sense, code. Each is a plain beginning of a text with possible
continuations. A base model can therefore be scored too, and no chat template is involved, because fine-tuning would
change the answers under a template for reasons other than forgetting.

The score of an option is its summed log-likelihood after the prompt, divided by its length in UTF-8 bytes. The sum
alone would favour short options, because every further token can only lower it. The length is in bytes and not in
tokens, because an extended vocabulary splits the same option into other tokens, which would change a mean per token
even if the model's probabilities stayed the same.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data.tokens import bos_ids

FILE = Path(__file__).with_name("questions.jsonl")


@dataclass(frozen=True)
class Question:
    """The beginning of a text and its possible continuations. The first one is right."""

    kind: str
    prompt: str
    options: tuple[str, ...]  # each includes the space before it, if one belongs there


def read_questions() -> list[Question]:
    """Return all questions, in the order of the file."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return [Question(q["kind"], q["prompt"], tuple(q["options"])) for q in map(json.loads, lines)]


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens to place before a text, so that its first token is predicted too.

    BOS if the tokenizer adds it, else a newline. With them, the loss covers every byte of the text under any tokenizer.
    """
    return bos_ids(tokenizer) or tokenizer.encode("\n", add_special_tokens=False)


def encode_options(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> list[tuple[list[int], list[bool]]]:
    """Return (token ids, is_target) of every option of every question, in order. The targets are the tokens of the option.

    Prompt and option are tokenized together. A token that spans the boundary between them is a target.
    """
    start, sequences = start_tokens(tokenizer), []
    for question in questions:
        prompt = tokenizer.encode(question.prompt, add_special_tokens=False)
        for option in question.options:
            ids = tokenizer.encode(question.prompt + option, add_special_tokens=False)
            pairs = zip(prompt, ids, strict=False)
            common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(ids) - 1))
            context = len(start) + common
            sequences.append((start + ids, [False] * context + [True] * (len(ids) - common)))
    return sequences


def right_answers(questions: Sequence[Question], nats: Sequence[float]) -> list[bool]:
    """Return for each question whether its first option has the highest likelihood per byte.

    nats: the negative log-likelihood of every option of every question, in order. A tie is not a right answer.
    """
    right, start = [], 0
    for question in questions:
        per_byte = [
            loss / len(option.encode())
            for option, loss in zip(question.options, nats[start : start + len(question.options)], strict=True)
        ]
        right.append(all(per_byte[0] < wrong for wrong in per_byte[1:]))
        start += len(question.options)
    return right
