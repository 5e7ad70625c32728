"""Due dates of returns, and lateness judged by the time of creation in a file's name."""

import pathlib
from decimal import Decimal

import pytest

from xbrl.read.filed_report import Fact, Report
from xbrl.rules.measures import plan_measures
from xbrl.rules.remittance import due_date, late_filings
from xbrl.rules.rule_lines import all_results
from xbrl.rules.rules import evaluate, violations

LCR = Fact("dp1", Decimal("1.3"), "xbrli:pure", 4, "BANK", "2026-03-31", {}, ("C_76.00.a", "r0030", "c0010"))


def report_of(*names: str, period="2026-03-31") -> Report:
    files = tuple(map(pathlib.Path, names))
    return Report(files[0], "xBRL-CSV", "BANK", period, "EUR", {}, (LCR,), (), files=files)


def name(module: str, created: str) -> str:
    return f"549300BANK00000000A1.CON_DE_COREP040200_{module}_2026-03-31_{created}093001123.zip"


@pytest.mark.parametrize(
    ("module", "period", "due"),
    [
        ("COREP_LCR_DA", "2026-03-31", "2026-04-15"),
        ("COREP_LCR_DA", "2026-01-31", "2026-02-16"),  # the 15th is a Sunday
        ("COREP_LCR_DA", "2026-07-31", "2026-08-17"),  # the 15th is a Saturday
        ("COREP_OF", "2026-03-31", "2026-05-12"),
        ("COREP_LR", "2026-06-30", "2026-08-11"),
        ("COREP_LE", "2026-09-30", "2026-11-11"),
        ("COREP_NSFR", "2026-12-31", "2027-02-11"),
        ("FINREP9", "2027-12-31", "2028-02-11"),
        ("FINREP9", "2026-02-28", ""),  # no quarter of the calendar ends then
        ("SOMETHING", "2026-03-31", ""),
    ],
)
def test_each_module_has_its_own_due_date(module, period, due):
    assert due_date(module, period) == due


@pytest.mark.parametrize(
    ("created", "state", "words"),
    [
        ("20260415", "ok", "When it arrived is not known"),
        ("20260416", "undecided", "or later if that is a public holiday"),
        ("20260520", "violated", "COREP_LCR_DA as of 2026-03-31 was made on 2026-05-20; it was due on 2026-04-15: late for certain"),
    ],
)  # fmt: skip
def test_a_file_after_its_due_date_is_late(created, state, words):
    (result,) = late_filings(report_of(name("COREPLCRDA", created)))
    assert result.state == state and words in result.reason
    assert result.legal == "ITS (EU) 2024/3117 Art. 3(1)(a)" and result.cell[1:] == ("", "")
    assert result.limit == 15 and result.value is not None


@pytest.mark.parametrize(
    ("module", "period", "created", "state", "law"),
    [
        ("COREPOF", "2025-03-31", "20250630", "ok", "2024/3117 Art. 24(1)"),
        ("COREPLR", "2025-03-31", "20250702", "violated", "2024/3117 Art. 24(1)"),
        ("COREPNSFR", "2025-03-31", "20250630", "violated", "2024/3117 Art. 3(1)(b)"),
        ("COREPLCRDA", "2024-11-30", "20241220", "violated", "2021/451 Art. 3(1)(a)"),
        ("COREPALM", "2026-03-31", "20260505", "undecided", "2024/3117 Art. 3(1)"),  # some file it quarterly
    ],
)
def test_the_law_of_the_date_decides(module, period, created, state, law):
    (result,) = late_filings(report_of(name(module, created).replace("2026-03-31", period), period=period))
    assert (result.state, result.legal) == (state, f"ITS (EU) {law}")


def test_the_earliest_file_of_a_module_counts():
    names = (name("COREPLCRDA", "20260410"), name("COREPLCRDA", "20260601"), name("COREPOF", "20260520"))
    results = late_filings(report_of(*names))
    assert [(result.cell[0], result.state) for result in results] == [("COREP_LCR_DA", "ok"), ("COREP_OF", "violated")]
    for text in ("report.zip", "BANK_2026-03-31.json", name("COREPLCRDA", "20261340")):
        (result,) = late_filings(report_of(text))
        assert (result.state, result.reason) == ("undecided", "the file's name has no time of creation")


def test_a_late_return_is_no_label():
    report = report_of(name("COREPLCRDA", "20260520"))
    assert "LATE_FILING" not in {result.rule_id for result in evaluate(report)}
    (late,) = [result for result in violations(all_results(report)) if result.rule_id == "LATE_FILING"]
    assert [measure.subject for measure in plan_measures([late], {})] == ["timing"]
