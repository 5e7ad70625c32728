"""Odd reports, written as files and read back: nothing odd passes as clean."""

import dataclasses
import json
import pathlib
import zipfile
from decimal import Decimal

import pytest

from tests.xbrl.rules.figures import PERIOD, cell_of, report_of
from xbrl.corpus.banks import make_bank
from xbrl.corpus.examples import read_filing
from xbrl.corpus.filing import write_reports
from xbrl.read.dpm import load_cells
from xbrl.read.filed_report import CellKey, Fact, duplicate_warnings
from xbrl.rules.quality import check_quality
from xbrl.rules.reported_figures import MAX_VALUES, RECOMPUTED, index_facts
from xbrl.rules.rules import built_in_rules, evaluate, evaluate_all, violations

CELLS = load_cells()
BANK = dataclasses.replace(make_bank(0, 0), currency="EUR", decimals=-3, ratio_decimals=4)
CLIENT = BANK.entity  # key of the only large exposure
LR, LR_TIER1, LR_EXPOSURE, LCR, BUFFER, OUTFLOW, SHARE = map(
    cell_of, ("lev 340", "lev 320", "lev 300", "lcr 30", "lcr 10", "lcr 20", f"le {CLIENT} c350")
)
MILLIONS = {
    **{"of 10": 150, "of 15": 120, "of 20": 100, "of 530": 20, "of 750": 30, "rea 10": 1000, "ratio 20": 55},
    **{"ratio 40": 60, "ratio 60": 70, "memo 740": 30, "memo 750": 25, "memo 770": 5, "lev 320": 120, "lev 300": 2400},
    **{"lcr 10": 130, "lcr 20": 100, "rsf 10 20": 100, "asf 120 30": 110},
    **dict.fromkeys((f"le {CLIENT} c210", f"le {CLIENT} c330"), 24),
}
RATIOS = {
    **{"ratio 10": "0.10", "ratio 30": "0.12", "ratio 50": "0.15", "ratio 130": "0.10", "ratio 140": "0.0562"},
    **{"ratio 150": "0.075", "ratio 160": "0.13", "ratio 170": "0.0862", "ratio 180": "0.105", "lev 340": "0.05"},
    **{"lev 440": "0.03", "lcr 30": "1.3", "nsfr 220 40": "1.1"},
    **dict.fromkeys((f"le {CLIENT} c350", f"le {CLIENT} c230"), "0.2"),
}
SOUND: dict[CellKey, Decimal | str] = {
    **{cell_of(name): Decimal(value) * 1_000_000 for name, value in MILLIONS.items()},
    **{cell_of(name): Decimal(value) for name, value in RATIOS.items()},
}


def without(*cells, keep=()):
    """Return SOUND without some cells; with `keep`, only the cells in tables of `keep`."""
    return {cell: value for cell, value in SOUND.items() if cell not in cells and (not keep or cell[0] in keep)}


def read(folder, figures, edits=(), bank=BANK, syntax="csv"):
    """Write the figures as files, edit members of the packages, and read the files.

    `edits`: (end of the member's name, old text, new text). A new text None removes the member.
    """
    paths = write_reports(folder, bank, PERIOD, figures, CELLS, syntax=syntax)
    for name, old, new in edits:
        for path in paths:
            edit(path, name, old, new)
    return read_filing(paths, CELLS)


def edit(path, name, old, new):
    with zipfile.ZipFile(path) as package:
        members = {member: package.read(member).decode() for member in package.namelist()}
    changed = {key: text.replace(old, new or "") for key, text in members.items() if new is not None or name not in key}
    with zipfile.ZipFile(path, "w") as package:
        for member, text in members.items():
            if member in changed:
                package.writestr(member, changed[member] if member.endswith(name) else text)


def judged(report):
    """Return the results by rule, and the findings about the report as (id, reason)."""
    results = evaluate_all(report)
    assert {result.rule_id for result in results} == {rule.id for rule in built_in_rules()}
    findings = check_quality(report, CELLS)
    assert all(finding.kind == "quality" for finding in findings)
    return {result.rule_id: result for result in results}, [(finding.rule_id, finding.reason) for finding in findings]


def datapoint(cell):
    entry = CELLS.by_cell(*cell)
    assert entry is not None
    return entry.datapoint


