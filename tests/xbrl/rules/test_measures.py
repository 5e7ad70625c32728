"""Measures and announcements are in proportion to the legal order, the size of the gap and its duration. The legal basis."""

import json
from dataclasses import replace
from decimal import Decimal

import pytest

from common.errors import UserError
from xbrl.rules.findings import note_rules
from xbrl.rules.measures import (
    BASES_FILE,
    CONSEQUENCES,
    DEADLINES,
    ORDERS,
    OWNERS,
    REQUIREMENTS,
    consequence,
    load_basis,
    plan_measures,
    requirement_of,
    severity,
    topic_of,
)
from xbrl.rules.rules import RuleResult, built_in_rules

RULES = {rule.id: rule for rule in built_in_rules()}


def result(rule: str, value: str = "1", limit: str = "2") -> RuleResult:
    return RuleResult(
        rule, "breach", "violated", ("C_03.00", "r0010", "c0010"), Decimal(value), Decimal(limit), "min", "CRR", None, 4
    )


P1, P2, BUFFER = result("TC_MIN", "0.0799", "0.08"), result("TSCR_TC", "0.09", "0.1"), result("OCR_TC", "0.1", "0.135")
SUM = result("OF_SUM", "90001000", "92000000")


def demands(*results, repeated=()):
    return [
        (measure.subject, measure.deadline_days, measure.owners_days)
        for measure in plan_measures(results, dict(repeated))
    ]


def test_severity_follows_the_legal_order():
    assert {severity([result("CET1_MIN", value, "0.045")]) for value in ("0.0449", "0.03", "-0.01")} == {"pillar1"}
    assert [severity([result]) for result in (SUM, BUFFER, P2, P1)] == list(ORDERS)
    assert severity([SUM, BUFFER, P2]) == "pillar2" and severity([]) == "filing"
    orders = {rule: REQUIREMENTS[rule].order for rule in note_rules()}
    assert orders["OWN_SHARES_MIN"] == "pillar1" and orders["OWN_SHARES_TSCR"] == "pillar2"
    assert orders["OWN_SHARES"] == "buffer" and orders["PROFIT_COUNTED"] == "filing"
    assert all(rule.id in REQUIREMENTS for rule in RULES.values() if rule.kind == "breach")
    assert requirement_of(SUM)[:2] == ("filing", "filing")


def test_size_and_duration_grade_within_an_order():
    sizes = [result("CET1_MIN", value, "0.045") for value in ("0.0437", "0.0436", "0.0404")]
    assert [plan_measures([result], {})[0].urgency for result in sizes] == [0, 1, 2]
    assert [plan_measures(sizes[:1], {"CET1_MIN": times})[0].urgency for times in (1, 2, 3)] == [1, 2, 2]
    assert all(days[0] >= days[1] >= days[2] for days in DEADLINES.values())
    for subject in ("capital", "leverage"):  # a graver order never has a longer term
        terms = zip(DEADLINES[subject, "pillar1"], DEADLINES[subject, "pillar2"], strict=True)
        assert all(graver <= lighter for graver, lighter in terms)


def test_owners_meet_only_for_large_gaps():
    assert all(days == 0 or days >= 30 for terms in OWNERS.values() for days in terms)
    assert demands(result("CET1_MIN", "0.0446", "0.045"))[0] == ("capital", 20, 0)
    assert demands(result("CET1_MIN", "0.043", "0.045"))[0] == ("capital", 15, 60)
    assert demands(result("CET1_MIN", "0.03", "0.045"))[0] == ("capital", 10, 40)
    assert demands(result("TSCR_TC", "0.095", "0.1"))[0] == ("capital", 20, 0)


def test_the_measures_of_a_letter():
    errors = [SUM, *(replace(SUM, rule_id=rule) for rule in ("T1_SUM", "FX_XTAB", "FIN_PL"))]
    assert [demands(*errors[:count]) for count in (1, 2, 4)] == [[("filing", days, 0)] for days in (10, 7, 5)]
    many = [SUM, result("LCR_MIN", "0.9", "1"), P2, BUFFER, result("LE_LIMIT", "0.3", "0.25"), result("PROFIT_COUNTED")]
    assert [demand[:2] for demand in demands(*many)] == [
        ("liquidity", 3), ("exposure", 10), ("capital", 20), ("distributions", 5), ("filing", 10), ("misstatement", 10),
    ]  # fmt: skip
    assert demands(BUFFER) == [("distributions", 5, 0)]  # CRD Art. 142(1): five working days
    assert [topic_of(measure) for measure in plan_measures([result("LR_OLRR")], {})] == ["leverage distributions"]
    assert demands(result("LATE_FILING", "50", "15")) == [("timing", 10, 0)]  # an explanation; nothing is filed again
    assert demands() == []


@pytest.mark.parametrize(
    ("rule", "value", "limit", "before", "announced"),
    [
        ("LE_LIMIT", "0.2503", "0.25", 0, "none"),
        ("CET1_MIN", "0.0442", "0.045", 0, "none"),
        ("CET1_MIN", "0.0442", "0.045", 3, "penalty"),  # a small gap never threatens the authorisation
        ("CET1_MIN", "0.043", "0.045", 0, "penalty"),
        ("CET1_MIN", "0.043", "0.045", 2, "licence"),
        ("CET1_MIN", "0.04", "0.045", 0, "licence"),
        ("LE_LIMIT", "0.4", "0.25", 0, "penalty"),
        ("TSCR_TC", "0.05", "0.1", 1, "penalty"),
        ("TSCR_TC", "0.05", "0.1", 2, "licence"),
        ("OCR_TC", "0.05", "0.1", 5, "none"),  # the price of the buffer is the limit on distributions
        ("OF_SUM", "1", "2", 0, "none"),
        ("PROFIT_COUNTED", "1", "2", 1, "penalty"),
    ],
)
def test_what_a_letter_announces_is_in_proportion(rule, value, limit, before, announced):
    assert consequence([result(rule, value, limit), BUFFER], {rule: before}) == announced
    assert consequence([], {}) == CONSEQUENCES[0]


def test_the_legal_basis_names_powers_hearing_and_objection(tmp_path):
    for name in json.loads(BASES_FILE.read_text(encoding="utf-8")):
        basis = load_basis(name).row
        assert basis["hearing"]["working_days"] > 0 and basis["objection"]["months"] > 0
        assert set(basis["requirements"]) <= {*RULES, *note_rules()}
    model, german = load_basis(), load_basis("de")
    assert german.cite(P2) == "§ 6c KWG" and german.cite(P1) == model.cite(P1) == "CRR"
    assert model.power_for(plan_measures([P1, SUM], {})).count(";") == 3
    with pytest.raises(UserError, match="no legal basis 'fr'; it has model, de"):
        load_basis("fr")
    text = BASES_FILE.read_text(encoding="utf-8")
    for old, missing in (
        ('"timing"', "powers timing law"),
        ('"hearing"', "hearing law"),
        ('"months"', "objection months"),
    ):
        (tmp_path / "bases.json").write_text(text.replace(old, '"other"'))
        with pytest.raises(UserError, match=f"de: {missing} is missing; xbrl/rules/measures.py describes the keys"):
            load_basis("de", tmp_path / "bases.json")
