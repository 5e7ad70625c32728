"""The examples that every arm trains on: synthetic chats, generated from a seed and tokenised once by our own code.

Every arm gets the same token ids and the same targets (the assistant's tokens and its end-of-turn token). In the settings
`parity`, `matched` and `skewed` every arm also gets the same examples in each step, in the order of our batch plan. In `defaults`
each of the other trainers orders and packs the examples in its own way.
"""

import bisect
import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from data.batches import plan_training
from data.encoding import ExampleEncoder
from data.examples import load_documents

RATIOS = (
    ("own funds", 8.0),
    ("leverage", 3.0),
    ("liquidity coverage", 100.0),
    ("net stable funding", 100.0),
    ("Tier 1", 6.0),
    ("common equity", 4.5),
    ("large exposure to one client", 25.0),
    ("cover for non-performing loans", 35.0),
)
TOWNS = ("Dalsee", "Norden", "Altbach", "Rivemar", "Costaverde", "Lindholm", "Kastel", "Monteluce")


@dataclasses.dataclass(frozen=True)
class Shape:
    """How much work a setting is, and how it is cut into forward passes."""

    examples: int  # per step; in `defaults` of our own arm
    lengths: tuple[int, int]  # tokens of the shortest and of the longest example
    sequence_length: int  # tokens of a packed row of ours
    rows: int  # our own arm: rows in one forward pass
    micro_batch: int  # other trainers: examples in one forward pass
    skewed: bool = False  # lengths are spread log-uniformly, instead of being those of the generated chats


@dataclasses.dataclass(frozen=True)
class Workload:
    """The training examples of one setting."""

    jsonl: Path  # chats (`messages`), for our own arm
    tokens: Path  # JSON for the other trainers: `examples` [{input_ids, labels}] and `steps` [[example index]]
    lengths: tuple[int, ...]  # tokens of each example
    targets: tuple[int, ...]  # target tokens of each example
    steps: tuple[tuple[int, ...], ...]  # example indices of each step of our batch plan
    shape: Shape


def make_report(rng: random.Random, lines: int) -> tuple[list[str], list[str]]:
    """The lines of a synthetic report, and for each of them a line of the answer of about as many tokens."""
    report, answers = [], []
    for quarter in range(1, lines + 1):
        name, minimum = rng.choice(RATIOS)
        value = minimum * rng.uniform(0.7, 1.6)
        verdict = "is met" if value >= minimum else f"is missed by {minimum - value:.2f} points"
        report.append(f"Q{quarter}: the {name} ratio stands at {value:.2f}%.")
        answers.append(f"Q{quarter}: the minimum of {minimum:g}% for {name} {verdict}.")
    return report, answers


def make_chat(rng: random.Random) -> list[dict]:
    """A synthetic report of 2 to 12 lines, biased towards few lines, and an answer of about the same number of tokens."""
    report, answers = make_report(rng, min(rng.randint(2, 12), rng.randint(2, 12)))
    question = f"Report of the bank of {rng.choice(TOWNS)}.\n" + "\n".join(report) + "\nWhich ratios are too low?"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "\n".join(answers)}]


def make_chat_of_length(rng: random.Random, length: int, num_tokens: Callable[[list[dict]], int]) -> list[dict]:
    """A report and its answer, cut after as many words as `length` tokens hold, at least one word each.

    The system message is empty, because the default one of some templates is longer than the shortest chats.
    """
    report, answers = make_report(rng, 2 + length // 20)  # more than fit: a line and its answer have over 20 tokens
    questions, replies = ["Which", *" ".join(report).split()], ["None", *" ".join(answers).split()]

    def chat(words: int) -> list[dict]:
        system, user, assistant = "", " ".join(questions[:words]), " ".join(replies[:words])
        roles = ("system", "user", "assistant")
        return [{"role": r, "content": c} for r, c in zip(roles, (system, user, assistant), strict=True)]

    fitting = bisect.bisect_right(range(1, len(replies)), length, key=lambda words: num_tokens(chat(words)))
    return chat(max(1, fitting))


def make_chats(rng: random.Random, tokenizer: PreTrainedTokenizerBase, number: int, shape: Shape) -> list[list[dict]]:
    """`number` chats with lengths as `shape` says. Raises UserError if the generator does not make enough of them."""
    encoder, (shortest, longest) = ExampleEncoder(tokenizer), shape.lengths

    def num_tokens(chat: list[dict]) -> int:
        return len(encoder.encode([{"messages": chat}])[0].sequences[0].ids)

    if (
        shape.skewed
    ):  # one length from each of `number` equal parts of the logarithmic scale: any seed has the same spread
        shares = [(i + rng.random()) / number for i in range(number)]
        lengths = [round(shortest * (longest / shortest) ** share) for share in rng.sample(shares, number)]
        return [make_chat_of_length(rng, length, num_tokens) for length in lengths]
    chats = []
    for _ in range(100 * number):
        chat = make_chat(rng)
        if shortest <= num_tokens(chat) <= longest:
            chats.append(chat)
        if len(chats) == number:
            return chats
    raise UserError(
        f"too few synthetic chats have {shortest} to {longest} tokens with this tokenizer; choose other --lengths"
    )


def make_workload(
    directory: Path, tokenizer: PreTrainedTokenizerBase, steps: int, shape: Shape, seed: int = 0
) -> Workload:
    """Write the examples of `steps` steps into `directory`; the arguments determine the bytes."""
    chats = make_chats(random.Random(seed), tokenizer, steps * shape.examples, shape)
    directory.mkdir(parents=True, exist_ok=True)
    jsonl, tokens = directory / "train.jsonl", directory / "tokens.json"
    jsonl.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    documents = load_documents((str(jsonl),), tokenizer, shape.sequence_length, "error")
    plan = plan_training(documents, epochs=1, seed=seed, global_examples=shape.examples)
    # Within a step the order is that of the file, and not that of the plan: it decides how much the other trainers pad.
    order = tuple(tuple(sorted(plan.batch(step).items)) for step in range(plan.num_steps))
    examples = [
        {"input_ids": ids.tolist(), "labels": np.where(flags, ids, -100).tolist()}
        for ids, flags in zip(documents.ids, documents.weights, strict=True)
    ]
    tokens.write_text(json.dumps({"examples": examples, "steps": order}), encoding="utf-8")
    return Workload(jsonl, tokens, tuple(documents.lengths.tolist()), tuple(documents.targets.tolist()), order, shape)
