"""Splits: each test has what its name says, and training does not have it."""

import random
from collections import Counter

import pytest

from common.errors import UserError
from xbrl.corpus.splits import FULL_SPLITS, group_by_split, split_banks, split_examples

SHARES = (0.6, 0.1, 0.1, 0.1, 0.1)


def test_the_short_profile_is_split_by_bank():
    banks = [f"B{number}" for number in range(20)]
    split = split_banks(banks, (0.8, 0.1, 0.1), seed=4)
    assert [list(split.values()).count(name) for name in ("train", "validation", "test")] == [16, 2, 2]
    assert split == split_banks(banks, (0.8, 0.1, 0.1), seed=4) != split_banks(banks, (0.8, 0.1, 0.1), seed=5)
    with pytest.raises(UserError, match="add up to 1"):
        split_banks(banks, (0.8, 0.1, 0.2), seed=4)
    with pytest.raises(UserError, match="too few"):
        split_banks(banks[:2], (0.8, 0.1, 0.1), seed=4)
    with pytest.raises(UserError, match="none negative"):
        split_banks(banks, (float("nan"), 0, 1), seed=4)


def examples_of(banks=40, quarters=4):
    rules = ["A", "B", "C", "D", "E"]
    made = []
    for bank in range(banks):
        for quarter in range(quarters):
            number = bank * 7 + quarter * 3
            violated = sorted({rules[number % 5], rules[(number * 3 + bank) % 5]}) if number % 3 else []
            period = f"2026-{3 * (quarter + 1):02}-30"
            made.append({"id": f"{bank}-{period}", "bank": str(bank), "period": period, "violations": violated})
    return made


def test_training_has_none_of_the_banks_quarters_and_combinations_of_the_tests():
    examples = examples_of()
    splits = split_examples(examples, SHARES, seed=0)
    parts = group_by_split(examples, splits, FULL_SPLITS)
    train_banks = {one["bank"] for one in parts["train"]}
    assert not train_banks & {one["bank"] for one in parts["test_banks"] + parts["validation"]}
    assert len(parts["test_banks"]) == len(parts["validation"]) == 16
    seen = {tuple(one["violations"]) for one in parts["train"]}
    assert parts["test_combinations"]
    for one in parts["test_combinations"]:
        assert tuple(one["violations"]) not in seen and len(one["violations"]) > 1
    assert len(parts["test_quarters"]) == 16
    for one in parts["test_quarters"]:
        assert one["bank"] in train_banks and one["period"] == "2026-12-30"
    counts = Counter(rule for one in parts["train"] for rule in one["violations"])
    assert set(counts) == set("ABCDE")
    assert splits == split_examples(examples, SHARES, seed=0) != split_examples(examples, SHARES, seed=1)


def test_banks_in_test_quarters_are_in_training_too():
    examples = examples_of(60, 2)
    shuffled = [one["violations"] for one in examples]
    random.Random(0).shuffle(shuffled)
    for one, violated in zip(examples, shuffled, strict=True):
        one["violations"] = violated
    for seed in range(10):
        parts = group_by_split(examples, split_examples(examples, (0.4, 0.1, 0.1, 0.3, 0.1), seed), FULL_SPLITS)
        banks = {name: {one["bank"] for one in part} for name, part in parts.items()}
        assert banks["test_quarters"] and banks["test_quarters"] <= banks["train"]


def test_training_keeps_at_least_half_of_each_rule():
    examples = examples_of()
    for number, one in enumerate(examples):
        one["violations"] = ["A", "B"] if number % 20 == 0 else ["A", "C"] if number % 20 == 1 else ["A"]
    with pytest.raises(UserError, match="'test_combinations'"):  # B and C each occur in a single combination
        split_examples(examples, (0.3, 0.1, 0.1, 0.1, 0.4), seed=0)


def test_no_combination_dominates_its_test():
    examples = examples_of(400, 4)
    for number, one in enumerate(examples):  # {R0, R1} in 80 reports; in the rest, R0 or R1 with one of 150 other rules
        pair = (0, 1) if number % 20 == 0 else (number % 2, 2 + number // 2 % 150)
        one["violations"] = [f"R{place}" for place in pair]
    for seed in range(8):
        parts = group_by_split(examples, split_examples(examples, SHARES, seed), FULL_SPLITS)
        held_out = Counter(tuple(one["violations"]) for one in parts["test_combinations"])
        assert 120 <= held_out.total() <= 160
        assert max(held_out.values()) <= 20


def test_invalid_shares():
    with pytest.raises(UserError, match="5 shares"):
        split_examples(examples_of(), (0.8, 0.1, 0.1), seed=0)
    with pytest.raises(UserError, match="too few"):
        split_examples(examples_of(3, 1), SHARES, seed=0)
