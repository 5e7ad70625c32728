"""Read xBRL-XML and inline XBRL with Arelle, without the taxonomy and without network access.

Arelle recovers from malformed XML and silently drops the parts it could not parse. Callers therefore validate every
document with `safety.strict_xml` first; the same bytes are written to a temporary folder for Arelle, and any syntax
error that Arelle still reports is fatal. Arelle is not thread-safe: run one session at a time per process. Only this
module imports Arelle, because training does not need it.
"""

import contextlib
import datetime
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from xbrl.read.assemble import FILING_INDICATORS, Concept, FiledFact, ParsedFile
from xbrl.read.filed_report import Fact, parse_number
from xbrl.read.xbrl_json import first_day, last_day

FATAL = ("xmlSchema:syntax", "exception:", "FileNotLoadable", "IOerror")
NO_VALUE = "(ixTransformValueError)"  # Arelle's value for displayed text that its inline transformation cannot parse
STANDARD_PREFIXES = {"http://www.xbrl.org/2003/iso4217": "iso4217", "http://www.xbrl.org/2003/instance": "xbrli"}


def read_with_arelle(path: Path, syntax: str, documents: Sequence[bytes], references: int) -> ParsedFile:
    """Read the facts of one instance (`syntax="xBRL-XML"`) or of all documents of an inline report (`syntax="iXBRL"`).

    `references` is the number of elements with a contextRef in the documents. Arelle ignores such elements where XBRL
    allows no fact, so a warning reports how many were ignored. Raise `UserError` if Arelle cannot read the report.
    """
    suffix = ".xbrl" if syntax == "xBRL-XML" else ".xhtml"
    with tempfile.TemporaryDirectory(prefix="report-") as folder:
        files = [str(Path(folder) / f"report{number}{suffix}") for number in range(len(documents))]
        for file, content in zip(files, documents, strict=True):
            Path(file).write_bytes(content)
        entry: dict = {"entrypointFile": files[0]}
        if len(files) > 1:
            entry["entrypointFile"] = json.dumps([{"ixds": [{"file": file} for file in files]}])
            entry["plugins"] = "inlineXbrlDocumentSet"
        with _session(skipDTS=True, **entry) as (models, messages):
            for code, text in messages:
                if code.startswith(FATAL):
                    raise UserError(f"{path}: Arelle cannot read it ({text.replace(folder, '')})")
            if len(models) != 1 or models[0].modelDocument is None:
                raise UserError(f"{path}: Arelle found no XBRL report in this file")
            return _parsed_file(path, syntax, models[0], references)


def read_concepts(entry_points: Sequence[str], packages: Sequence[Path]) -> dict[tuple[str, str], Concept]:
    """Return {(namespace, name): concept} for the schemas at `entry_points` that the taxonomy packages contain."""
    concepts = {}
    for url in entry_points:
        with _session(entrypointFile=url, packages=[str(package) for package in packages]) as (models, _):
            for model in models:
                for name, concept in model.qnameConcepts.items():
                    if not (concept.isItem or concept.isTuple) or concept.typeQname is None:
                        continue
                    label = concept.label(lang="en", fallbackToQname=False) or ""
                    boolean = concept.baseXbrliType == "booleanItemType"
                    key = (name.namespaceURI or "", name.localName)
                    concepts[key] = Concept(
                        str(concept.typeQname), " ".join(label.split()), bool(concept.isNumeric), boolean
                    )
    return concepts


@contextlib.contextmanager
def _session(**options: Any) -> Iterator[tuple[list, list[tuple[str, str]]]]:
    """Run Arelle offline. Yield (models, [(message code, message text)]); the models are valid until the context exits."""
    from arelle.api.Session import Session  # takes a second
    from arelle.RuntimeOptions import RuntimeOptions

    fixed: dict[str, Any] = {
        "internetConnectivity": "offline",
        "keepOpen": True,
        "logFile": "logToBuffer",
        "disablePersistentConfig": True,
    }
    with Session() as session:
        session.run(RuntimeOptions(**fixed, **options))
        log = json.loads(session.get_logs("json") or "{}").get("log", [])
        yield session.get_models(), [(entry["code"], entry["message"]["text"]) for entry in log]


def _parsed_file(path: Path, syntax: str, model, references: int) -> ParsedFile:  # noqa: ANN001 (an arelle ModelXbrl)
    facts: list[FiledFact] = []
    indicators: dict[str, bool] = {}
    for item in _leaf_facts(model.facts):
        references -= item.get("contextRef") is not None
        if _namespace(item).startswith(FILING_INDICATORS):
            _add_indicator(item, indicators)
        else:
            facts.append(_filed_fact(item))
    ignored = f"{references} elements with a contextRef are in places where XBRL allows no facts and were ignored"
    return ParsedFile(path, syntax, tuple(facts), indicators, warnings=(ignored,) if references > 0 else ())


def _leaf_facts(items):  # noqa: ANN001, ANN202 (arelle facts)
    """Yield the facts in document order. A tuple has no value of its own and is replaced by the facts inside it."""
    for item in items:
        inner = [child for child in item.modelTupleFacts if child.localName not in ("numerator", "denominator")]
        if inner:
            yield from _leaf_facts(inner)
        elif item.contextID or "".join(item.itertext()).strip():  # not an empty tuple
            yield item