@pytest.mark.parametrize("syntax", ["csv", "json"])
def test_a_sound_report_has_neither_violations_nor_findings(tmp_path, syntax):
    report = read(tmp_path, SOUND, syntax=syntax)
    results, findings = judged(report)
    assert (violations(results.values()), findings) == ([], [])
    assert {result.rule_id for result in evaluate(report)} == {
        rule_id for rule_id, result in results.items() if result.state != "not applicable"
    }
    assert results["LR_MIN"].state == "ok" and results["LR_MIN"].inputs[0].source == "reported"
    assert (results["FIN_BS"].state, results["FIN_BS"].reason) == (
        "not applicable",
        "F 01.01 has no filing indicator; F 01.03 has no filing indicator; F 01.02 has no filing indicator",
    )


@pytest.mark.parametrize(
    ("indicator", "why"),
    [("C_47.00,false", "is declared as not filed"), ("C_99.99,true", "has no filing indicator")],
)
def test_a_breach_without_filing_indicator_is_named(tmp_path, indicator, why):
    report = read(tmp_path, SOUND | {LR: Decimal("0.02")}, [("FilingIndicators.csv", "C_47.00,true", indicator)])
    results, findings = judged(report)
    assert (results["LR_MIN"].state, results["LR_MIN"].reason) == ("not applicable", f"C 47.00 {why}")
    assert findings == [
        (
            "FILING_INDICATOR",
            f"C 47.00 {why}, yet it has 4 facts: C 47.00 r0320 c0010 = 120000 thousand, "
            "C 47.00 r0300 c0010 = 2400000 thousand, C 47.00 r0340 c0010 = 2.00%, C 47.00 r0440 c0010 = 3.00%",
        ),
        ("MANDATORY", f"C 47.00 {why}, but COREP_LR must contain it"),
        *([("FORM", "filing indicators that no template has: C_99.99")] if "C_99.99" in indicator else []),
    ]


def test_without_filing_indicators_all_facts_count(tmp_path):
    figures = without(keep=("C_47.00",)) | {LR: Decimal("0.02")}
    report = read(tmp_path, figures, [("FilingIndicators.csv", "", None)])
    results, findings = judged(report)
    assert results["LR_MIN"].state == "violated"
    assert results["CET1_MIN"].reason == "C 03.00 has no facts"
    assert [rule_id for rule_id, _ in findings] == ["FILING_INDICATOR"]
    assert findings[0][1].startswith("the report has no filing indicators; the rules judge all of its facts (4 facts")


def test_a_missing_ratio_is_recomputed_or_undecided(tmp_path):
    report = read(tmp_path, without(LCR) | {BUFFER: Decimal(60_000_000)})
    result = judged(report)[0]["LCR_MIN"]
    assert (result.state, result.value, result.limit, result.missing) == ("violated", Decimal("0.6"), 1, False)
    (figure,) = result.inputs
    assert (figure.source, figure.legal) == ("recomputed", "Delegated Reg. (EU) 2015/61 Art. 4(1)")
    assert [(part.cell, part.value) for part in figure.parts] == [(BUFFER, 60_000_000), (OUTFLOW, 100_000_000)]
    assert [result.rule_id for result in violations(evaluate(report))] == ["LCR_MIN"]
    result = judged(read(tmp_path, without(LCR, OUTFLOW)))[0]["LCR_MIN"]
    assert (result.state, result.reason) == (
        "undecided",
        "C 76.00.a r0030 c0010 is not reported and cannot be recomputed: "
        "C 76.00.a r0010 c0010 is 130000 thousand EUR and C 76.00.a r0020 c0010 is not reported",
    )
    bank = dataclasses.replace(BANK, decimals=-6)
    results, findings = judged(read(tmp_path, without(LCR) | {BUFFER: Decimal(100_000_000)}, bank=bank))
    assert results["LCR_MIN"].state == "undecided"
    assert "C 76.00.a r0030 c0010 is 100% (recomputed), between 99.005% and 101.005%" in results["LCR_MIN"].reason
    assert [rule_id for rule_id, _ in findings] == ["ACCURACY"]
    assert findings[0][1].startswith("monetary figures have decimals -6 where at least -4 is required: 20 facts")


