"""Inline XBRL: values, tuples, transformations, and reports of several documents."""

import zipfile
from decimal import Decimal

import pytest

from tests.xbrl.read.xbrl_documents import context, inline, member, read, values
from xbrl.read.dpm import load_cells
from xbrl.read.xbrl import read_report

pytest.importorskip("arelle")


def test_inline_values(tmp_path):
    number = '<ix:nonFraction name="t:{}" contextRef="c" unitRef="eur" decimals="{}" {}>{}</ix:nonFraction>'
    body = number.format("Loss", -3, 'scale="3" sign="-" format="ixt:numdotdecimal"', "1,234")
    body += number.format("Comma", 0, 'format="ixt:numcommadecimal"', "1.234,5")
    body += number.format("Nil", 0, 'xsi:nil="true"', "")
    body += '<ix:nonNumeric name="t:Day" contextRef="d" format="ixt:datedaymonthyearen">31 October 2017</ix:nonNumeric>'
    body += '<ix:nonNumeric name="t:Note" contextRef="d" continuedAt="k">one <b>'
    body += number.format("Nested", "INF", "", "5") + "</b> </ix:nonNumeric>"
    body += '<ix:continuation id="k">two</ix:continuation>'
    body += """<ix:tuple name="t:Loan" tupleID="l"/><ix:nonNumeric tupleRef="l" order="1" name="t:Name" contextRef="c">n</ix:nonNumeric>
        <ix:fraction name="t:Share" contextRef="c" unitRef="pure"><ix:numerator>1</ix:numerator>/<ix:denominator>3</ix:denominator>
        </ix:fraction>"""
    hidden = '<ix:nonNumeric name="t:Hidden" contextRef="d">h</ix:nonNumeric>'
    report = read(tmp_path, inline(body, hidden), "r.xhtml")
    assert report.format == "iXBRL"
    assert values(report) == {
        **{"t:Loss": Decimal(-1234000), "t:Comma": Decimal("1234.5"), "t:Nil": None, "t:Day": "2017-10-31"},
        **{"t:Note": "one 5 two", "t:Nested": Decimal(5), "t:Hidden": "h"},
        **{"t:Name": "n", "t:Share": "1/3"},
    }
    assert report.warnings == ()


def test_inline_texts_without_value_give_warnings(tmp_path):
    number = '<ix:nonFraction name="t:{}" contextRef="{}" unitRef="eur" decimals="0" {}>{}</ix:nonFraction>'
    body = number.format("A", "c", 'format="ixt:nosuchthing"', "2,909")
    body += number.format("B", "c", 'format="ixt:numdotdecimal"', "12 apples") + number.format("C", "gone", "", "1")
    report = read(tmp_path, inline(body), "r.xhtml")
    assert values(report) == {"t:A": "2,909", "t:B": "12 apples", "t:C": Decimal(1)}
    assert [warning.split(":", 2)[:2] for warning in report.warnings[:1]] == [
        ["t", "A has a text that its transformation ixt"]
    ]
    assert "t:A has the non-numeric value '2,909'" in report.warnings
    assert "t:B has the non-numeric value '12 apples'" in report.warnings
    assert "t:C refers to the context gone, which the file does not define" in report.warnings


def test_inline_packages_and_local_schemas(tmp_path):
    """Packages with first and second documents, and a single document. A schema that is a local file is not read."""
    first = inline('<ix:nonNumeric name="t:A" contextRef="c">a</ix:nonNumeric>')
    second = inline('<ix:nonNumeric name="t:B" contextRef="c">b</ix:nonNumeric>', resources=False)
    local = first.replace("http://example.org/t.xsd", "foo.xsd")
    for documents, expected in (
        ({"first.xhtml": first}, {"t:A": "a"}),
        ({"first.xhtml": local, "second.xhtml": second}, {"t:A": "a", "t:B": "b"}),
    ):
        package = tmp_path / f"package{len(documents)}.zip"
        with zipfile.ZipFile(package, "w") as archive:
            archive.writestr("bank/META-INF/reportPackage.json", "{}")
            archive.writestr("bank/bank.com/lab.xml", "<linkbase/>")
            archive.writestr("bank/bank.com/draft.xhtml", first)
            for name, content in documents.items():
                archive.writestr(f"bank/reports/{name}", content)
        report = read_report(package, load_cells())
        assert (report.format, values(report)) == ("iXBRL", expected)
    hint = '<html xsi:schemaLocation="http://example.org/t foo.xsd" '
    alone = read(tmp_path, local.replace("<html ", hint), "r.xhtml")
    assert values(alone) == {"t:A": "a"}
    for warnings in (report.warnings, alone.warnings):
        assert len(warnings) == 1 and warnings[0].startswith("the schema 'foo.xsd' is a local file, which is not read")


def test_inline_eba_facts_have_cells_and_indicators(tmp_path):
    """The namespace of the concept counts, not the namespace of the element `ix:nonFraction`."""
    tier1 = member("eba_dim_4.0:qACK", "eba_qTP:qx2008") + member("eba_dim_4.0:qADT", "eba_qOR:qx2060")
    body = '<ix:nonFraction name="eba_met:qABJ" contextRef="x" unitRef="eur" decimals="-3">5000</ix:nonFraction>'
    hidden = '<ix:nonNumeric name="find:filingIndicator" contextRef="c">C_01.00</ix:nonNumeric>'
    content = inline(body, hidden).replace("<ix:resources>", f"<ix:resources>{context('x', scenario=tier1)}")
    report = read(tmp_path, content, "r.xhtml")
    assert [(fact.value, fact.cell) for fact in report.facts] == [(Decimal(5000), ("C_01.00", "r0015", "c0010"))]
    assert report.filing_indicators == {"C_01.00": True}
