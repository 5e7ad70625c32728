"""xBRL-JSON without a taxonomy: facts, warnings, and errors for malformed documents."""

import json
from decimal import Decimal
from pathlib import Path

import pytest

from common.errors import UserError
from tests.xbrl.read.xbrl_documents import document, fact, instance
from tests.xbrl.read.xbrl_documents import read as read_file
from xbrl.read.dpm import load_cells
from xbrl.read.render import render_report


def read(tmp_path: Path, content: object):
    return read_file(tmp_path, content if isinstance(content, bytes) else json.dumps(content), "report.json")


def test_an_unknown_figure_is_no_percentage(tmp_path):
    """The JSON reader gives a number without a unit the unit `pure`; in XML the file itself gives it."""
    json_report = read(tmp_path, document(fact("eba_met:qZZZZ", "1340000.5", 4)))
    body = '<eba_met:qZZZZ contextRef="c" unitRef="pure" decimals="4">1340000.5</eba_met:qZZZZ>'
    for report in (json_report, read_file(tmp_path, instance(body))):
        assert report.facts[0].unit == "xbrli:pure" and "1 of 1 facts have no cell" in report.incomplete[0]
        assert render_report(report, load_cells()).endswith("eba_met:qZZZZ | 1340000.5")


def test_facts_units_decimals_and_dimensions(tmp_path):
    facts = (
        fact("t:A", "1200000.50", -3, unit="iso4217:EUR"),
        fact("t:Pure", "0.045", 4),
        fact("t:Exact", "7", unit="iso4217:EUR"),
        fact("t:Nil", None, unit="iso4217:EUR"),
        fact("t:Text", "12", t__Dim="t:m", t__Typed="x:y", language="en"),
        fact("t:Number", 5, 0, unit="iso4217:EUR"),
    )
    report = read(tmp_path, document(*facts))
    assert (report.format, report.entity, report.period) == ("xBRL-JSON", "LEI1.CON", "2026-03-31")
    assert report.currency == "EUR"
    a, pure, exact, nil, text, number = report.facts
    assert (a.value, a.unit, a.decimals, a.period) == (Decimal("1200000.50"), "iso4217:EUR", -3, "2026-03-31")
    assert (pure.value, pure.unit, pure.decimals) == (Decimal("0.045"), "xbrli:pure", 4)
    assert (exact.value, exact.decimals) == (Decimal(7), "INF")
    assert (nil.value, nil.decimals) == (None, None)
    assert (text.value, text.unit) == ("12", None)
    assert text.dimensions == {"t:Dim": "t:m", "t:Typed": "x:y", "language": "en"}
    assert number.value == Decimal(5)
    assert report.warnings == ()


def test_eba_metrics_are_mapped_to_cells(tmp_path):
    members = {"eba_dim__qACK": "eba_qTP:qx2008", "eba_dim__qADT": "eba_qOR:qx2060"}
    tier1 = fact("eba_met:qABJ", "5000", 0, unit="iso4217:EUR", **members)
    filed = fact("fi:filed", "true", fi__template="C_01.00")
    report = read(tmp_path, document(tier1, fact("eba_met:qAZF", "1.2"), filed))
    assert report.filing_indicators == {"C_01.00": True}
    amount, ratio = report.facts
    assert amount.cell == ("C_01.00", "r0015", "c0010")
    # The file has no unit and no decimals; only the DPM identifies the value as a number.
    assert (ratio.cell, ratio.value, ratio.unit) == (("C_76.00.a", "r0030", "c0010"), Decimal("1.2"), "xbrli:pure")


def test_defective_facts_are_kept_with_warnings(tmp_path):
    facts = [
        fact("t:A", "n/a", 0, unit="iso4217:EUR"),
        fact("u:B", "1", 0),
        fact("t:C", "1", "many"),
        fact("t:D", ["x"]),
        fact("t:E", "1", 0, period="yesterday"),
        fact("t:F", "1", 0),
        fact("t:F", "2", 0.5),
    ]
    report = read(tmp_path, document(*facts))
    assert len(report.facts) == 7
    for warning in (
        "t:A has the non-numeric value 'n/a'",
        "u:B has a prefix that is not declared in documentInfo.namespaces",
        "t:C has the decimals 'many', which is not an integer",
        "t:D has a value that is neither a string nor null",
        "t:E has the invalid period 'yesterday'",
        "t:F is reported as 1 and as 2",
    ):
        assert warning in report.warnings


@pytest.mark.parametrize(
    ("text", "period"),
    [
        ("2020-10-01T00:00:00", "2020-09-30"),
        ("2020-10-01T00:00:00Z", "2020-09-30"),
        ("2020-01-01T00:00:00/2021-01-01T00:00:00", "2020-01-01/2020-12-31"),
        ("2020-10-01T12:30:00", "2020-10-01T12:30:00"),
        ("2020-03-01T00:00:00", "2020-02-29"),
        *dict.fromkeys(
            ("2026-03-31", "2026-02-30T00:00:00", "20260401T000000", "a/b/c", "x/2026-04-01T00:00:00")
        ).items(),
    ],
)
def test_periods(tmp_path, text, period):
    """A date alone is no valid period: as a date time, 2026-03-31 would be the end of 30 March."""
    content = document(fact("t:A", "1", 0, period=text))
    if period:
        assert read(tmp_path, content).facts[0].period == period
    else:
        with pytest.raises(UserError, match=f"no fact has a valid period .t:A has the invalid period {text!r}"):
            read(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"documentInfo": {}, "documentInfo": {}}', "duplicate name"),
        (b'{"documentInfo": {"x": NaN}}', "NaN is not valid JSON"),
        (b'{"documentInfo": ', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": 1}', "not an XBRL report"),
        (b"[]", "not an XBRL report"),
        ("{é".encode("latin-1"), "not valid JSON"),
        (document(documentType="https://example.org/other"), "documentType is 'https://example.org/other'"),
        (document() | {"facts": []}, "must be JSON objects"),
        (document({"dimensions": {"concept": "t:A"}}), "fact 'f0' has no value"),
        (document({"value": "1", "dimensions": {}}), "fact 'f0' has no value, or no dimensions"),
        (document(), "contains no facts"),
    ],
)
def test_a_malformed_document_is_rejected_with_one_sentence(tmp_path, content, sentence):
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    assert sentence in str(caught.value) and "report.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_numbers_keep_their_digits(tmp_path):
    content = json.dumps(document(fact("t:A", "DIGITS", 20))).replace('"DIGITS"', "0.12345678901234567890")
    assert read(tmp_path, b"\xef\xbb\xbf" + content.encode()).facts[0].value == Decimal("0.12345678901234567890")