def _add_indicator(item, indicators: dict[str, bool]) -> None:  # noqa: ANN001
    """Record a filing indicator: the text of `find:filingIndicator`, or the typed dimension of `fi:filed`."""
    if item.qname.localName == "filed" and item.context is not None:
        for dimension in item.context.qnameDims.values():
            if dimension.isTyped:
                indicators[dimension.typedMember.stringValue.strip()] = item.value.strip() in ("true", "1")
        return
    filed = next((value for name, value in item.attrib.items() if name.endswith("filed")), "true")
    indicators[item.value.strip()] = filed in ("true", "1")


def _filed_fact(item) -> FiledFact:  # noqa: ANN001
    problems: list[str] = []
    context, unit = item.context, None
    entity, period, dimensions, typed = "", "", {}, ()
    if not item.contextID:
        problems.append("names no context")
    elif context is None:
        problems.append(f"refers to the context {item.contextID}, which the file does not define")
    else:
        entity = (context.entityIdentifier or ("", ""))[1] or ""
        period = _period(context)
        dimensions, typed = _dimensions(context)
        if not period:
            problems.append(f"has no valid period in the context {item.contextID}, line {context.sourceline}")
    if item.unitID:
        if item.unit is None:
            problems.append(f"refers to the unit {item.unitID}, which the file does not define")
        else:
            unit = _unit(item.unit.measures)
    value = fraction = _fraction(item)
    if item.isNil:
        value = None
    elif fraction is None:
        value = item.value
        if value == NO_VALUE:
            value = "".join(item.itertext()).strip()
            if item.format is not None:
                problems.append(f"has a text that its transformation {item.format} cannot convert: {value[:40]!r}")
    decimals = _decimals(item, value, problems)
    fact = Fact(str(item.qname), value, unit, decimals, entity, period, dimensions)
    marked = bool(item.unitID) or item.decimals is not None or item.precision is not None
    numeric = marked and value != fraction
    return FiledFact(fact, _namespace(item), numeric, typed, tuple(problems), id=item.id or "")


def _namespace(item) -> str:  # noqa: ANN001
    """Return the namespace of the concept. In an inline report this is not the namespace of the XML element."""
    return (item.qname and item.qname.namespaceURI) or ""


def _fraction(item) -> str | None:  # noqa: ANN001
    """Return a fraction item as the text `1/3`, because the quotient may have no finite decimal form; None for other items."""
    parts = {child.localName: child.textValue.strip() for child in item.iterchildren() if hasattr(child, "localName")}
    if "numerator" in parts and "denominator" in parts:
        return f"{parts['numerator']}/{parts['denominator']}"
    return None


def _decimals(item, value: str | None, problems: list[str]) -> int | str | None:  # noqa: ANN001
    """Return the decimals, converted from a `precision` attribute if need be. Append an invalid attribute to `problems`."""
    name = "precision" if item.decimals is None else "decimals"
    text = getattr(item, name)
    if value is None or text is None:
        return None
    if text.strip() == "INF":
        return "INF"
    number = parse_number(text)
    if number is None or number != int(number):
        problems.append(f"has the {name} {text!r}, which is neither an integer nor INF")
        return None
    if name == "decimals":
        return int(number)
    amount = parse_number(value)  # a precision is a number of significant digits: XBRL 2.1, 4.6.6
    return int(number) - amount.adjusted() - 1 if amount and number > 0 else None


def _period(context) -> str:  # noqa: ANN001
    """Return a day, `START/END` with both days inclusive, `forever`, or "" if the dates cannot be parsed."""
    if context.isForeverPeriod:
        return "forever"
    instant = context.isInstantPeriod
    moments = [context.instantDatetime] if instant else [context.startDatetime, context.endDatetime]
    # Arelle returns None for a malformed date, and the year 9999 for a date that does not exist, e.g. 2026-02-30.
    if any(moment is None or moment.year == datetime.MAXYEAR for moment in moments):
        return ""
    return last_day(moments[0]) if instant else f"{first_day(moments[0])}/{last_day(moments[1])}"


def _dimensions(context) -> tuple[dict[str, str], tuple[str, ...]]:  # noqa: ANN001
    """Return ({dimension or name of another element: its member or text}, names of the typed dimensions)."""
    dimensions, typed = {}, []
    for name, dimension in context.qnameDims.items():
        if dimension.isTyped:
            member = dimension.typedMember
            dimensions[str(name)] = "" if member is None else " ".join(member.stringValue.split())
            typed.append(str(name))
        else:
            dimensions[str(name)] = str(dimension.memberQname)
    for element in (*context.nonDimValues("segment"), *context.nonDimValues("scenario")):
        dimensions[str(element.qname)] = " ".join(element.stringValue.split())
    return dimensions, tuple(typed)


def _unit(measures: tuple) -> str:
    """Format a unit: `iso4217:EUR`, `xbrli:pure`, `iso4217:USD/xbrli:shares`, `a*b`. Standard measures get their usual prefix."""
    parts = [
        "*".join(f"{STANDARD_PREFIXES.get(m.namespaceURI, m.prefix or '')}:{m.localName}" for m in side)
        for side in measures
    ]
    return "/".join(part for part in parts if part)
