"""Few-shot prompts: examples of the training split as earlier turns of the conversation."""

import random
from collections.abc import Callable, Sequence

from eval.asked_examples import Item


def choose_shots(training: Sequence[Item], number: int) -> list[Item]:
    """`number` training examples, a random choice that is always the same."""
    return random.Random(0).sample(list(training), min(number, len(training)))


def with_shots(messages: Sequence[dict], shots: Sequence[dict]) -> list[dict]:
    """A conversation in which the `shots` come before its own turns, and after its system message."""
    start = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    turns = [message for shot in shots for message in shot["messages"] if message["role"] != "system"]
    return [*messages[:start], *turns, *messages[start:]]


def fitting_prompt(
    messages: Sequence[dict], shots: Sequence[dict], encode: Callable[[list[dict]], list[int]], room: float
) -> tuple[list[int], int]:
    """(token ids of the prompt, number of shots in it): as many of the `shots`, from the first on, as `room` tokens hold."""
    for number in range(len(shots), -1, -1):
        ids = encode(with_shots(messages, shots[:number]))
        if len(ids) <= room or not number:
            return ids, number
    raise AssertionError("the loop ends with no shots at all")
