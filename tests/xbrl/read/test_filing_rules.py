"""Breaches of the EBA's filing rules in the text of an instance."""

import pytest

from tests.xbrl.read.xbrl_documents import instance, read


def clean() -> str:
    """Return an instance that breaks no filing rule: without the context of a year that `instance` has."""
    text = instance('<eba_met:mi53 contextRef="c" unitRef="eur" decimals="0">1</eba_met:mi53>')
    start = text.index('<xbrli:context id="d">')
    end = text.index("</xbrli:context>", start) + len("</xbrli:context>")
    return text[:start] + text[end:]


@pytest.mark.parametrize(
    ("old", "new", "number"),
    [
        ("<link:schemaRef", '<link:schemaRef xlink:type="simple" xlink:href="http://a/b.xsd"/><link:schemaRef', "1.5"),
        ("<xbrli:unit", '<find:fIndicators><find:filingIndicator contextRef="c">C_01.00</find:filingIndicator>'
         '<find:filingIndicator contextRef="c">C_01.00</find:filingIndicator></find:fIndicators><xbrli:unit', "1.6"),
        ("<xbrli:xbrl ", '<xbrli:xbrl xsi:schemaLocation="http://a b.xsd" ', "1.14"),
        ("<xbrli:xbrl ", '<xbrli:xbrl xml:base="http://a" ', "2.1"),
        ("<xbrli:unit", '<link:linkbaseRef xlink:type="simple" xlink:href="a"/><xbrli:unit', "2.4"),
        ("https://eurofiling.info/eu/rs", "http://example.org/banks", "2.8"),
        ("2026-03-31", "2026-03-31T00:00:00", "2.10"),
        ("<xbrli:instant>2026-03-31</xbrli:instant>", "<xbrli:forever/>", "2.11"),
        ("</xbrli:identifier>", "</xbrli:identifier><xbrli:segment><t:a/></xbrli:segment>", "2.14"),
        ('decimals="0"', 'precision="3"', "2.17"),
    ],
)  # fmt: skip
def test_each_breach_is_named_by_its_number(tmp_path, old, new, number):
    assert read(tmp_path, clean()).breaches == ()
    changed = clean().replace(old, new, 1)
    assert changed != clean()
    assert [rule for rule, _ in read(tmp_path, changed).breaches] == [number]


def test_other_instances_are_not_judged(tmp_path):
    text = clean().replace("2026-03-31", "2026-03-31T00:00:00")
    assert [rule for rule, _ in read(tmp_path, text).breaches] == ["2.10"]
    for namespace in ("www.eba.europa.eu", "www.eurofiling.info"):
        text = text.replace(namespace, "example.org").replace("ext/filing-indicators", "ext/t")
    assert read(tmp_path, text).breaches == ()
