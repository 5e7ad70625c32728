"""The reports of the full profile: consistent quarters, positions near their limits, and omitted figures."""

import random
import statistics
from decimal import Decimal

import pytest

from common.errors import UserError
from xbrl.corpus.banks import make_bank
from xbrl.corpus.corpus import make_filings
from xbrl.corpus.economics import draw_economics
from xbrl.corpus.generate import Request, is_generated
from xbrl.corpus.mutations import FILING_RULES, plant_error
from xbrl.corpus.omissions import MAX_FIGURES
from xbrl.corpus.positions import EXPOSURE_LIMIT, draw_positions
from xbrl.corpus.profiles import FULL
from xbrl.corpus.trial import template_of
from xbrl.rules.rules import built_in_rules

LEVERAGE, LCR = ("C_47.00", "r0340", "c0010"), ("C_76.00.a", "r0030", "c0010")


def test_ratios_move_little_from_quarter_to_quarter():
    moves = []
    for index in range(60):
        filings = make_filings(6, index, 4, FULL)
        for before, now in zip(filings, filings[1:], strict=False):
            if LCR in before.figures and LCR in now.figures:
                moves.append(abs(now.figures[LCR] - before.figures[LCR]))
    assert len(moves) > 80
    assert statistics.median(moves) < Decimal("0.03")  # independent draws would differ by 0.15


def test_exposures_near_the_limit_and_near_the_threshold():
    limit = threshold = 0
    for index in range(60):
        bank, rng = make_bank(6, index), random.Random(index)
        economics = draw_economics(rng, bank, bank.trea, {})
        if economics is None:
            continue
        tier1 = economics.cet1 + economics.at1
        positions = draw_positions(rng, random.Random(index), bank, economics, {}, 1, 2026)
        for exposure in positions.exposures:
            allowed = positions.institution_limit if exposure.institution else EXPOSURE_LIMIT
            assert 0 < exposure.after <= exposure.before and exposure.after <= allowed * tier1
            limit += allowed - exposure.after / tier1 < Decimal("0.001")
            threshold += abs(exposure.before / tier1 - Decimal("0.1")) < Decimal("0.001")
        over = draw_positions(rng, random.Random(index), bank, economics, {"exposure": "over"}, 1, 2026)
        limits = [over.institution_limit if one.institution else EXPOSURE_LIMIT for one in over.exposures]
        breaches = [one for one, limit_of in zip(over.exposures, limits, strict=True) if one.after > limit_of * tier1]
        assert len(breaches) == 1
    assert limit > 20 and threshold > 20


def test_an_error_that_violates_no_rule_is_not_planted():
    (filing,) = make_filings(6, 0, 1, FULL)
    for rule_id in FILING_RULES:
        if rule_id not in ("CET1_SIGN", "T1_SIGN", "TC_SIGN"):
            assert plant_error(random.Random(0), rule_id, filing.figures, lambda figures: False) is None


def test_reports_differ_in_their_templates_and_fit_the_window():
    filings = [filing for index in range(80) for filing in make_filings(6, index, 1, FULL)]
    read = {cell for rule in built_in_rules() for cell in rule.cells}
    templates = [{template_of(table) for table, _, _ in filing.figures} for filing in filings]
    for module in ("C_47.00", "C_76.00", "C_84.00", "C_28.00", "F_01.01", "C_22.00"):
        filed = sum(module in one for one in templates)
        assert 0 < filed < len(filings), module
    for filing in filings:
        others = [key for key in filing.figures if key not in read and (key[0], "*", key[2]) not in read]
        assert not others or len(filing.figures) <= MAX_FIGURES + 1  # an error may add one
        assert not set(filing.unfiled) & {template_of(table) for table, _, _ in filing.figures}
    assert max(len(filing.figures) for filing in filings) > 1.4 * min(len(filing.figures) for filing in filings)


def test_a_corpus_below_a_file_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file, not a directory; choose another --out"):
        is_generated(tmp_path / "file" / "corpus", Request(10, 0, "laptop", [0.8, 0.1, 0.1]))
