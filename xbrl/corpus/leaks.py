"""Keep letters of the test of an archive from repeating letters of its training.

A letter leaks if a training letter is equal to it except for names, dates, entity codes and numbers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from xbrl.corpus.examples import letter_of
from xbrl.corpus.splits import group_by_split, split_banks

_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = re.compile(rf"\b\d{{1,2}} (?:{_MONTHS}) \d{{4}}\b|\b\d{{4}}-\d\d-\d\d\b")
_CODE = re.compile(r"\b[A-Z0-9]{18}[0-9]{2}\b")
_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")


def mask(letter: str, names: Iterable[str]) -> str:
    """Replace the given names, dates, entity codes and numbers in a letter by placeholders."""
    for name in sorted(names, key=len, reverse=True):
        letter = letter.replace(name, "<name>")
    return _NUMBER.sub("<number>", _CODE.sub("<code>", _DATE.sub("<date>", letter)))


def leaks(training: Iterable[tuple[str, str]], test: Iterable[tuple[str, str]]) -> list[int]:
    """Indices of the test letters that, once masked, occur in training. Both are (letter, name of the bank) pairs."""
    known = {mask(letter, [name]) for letter, name in training}
    return [index for index, (letter, name) in enumerate(test) if mask(letter, [name]) in known]


def place_examples(
    examples: Sequence[dict], shares: Sequence[float], seed: int, names: Mapping[str, str]
) -> tuple[dict[str, list[dict]], int]:
    """Assign examples with letters of their own to the splits by bank, and drop the test examples whose letter leaks.

    `names` maps a bank to its name in letters (default: the bank's id). Returns (split -> examples, number of dropped
    examples).
    """
    split_of = split_banks(sorted({example["bank"] for example in examples}), shares, seed)
    placed = group_by_split(examples, [split_of[example["bank"]] for example in examples])
    letters = {
        split: [(letter_of(one), names.get(one["bank"], one["bank"])) for one in members]
        for split, members in placed.items()
    }
    leaking = set(leaks(letters["train"], letters["test"]))
    placed["test"] = [example for place, example in enumerate(placed["test"]) if place not in leaking]
    return placed, len(leaking)
