"""Splits by bank, and letters of an archive's test that repeat those of its training."""

from decimal import Decimal

import pytest

from common.errors import UserError
from xbrl.corpus.banks import lei, make_bank, requirements
from xbrl.corpus.leaks import leaks, mask, place_examples
from xbrl.corpus.splits import split_banks


def test_banks_are_split_at_random_and_once():
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


def test_names_dates_codes_and_numbers_are_masked():
    letter = "To Bank A\nReport of 31 March 2026\n1. SYNB00ABCDEFGHIJKL12 in C 03.00: 4.31%, 1,234 (2026-03-31)"
    assert mask(letter, ["Bank A"]) == (
        "To <name>\nReport of <date>\n<number>. <code> in C <number>: <number>%, <number> (<date>)"
    )


def test_a_test_example_whose_letter_repeats_a_training_letter_is_dropped():
    training = [("Bank A must raise 4.5% by 1 May 2026.", "Bank A"), ("Bank B is sound.", "Bank B")]
    test = [("Bank C must raise 12% by 30 June 2027.", "Bank C"), ("Bank C is fine.", "Bank C")]
    assert leaks(training, test) == [0] and leaks(training, test[1:]) == []
    examples = [
        {"bank": f"B{number}", "messages": [{"role": "assistant", "content": f"Violations:\nnone\nDirective:\n{text}"}]}
        for number in range(10)
        for text in (f"Bank {number} is sound.", f"Bank {number} has {'word ' * (number + 1)}")
    ]
    placed, dropped = place_examples(
        examples, (0.7, 0, 0.3), 0, {f"B{number}": f"Bank {number}" for number in range(10)}
    )
    assert {split: len(members) for split, members in placed.items()} == {"train": 14, "validation": 0, "test": 3}
    assert dropped == 3


def test_banks_have_codes_with_check_digits_and_requirements_of_the_law():
    bank = make_bank(0, 0)
    assert bank.entity == lei(bank.entity[:18]) and bank.entity.startswith("SYNB00")
    assert lei("HWUPKR0MPOU8FGXBT3") == "HWUPKR0MPOU8FGXBT394"  # a real one
    assert len({make_bank(0, index).name for index in range(500)}) == 500
    need = requirements(bank)
    assert abs(need.tscr_cet1 - Decimal("0.045") - bank.pillar2 * 9 / 16) <= Decimal("0.00005")
    assert need.ocr - need.tscr == need.ocr_cet1 - need.tscr_cet1 == need.ocr_t1 - need.tscr_t1
