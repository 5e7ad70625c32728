"""The short form of an answer: a line for each limit of each figure, and the consequences of a note step by step."""

from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from xbrl.answers.answer_reader import parse_answer
from xbrl.answers.answers import Check, write_checks
from xbrl.answers.checks import check_of, fact_checks, in_one_unit, report_checks
from xbrl.answers.profiles import short_rules
from xbrl.read.filed_report import Fact, Report
from xbrl.rules.note_facts import BUFFER, CET1, LCR, OUTFLOW, SHARE, TREA, NoteFact, consequences
from xbrl.rules.rules import RuleResult, evaluate

C_03 = [("C_03.00", f"r{row:04}", "c0010") for row in (10, 30, 50, 140, 150, 130, 170, 180, 160)]
RATIOS = dict(zip(C_03, ("0.0731", "0.12", "0.15", "0.0506", "0.0675", "0.09", "0.0934", "0.11", "0.14"), strict=True))
AMOUNTS = {
    **{CET1: "73100000", ("C_01.00", "r0015", "c0010"): "120000000", ("C_01.00", "r0010", "c0010"): "150000000"},
    **{TREA: "1000000000", BUFFER: "601610000", OUTFLOW: "639790000"},
}
OTHERS = {LCR: "0.9403", ("C_47.00", "r0340", "c0010"): "0.05", ("C_84.00.a", "r0220", "c0040"): "1.1"}
CLIENTS = {"Arno SRL": "0.15", "Bern & Co 2": "0.2601", "Cato AG": "0.13"}


def make_report(clients=CLIENTS, **changes) -> Report:
    """Return the report of a bank in thousands of EUR. `changes` sets cells by row, such as r0030=None."""
    figures = {cell: changes.get(cell[1] + cell[0][:4], value) for cell, value in (RATIOS | AMOUNTS | OTHERS).items()}
    facts = [
        Fact("", Decimal(value), "iso4217:EUR" if cell in AMOUNTS else "xbrli:pure", -3 if cell in AMOUNTS else 4, "", "", {}, cell)
        for cell, value in figures.items()
        if value is not None
    ]  # fmt: skip
    facts += [Fact("", Decimal(v), "xbrli:pure", 4, "", "", {"qINC": name}, SHARE) for name, v in clients.items()]
    return Report(Path(), "", "LEI", "2026-03-31", "EUR", {}, tuple(facts), ())


def fact(kind, amount=None, who=()) -> NoteFact:
    return NoteFact(kind, True, None if amount is None else Decimal(amount), who)


def lines(report, *facts) -> list[str]:
    return [str(check) for check in fact_checks(report, facts)]


def test_checks_have_every_limit_in_report_order():
    report = make_report(r0030C_76="1.01")
    facts = [fact("pledged", 41_000_000), fact("connected", who=("Arno SRL", "Cato AG")), fact("waiver")]
    checks = [*report_checks(report, evaluate(report, short_rules())), *fact_checks(report, facts)]
    written = write_checks(checks, "To the Board", facts).partition("Checks:\n")[2].splitlines()
    assert written == [
        "CET1 ratio 7.31% min 4.5%: met",
        "min 5.06%: met",
        "min 9.34%: OCR_CET1, CRD Art. 141a(a)",
        "Tier 1 ratio 12% min 6%: met",
        "min 6.75%: met",
        "min 11%: met",
        "Total capital ratio 15% min 8%: met",
        "min 9%: met",
        "min 14%: met",
        "TSCR 9% min 8%: met",
        "TSCR CET1 5.06% min 4.5%: met",
        "TSCR Tier 1 6.75% min 6%: met",
        "Client Arno SRL 15% max 25%: met",
        "Client Bern & Co 2 26.01% max 25%: LE_LIMIT, CRR Art. 395(1)",
        "Client Cato AG 13% max 25%: met",
        "Leverage ratio 5% min 3%: met",
        "LCR 101% min 100%: met",
        "LCR 601610 / 639790 = 94.03% != 101%: LCR_CALC, 2015/61 Art. 4(1)",
        "NSFR 110% min 100%: met",
        "Liquidity buffer 601610 k - 41000 k = 560610 k: PLEDGED_COUNTED, 2015/61 Art. 7(2)",
        "Client Arno SRL 15% + 13% = 28% max 25%: LE_CONNECTED, CRR Art. 395(1)",
        "Waiver: lifts LCR_MIN, CRR Art. 8",
        "Directive:",
        "To the Board",
    ]
    assert write_checks([], "x", []) == "Note:\nnone\nChecks:\nnone\nDirective:\nx"
    # Both forms say the same.
    assert parse_answer(write_checks(checks, "x", [])).claims == parse_answer(write_checks(checks, "x")).claims
    amounts = [
        Check("CET1", "90 mn", "<", "1.2 bn", "CET1_AMOUNT", "CRR Art. 92"),
        Check("CET1", "90 mn", ">=", "80 mn"),
    ]
    assert "CET1 90 mn min 1.2 bn: CET1_AMOUNT, CRR Art. 92" in write_checks(amounts, "x", [])
    assert parse_answer(write_checks(amounts, "x", [])).claims == parse_answer(write_checks(amounts, "x")).claims


