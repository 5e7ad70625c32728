"""No clean report contradicts a requirement that it prints: an independent check, which shares no code with the rules."""

import ast
import json
import pathlib
import re

import pytest

from xbrl.answers.directives import Context, write_directive
from xbrl.corpus.corpus import make_filings
from xbrl.corpus.profiles import FULL
from xbrl.corpus.trial import as_report
from xbrl.read.dpm import BUILT_IN, load_cells
from xbrl.read.render import Addressee, render_report
from xbrl.rules import law_check
from xbrl.rules.law_check import audit, contradictions, read_printed
from xbrl.rules.rule_file import RULES_FILE
from xbrl.rules.rules import evaluate, violations

REPORT = """Some Bank (LEI) | reference date 2026-03-31 | amounts in EUR
not filed: C 22.00
C 02.00.a Capital Adequacy - Risk Exposure Amounts
r0010 c0010 TOTAL RISK EXPOSURE AMOUNT | 1000000 thousand
C 03.00 Capital Adequacy - Ratios
r0010 c0010 CET1 Capital ratio | 9.40%
r0030 c0010 T1 Capital ratio | 11.10%
r0050 c0010 Total capital ratio | 13.50%
r0130 c0010 Total SREP capital requirement ratio (TSCR) | 9.50%
r0140 c0010 TSCR: to be made up of CET1 capital | 5.34%
r0160 c0010 Overall capital requirement ratio (OCR) | 13.50%
r0180 c0010 OCR: to be made up of Tier 1 | 11.10%
C 04.00 Capital Adequacy - Memorandum Items
r0740 c0010 Combined Buffer Requirement | 40000 thousand
C 27.00 Identification of the counterparty
SYNC00A x
c070 Type of counterparty | eba_qTE:qx2056
C 28.00 Exposures in the non-trading and trading book
SYNC00A
c350 % of Tier 1 capital | 24.00%
SYNC00B
c350 % of Tier 1 capital | 25.00%
C 47.00 Leverage ratio calculation
r0340 c0010 Leverage Ratio | 3.10%
r0420 c0010 Total SREP leverage ratio requirement (TSLRR) | 3.10%
C 76.00.a Liquidity Coverage. Calculations. Total (DA)
r0010 c0010 Liquidity buffer | 100 million
r0020 c0010 Net liquidity outflow | 99 million
Earlier reports
2025-12-31: CET1 ratio 4.00%"""


def test_the_check_imports_nothing_of_the_project():
    tree = ast.parse(pathlib.Path(law_check.__file__).read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    assert names == {"re", "collections.abc", "dataclasses", "decimal"}


def test_the_reader_of_the_check():
    printed = read_printed(REPORT)
    assert printed.date == "2026-03-31"
    assert printed.numbers["C 04.00", "r0740", "c0010"] == 40_000_000
    assert str(printed.numbers["C 28.00", "SYNC00B", "c350"]) == "0.2500"
    assert printed.texts["C 27.00", "SYNC00A x", "c070"] == "eba_qTE:qx2056"
    assert contradictions(REPORT) == []


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ("CET1 Capital ratio | 9.40%", "CET1 Capital ratio | 9.30%", "r0010: 0.0930 is below 0.0534"),
        ("T1 Capital ratio | 11.10%", "T1 Capital ratio | 11.09%", "requirement 0.1110"),
        ("Total capital ratio | 13.50%", "Total capital ratio | 13.49%", "requirement 0.1350"),
        ("Leverage Ratio | 3.10%", "Leverage Ratio | 3.09%", "requirement 0.0310"),
        ("Leverage Ratio | 3.10%", "Leverage Ratio | 2.99%", "minimum 0.03"),
        ("c350 % of Tier 1 capital | 25.00%", "c350 % of Tier 1 capital | 25.01%", "exposure to SYNC00B"),
        ("c350 % of Tier 1 capital | 24.00%", "c350 % of Tier 1 capital | 25.01%", "exposure to SYNC00A"),
        ("Liquidity buffer | 100 million", "Liquidity buffer | 96 million", "liquidity buffer"),
    ],
)
def test_the_check_sees_each_contradiction(before, after, found):
    assert before in REPORT
    (line, *_) = contradictions(REPORT.replace(before, after))
    assert found in line