@pytest.mark.parametrize(
    ("name", "rule_id", "value", "violated"),
    [
        ("ratio 10", "CET1_MIN", "0.1", {"rea 10": 2223}),
        ("ratio 30", "TSCR_T1", "0.12", {"rea 10": 1601}),
        ("ratio 50", "OCR_TC", "0.15", {"rea 10": 1154}),
        ("lev 340", "LR_MIN", "0.05", {"lev 300": 4001}),
        ("lcr 30", "LCR_MIN", "1.3", {"lcr 10": Decimal("99.999")}),
        ("nsfr 220 40", "NSFR_MIN", "1.1", {"asf 120 30": Decimal("99.9")}),
        (f"le {CLIENT} c350", "LE_LIMIT", "0.2", {f"le {CLIENT} c330": Decimal("30.1")}),
        (f"le {CLIENT} c230", "LE_DEF", "0.2", {}),
    ],
)
def test_every_ratio_is_recomputed_from_its_parts(tmp_path, name, rule_id, value, violated):
    cell = cell_of(name)
    assert (cell[0], "*" if cell[1] == CLIENT else cell[1], cell[2]) in RECOMPUTED
    result = judged(read(tmp_path, without(cell)))[0][rule_id]
    state = "triggered" if rule_id == "LE_DEF" else "ok"
    assert (result.state, result.value, result.inputs[0].source) == (state, Decimal(value), "recomputed")
    if violated:
        changed = {cell_of(part): Decimal(million) * 1_000_000 for part, million in violated.items()}
        result = judged(read(tmp_path, without(cell) | changed))[0][rule_id]
        assert result.state == "violated"
        assert result.known_value != result.known_limit  # rounded, but not onto its limit


def test_a_filing_rule_reports_tolerated_rounding(tmp_path):
    results = judged(read(tmp_path, SOUND | {cell_of("of 10"): Decimal(150_001_000)}))[0]
    assert (results["OF_SUM"].value, results["OF_SUM"].limit) == (150_001_000, 150_000_000)
    assert {rule: (results[rule].state, results[rule].reason) for rule in ("OF_SUM", "T1_SUM", "AT1_EXCESS")} == {
        "OF_SUM": ("ok", "the difference is within the rounding of the figures"),
        "T1_SUM": ("ok", ""),
        "AT1_EXCESS": ("not applicable", "none of its figures is reported"),
    }
    bank = dataclasses.replace(BANK, decimals=-6)
    coarse = judged(read(tmp_path, SOUND | {cell_of("of 10"): Decimal(151_000_000)}, bank=bank))[0]
    assert coarse["OF_SUM"].state == "ok"


@pytest.mark.parametrize(
    ("decimals", "value", "state"),
    [
        (2, "0.03", "undecided"),
        (2, "0.02", "violated"),
        (2, "0.04", "ok"),
        (4, "0.0300", "ok"),
        (4, "0.0299", "violated"),
    ],
)
def test_a_coarse_ratio_decides_only_outside_its_rounding(tmp_path, decimals, value, state):
    figures = without(LR_TIER1, LR_EXPOSURE, ("C_47.00", "r0440", "c0010"), keep=("C_47.00",)) | {LR: Decimal(value)}
    results, findings = judged(read(tmp_path, figures, bank=dataclasses.replace(BANK, ratio_decimals=decimals)))
    assert results["LR_MIN"].state == state
    assert [rule_id for rule_id, _ in findings] == ["ACCURACY"] * (decimals < 4)
    if state == "undecided":
        text = "too coarse to decide: C 47.00 r0340 c0010 is 3% (decimals=2), between 2.5% and 3.5%"
        assert results["LR_MIN"].reason == text


def test_templates_that_are_missing(tmp_path):
    figures = {cell_of("fx 10 90"): Decimal(1_000_000), cell_of("fx 10 100"): Decimal(12_500_000)}
    findings = judged(read(tmp_path, figures))[1]
    missing = ("C 01.00", "C 02.00", "C 03.00", "C 04.00")
    assert findings == [
        ("MANDATORY", f"{name} has no filing indicator, but COREP_OF must contain it") for name in missing
    ]
    figures = {cell: value for cell, value in SOUND.items() if cell[0] != "C_03.00"}
    results, findings = judged(read(tmp_path, figures | {("C_01.00", "r0020", "c0010"): Decimal(44_000_000)}))
    assert (results["CET1_MIN"].state, results["CET1_MIN"].value) == ("violated", Decimal("0.044"))
    assert results["TSCR_CET1"].state == "not applicable"  # the requirement stands in C 03.00 alone
    assert findings == [("MANDATORY", "C 03.00 has no filing indicator, but COREP_OF must contain it")]


