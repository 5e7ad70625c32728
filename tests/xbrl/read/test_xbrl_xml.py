"""xBRL-XML: edge cases of the syntax, mapping EBA facts to cells, and taxonomy packages."""

import zipfile
from decimal import Decimal
from pathlib import Path

import pytest

from common.errors import UserError
from tests.xbrl.read.xbrl_documents import INSTANT, NAMESPACES, context, instance, member, read, values
from xbrl.read.arelle_reader import read_with_arelle
from xbrl.read.dpm import load_cells
from xbrl.read.xbrl import read_report

pytest.importorskip("arelle")


def test_an_instance_becomes_facts(tmp_path):
    body = '<t:A contextRef="c" unitRef="eur" decimals="-3">1200000</t:A><t:B contextRef="d">text</t:B>'
    report = read(tmp_path, instance(body))
    assert (report.format, report.entity, report.period) == ("xBRL-XML", "LEI1.CON", "2026-03-31")
    assert report.currency == "EUR"
    number, text = report.facts
    assert (number.concept, number.value, number.unit, number.decimals) == ("t:A", Decimal(1200000), "iso4217:EUR", -3)
    assert number.period == "2026-03-31"
    assert (text.value, text.unit, text.decimals, text.period) == ("text", None, None, "2020-01-01/2020-12-31")
    assert report.warnings == ()


def test_instants_at_midnight_belong_to_the_day_before(tmp_path):
    """The reference date is a day, although most periods end at noon. A second entity gives a warning."""
    midnight = INSTANT.replace("2026-03-31", "2020-10-01T00:00:00")
    noon, forever = midnight.replace("00:00:00", "12:00:00"), "<xbrli:period><xbrli:forever/></xbrli:period>"
    contexts = context("m", midnight) + context("n", noon) + context("f", forever)
    contexts += context("o", noon).replace("LEI1", "LEI2")
    report = read(tmp_path, instance("".join(f'<t:A contextRef="{name}">x</t:A>' for name in "mnfo"), contexts))
    noon = "2020-10-01T12:00:00"
    assert [fact.period for fact in report.facts] == ["2020-09-30", noon, "forever", noon]
    assert (report.entity, report.period) == ("LEI1.CON", "2020-10-01")
    assert report.warnings == ("facts of entities other than LEI1.CON: LEI2.CON",)


@pytest.mark.parametrize("day", ["2026-3-31", "2026-02-30", "0000-01-01", ""])
def test_a_report_without_valid_date_is_rejected(tmp_path, day):
    content = instance('<t:A contextRef="c">1</t:A>').replace("2026-03-31", day)
    message = "no fact has a valid period .*t:A has no valid period in the context c, line 10"
    with pytest.raises(UserError, match=message):
        read(tmp_path, content)


def test_one_impossible_date_gives_a_warning(tmp_path):
    wrong = context("w", INSTANT.replace("2026-03-31", "2026-02-30"))
    report = read(tmp_path, instance('<t:A contextRef="w">1</t:A><t:B contextRef="c">1</t:B>', wrong))
    assert (report.period, [fact.period for fact in report.facts]) == ("2026-03-31", ["", "2026-03-31"])
    assert report.warnings == ("t:A has no valid period in the context w, line 10",)


LOCATION = 'xsi:schemaLocation="http://example.org/t {}" '


@pytest.mark.parametrize("href", ["../../foo.xsd", "file:///etc/hostname"])
def test_a_local_schema_is_never_opened(tmp_path, href):
    fact = '<t:A contextRef="c" unitRef="eur" decimals="0">5</t:A>'
    content = instance(fact).replace("http://example.org/t.xsd", href)
    hint = LOCATION.format(href)
    hints = content.replace("<xbrli:xbrl ", "<xbrli:xbrl " + hint).replace("<t:A ", "<t:A " + hint)
    for document in (content, hints):
        report = read(tmp_path, document)
        assert values(report) == {"t:A": Decimal(5)}
        assert report.warnings == (
            f"the schema {href!r} is a local file, which is not read: the facts have no types and labels of its taxonomy",
        )


