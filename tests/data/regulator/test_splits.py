"""Splits: what training has seen and what it has not; the leak test."""

import random
from collections import Counter

import pytest

from common.errors import UserError
from data.regulator.splits import FULL_SPLITS, leaks, mask, split_banks, split_examples

SHARES = (0.6, 0.1, 0.1, 0.1, 0.1)


def test_splits_are_by_bank():
    banks = [f"B{number}" for number in range(20)]
    split = split_banks(banks, (0.8, 0.1, 0.1), seed=4)
    assert [list(split.values()).count(name) for name in ("train", "validation", "test")] == [16, 2, 2]
    assert split == split_banks(banks, (0.8, 0.1, 0.1), seed=4) != split_banks(banks, (0.8, 0.1, 0.1), seed=5)
    with pytest.raises(UserError, match="add up to 1"):
        split_banks(banks, (0.8, 0.1, 0.2), seed=4)
    with pytest.raises(UserError, match="too few"):
        split_banks(banks[:2], (0.8, 0.1, 0.1), seed=4)


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


def test_three_kinds_of_test_that_training_has_not_seen():
    examples = examples_of()
    splits = split_examples(examples, SHARES, seed=0)
    parts = {name: [one for one, split in zip(examples, splits, strict=True) if split == name] for name in FULL_SPLITS}
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


def test_a_bank_in_the_test_of_quarters_is_in_training_too():
    examples = examples_of(60, 2)
    shuffled = [one["violations"] for one in examples]
    random.Random(0).shuffle(shuffled)
    for one, violated in zip(examples, shuffled, strict=True):
        one["violations"] = violated
    for seed in range(10):
        splits = split_examples(examples, (0.4, 0.1, 0.1, 0.3, 0.1), seed)
        banks = {
            name: {one["bank"] for one, split in zip(examples, splits, strict=True) if split == name}
            for name in FULL_SPLITS
        }
        assert banks["test_quarters"] and banks["test_quarters"] <= banks["train"]


def test_training_keeps_at_least_half_of_each_rule():
    examples = examples_of()
    for number, one in enumerate(examples):
        one["violations"] = ["A", "B"] if number % 4 == 0 else ["A", "C"] if number % 4 == 1 else ["A"]
    with pytest.raises(UserError, match="'test_combinations'"):  # B and C occur in one combination each
        split_examples(examples, (0.3, 0.1, 0.1, 0.1, 0.4), seed=0)


def test_no_combination_is_most_of_the_test():
    examples = examples_of(400, 4)
    for number, one in enumerate(examples):  # R0 with R1 in 80 reports, either with one of 150 others in the rest
        pair = (0, 1) if number % 20 == 0 else (number % 2, 2 + number // 2 % 150)
        one["violations"] = [f"R{place}" for place in pair]
    for seed in range(8):
        splits = split_examples(examples, SHARES, seed)
        pairs = (
            tuple(one["violations"])
            for one, split in zip(examples, splits, strict=True)
            if split == "test_combinations"
        )
        held = Counter(pairs)
        assert 120 <= held.total() <= 160
        assert max(held.values()) <= 20


def test_shares_that_cannot_be():
    with pytest.raises(UserError, match="five shares"):
        split_examples(examples_of(), (0.8, 0.1, 0.1), seed=0)
    with pytest.raises(UserError, match="too few"):
        split_examples(examples_of(3, 1), SHARES, seed=0)


def test_the_mask_hides_names_dates_codes_and_numbers():
    letter = "To the Board of Nordhaven Bank\nReport of 31 March 2026\n1. SYNC00ABCDEFGHIJKL12 in C 28.00: -4.31%, 26,000 (2026-03-31)"
    assert mask(letter, ["Nordhaven Bank"]) == (
        "To the Board of <name>\nReport of <date>\n<number>. <code> in C <number>: <number>%, <number> (<date>)"
    )


def test_a_leak_is_found_although_names_and_figures_differ():
    training = [("Bank A must raise 4.5% by 1 May 2026.", "Bank A"), ("Bank B is sound.", "Bank B")]
    test = [("Bank C must raise 12% by 30 June 2027.", "Bank C"), ("Bank C is fine.", "Bank C")]
    assert leaks(training, test) == [0]
    assert leaks(training, test[1:]) == []
