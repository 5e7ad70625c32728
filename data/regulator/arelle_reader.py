"""xBRL-XML and inline XBRL through Arelle, without the taxonomy and without the network.

Arelle recovers from broken XML and then reports what is left as if it were all. So what comes here has passed
`safety.strict_xml`, Arelle reads exactly those bytes from a folder of their own, and any syntax error it still finds is
fatal. One session per process (Arelle is not thread-safe). The package is imported only here: training does not need it.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import UserError
from data.regulator.assemble import FILING_INDICATORS, Concept, Filed, Filing, decimals_of
from data.regulator.report import Fact, parse_number
from data.regulator.xbrl_json import first_day, last_day

FATAL = ("xmlSchema:syntax", "exception:", "FileNotLoadable", "IOerror")
NO_VALUE = (
    "(ixTransformValueError)"  # how Arelle marks a displayed text that its transformation cannot turn into a value
)
STANDARD = {"http://www.xbrl.org/2003/iso4217": "iso4217", "http://www.xbrl.org/2003/instance": "xbrli"}


def read_with_arelle(path: Path, form: str, documents: Sequence[bytes], references: int) -> Filing:
    """The facts of an instance (`form="xBRL-XML"`) or of the documents of one inline report (`form="iXBRL"`).

    `references` counts the elements with a contextRef: what stands where XBRL allows no fact is missed, so it is said.
    """
    suffix = ".xbrl" if form == "xBRL-XML" else ".xhtml"
    with tempfile.TemporaryDirectory(prefix="report-") as folder:
        files = [str(Path(folder) / f"report{number}{suffix}") for number in range(len(documents))]
        for file, content in zip(files, documents, strict=True):
            Path(file).write_bytes(content)
        entry: dict = {"entrypointFile": files[0]}
        if len(files) > 1:
            entry["entrypointFile"] = json.dumps([{"ixds": [{"file": file} for file in files]}])
            entry["plugins"] = "inlineXbrlDocumentSet"
        with _session(path, skipDTS=True, **entry) as (models, messages):
            for code, text in messages:
                if code.startswith(FATAL):
                    raise UserError(f"{path}: Arelle cannot read it ({text.replace(folder, '')})")
            if len(models) != 1 or models[0].modelDocument is None:
                raise UserError(f"{path}: Arelle finds no XBRL report in it")
            return _filing(path, form, models[0], references)


def read_concepts(entry_points: Sequence[str], packages: Sequence[Path]) -> dict[tuple[str, str], Concept]:
    """(namespace, name) -> `Concept` for the schemas at `entry_points`, as far as the taxonomy packages hold them."""
    found = {}
    for url in entry_points:
        with _session(Path(url), entrypointFile=url, packages=[str(package) for package in packages]) as (models, _):
            for model in models:
                for name, concept in model.qnameConcepts.items():
                    if not (concept.isItem or concept.isTuple) or concept.typeQname is None:
                        continue
                    label = concept.label(lang="en", fallbackToQname=False) or ""
                    boolean = concept.baseXbrliType == "booleanItemType"
                    key = (name.namespaceURI or "", name.localName)
                    found[key] = Concept(
                        str(concept.typeQname), " ".join(label.split()), bool(concept.isNumeric), boolean
                    )
    return found


@contextlib.contextmanager
def _session(path: Path, **options: object) -> Iterator[tuple[list, list[tuple[str, str]]]]:
    """Run Arelle offline and give (models, [(message code, text)]), to be used before it is closed."""
    try:
        from arelle.api.Session import Session
        from arelle.RuntimeOptions import RuntimeOptions
    except ImportError as error:
        raise UserError(f"{path}: reading it needs Arelle; pip install arelle-release") from error
    fixed = {
        "internetConnectivity": "offline",
        "keepOpen": True,
        "logFile": "logToBuffer",
        "disablePersistentConfig": True,
    }
    with Session() as session:
        session.run(RuntimeOptions(**fixed, **options))
        log = json.loads(session.get_logs("json") or "{}").get("log", [])
        yield session.get_models(), [(entry["code"], entry["message"]["text"]) for entry in log]


def _filing(path: Path, form: str, model, references: int) -> Filing:  # noqa: ANN001 (an arelle ModelXbrl)
    filed: list[Filed] = []
    indicators: dict[str, bool] = {}
    for item in _leaves(model.facts):
        references -= item.get("contextRef") is not None
        if item.namespaceURI.startswith(FILING_INDICATORS):
            _add_indicator(item, indicators)
        else:
            filed.append(_filed(item))
    warnings = ()
    if references > 0:
        warnings = (f"{references} elements with a contextRef stand where XBRL allows no fact, and are not read",)
    return Filing(path, form, tuple(filed), indicators, warnings=warnings)


def _leaves(items):  # noqa: ANN001, ANN202 (arelle facts)
    """Facts in document order; a tuple, which has no value, is replaced by what it holds."""
    for item in items:
        inner = [child for child in item.modelTupleFacts if child.localName not in ("numerator", "denominator")]
        if inner:
            yield from _leaves(inner)
        elif item.contextID or "".join(item.itertext()).strip():  # else an empty tuple
            yield item


def _add_indicator(item, indicators: dict[str, bool]) -> None:  # noqa: ANN001
    """`find:filingIndicator` names the template in its text, `fi:filed` in a typed dimension."""
    if item.localName == "filed" and item.context is not None:
        for dimension in item.context.qnameDims.values():
            if dimension.isTyped:
                indicators[dimension.typedMember.stringValue.strip()] = item.value.strip() in ("true", "1")
        return
    filed = next((value for name, value in item.attrib.items() if name.endswith("filed")), "true")
    indicators[item.value.strip()] = filed in ("true", "1")


def _filed(item) -> Filed:  # noqa: ANN001
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
            problems.append(f"has no readable period in the context {item.contextID}")
    if item.unitID:
        if item.unit is None:
            problems.append(f"refers to the unit {item.unitID}, which the file does not define")
        else:
            unit = _unit(item.unit.measures)
    numeric = bool(item.unitID) or item.decimals is not None or item.precision is not None
    value, problem = _value(item)
    if problem:
        problems.append(problem)
    decimals, problem = _decimals(item, value)
    if problem:
        problems.append(problem)
    fact = Fact(str(item.qname), value, unit, decimals, entity, period, dimensions)
    return Filed(fact, item.namespaceURI, numeric and value != _fraction(item), typed, tuple(problems))


def _value(item) -> tuple[str | None, str]:  # noqa: ANN001
    """(text or None for nil, problem)."""
    if item.isNil:
        return None, ""
    fraction = _fraction(item)
    if fraction:
        return fraction, ""
    if item.value == NO_VALUE:
        shown = "".join(item.itertext()).strip()
        if item.format is not None:
            return shown, f"has a text that its transformation {item.format} gives no value for: {shown[:40]!r}"
        return shown, ""
    return item.value, ""


def _fraction(item) -> str | None:  # noqa: ANN001
    """`1/3` for a fraction item: a quotient need not have a finite decimal form."""
    parts = {child.localName: child.textValue.strip() for child in item.iterchildren() if hasattr(child, "localName")}
    if "numerator" in parts and "denominator" in parts:
        return f"{parts['numerator']}/{parts['denominator']}"
    return None


def _decimals(item, value: str | None) -> tuple[int | str | None, str]:  # noqa: ANN001
    """(decimals, problem), where `precision` is turned into decimals."""
    if value is None:
        return None, ""
    for name in ("decimals", "precision"):
        text = getattr(item, name)
        if text is None:
            continue
        if text.strip() == "INF":
            return "INF", ""
        number = parse_number(text)
        if number is None or number != int(number):
            return None, f"has the {name} {text!r}, which is neither a whole number nor INF"
        amount = parse_number(value)
        if name == "precision":
            return (decimals_of(amount, int(number)) if amount and number > 0 else None), ""
        return int(number), ""
    return None, ""


def _period(context) -> str:  # noqa: ANN001
    """A day, `START/END` with both days inclusive, `forever`, or nothing where dates are unreadable."""
    if context.isForeverPeriod:
        return "forever"
    try:
        if context.isInstantPeriod:
            return last_day(context.instantDatetime)
        return f"{first_day(context.startDatetime)}/{last_day(context.endDatetime)}"
    except (AttributeError, TypeError, ValueError, OverflowError):
        return ""


def _dimensions(context) -> tuple[dict[str, str], tuple[str, ...]]:  # noqa: ANN001
    """({dimension: member or typed value}, the typed ones); other content of segment or scenario goes by its element."""
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
    """`iso4217:EUR`, `xbrli:pure`, `iso4217:USD/xbrli:shares`, `a*b`: the standard measures under their usual prefix."""
    parts = [
        "*".join(f"{STANDARD.get(m.namespaceURI, m.prefix or '')}:{m.localName}" for m in side) for side in measures
    ]
    return "/".join(part for part in parts if part)