def test_a_hint_at_a_remote_schema_is_ignored(tmp_path):
    content = instance('<t:A contextRef="c">x é</t:A>')
    hinted = content.replace("<xbrli:xbrl ", "<xbrli:xbrl " + LOCATION.format("http://example.org/t.xsd"))
    report = read(tmp_path, b'<?xml version="1.0" encoding="iso-8859-1"?>' + hinted.encode("iso-8859-1"))
    assert (values(report), report.warnings) == ({"t:A": "x é"}, ())


def test_decimals_precision_nil_and_units(tmp_path):
    body = """<t:A contextRef="c" unitRef="eur" decimals="INF">1.50</t:A>
        <t:B contextRef="c" unitRef="eur" precision="3">123456</t:B>
        <t:C contextRef="c" unitRef="per" decimals="2">0.15</t:C>
        <t:D contextRef="c" unitRef="eur" xsi:nil="true"/>
        <t:E contextRef="c" unitRef="pure" decimals="four">1</t:E>"""
    report = read(tmp_path, instance(body))
    facts = {fact.concept: fact for fact in report.facts}
    assert (str(facts["t:A"].value), facts["t:A"].decimals) == ("1.50", "INF")
    assert facts["t:B"].decimals == -3
    assert facts["t:C"].unit == "iso4217:EUR/xbrli:shares"
    assert (facts["t:D"].value, facts["t:D"].decimals) == (None, None)
    assert facts["t:E"].decimals is None
    assert report.warnings == ("t:E has the decimals 'four', which is neither an integer nor INF",)


def test_explicit_and_typed_dimensions_in_segment_and_scenario(tmp_path):
    typed = '<xbrldi:typedMember dimension="t:Id"><t:id> X 1 </t:id></xbrldi:typedMember>'
    segment = member("t:Seg", "t:s") + "<t:other>old</t:other>"
    contexts = context("x", scenario=member("t:Dim", "t:m") + typed, segment=segment)
    (fact,) = read(tmp_path, instance('<t:A contextRef="x">v</t:A>', contexts)).facts
    assert fact.dimensions == {"t:Dim": "t:m", "t:Id": "X 1", "t:Seg": "t:s", "t:other": "old"}
    assert fact.keys == {"Dim": "t:m", "Id": "X 1", "Seg": "t:s", "other": "old"}


def test_tuples_and_fractions(tmp_path):
    body = """<t:Loan><t:Amount contextRef="c" unitRef="eur" decimals="0">7</t:Amount><t:Inner><t:Name contextRef="c">n</t:Name>
        </t:Inner><t:Empty/></t:Loan><t:Empty/><t:Share contextRef="c" unitRef="pure"><xbrli:numerator>1</xbrli:numerator>
        <xbrli:denominator>3</xbrli:denominator></t:Share>"""
    report = read(tmp_path, instance(body))
    assert values(report) == {"t:Amount": Decimal(7), "t:Name": "n", "t:Share": "1/3"}
    assert report.warnings == ()


def test_defective_facts_are_kept_with_warnings(tmp_path):
    body = """<t:A contextRef="missing" unitRef="eur" decimals="0">1</t:A><t:B contextRef="c" unitRef="nope" decimals="0">2</t:B>
        <t:C contextRef="c" unitRef="eur" decimals="0">2,5</t:C><t:D contextRef="c" unitRef="eur" decimals="0">NaN</t:D>
        <t:E contextRef="c" unitRef="eur" decimals="0">100</t:E><t:E contextRef="c" unitRef="eur" decimals="INF">101</t:E>"""
    report = read(tmp_path, instance(body))
    assert len(report.facts) == 6
    assert report.facts[0].value == Decimal(1) and report.facts[0].entity == ""
    assert report.warnings == (
        "t:A refers to the context missing, which the file does not define",
        "t:B refers to the unit nope, which the file does not define",
        "t:C has the non-numeric value '2,5'",
        "t:D has the non-numeric value 'NaN'",
        "t:E is reported as 100 and as 101",
    )


