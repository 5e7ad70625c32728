"""XBRL instances, inline and JSON documents for the tests."""

from pathlib import Path

from xbrl.read.dpm import load_cells
from xbrl.read.xbrl import read_report

NAMESPACES = """xmlns:xbrli="http://www.xbrl.org/2003/instance" xmlns:link="http://www.xbrl.org/2003/linkbase"
 xmlns:xlink="http://www.w3.org/1999/xlink" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
 xmlns:xbrldi="http://xbrl.org/2006/xbrldi" xmlns:iso4217="http://www.xbrl.org/2003/iso4217"
 xmlns:find="http://www.eurofiling.info/xbrl/ext/filing-indicators" xmlns:t="http://example.org/t"
 xmlns:eba_met="http://www.eba.europa.eu/xbrl/crr/dict/met" xmlns:eba_typ="http://www.eba.europa.eu/xbrl/crr/dict/typ"
 xmlns:eba_dim_4.0="http://www.eba.europa.eu/xbrl/crr/dict/dim/4.0" xmlns:eba_qTP="http://example.org/qTP"
 xmlns:eba_qOR="http://example.org/qOR" xmlns:eba_qAF="http://example.org/qAF" """
ENTITY = '<xbrli:entity><xbrli:identifier scheme="https://eurofiling.info/eu/rs">LEI1.CON</xbrli:identifier>{}</xbrli:entity>'
INSTANT = "<xbrli:period><xbrli:instant>2026-03-31</xbrli:instant></xbrli:period>"
YEAR = "<xbrli:period><xbrli:startDate>2020-01-01</xbrli:startDate><xbrli:endDate>2020-12-31</xbrli:endDate></xbrli:period>"
UNITS = """<xbrli:unit id="eur"><xbrli:measure>iso4217:EUR</xbrli:measure></xbrli:unit>
<xbrli:unit id="pure"><xbrli:measure>xbrli:pure</xbrli:measure></xbrli:unit>
<xbrli:unit id="per"><xbrli:divide><xbrli:unitNumerator><xbrli:measure>iso4217:EUR</xbrli:measure></xbrli:unitNumerator>
<xbrli:unitDenominator><xbrli:measure>xbrli:shares</xbrli:measure></xbrli:unitDenominator></xbrli:divide></xbrli:unit>"""
SCHEMA_REF = '<link:schemaRef xlink:type="simple" xlink:href="http://example.org/t.xsd"/>'


def context(name: str, period: str = INSTANT, scenario: str = "", segment: str = "") -> str:
    scenario = f"<xbrli:scenario>{scenario}</xbrli:scenario>" if scenario else ""
    segment = f"<xbrli:segment>{segment}</xbrli:segment>" if segment else ""
    return f'<xbrli:context id="{name}">{ENTITY.format(segment)}{period}{scenario}</xbrli:context>'


def member(dimension: str, value: str) -> str:
    return f'<xbrldi:explicitMember dimension="{dimension}">{value}</xbrldi:explicitMember>'


def instance(body: str, contexts: str = "") -> str:
    return (
        f"<xbrli:xbrl {NAMESPACES}>{SCHEMA_REF}{UNITS}{context('c')}{context('d', YEAR)}{contexts}{body}</xbrli:xbrl>"
    )


def inline(body: str, hidden: str = "", resources: bool = True) -> str:
    header = ""
    if resources:
        header = f"""<div style="display:none"><ix:header><ix:hidden>{hidden}</ix:hidden><ix:references>{SCHEMA_REF}
            </ix:references><ix:resources>{context("c")}{context("d", YEAR)}{UNITS}</ix:resources></ix:header></div>"""
    return f"""<html xmlns="http://www.w3.org/1999/xhtml" xmlns:ix="http://www.xbrl.org/2013/inlineXBRL"
        xmlns:ixt="http://www.xbrl.org/inlineXBRL/transformation/2015-02-26" {NAMESPACES}>
        <head><title>t</title></head><body>{header}{body}</body></html>"""


def read(tmp_path: Path, content: str | bytes, name: str = "report.xbrl", **options):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_report(file, load_cells(), **options)


def values(report) -> dict[str, object]:
    return {fact.concept: fact.value for fact in report.facts}


JSON_NAMESPACES = {
    **{"t": "http://example.org/t", "rs": "https://eurofiling.info/eu/rs", "xbrl": "https://xbrl.org/2021"},
    **{"iso4217": "http://www.xbrl.org/2003/iso4217", "eba_met": "http://www.eba.europa.eu/xbrl/crr/dict/met"},
    **{f"eba_{name}": f"http://example.org/{name}" for name in ("qTP", "qOR", "qAF")},
    "eba_dim": "http://www.eba.europa.eu/xbrl/crr/dict/dim/4.0",
    "fi": "http://www.xbrl.org/taxonomy/int/filing-indicators/REC/2021-02-03",
}


def fact(concept: str, value: object, decimals: object = None, **dimensions: str) -> dict:
    """Make a fact of xBRL-JSON; `__` in the name of a dimension is a colon."""
    own = {"concept": concept, "entity": "rs:LEI1.CON", "period": "2026-04-01T00:00:00"}
    own |= {key.replace("__", ":"): item for key, item in dimensions.items()}
    return {"value": value, "dimensions": own} | ({} if decimals is None else {"decimals": decimals})


def document(*facts: dict, notes: dict[str, tuple[str, str]] | None = None, **changes: object) -> dict:
    """Make an xBRL-JSON document with the facts f0, f1, ... and with `notes`: {name: (text, language)}."""
    info = {"documentType": "https://xbrl.org/2021/xbrl-json", "namespaces": JSON_NAMESPACES, "taxonomy": []}
    content = {f"f{number}": item for number, item in enumerate(facts)}
    for name, (text, language) in (notes or {}).items():
        content[name] = {"value": text, "dimensions": {"concept": "xbrl:note", "noteId": name, "language": language}}
    return {"documentInfo": info | changes, "facts": content}
