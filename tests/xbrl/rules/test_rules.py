"""Rules on both sides of their limit, at their tolerance and with a missing cell; the rules file and its errors."""

import json
from decimal import Decimal

import pytest

from common.errors import UserError
from tests.xbrl.rules.figures import report_of
from xbrl.read.render import format_figure, format_limit
from xbrl.rules.rule_lines import rule_table
from xbrl.rules.rules import evaluate, load_rules, violations

CET1, LR, TIER1 = ("C_03.00", "r0010", "c0010"), ("C_47.00", "r0340", "c0010"), ("C_01.00", "r0015", "c0010")
BUFFER, OUTFLOW, LCR = (("C_76.00.a", row, "c0010") for row in ("r0010", "r0020", "r0030"))


def state(rule_id, figures, **more):
    return {result.rule_id: result.state for result in evaluate(report_of(figures, **more))}.get(rule_id)


def test_a_missing_figure_keeps_its_unit():
    """An exposure is printed as an amount although only its share is reported, a requirement as a ratio beside an amount."""
    share = ("C_28.00", "A12", "c350")
    buffer, trea = ("C_04.00", "r0740", "c0010"), ("C_02.00.a", "r0010", "c0010")
    figures = {share: "10%", TIER1: 200_000, buffer: 5_000, trea: 100_000}
    report = report_of(figures, filed={cell[0]: True for cell in figures} | {"C_03.00": True})
    violated = {result.rule_id: result for result in violations(evaluate(report))}
    exposure, requirement = violated["LE_PCT"], violated["OCR_CALC"]
    assert exposure.cell == ("C_28.00", "*", "c330") and exposure.missing
    assert (exposure.limit, exposure.unit) == (20_000, "iso4217:EUR")
    assert requirement.missing and format_limit(requirement.limit, requirement.unit) == "13%"


def test_what_a_report_leaves_out_decides_nothing():
    assert state("LCR_CALC", {BUFFER: 12_000, OUTFLOW: 0, LCR: "120%"}) == "undecided"
    assert state("LCR_CALC", {BUFFER: 12_000, OUTFLOW: 400, LCR: "120%"}) == "undecided"  # 400 may be rounded from 0
    figures = {LCR: "50%", CET1: "4%"}
    assert state("LCR_MIN", figures, filed={"C_76.00": True}) == "violated"
    assert state("LCR_MIN", figures, filed={"C_76.00": False}) is None
    assert state("CET1_MIN", figures, filed={"C_76.00": True}) is None
    assert state("LCR_MIN", {CET1: "4%"}) is None


def rule_line(**changes):
    """Make a line of a rules file, with some of its fields changed."""
    row = {
        "id": "MINE",
        "kind": "breach",
        "title": "t",
        "legal": "l",
        "violated_if": "{C_03.00,r0010,c0010} < 0.5",
        "absent_cell": "unknown",
    }
    return json.dumps(row | changes)


@pytest.mark.parametrize(
    ("expression", "cet1", "expected"),
    [
        ("{C_03.00,r0010,c0010} > 0.5", "50.01%", "violated"),
        ("{C_03.00,r0010,c0010} >= 0.5", "50%", "violated"),
        ("{C_03.00,r0010,c0010} <= 0.5", "50.01%", "ok"),
        ("{C_03.00,r0010,c0010} < 0.5 and not {C_03.00,r0010,c0010} < 0.4", "45%", "violated"),
        ("{C_03.00,r0010,c0010} < 0.4 or {C_03.00,r0010,c0010} > 0.6", "45%", "ok"),
        ("{C_03.00,r0010,c0010} < max(0.1, 0.2 * 3 - 0.1)", "49.99%", "violated"),
        ("{C_03.00,r0010,c0010} < -(1 / 2)", "-50.01%", "violated"),
    ],
)
def test_operators_of_the_rule_language(tmp_path, expression, cet1, expected):
    path = tmp_path / "rules.jsonl"
    path.write_text(rule_line(violated_if=expression))
    assert [result.state for result in evaluate(report_of({CET1: cet1}), load_rules(path))] == [expected]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"violated_if": "__import__('os').getcwd() < {C_03.00,r0010,c0010}"}, "violated_if contains"),
        ({"violated_if": "{C_03.00,r0010,c0010} < abs(1)"}, "violated_if contains abs"),
        ({"violated_if": "{C_03.00,r0010,c0010} + 1"}, "contains no comparison"),
        ({"kind": "crime"}, "unknown value"),
        ({"violated_if": "{C_03.00,r0010,c0010} < floor"}, "neither a cell nor a legal parameter"),
        ({"violated_if": "{C_03.00,r0010,c0010} < says({C_03.00,r0010,c0010}, 1)"}, "where a figure is expected"),
        ({"violated_if": "0.01 < {C_03.00,r0010,c0010} < 0.5"}, "where a comparison is expected"),
        ({"violated_if": "({C_03.00,r0010,c0010} < 0.5) + 1"}, "where a comparison is expected"),
        ({"applies_from": "2025"}, "invalid rule"),
        ({"legal": [{"from": "2025-01-01", "text": "b"}, {"from": "", "text": "a"}]}, "invalid rule"),
        ({"legal": [{"text": "a"}]}, "invalid rule"),
    ],
)
def test_an_invalid_rule_is_refused_with_its_line(tmp_path, changes, message):
    path = tmp_path / "rules.jsonl"
    path.write_text(rule_line() + "\n" + rule_line(**changes) + "\n")
    with pytest.raises(UserError, match=f"line 2: .*{message}"):
        load_rules(path)


def test_the_citation_follows_the_reference_date(tmp_path):
    versions = [{"from": "", "text": "first"}, {"from": "2025-01-01", "text": "second"}]
    path = tmp_path / "rules.jsonl"
    path.write_text(rule_line(legal=versions))
    (rule,) = load_rules(path)
    dates = ("2024-12-31", "2025-01-01", "2030-01-01", "")
    assert [rule.at(date).legal for date in dates] == ["first", "second", "second", "second"]
    report = report_of({CET1: "4%"}, period="2024-12-31")
    assert [result.legal for result in evaluate(report, [rule])] == ["first"]


def test_a_figure_of_an_absurd_size_is_printed():
    huge = Decimal("1e400")
    assert format_figure(huge, "xbrli:pure", 6) == f"{10**402}%"
    assert format_limit(huge, "xbrli:pure", 6) == f"{10**402}%"
    assert format_figure(Decimal("0.5"), "xbrli:pure", 9999) == "50%"
    assert format_figure(Decimal("0.035"), "xbrli:pure", 6) == "3.5000%"


@pytest.mark.parametrize("outflow", [Decimal("1e-300"), Decimal("1e300")])
def test_an_absurd_recomputed_ratio_is_judged(outflow):
    assert state("LCR_MIN", {BUFFER: 100_000_000, OUTFLOW: outflow}) == ("ok" if outflow < 1 else "violated")


def test_the_table_rounds_no_ratio_onto_its_limit():
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