def test_misplaced_facts_are_counted(tmp_path):
    inside = context("x", scenario='<t:A contextRef="c">lost</t:A>')
    body = '<t:B contextRef="c">outer<t:C contextRef="c">inner</t:C></t:B><t:D>stray</t:D>'
    report = read(tmp_path, instance(body, inside))
    assert values(report) == {"t:C": "inner", "t:D": "stray"}
    assert report.warnings == (
        "2 elements with a contextRef are in places where XBRL allows no facts and were ignored",
        "t:D names no context",
    )


def test_duplicates_within_rounding_are_consistent(tmp_path):
    fact = '<t:E contextRef="c" unitRef="eur" decimals="{}">{}</t:E>'
    assert read(tmp_path, instance(fact.format(-3, 100000) + fact.format(0, 100400))).warnings == ()
    assert len(read(tmp_path, instance(fact.format(-3, 100000) + fact.format(0, 100501))).warnings) == 1
    two_units = fact.format(0, 1) + fact.format(0, 9).replace("eur", "pure")
    assert read(tmp_path, instance(two_units)).warnings == ()


def test_malformed_xml_that_arelle_would_repair_is_rejected(tmp_path):
    with pytest.raises(UserError, match="Arelle cannot read it"):
        read_with_arelle(tmp_path / "r.xbrl", "xBRL-XML", [instance('<t:A contextRef="c">1</t:A>')[:-30].encode()], 1)


@pytest.mark.parametrize("filed", ["C_01.00", "C_47.00"])
def test_an_eba_metric_is_mapped_to_its_cells(tmp_path, filed):
    """Tier 1 capital is shown in C 01.00 and in C 47.00; the cell of the filed template comes first. The instance is in a zip."""
    dimensions = member("eba_dim_4.0:qACK", "eba_qTP:qx2008") + member("eba_dim_4.0:qADT", "eba_qOR:qx2060")
    body = f"""<find:fIndicators><find:filingIndicator contextRef="c">{filed}</find:filingIndicator>
        <find:filingIndicator contextRef="c" find:filed="false">C_76.00</find:filingIndicator></find:fIndicators>
        <eba_met:qABJ contextRef="x" unitRef="eur" decimals="-3">5000</eba_met:qABJ>"""
    with zipfile.ZipFile(tmp_path / "bank.zip", "w") as archive:
        archive.writestr("bank.xbrl", instance(body, context("x", scenario=dimensions)))
    report = read_report(tmp_path / "bank.zip", load_cells())
    assert report.filing_indicators == {filed: True, "C_76.00": False}
    (fact,) = report.facts
    cells = [("C_01.00", "r0015", "c0010"), ("C_47.00", "r0320", "c0010")]
    assert [fact.cell, fact.other_cells[0]] == (cells if filed == "C_01.00" else cells[::-1])
    assert {table for table, _, _ in fact.other_cells[1:]} == {"I_01.00", "I_01.01", "K_61.00"}  # of other modules
    assert fact.keys == {} and len(fact.dimensions) == 2
    with zipfile.ZipFile(tmp_path / "bank.zip", "a") as archive:
        archive.writestr("other.xbrl", instance('<t:A contextRef="c">a</t:A>'))
    with pytest.raises(UserError, match="contains 2 reports"):
        read_report(tmp_path / "bank.zip", load_cells())


def test_open_rows_keep_their_key_and_type(tmp_path):
    key = '<xbrldi:typedMember dimension="eba_dim_4.0:qINC"><eba_typ:CC>LEI7</eba_typ:CC></xbrldi:typedMember>'
    amount = member("eba_dim_4.0:qLJI", "eba_qAF:qx2011") + member("eba_dim_4.0:qZZX", "eba_qOR:qx2007")
    contexts = context("x", scenario=key) + context("y", scenario=key + amount)
    body = '<eba_met:qEFF contextRef="x">true</eba_met:qEFF><eba_met:qIJJ contextRef="y" unitRef="eur" decimals="0">5</eba_met:qIJJ>'
    flag, number = read(tmp_path, instance(body, contexts)).facts
    assert (flag.value, flag.cell, flag.keys) == (True, ("C_28.00", "*", "c030"), {"qINC": "LEI7"})
    assert (number.value, number.cell, number.keys) == (Decimal(5), ("C_28.00", "*", "c040"), {"qINC": "LEI7"})


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "iso-8859-1"])
def test_declared_encodings_are_respected(tmp_path, encoding):
    text = instance('<t:A contextRef="c">Société</t:A>')
    if encoding == "iso-8859-1":
        text = '<?xml version="1.0" encoding="iso-8859-1"?>' + text
    assert values(read(tmp_path, text.encode(encoding))) == {"t:A": "Société"}


