"""The examples that every arm trains on: synthetic chats, generated from a seed and tokenised once by our own code.

Every arm gets the same token ids and the same targets (the assistant's tokens and its end-of-turn token). In the settings
`parity` and `matched` every arm also gets the same examples in each step, in the order of our batch plan. In `defaults`
each of the other trainers orders and packs the examples in its own way.
"""

import dataclasses
import json
import random
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
class Workload:
    """The training examples of one setting."""

    jsonl: Path  # chats (`messages`), for our own arm
    tokens: Path  # JSON for the other trainers: `examples` [{input_ids, labels}] and `steps` [[example index]]
    lengths: tuple[int, ...]  # tokens of each example
    targets: tuple[int, ...]  # target tokens of each example
    steps: tuple[tuple[int, ...], ...]  # example indices of each step of our batch plan
    sequence_length: int


def make_chat(rng: random.Random) -> list[dict]:
    """A synthetic report of 2 to 12 lines, biased towards few lines, and an answer of about the same number of tokens."""
    lines, answers = [], []
    for quarter in range(1, min(rng.randint(2, 12), rng.randint(2, 12)) + 1):
        name, minimum = rng.choice(RATIOS)
        value = minimum * rng.uniform(0.7, 1.6)
        verdict = "is met" if value >= minimum else f"is missed by {minimum - value:.2f} points"
        lines.append(f"Q{quarter}: the {name} ratio stands at {value:.2f}%.")
        answers.append(f"Q{quarter}: the minimum of {minimum:g}% for {name} {verdict}.")
    question = f"Report of the bank of {rng.choice(TOWNS)}.\n" + "\n".join(lines) + "\nWhich ratios are too low?"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "\n".join(answers)}]


def make_workload(
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    batch: int,
    shortest: int,
    longest: int,
    seed: int = 0,
) -> Workload:
    """Write `steps * batch` examples of `shortest` to `longest` tokens into `directory`; the arguments determine the bytes."""
    rng, chats, encoder = random.Random(seed), [], ExampleEncoder(tokenizer)
    for _ in range(100 * steps * batch):
        chat = make_chat(rng)
        if shortest <= len(encoder.encode([{"messages": chat}])[0].sequences[0].ids) <= longest:
            chats.append(chat)
        if len(chats) == steps * batch:
            break
    else:
        raise UserError(
            f"too few synthetic chats have {shortest} to {longest} tokens with this tokenizer; choose other --lengths"
        )
    directory.mkdir(parents=True, exist_ok=True)
    jsonl, tokens = directory / "train.jsonl", directory / "tokens.json"
    jsonl.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    documents = load_documents((str(jsonl),), tokenizer, longest, "error")
    plan = plan_training(documents, epochs=1, seed=seed, global_examples=batch)
    order = tuple(plan.batch(step).items for step in range(plan.num_steps))
    examples = [
        {"input_ids": ids.tolist(), "labels": np.where(flags, ids, -100).tolist()}
        for ids, flags in zip(documents.ids, documents.weights, strict=True)
    ]
    tokens.write_text(json.dumps({"examples": examples, "steps": order}), encoding="utf-8")
    return Workload(jsonl, tokens, tuple(documents.lengths.tolist()), tuple(documents.targets.tolist()), order, longest)
