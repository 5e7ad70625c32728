"""Find what an xBRL-XML file has that the EBA's filing rules forbid and that its facts no longer show.

The rules' numbers and contents are those of version 5.8 as a validator (Meaningful-Data/xbridge 2.0.1) lists them. We did not read
the EBA's own text.
"""

from collections.abc import Iterator

from xbrl.read.filed_report import is_day

OURS = ("eba.europa.eu", "filing-indicators")  # parts of the namespaces that only supervisory reports declare
NAMESPACES = {
    "xbrli": "http://www.xbrl.org/2003/instance",
    "link": "http://www.xbrl.org/2003/linkbase",
    "xbrldi": "http://xbrl.org/2006/xbrldi",
    "find": "http://www.eurofiling.info/xbrl/ext/filing-indicators",
    "xsi": "http://www.w3.org/2001/XMLSchema-instance",
    "xi": "http://www.w3.org/2001/XInclude",
}
SCHEMES = " and ".join(
    f"@scheme != '{scheme}'" for scheme in ("http://standards.iso.org/iso/17442", "https://eurofiling.info/eu/rs")
)
FORBIDDEN = (  # (number of the rule, XPath, name of what it selects)
    ("1.5", "/*[count(link:schemaRef) != 1]", "not exactly one schemaRef"),
    ("1.14", "//@xsi:schemaLocation | //@xsi:noNamespaceSchemaLocation", "a schemaLocation"),
    ("1.15", "//xi:include", "an inclusion of another file"),
    ("2.1", "//@xml:base", "an xml:base"),
    ("2.4", "//link:linkbaseRef", "a linkbaseRef"),
    ("2.8", f"//xbrli:identifier[{SCHEMES}]", "an entity of an unknown scheme"),
    ("2.11", "//xbrli:forever", "a period without end"),
    ("2.13", "//xbrli:startDate", "a period that is no day"),
    ("2.14", "//xbrli:segment", "a segment"),
    ("2.15", "//xbrli:scenario/*[namespace-uri() != 'http://xbrl.org/2006/xbrldi']", "a scenario that is no dimension"),
    ("2.17", "//@precision", "a precision in place of decimals"),
    ("2.19", "//*[@contextRef][@xsi:nil or not(normalize-space())]", "a fact without a value"),
    ("2.25", "//link:footnoteLink", "footnotes, in place of a reply beside the report"),
)


def breaches_of_instance(tree) -> tuple[tuple[str, str], ...]:  # noqa: ANN001 (an lxml tree)
    """Return (number of the rule, sentence) for each filing rule that an instance breaks; () if it is no supervisory report."""
    root = tree.getroot()
    is_of_eba = any(part in uri for uri in root.nsmap.values() for part in OURS)
    return tuple(_breaches(tree, root)) if is_of_eba else ()


def _breaches(tree, root) -> Iterator[tuple[str, str]]:  # noqa: ANN001
    if (encoding := (tree.docinfo.encoding or "UTF-8").upper()) != "UTF-8":
        yield "1.4", f"the file is in {encoding}, not in UTF-8"
    indicators = [(element.text or "").strip() for element in root.iter(f"{{{NAMESPACES['find']}}}filingIndicator")]
    if len(set(indicators)) < len(indicators):
        yield "1.6", "a filing indicator occurs twice"
    for number, path, name in FORBIDDEN:
        if selected := tree.xpath(path, namespaces=NAMESPACES):
            yield number, f"the file has {name} ({len(selected)} in all)"
    for name in ("instant", "startDate", "endDate"):
        for element in root.iter(f"{{{NAMESPACES['xbrli']}}}{name}"):
            if not is_day((element.text or "").strip()):
                yield (
                    "2.10",
                    f"line {element.sourceline} has the period {(element.text or '')[:40]!r}, which is no day YYYY-MM-DD",
                )
                return