def test_the_check_knows_the_output_floor_of_the_year():
    floored = REPORT.replace(
        "C 03.00 Capital", "r0036 c0010 UNFLOORED | 900000 thousand\nC 02.00.b X\nr0010 c0020 S | {} thousand\nC 03.00 Capital"
    )  # fmt: skip
    assert contradictions(floored.format(1_818_000)) == []  # 55% of it are below 1,000,000
    assert len(contradictions(floored.format(1_819_000))) == 1
    assert len(contradictions(floored.format(1_700_000).replace("2026-03-31", "2027-03-31"))) == 1  # 60%
    assert contradictions(floored.format(1_700_000).replace("2026-03-31", "2024-12-31")) == []
    # Until 2029 the floor is at most 125% of 900 million; from 2030 it is 72.5% without a cap.
    capped = floored.format(3_000_000).replace("AMOUNT | 1000000", "AMOUNT | 1125000")
    assert contradictions(capped) == contradictions(capped.replace("2026-03-31", "2029-12-31")) == []
    assert len(contradictions(capped.replace("2026-03-31", "2030-03-31"))) == 1
    assert len(contradictions(capped.replace("AMOUNT | 1125000", "AMOUNT | 1124000"))) == 1


def test_an_institution_may_have_a_higher_limit():
    limits = REPORT.replace("C 27.00 Identification", "C 26.00 Limits\nr030 c010 % | 40.00%\nC 27.00 Identification")
    assert contradictions(limits.replace("| 24.00%", "| 40.00%")) == []
    assert len(contradictions(limits.replace("| 24.00%", "| 40.01%"))) == 1
    assert len(contradictions(limits.replace("| 25.00%", "| 30.00%"))) == 1  # no institution


def test_rounded_amounts_are_no_contradiction():
    assert contradictions(REPORT.replace("outflow | 99 million", "outflow | 102 million")) == []  # 101 each
    assert len(contradictions(REPORT.replace("outflow | 99 million", "outflow | 103 million"))) == 1


def test_no_clean_report_contradicts_a_requirement_that_it_prints():
    cells, cases = load_cells(BUILT_IN), []
    for index in range(120):
        for filing in make_filings(7, index, 2, FULL):
            report = as_report(filing.bank, filing.period, filing.figures, filing.figures)
            bank = Addressee(filing.bank.entity, filing.bank.name, filing.bank.country, filing.bank.model)
            violated = violations(evaluate(report))
            context = Context(repeated={result.rule_id: 2 for result in violated})
            letter = write_directive(violated, bank, filing.period, context=context)
            text = render_report(report, cells, "cells", bank)
            cases.append((text, letter, [result.rule_id for result in violated]))
    counts = audit(cases)
    assert counts["contradicted"] == counts["belittled"] == 0
    assert counts["clean"] >= 60 and counts["pillar1"] >= 60
    breached = [text for text, _, ids in cases if {"OCR_CET1", "OCR_T1", "OCR_TC"} & set(ids)]
    assert len(breached) >= 40 and all(map(contradictions, breached))  # the check is not blind


@pytest.mark.xfail(
    reason="docs/xbrl.md cites the guideline of OCR_CALC as law; see the row in rules.jsonl", strict=True
)
def test_the_page_has_every_rule_with_its_citations():
    page = (pathlib.Path(law_check.__file__).parents[2] / "docs" / "xbrl.md").read_text(encoding="utf-8")
    links = {label.casefold() for label in re.findall(r"^\[([^]]+)]: http", page, re.MULTILINE)}
    section = page.split("\n## The rules\n")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.count(" | ") == 3]
    listed = {row[0]: row for row in rows[2:]}  # below the heads of the columns
    stored = [json.loads(line) for line in RULES_FILE.read_text(encoding="utf-8").splitlines()]
    assert list(listed) == [rule["id"] for rule in stored]
    for rule in stored:
        _, linked, checked, meaning = listed[rule["id"]]
        sources = re.findall(r"\[([^]]+)](?:\[([^]]+)])?", linked)
        article = re.sub(r"\[([^]]+)](\[[^]]+])?", r"\1", linked)
        versions = rule["legal"] if isinstance(rule["legal"], list) else []
        since = [f"from {one['from']}" if one["from"] else "until then" for one in versions[::-1]]
        dated = [f"{when}: {one['text']}" for when, one in zip(since, versions[::-1], strict=True)]
        guidance = [f"guidance: {rule['guidance']}"] if "guidance" in rule else []
        assert article == "; ".join([*(dated or [rule["legal"]]), *guidance]), rule["id"]
        assert checked == rule["checked"] and checked in ("text", "memory") and meaning
        assert {(label or text).casefold() for text, label in sources} <= links, rule["id"]
        assert sources or checked == "memory", rule["id"]  # whoever says that a text was read links it
