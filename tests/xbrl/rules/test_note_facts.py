"""Consequences of the facts of a note: the figure is wrong in any case, and a limit missed without the amount is added."""

from decimal import Decimal

import pytest

from tests.xbrl.rules.figures import report_of
from xbrl.desk.letters import write_letter
from xbrl.read.render import Addressee
from xbrl.rules.findings import apply_findings
from xbrl.rules.note_facts import NoteFact, consequences, limit_rule, undecided
from xbrl.rules.rules import evaluate, violations

BUFFER, OUTFLOW, LCR = (("C_76.00.a", row, "c0010") for row in ("r0010", "r0020", "r0030"))
OWN, TIER1, CET1 = (("C_01.00", row, "c0010") for row in ("r0010", "r0015", "r0020"))
TREA = ("C_02.00.a", "r0010", "c0010")
# The requirements of C 03.00: TSCR 10% (CET1 5.62%, Tier 1 7.5%), overall 12.5% (8.12%, 10%).
REQUIRED = {"r0130": "10%", "r0140": "5.62%", "r0150": "7.5%", "r0160": "12.5%", "r0170": "8.12%", "r0180": "10%"}
SOUND = {
    **{BUFFER: 1_300_000_000, OUTFLOW: 1_000_000_000, LCR: "130%"},
    **{OWN: 1_600_000_000, TIER1: 1_400_000_000, CET1: 1_200_000_000, TREA: 10_000_000_000},
    **{("C_03.00", row, "c0010"): text for row, text in REQUIRED.items()},
}


def filed(figures, clients=(), **more):
    """Make a report. `clients` are (code, name, share of Tier 1, member of the type)."""
    rows = dict(figures)
    for code, name, share, kind in clients:
        rows |= {("C_28.00", code, "c350"): share, ("C_27.00", code, "c021"): name, ("C_27.00", code, "c070"): kind}
    return report_of(rows, entity="BANK.CON", **more)


def fact(kind, millions=None, applies=True, who=()) -> NoteFact:
    return NoteFact(kind, applies, None if millions is None else Decimal(millions) * 1_000_000, who)


def derived(report, *facts):
    findings = consequences(report, evaluate(report), facts)
    return [(finding.rule, finding.cell, finding.value, finding.limit) for finding in findings]


def test_a_missed_limit_is_a_second_finding():
    kinds = ("pledged", "own_shares", "profit", "connected", "waiver")
    assert derived(filed(SOUND), *(fact(kind, 900, applies=False, who=("A", "B")) for kind in kinds)) == []
    (counted,) = derived(filed(SOUND), fact("pledged", "65.2"))
    assert counted == ("PLEDGED_COUNTED", "C 76.00.a r0010 c0010", 1_300_000_000, 1_234_800_000)
    (counted,) = derived(filed(SOUND), fact("profit", "65.2"))
    assert counted == ("PROFIT_COUNTED", "C 01.00 r0020 c0010", 1_200_000_000, 1_134_800_000)
    assert len(derived(filed(SOUND), fact("pledged", 300))) == 1  # exactly 100% is enough
    assert derived(filed(SOUND), fact("pledged", 301))[1] == (
        "LCR_PLEDGED", "C 76.00.a r0030 c0010", Decimal("0.9990"), 1,
    )  # fmt: skip
    report = filed(SOUND)
    results = evaluate(report)
    counted = apply_findings(results, consequences(report, results, [fact("pledged", "65.2")]))[-1]
    assert (counted.unit, counted.decimals, counted.relation, counted.kind) == ("iso4217:EUR", -3, "max", "note")


@pytest.mark.parametrize(
    ("millions", "rule", "row", "value", "limit", "named", "words"),
    [
        (350, "OWN_SHARES", "r0160", None, None, "", ""),  # 12.5% of total capital is met
        (
            351,
            "OWN_SHARES",
            "r0050",
            "0.1249",
            "0.125",
            "OCR_TC",
            "12.5% is required: the overall capital requirement (",
        ),
        # All legs miss the requirement: CET1 comes first.
        (599, "OWN_SHARES", "r0010", "0.0601", "0.0812", "OCR_CET1", ": the overall capital requirement in CET1 ("),
        (
            601,
            "OWN_SHARES_TSCR",
            "r0050",
            "0.0999",
            "0.1",
            "TSCR_TC",
            "10% is required: the total SREP capital requirement (",
        ),
        (
            660,
            "OWN_SHARES_TSCR",
            "r0010",
            "0.0540",
            "0.0562",
            "TSCR_CET1",
            "5.62% is required: the CET1 share of the total",
        ),
        (760, "OWN_SHARES_MIN", "r0010", "0.0440", "0.045", "CET1_MIN", "4.5% is required: the minimum ("),
    ],
)
def test_the_most_severe_capital_requirement_is_named(millions, rule, row, value, limit, named, words):
    report = filed(SOUND)
    results = evaluate(report)
    more = derived(report, fact("own_shares", millions))[1:]
    assert more == ([(rule, f"C 03.00 {row} c0010", Decimal(value), Decimal(limit))] if value else [])
    same = derived(report, fact("profit", millions))[1:]
    assert [finding[0] for finding in same] == [rule.replace("OWN_SHARES", "INTERIM_PROFIT")] * len(more)
    *_, on_top = apply_findings(results, consequences(report, results, [fact("own_shares", millions)]))
    assert limit_rule(on_top) == (named or "OWN_SHARES_COUNTED")
    assert words in write_letter([on_top], Addressee("BANK", "Bank", "DE", "commercial"), "2026-03-31")


