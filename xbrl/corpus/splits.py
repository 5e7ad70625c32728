"""Assign examples to the splits of a corpus.

The short profile has three splits, by bank: `SPLITS`. The full profile has five, `FULL_SPLITS`: besides training and
validation there are three tests, on banks, on quarters and on combinations of violations that do not occur in training.
"""

import random
from collections import Counter
from collections.abc import Sequence

from common.errors import UserError

SPLITS = ("train", "validation", "test")
FULL_SPLITS = ("train", "validation", "test_banks", "test_quarters", "test_combinations")
DEFAULT_SHARES = {SPLITS: (0.8, 0.1, 0.1), FULL_SPLITS: (0.72, 0.06, 0.08, 0.08, 0.06)}


def group_by_split(examples: Sequence, splits: Sequence[str], names: Sequence[str]) -> dict[str, list]:
    """Split name -> its examples, in their order. `splits` has the split of each example."""
    return {name: [one for one, split in zip(examples, splits, strict=True) if split == name] for name in names}


def check_shares(shares: Sequence[float], names: Sequence[str]) -> None:
    """Raises `UserError` unless there is one share for each name, none is negative, and they add up to 1."""
    # A share that is not a number fails the comparison, which is why it is not written the other way round.
    if len(shares) != len(names) or not (all(share >= 0 for share in shares) and abs(sum(shares) - 1) <= 1e-9):
        raise UserError(
            f"the splits {list(shares)} must be {len(names)} shares ({', '.join(names)}), none negative, that add up to 1."
        )


def split_banks(banks: Sequence[str], shares: Sequence[float], seed: int) -> dict[str, str]:
    """Bank -> split, at random. `shares` are the fractions of the banks for train, validation and test.

    Raises `UserError` if they do not add up to 1, or if a split with a share above 0 would get no bank.
    """
    check_shares(shares, SPLITS)
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
    """The split of each example, one of `FULL_SPLITS`.

    `shares` are the fractions of the examples for `FULL_SPLITS`. They are met approximately:

    - `test_banks` and `validation` have all reports of some banks.
    - `test_combinations` has all reports of the remaining banks that violate one of some combinations of two or more
      rules. Of the reports that violate a rule of such a combination, at least half stay out of this split.
    - `test_quarters` has the last report of some of the remaining banks.

    Raises `UserError` if the shares do not add up to 1, or if a split with a share above 0 would get no example.
    """
    check_shares(shares, FULL_SPLITS)
    share_of = dict(zip(FULL_SPLITS, shares, strict=True))
    rng = random.Random(f"splits {seed}")
    banks = sorted({example["bank"] for example in examples})
    rng.shuffle(banks)
    first = round(len(banks) * share_of["test_banks"])
    second = first + round(len(banks) * share_of["validation"])
    split_of_bank = dict.fromkeys(banks[:first], "test_banks") | dict.fromkeys(banks[first:second], "validation")
    rest = [example for example in examples if example["bank"] not in split_of_bank]
    combinations = _held_out_combinations(rest, round(len(examples) * share_of["test_combinations"]), rng)
    last_reports = _last_reports(rest, combinations)
    wanted = round(len(examples) * share_of["test_quarters"])
    quarters = set(rng.sample(last_reports, min(wanted, len(last_reports))))
    splits = [
        split_of_bank.get(example["bank"])
        or ("test_combinations" if frozenset(example["violations"]) in combinations else None)
        or ("test_quarters" if example["id"] in quarters else "train")
        for example in examples
    ]
    for name, share in share_of.items():
        if share > 0 and name not in splits:
            raise UserError(
                f"{len(examples)} examples are too few for a share of {share} in {name!r}; give more, or a share of 0."
            )
    return splits


def _held_out_combinations(examples: Sequence[dict], wanted: int, rng: random.Random) -> set[frozenset[str]]:
    """Choose combinations of violations that together cover about `wanted` examples.

    At most half of the reports that violate a rule are held out. No single combination dominates the test.
    """
    counts = Counter(frozenset(example["violations"]) for example in examples)
    remaining = Counter(rule_id for example in examples for rule_id in example["violations"])
    total = dict(remaining)
    candidates = sorted((combination for combination in counts if len(combination) > 1), key=sorted)
    rng.shuffle(candidates)
    chosen: set[frozenset[str]] = set()
    held_out = 0
    for combination in candidates:
        number = counts[combination]
        rules_remain = all(2 * (remaining[rule_id] - number) >= total[rule_id] for rule_id in combination)
        if held_out + number <= wanted and number <= max(10, wanted // 8) and rules_remain:
            chosen.add(combination)
            held_out += number
            for rule_id in combination:
                remaining[rule_id] -= number
    return chosen


def _last_reports(examples: Sequence[dict], held_out: set[frozenset[str]]) -> list[str]:
    """Ids of the last report of each bank, unless it is held out or would leave no report of the bank for training."""
    last: dict[str, str] = {}
    for example in examples:
        last[example["bank"]] = max(last.get(example["bank"], ""), example["period"])
    kept = [example for example in examples if frozenset(example["violations"]) not in held_out]
    reports_of_bank = Counter(example["bank"] for example in kept)
    return [
        example["id"]
        for example in kept
        if example["period"] == last[example["bank"]] and reports_of_bank[example["bank"]] > 1
    ]
