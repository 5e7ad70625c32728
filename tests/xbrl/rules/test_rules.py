"""What rules say of figures that are left out, of absurd ones and of their law. test_every_rule.py has each on both sides of its limit."""

from decimal import Decimal

import pytest

from tests.xbrl.rules.figures import report_of
from xbrl.read.render import format_figure, format_limit
from xbrl.rules.rule_lines import rule_table
from xbrl.rules.rules import evaluate, violations

CET1, LR, TIER1 = ("C_03.00", "r0010", "c0010"), ("C_47.00", "r0340", "c0010"), ("C_01.00", "r0015", "c0010")
BUFFER, OUTFLOW, LCR = (("C_76.00.a", row, "c0010") for row in ("r0010", "r0020", "r0030"))


def state(rule_id, figures, **more):
    return {result.rule_id: result.state for result in evaluate(report_of(figures, **more))}.get(rule_id)


def test_a_missing_figure_is_printed_in_its_own_unit():
    """A client's exposure is an amount though its share of Tier 1 is given, and a requirement is a ratio beside a buffer."""
    share = ("C_28.00", "A12", "c350")
    buffer, trea = ("C_04.00", "r0740", "c0010"), ("C_02.00.a", "r0010", "c0010")
    figures = {share: "10%", TIER1: 200_000, buffer: 5_000, trea: 100_000}
    report = report_of(figures, filed={one[0]: True for one in figures} | {"C_03.00": True})
    found = {one.rule_id: one for one in violations(evaluate(report))}
    assert found["LE_PCT"].cell == ("C_28.00", "*", "c330") and found["LE_PCT"].missing
    assert (found["LE_PCT"].limit, found["LE_PCT"].unit) == (20_000, "iso4217:EUR")
    assert found["OCR_CALC"].missing and format_limit(found["OCR_CALC"].limit, found["OCR_CALC"].unit) == "13%"


def test_what_a_report_leaves_out_decides_nothing():
    assert state("LCR_CALC", {BUFFER: 12_000, OUTFLOW: 0, LCR: "120%"}) == "undecided"
    assert state("LCR_CALC", {BUFFER: 12_000, OUTFLOW: 400, LCR: "120%"}) == "undecided"  # 400 may be rounded from 0
    figures = {LCR: "50%", CET1: "4%"}
    assert state("LCR_MIN", figures, filed={"C_76.00": True}) == "violated"
    assert state("LCR_MIN", figures, filed={"C_76.00": False}) is None
    assert state("CET1_MIN", figures, filed={"C_76.00": True}) is None
    assert state("LCR_MIN", {CET1: "4%"}) is None


def test_the_citation_is_the_one_of_the_reference_date():
    """The combined buffer: Art. 141a applies from 28 December 2020."""
    figures = {CET1: "8%", ("C_03.00", "r0170", "c0010"): "9%"}
    for day, law in (
        ("2020-12-27", "141(1)-(3)"),
        ("2020-12-28", "141a(a), 141(2)"),
        ("2030-01-01", "141a(a), 141(2)"),
    ):
        found = {result.rule_id: result for result in evaluate(report_of(figures, period=day))}["OCR_CET1"]
        assert (found.state, found.legal) == ("violated", f"CRD Art. {law}")


def test_a_figure_of_an_absurd_size_is_printed():
    huge = Decimal("1e400")
    assert format_figure(huge, "xbrli:pure", 6) == f"{10**402}%"
    assert format_limit(huge, "xbrli:pure", 6) == f"{10**402}%"
    assert format_figure(Decimal("0.5"), "xbrli:pure", 9999) == "50%"
    assert format_figure(Decimal("0.035"), "xbrli:pure", 6) == "3.5000%"


@pytest.mark.parametrize("outflow", [Decimal("1e-300"), Decimal("1e300")])
def test_a_recomputed_ratio_of_an_absurd_size_is_judged(outflow):
    assert state("LCR_MIN", {BUFFER: 100_000_000, OUTFLOW: outflow}) == ("ok" if outflow < 1 else "violated")


def test_the_table_names_what_is_not_reported_and_rounds_no_ratio_onto_its_limit():
    lines = "\n".join(rule_table(report_of({LR: "5%"})))
    assert "  met | LR_CALC | not reported: C 47.00 r0320 c0010, C 47.00 r0300 c0010 | CRR Art. 429(2)\n" in lines
    amounts = {("C_47.00", row, "c0010"): amount for row, amount in (("r0320", 5_000), ("r0300", 100_000))}
    assert "  met | LR_CALC | 5 thousand | expected 5 thousand |" in "\n".join(
        rule_table(report_of({LR: "5%"} | amounts))
    )
    # An LCR of 99.999996%, to six places, is 100%.
    lines = "\n".join(rule_table(report_of({BUFFER: 99_999_996, OUTFLOW: 100_000_000}, decimals=0)))
    assert "  violated | LCR_MIN | 99.999996% | min 100% |" in lines
    assert "C 76.00.a r0030 c0010 = 99.999996% (not reported;" in lines
