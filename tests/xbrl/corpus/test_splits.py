"""Splits by bank, and the identity and requirements of invented banks."""

from decimal import Decimal

import pytest

from common.errors import UserError
from xbrl.corpus.archive import split_banks
from xbrl.corpus.banks import lei, make_bank, requirements


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


def test_banks_have_codes_with_check_digits_and_requirements_of_the_law():
    bank = make_bank(0, 0)
    assert bank.entity == lei(bank.entity[:18]) and bank.entity.startswith("SYNB00")
    assert lei("HWUPKR0MPOU8FGXBT3") == "HWUPKR0MPOU8FGXBT394"  # a real one
    assert len({make_bank(0, index).name for index in range(500)}) == 500
    need = requirements(bank)
    assert abs(need.tscr_cet1 - Decimal("0.045") - bank.pillar2 * 9 / 16) <= Decimal("0.00005")
    assert need.ocr - need.tscr == need.ocr_cet1 - need.tscr_cet1 == need.ocr_t1 - need.tscr_t1
