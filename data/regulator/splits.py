"""Which example goes where, and whether a test says what training has said.

A corpus of the short form has three splits by bank. The full one has five: beside training and validation there are three
tests, of banks, of quarters and of combinations of violations that training has not seen.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from common.errors import UserError

SPLITS = ("train", "validation", "test")
FULL_SPLITS = ("train", "validation", "test_banks", "test_quarters", "test_combinations")
DEFAULT_SHARES = {SPLITS: (0.8, 0.1, 0.1), FULL_SPLITS: (0.72, 0.06, 0.08, 0.08, 0.06)}
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = re.compile(rf"\b\d{{1,2}} (?:{_MONTHS}) \d{{4}}\b|\b\d{{4}}-\d\d-\d\d\b")
_CODE = re.compile(r"\b[A-Z0-9]{18}[0-9]{2}\b")
_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")


def split_banks(banks: Sequence[str], shares: Sequence[float], seed: int) -> dict[str, str]:
    """Bank -> split, every report of a bank in one split. `shares` are of the banks, for train, validation, test.

    Raises `UserError` if they do not add up to 1 or leave a split with a share without a bank.
    """
    if len(shares) != len(SPLITS) or any(share < 0 for share in shares) or abs(sum(shares) - 1) > 1e-9:
        raise UserError(f"the splits {list(shares)} must be three shares (train, validation, test) that add up to 1.")
    order = list(banks)
    random.Random(f"splits {seed}").shuffle(order)
    first = round(len(order) * shares[0])
    second = first + round(len(order) * shares[1])
    parts = dict(zip(SPLITS, (order[:first], order[first:second], order[second:]), strict=True))
    for (split, members), share in zip(parts.items(), shares, strict=True):
        if share > 0 and not members:
            raise UserError(
                f"{len(order)} banks are too few for a share of {share} in {split!r}; ask for more examples."
            )
    return {bank: split for split, members in parts.items() for bank in members}


def split_examples(examples: Sequence[dict], shares: Sequence[float], seed: int) -> list[str]:
    """The split of each example, in their order. `shares` are of the examples, for `FULL_SPLITS`, nearly kept.

    - `test_banks` and `validation` hold all reports of some banks.
    - `test_combinations` holds every report of the other banks with one of some combinations of two and more violations.
      Each rule of such a combination stays in training at least as often as it is taken out.
    - `test_quarters` holds the last report of some of the other banks.

    Raises `UserError` if the shares do not add up to 1 or leave a split with a share without an example.
    """
    if len(shares) != len(FULL_SPLITS) or any(share < 0 for share in shares) or abs(sum(shares) - 1) > 1e-9:
        raise UserError(f"the splits {list(shares)} must be five shares ({', '.join(FULL_SPLITS)}) that add up to 1.")
    share = dict(zip(FULL_SPLITS, shares, strict=True))
    rng = random.Random(f"splits {seed}")
    banks = sorted({example["bank"] for example in examples})
    rng.shuffle(banks)
    first = round(len(banks) * share["test_banks"])
    second = first + round(len(banks) * share["validation"])
    of_bank = dict.fromkeys(banks[:first], "test_banks") | dict.fromkeys(banks[first:second], "validation")
    rest = [example for example in examples if example["bank"] not in of_bank]
    combinations = _held_out(rest, round(len(examples) * share["test_combinations"]), rng)
    last: dict[str, str] = {}
    for example in rest:
        last[example["bank"]] = max(last.get(example["bank"], ""), example["period"])
    kept = [example for example in rest if frozenset(example["violations"]) not in combinations]
    several = Counter(example["bank"] for example in kept)  # one of which stays in training
    late = [example for example in kept if example["period"] == last[example["bank"]] and several[example["bank"]] > 1]
    wanted = round(len(examples) * share["test_quarters"])
    quarters = {example["id"] for example in rng.sample(late, min(wanted, len(late)))}
    splits = [
        of_bank.get(example["bank"])
        or ("test_combinations" if frozenset(example["violations"]) in combinations else None)
        or ("test_quarters" if example["id"] in quarters else "train")
        for example in examples
    ]
    for name, part in share.items():
        if part > 0 and name not in splits:
            raise UserError(
                f"{len(examples)} examples are too few for a share of {part} in {name!r}; give more, or a share of 0."
            )
    return splits


def _held_out(examples: Sequence[dict], wanted: int, rng: random.Random) -> set[frozenset[str]]:
    """Combinations of violations with together about `wanted` examples, whose rules training keeps in other company."""
    counts = Counter(frozenset(example["violations"]) for example in examples)
    left = Counter(rule_id for example in examples for rule_id in example["violations"])
    total = dict(left)
    candidates = sorted((combination for combination in counts if len(combination) > 1), key=sorted)
    rng.shuffle(candidates)
    taken: set[frozenset[str]] = set()
    held = 0
    for combination in candidates:
        number = counts[combination]
        enough = all(2 * (left[rule_id] - number) >= total[rule_id] for rule_id in combination)
        if held + number <= wanted and number <= max(10, wanted // 8) and enough:  # none is most of the test
            taken.add(combination)
            held += number
            for rule_id in combination:
                left[rule_id] -= number
    return taken


def mask(letter: str, names: Iterable[str]) -> str:
    """A letter without what tells one case from another: the given names, dates, codes of entities, and numbers."""
    for name in sorted(names, key=len, reverse=True):
        letter = letter.replace(name, "<name>")
    return _NUMBER.sub("<number>", _CODE.sub("<code>", _DATE.sub("<date>", letter)))


def leaks(training: Iterable[tuple[str, str]], test: Iterable[tuple[str, str]]) -> list[int]:
    """The places in `test` of letters that, masked, stand in `training`. Both are (letter, name of the bank)."""
    said = {mask(letter, [name]) for letter, name in training}
    return [place for place, (letter, name) in enumerate(test) if mask(letter, [name]) in said]
