"""Keep letters of the test splits from repeating letters of the training split.

A letter leaks if a training letter is equal to it except for names, dates, entity codes and numbers.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from data.regulator.examples import letter_of
from data.regulator.splits import FULL_SPLITS, group_by_split, split_examples

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
    examples: Sequence[Sequence[dict]], shares: Sequence[float], seed: int, names: Mapping[str, str]
) -> tuple[dict[str, list[dict]], dict[str, dict[str, int]]]:
    """Assign examples to `FULL_SPLITS` so that no test letter leaks.

    Each example is given as its variants: the same report with different wordings of the letter. Training and
    validation use the first variant. A test uses the first variant that does not leak; an example whose variants all
    leak is dropped. `names` maps a bank to its name in letters (default: the bank's id).

    Returns (split -> examples, counts per test split). `reworded` counts the variants that were replaced by the next
    one, `dropped` the examples without a usable variant, and `leaks_left` is a final check that must be 0.
    """

    def letter_and_name(example: dict) -> tuple[str, str]:
        return letter_of(example), names.get(example["bank"], example["bank"])

    splits = split_examples([variants[0] for variants in examples], shares, seed)
    variants_of = group_by_split(examples, splits, FULL_SPLITS)
    training = [letter_and_name(variants[0]) for variants in variants_of["train"]]
    masked_training = {mask(letter, [name]) for letter, name in training}

    def is_leaking(example: dict) -> bool:
        letter, name = letter_and_name(example)
        return mask(letter, [name]) in masked_training

    placed: dict[str, list[dict]] = {}
    counts: dict[str, dict[str, int]] = {"reworded": {}, "dropped": {}, "leaks_left": {}}
    for split in FULL_SPLITS:
        if not split.startswith("test"):
            placed[split] = [variants[0] for variants in variants_of[split]]
            continue
        placed[split] = []
        reworded = 0
        for variants in variants_of[split]:
            n_leaking = sum(1 for _ in itertools.takewhile(is_leaking, variants))
            reworded += min(n_leaking, len(variants) - 1)
            placed[split] += variants[n_leaking : n_leaking + 1]  # empty if all variants leak
        counts["reworded"][split] = reworded
        counts["dropped"][split] = len(variants_of[split]) - len(placed[split])
        counts["leaks_left"][split] = len(leaks(training, map(letter_and_name, placed[split])))
    return placed, counts