def test_mandatory_templates_cite_the_law_in_force():
    for period, act in (("2026-03-31", "2024/3117 Art. 5(1)"), ("2024-12-31", "2021/451 Art. 5(2)")):
        report = report_of({"ratio 10": "10%"}, period=period, filed={"C_03.00": True})
        assert {finding.legal for finding in check_quality(report, CELLS)} == {f"ITS (EU) {act}"}


def test_numbers_of_staff_and_years_are_no_percentages():
    report, staff, years = report_of({}), ("R_07.00", "r0010", "c0010"), ("C_08.03", "r0010", "c0080")
    values = [(staff, "5904", 0), (staff, "6000", 0), (years, "2.5", 2)]
    facts = [Fact("i", Decimal(text), "xbrli:pure", places, "BANK", PERIOD, {}, cell) for cell, text, places in values]
    indicators = {"R_07.00": True, "C_08.03": False}
    report = dataclasses.replace(report, facts=tuple(facts), filing_indicators=indicators)
    reasons = {finding.rule_id: finding.reason for finding in check_quality(report, CELLS)}
    assert reasons["DUPLICATE"] == "R 07.00 r0010 c0010 is reported as 5904 and as 6000"
    assert reasons["FILING_INDICATOR"].endswith("1 fact: C 08.03 r0010 c0080 = 2.5")


@pytest.mark.parametrize(("decimals", "expected"), [(2, set()), (6, {"DUPLICATE"})])
def test_a_cell_with_ten_thousand_values_costs_nothing(decimals, expected):
    """Comparing each value with all others takes hours for a file of 2 MB."""
    values = [Decimal(13_000 + number).scaleb(-6) for number in range(10_000)]
    facts = [Fact("i", value / 5, "xbrli:pure", decimals, "BANK", PERIOD, {}, LR) for value in values]
    report = dataclasses.replace(report_of({}), facts=tuple(facts), filing_indicators={"C_47.00": True})
    assert {finding.rule_id for finding in check_quality(report, CELLS)} - {"ACCURACY"} == expected
    assert len(duplicate_warnings(report.facts)) == len(expected)
    assert len(index_facts(report).facts[LR][()]) == (MAX_VALUES if expected else 1)


def test_contradictory_values_of_a_cell_are_a_finding(tmp_path):
    row = f"{datapoint(LR)},0.05"
    results, findings = judged(read(tmp_path, SOUND, [("c_47.00.csv", row, f"{row}\n{datapoint(LR)},0.02")]))
    text = "C 47.00 r0340 c0010 is reported as 5.00% and as 2.00%"
    assert findings == [("DUPLICATE", text)]
    assert (results["LR_MIN"].state, results["LR_MIN"].reason) == ("undecided", text)
    assert [part.value for part in results["LR_MIN"].inputs[0].parts] == [Decimal("0.05"), Decimal("0.02")]
    five = judged(read(tmp_path, SOUND, [("c_47.00.csv", row, f"{datapoint(LR)},five")]))[0]["LR_MIN"]
    assert (five.state, five.reason) == ("undecided", "C 47.00 r0340 c0010 is 'five', not a number")


def test_of_consistent_values_the_more_accurate_one_counts(tmp_path):
    row = f"{datapoint(LR)},0.03"
    figures = without(keep=("C_47.00",)) | {LR: Decimal("0.03"), LR_TIER1: Decimal(71_040_000)}
    coarse, fine = f"{row}d2", f"{datapoint(LR)},0.0296"
    for first, second in ((coarse, fine), (fine, coarse)):
        results, findings = judged(read(tmp_path, figures, [("c_47.00.csv", row, f"{first}\n{second}")]))
        assert (results["LR_MIN"].state, results["LR_MIN"].value) == ("violated", Decimal("0.0296"))
        assert results["LR_MIN"].inputs[0].source == "reported"  # and not recomputed because the first is too coarse
    text = "percentage figures have decimals 2 where at least 4 is required: 1 fact: C 47.00 r0340 c0010 = 3%"
    assert findings == [("ACCURACY", text)]