def test_capital_amounts_add_up():
    together = derived(filed(SOUND), fact("own_shares", 200), fact("profit", 151))
    assert [finding[0] for finding in together] == [
        "OWN_SHARES_COUNTED",
        "OWN_SHARES",
        "PROFIT_COUNTED",
        "INTERIM_PROFIT",
    ]
    assert [finding[3] for finding in together[::2]] == [1_000_000_000, 1_049_000_000]
    figures = {cell: value for cell, value in SOUND.items() if cell[1] not in ("r0160", "r0170", "r0180")}
    with_buffer = filed({**figures, ("C_04.00", "r0740", "c0010"): 250_000_000})
    assert derived(with_buffer, fact("own_shares", 351))[1][:1] == ("OWN_SHARES",)
    assert len(derived(filed(figures), fact("own_shares", 351))) == 1


CLIENTS = (("AA1", "Delta Oil", "14%", "eba_qTE:qx2001"), ("BB2", "Delta Bitumen S.A.", "12%", "eba_qTE:qx2001"))


def test_connected_clients_are_matched_by_name_or_code():
    report = filed({}, CLIENTS)
    for who in (("delta  oil", "Delta Bitumen SA"), ("AA1", "Delta Bitumen S.A.")):
        assert derived(report, fact("connected", who=who)) == [
            ("LE_CONNECTED", "C 28.00 AA1 c350", Decimal("0.26"), Decimal("0.25"))
        ]
    small = filed({}, (CLIENTS[0], ("BB2", "Delta Bitumen S.A.", "11%", "eba_qTE:qx2001")))
    assert derived(small, fact("connected", who=("AA1", "BB2"))) == []  # 25% is not above 25%
    (reason,) = undecided(report, [fact("connected", who=("Delta Oil", "Delta Gas"))])
    assert reason == "LE_CONNECTED: Delta Gas has no row in C 28.00"


def test_a_group_with_an_institution_has_its_limit():
    clients = (CLIENTS[0], ("BB2", "Bank B", "12%", "eba_qTE:qx2056"))
    limit = {("C_26.00", "r030", "c010"): "40%"}
    assert derived(filed(limit, clients), fact("connected", who=("AA1", "BB2"))) == []
    more = filed(limit, (*clients, ("CC3", "Delta Gas", "12%", "eba_qTE:qx2001")))
    (over,) = derived(more, fact("connected", who=("AA1", "BB2", "CC3")))  # 38%, and 26% without the institution
    assert over[2:] == (Decimal("0.38"), Decimal("0.25"))


def test_a_waiver_lifts_only_the_lcr():
    low = filed({**SOUND, BUFFER: 900_000_000, LCR: "90%"})
    (lifted,) = consequences(low, evaluate(low), [fact("waiver")])
    assert (lifted.rule, lifted.state, lifted.legal) == ("LCR_MIN", "lifted", "CRR Art. 8")
    left = {result.rule_id for result in violations(evaluate(low))} - {"LCR_MIN"}
    assert {result.rule_id for result in apply_findings(evaluate(low), [lifted])} == left
    assert derived(filed(SOUND), fact("waiver")) == []  # there is nothing to lift
    assert [finding[0] for finding in derived(filed(SOUND), fact("waiver"), fact("pledged", 400))] == [
        "PLEDGED_COUNTED"
    ]


def test_an_uncomputable_amount_still_is_a_finding():
    for report, stated, reason in (
        (filed(SOUND), fact("pledged"), "the note states no amount"),
        (filed(SOUND, unit="iso4217:CZK"), fact("pledged", 5), "the amount is in EUR and C 76.00.a r0010 c0010 in CZK"),
        (filed({}), fact("profit", 5), "C 01.00 r0020 c0010 is not reported"),
        (filed(SOUND), fact("pledged", 1301), "the amount is larger than C 76.00.a r0010 c0010"),
    ):  # fmt: skip
        (counted,) = consequences(report, evaluate(report), [stated])
        assert counted.limit is None and counted.rule.endswith("_COUNTED")
        assert reason in undecided(report, [stated])[0]
        result = apply_findings(evaluate(report), [counted])[-1]
        assert (result.rule_id, result.limit) == (counted.rule, None)
    no_outflow = filed({BUFFER: 1_000_000})
    assert undecided(no_outflow, [fact("pledged", "0.5")])[0].startswith("LCR_PLEDGED: C 76.00.a r0020 c0010")