def test_missing_ratio_is_shown_as_quotient():
    without = make_report(r0030C_76=None, r0140C_03=None)
    found = [str(check) for check in report_checks(without, evaluate(without, short_rules()))]
    (lcr,) = [line for line in found if line.startswith("LCR")]
    assert lcr == "LCR 601610 / 639790 = 94.03% < 100%: LCR_MIN, CRR Art. 412(1)"
    assert [line for line in found if line.startswith("CET1")][1].startswith("CET1 ratio 7.31% < 9.34%")


def test_pledged_assets_leave_the_buffer_and_the_ratio():
    assert lines(make_report(), fact("pledged", 41_000_000)) == [
        "Liquidity buffer 601610 k - 41000 k = 560610 k: PLEDGED_COUNTED, 2015/61 Art. 7(2)",
        "LCR 560610 / 639790 = 87.62% < 100%: LCR_PLEDGED, 2015/61 Art. 4(2)",
    ]
    met = lines(make_report(r0020C_76="500000000"), fact("pledged", 600_000))
    assert met[1] == "LCR 601010 / 500000 = 120.2% >= 100%: met"
    waived = lines(make_report(), fact("pledged", 41_000_000), fact("waiver"))
    assert len(waived) == 2 and waived[1] == "Waiver: lifts LCR_MIN, CRR Art. 8"
    assert lines(make_report(), replace(fact("pledged", 41_000_000), applies=False)) == []


def test_checks_name_only_rules_that_follow():
    """The remaining amount is unknown: the note states no amount, or more than the report, or the currency differs."""
    report, more = make_report(), fact("pledged", 700_000_000)
    abroad = replace(report, facts=tuple(replace(entry, unit="iso4217:CZK") for entry in report.facts))
    for filed, stated in ((report, fact("pledged")), (report, more), (abroad, fact("pledged", 41_000_000))):
        (counted,) = consequences(filed, evaluate(filed), [stated])
        assert (counted.rule, counted.limit, lines(filed, stated)) == ("PLEDGED_COUNTED", None, [])


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (4_000_000, "CET1 ratio 69.1 / 1000 = 6.91% < 9.34%: INTERIM_PROFIT, CRR Art. 26(2)"),
        # of two requirements that are missed, the minimum of the first leg
        (61_000_000, "CET1 ratio 12.1 / 1000 = 1.21% < 4.5%: INTERIM_PROFIT_MIN, CRR Art. 92(1)"),
    ],
)
def test_profit_is_subtracted_until_a_ratio_misses(amount, expected):
    counted, ratio = lines(make_report(), fact("profit", amount))
    assert counted.startswith("CET1 73.1 mn - ") and counted.endswith(": PROFIT_COUNTED, CRR Art. 26(2)")
    assert ratio == expected


def test_own_shares_show_each_ratio_until_one_misses():
    report = make_report(r0170C_03="0.05", r0010C_03="0.0731")
    assert lines(report, fact("own_shares", 10_000_000))[1:] == [
        "CET1 ratio 63.1 / 1000 = 6.31% >= 5%: met",
        "Tier 1 ratio 120 - 10 = 110, 110 / 1000 = 11% >= 11%: met",
        "Total capital ratio 150 - 10 = 140, 140 / 1000 = 14% >= 14%: met",
    ]
    assert lines(report, fact("own_shares", 10_000_001))[2].endswith(": OWN_SHARES, CRR Art. 36(1)(f)")


@pytest.mark.parametrize(
    ("who", "line"),
    [
        (("Arno SRL", "Cato AG"), "Client Arno SRL 15% + 13% = 28% > 25%: LE_CONNECTED, CRR Art. 395(1)"),
        (("Cato AG", "Arno SRL"), "Client Cato AG 13% + 15% = 28% > 25%: LE_CONNECTED, CRR Art. 395(1)"),
        (("Arno SRL", "Dole"), "Client Arno SRL 15% + 10% = 25% <= 25%: met"),
        (("Arno SRL", "Dora"), None),  # no row of the report
    ],
)
def test_connected_clients_are_added_up(who, line):
    assert lines(make_report(CLIENTS | {"Dole": "0.1"}), fact("connected", who=who)) == ([line] if line else [])


def test_amounts_stand_in_one_unit():
    amounts = [Decimal(text) for text in ("1200000000", "41000000", "483089")]
    assert in_one_unit(*amounts[:2]) == ["1200 mn", "41 mn"]
    assert in_one_unit(*amounts[1:]) == ["41000000", "483089"] and in_one_unit(amounts[0]) == ["1.2 bn"]


def test_only_what_is_decided_has_a_check():
    report = make_report(r0010C_03=None)
    found = {result.rule_id: result for result in evaluate(report, short_rules())}
    assert str(check_of(found["CET1_MIN"])) == "CET1 ratio 73.1 / 1000 = 7.31% >= 4.5%: met"  # recomputed
    none = make_report(r0010C_03=None, r0020C_01=None)
    assert not any(str(entry).startswith("CET1") for entry in report_checks(none, evaluate(none, short_rules())))


def test_a_finding_on_a_note_is_compared_exactly():
    """Its limit is the rest of an amount, which would change if it were rounded to thousands."""
    figures = Decimal(533_010_000), Decimal(494_010_500), "max", "Delegated Reg. (EU) 2015/61 Art. 7(2)", "iso4217:EUR"
    found = RuleResult("PLEDGED_COUNTED", "note", "violated", BUFFER, *figures, decimals=-3)
    assert str(check_of(found)) == "Liquidity buffer 533010 k > 494010.5 k: PLEDGED_COUNTED, 2015/61 Art. 7(2)"