def test_amounts_in_two_currencies_are_not_mixed(tmp_path):
    figures = without(LR, keep=("C_47.00",))
    lines = [("c_47.00.csv", "datapoint,factValue", "datapoint,unit,factValue")]
    lines += [("c_47.00.csv", f"{datapoint(LR_TIER1)},", f"{datapoint(LR_TIER1)},iso4217:USD,")]
    lines += [("c_47.00.csv", f"{datapoint(cell)},", f"{datapoint(cell)},,") for cell in figures if cell != LR_TIER1]
    results, findings = judged(read(tmp_path, figures, lines))
    assert findings == [("CURRENCY", "amounts in USD beside 1 in EUR: 1 fact: C 47.00 r0320 c0010 = 120000 thousand")]
    assert (results["LR_MIN"].state, results["LR_CALC"].state) == ("undecided", "undecided")
    assert results["LR_MIN"].reason.startswith(
        "C 47.00 r0340 c0010 is not reported and cannot be recomputed: C 47.00 r0320 c0010 is 120000 thousand USD and"
    )
    assert "its amounts are in different currencies: USD, EUR" in results["LR_CALC"].reason


def test_an_amount_in_its_own_currency_is_sound(tmp_path):
    report = read(tmp_path, SOUND)
    kinds = ({"CUS": "eba_CU:USD"}, {"CCA": "eba_CA:x1"}, {})
    facts = [dataclasses.replace(report.facts[0], cell=None, unit="iso4217:USD", dimensions=kind) for kind in kinds]
    for fact, expected in zip(facts, ([], [], ["CURRENCY"]), strict=True):
        changed = dataclasses.replace(report, facts=(*report.facts, fact))
        assert [finding.rule_id for finding in check_quality(changed, CELLS)] == expected


@pytest.mark.parametrize(
    ("figures", "cell", "reason"),
    [
        (without(LR_TIER1) | {LR: Decimal("3.15")}, LR, "c0010 = 3.15 means 315.00%; probably 3.15% is meant"),
        (without(BUFFER) | {LCR: Decimal(315)}, LCR, "c0010 = 315 means 31500.00%; probably 315% is meant"),
        (without(BUFFER) | {LCR: Decimal("16.5")}, LCR, None),
        (SOUND | {LR: Decimal("5.01")}, LR, "C 47.00 r0340 c0010 = 5.01 means 501.00%; probably 5% is meant, by "),
        (
            SOUND | {LCR: Decimal("0.0131")},
            LCR,
            "r0030 c0010 = 0.0131 means 1.31%; probably 130% is meant, by C 76.00.a",
        ),
        (SOUND | {SHARE: Decimal(20)}, ("C_28.00", "*", "c350"), "= 20 means 2000.00%; probably 20% is meant"),
        (SOUND | {LCR: Decimal("0.6")}, LCR, None),
    ],
)
def test_a_hundredfold_ratio_is_doubted(tmp_path, figures, cell, reason):
    report = read(tmp_path, figures)
    doubts = [f for f in check_quality(report, CELLS) if f.rule_id == "PLAUSIBLE"]
    assert [(doubt.cell, doubt.state) for doubt in doubts] == ([(cell, "violated")] if reason else [])
    assert not reason or reason in doubts[0].reason


def test_facts_of_another_entity_or_date_are_ignored(tmp_path):
    (path,) = write_reports(tmp_path, BANK, PERIOD, without(keep=("C_47.00",)), CELLS, syntax="json")
    document = json.loads(path.read_text())
    ratio = next(fact for fact in document["facts"].values() if fact["value"] == "0.05")
    earlier = {**ratio, "value": "0.02", "dimensions": {**ratio["dimensions"], "period": "2026-01-01T00:00:00"}}
    foreign = {**ratio, "value": "0.01", "dimensions": {**ratio["dimensions"], "entity": "lei:OTHER"}}
    document["facts"] |= {"earlier": earlier, "foreign": foreign}
    path.write_text(json.dumps(document))
    results, findings = judged(read_filing([path], CELLS))
    assert results["LR_MIN"].value == Decimal("0.05")
    assert findings == [
        ("PERIOD", "2025-12-31 instead of 2026-03-31: 1 fact: C 47.00 r0340 c0010 = 2.00%"),
        ("ENTITY", f"OTHER instead of {BANK.entity}.CON: 1 fact: C 47.00 r0340 c0010 = 1.00%"),
    ]