@pytest.fixture
def taxonomy(tmp_path) -> Path:
    """A taxonomy package for the namespace t with two concepts: a labelled amount and a boolean."""
    element = '<xs:element name="{0}" id="t_{0}" type="xbrli:{1}ItemType" substitutionGroup="xbrli:item" xbrli:periodType="instant"/>'
    schema = f"""<xs:schema xmlns:xs="http://www.w3.org/2001/XMLSchema" {NAMESPACES} targetNamespace="http://example.org/t">
        <xs:annotation><xs:appinfo><link:linkbaseRef xlink:type="simple" xlink:href="lab.xml"
        xlink:arcrole="http://www.w3.org/1999/xlink/properties/linkbase"/></xs:appinfo></xs:annotation>
        <xs:import namespace="http://www.xbrl.org/2003/instance" schemaLocation="http://www.xbrl.org/2003/xbrl-instance-2003-12-31.xsd"/>
        {element.format("A", "monetary")}{element.format("Flag", "boolean")}</xs:schema>"""
    labels = f"""<link:linkbase {NAMESPACES}><link:labelLink xlink:type="extended" xlink:role="http://www.xbrl.org/2003/role/link">
        <link:loc xlink:type="locator" xlink:href="t.xsd#t_A" xlink:label="a"/><link:label xlink:type="resource" xlink:label="b"
        xlink:role="http://www.xbrl.org/2003/role/label" xml:lang="en">Total assets</link:label><link:labelArc xlink:type="arc"
        xlink:from="a" xlink:to="b" xlink:arcrole="http://www.xbrl.org/2003/arcrole/concept-label"/></link:labelLink></link:linkbase>"""
    target = tmp_path / "taxonomy.zip"
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(
            "t/META-INF/taxonomyPackage.xml",
            """<tp:taxonomyPackage xmlns:tp="http://xbrl.org/2016/taxonomy-package" xml:lang="en"><tp:identifier>http://example.org
            </tp:identifier><tp:name>t</tp:name><tp:description>t</tp:description></tp:taxonomyPackage>""",
        )
        archive.writestr(
            "t/META-INF/catalog.xml",
            """<catalog xmlns="urn:oasis:names:tc:entity:xmlns:xml:catalog">
            <rewriteURI uriStartString="http://example.org/" rewritePrefix="../x/"/></catalog>""",
        )
        archive.writestr("t/x/t.xsd", schema)
        archive.writestr("t/x/lab.xml", labels)
    return target


def test_a_taxonomy_package_gives_types_and_labels(tmp_path, taxonomy):
    content = instance('<t:A contextRef="c" unitRef="eur" decimals="0">5</t:A><t:Flag contextRef="c">true</t:Flag>')
    report = read(tmp_path, content, taxonomy=[taxonomy])
    amount, flag = report.facts
    assert (amount.type, amount.label, amount.value) == ("xbrli:monetaryItemType", "Total assets", Decimal(5))
    assert (flag.type, flag.label, flag.value) == ("xbrli:booleanItemType", "", True)
    plain = read(tmp_path, content)  # the taxonomy must not affect the next report
    assert [(fact.type, fact.value) for fact in plain.facts] == [("", Decimal(5)), ("", "true")]


def test_a_taxonomy_package_without_schema_warns(tmp_path, taxonomy):
    content = instance('<t:A contextRef="c" unitRef="eur" decimals="0">5</t:A>').replace("org/t.xsd", "org/u.xsd")
    report = read(tmp_path, content, taxonomy=[taxonomy])
    assert report.facts[0].value == Decimal(5)
    assert report.warnings == ("the taxonomy package contains no concepts for http://example.org/u.xsd",)
    with pytest.raises(UserError, match="taxonomy package not found"):
        read(tmp_path, content, taxonomy=[tmp_path / "absent.zip"])