def bare(report, *changes, path="report.json", files=(), **more):
    """Return the report with changed facts: (cell, {field: value}), read from a file with another name."""
    facts = list(report.facts)
    for cell, fields in changes:
        facts = [dataclasses.replace(fact, **fields) if fact.cell == cell else fact for fact in facts]
    return dataclasses.replace(report, facts=tuple(facts), path=pathlib.Path(path), files=files, **more)


def errors(report):
    return [(f.rule_id, f.legal, f.reason) for f in check_quality(report, CELLS) if f.state == "error"]


BANK_LEI, OTHER_LEI = "5299000J2N45DDNE4Y28", "529900TTHRQFTT3H2W22"


@pytest.mark.parametrize(
    ("name", "entity", "period", "mentions"),
    [
        (f"{OTHER_LEI}.IND_DE_COREP040200_COREPLR_2026-03-31_20260415120000000.zip", BANK_LEI, PERIOD, OTHER_LEI),
        (f"{BANK_LEI}.IND_DE_COREP040200_COREPLR_2026-03-31_20260415120000000.zip", BANK_LEI, "2026-03-30", PERIOD),
        (f"{BANK_LEI}.CON_DE_COREP040200_COREPLR_2026-03-31_20260415120000000.zip", f"{BANK_LEI}.IND", PERIOD, "CON"),
        (f"{BANK_LEI}.IND_DE_COREP040200_COREPLR_2026-03-31_20260415120000000.zip", f"{BANK_LEI}.IND", PERIOD, ""),
        (f"{BANK_LEI}_{PERIOD}.zip", f"{BANK_LEI}.IND", PERIOD, ""),
        ("lcr of the second quarter 20260415120000000.zip", BANK_LEI, PERIOD, ""),
    ],
)
def test_file_name_agrees_with_content(name, entity, period, mentions):
    report = report_of({"lcr 30": "130%"}, entity=entity, period=period)
    for named in (bare(report, path=name), bare(report, files=(pathlib.Path("x.zip"), pathlib.Path(name)))):
        found = errors(named)
        assert len(found) == bool(mentions)
        assert not found or (found[0][:2] == ("NAME", "EBA filing rules, file names") and mentions in found[0][2])


@pytest.mark.parametrize(
    ("cell", "fields", "rule", "legal"),
    [
        (LCR, {"unit": "iso4217:USD"}, "UNIT", "EBA filing rules 3.2"),
        (BUFFER, {"unit": "xbrli:pure"}, "UNIT", "EBA filing rules 2.24"),
        (BUFFER, {"unit": "iso4217:EUR*1000"}, "UNIT", "EBA filing rules 2.24"),
        (LCR, {"value": Decimal("-0.95")}, "RANGE", "Delegated Reg. (EU) 2015/61 Art. 4(1)"),
        (LR_EXPOSURE, {"value": Decimal(-5)}, "RANGE", "CRR Art. 429(2)"),
        (LCR, {"entity": "another bank"}, "ENTITY", "EBA filing rules 2.9"),
        (LCR, {"period": "2025-12-31"}, "PERIOD", "EBA filing rules 2.13"),
        (LR, {"value": Decimal("-0.01")}, "", ""),  # Tier 1 may be lost
    ],
)
def test_figures_that_cannot_be_are_errors(tmp_path, cell, fields, rule, legal):
    report = read(tmp_path, SOUND)
    assert errors(report) == []
    found = errors(bare(report, (cell, fields)))
    assert [entry[:2] for entry in found] == ([(rule, legal)] if rule else [])
    assert not rule or f"{cell[0].replace('_', ' ')} {cell[1]} {cell[2]}" in found[0][2]


def test_breaches_of_form_are_warnings(tmp_path):
    report = read(tmp_path, SOUND)
    report = bare(report, (LR_TIER1, {"value": None}), breaches=(("2.25", "2 footnotes"), ("2.10", "a time")))
    found = [(f.rule_id, f.legal, f.state) for f in check_quality(report, CELLS)]
    assert found == [
        ("PERIOD", "EBA filing rules 2.10", "error"),
        ("FORM", "EBA filing rules 2.19", "warning"),
        ("FORM", "EBA filing rules 2.25", "warning"),
    ]
