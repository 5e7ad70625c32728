"""Read a bank's report file into a `Report`. All report files are read through this module.

`read_report` opens a file or package in any XBRL syntax. `merge_reports` joins the packages (one per module) that a
bank files for one reference date.
"""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from xbrl.read.arelle_reader import read_concepts, read_with_arelle
from xbrl.read.assemble import Concept, ParsedFile, assemble
from xbrl.read.dpm import Cells, load_cells
from xbrl.read.filed_report import Fact, Report, duplicate_warnings
from xbrl.read.filing_rules import breaches_of_instance
from xbrl.read.report_notes import INLINE, add_footnotes, join_notes
from xbrl.read.safety import MAX_MEMBER_BYTES, Package, open_package, strict_xml, without_schema_locations
from xbrl.read.xbrl_csv import read_csv_package
from xbrl.read.xbrl_json import load_json, read_json

INSTANCE = "{http://www.xbrl.org/2003/instance}xbrl"
SCHEMA_REF = "{http://www.xbrl.org/2003/linkbase}schemaRef"
HREF = "{http://www.w3.org/1999/xlink}href"
NAMES = (".json", ".xbrl", ".xml", ".xhtml", ".html", ".htm")


def read_report(path: Path | str, cells: Cells | None = None, taxonomy: Sequence[Path] = ()) -> Report:
    """Read one report: xBRL-XML, iXBRL, xBRL-JSON, or a package (zip or unpacked folder) that contains such a file or xBRL-CSV.

    `cells` maps EBA facts to their cells and types (default: `load_cells()`). `taxonomy` lists taxonomy packages that
    provide types and labels for facts outside the EBA's taxonomy. Raise a one-sentence `UserError` for a file that cannot be
    trusted. Minor defects (dangling references, non-numeric values, inconsistent duplicates) become warnings.
    """
    path = Path(path)
    cells = cells or load_cells()
    taxonomy = tuple(Path(package).resolve() for package in taxonomy)
    if path.is_dir():
        return _read_package(open_package(path), cells, taxonomy)
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MAX_MEMBER_BYTES else b""
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    if size > MAX_MEMBER_BYTES:
        raise UserError(f"{path}: {size} bytes, over the limit of {MAX_MEMBER_BYTES}")
    if content.startswith(b"PK"):
        return _read_package(open_package(path), cells, taxonomy)
    if not content.strip():
        raise UserError(f"{path}: the file is empty")
    if path.suffix.lower() == ".csv" and not _is_json(content):
        raise UserError(
            f"{path}: this is one table of an xBRL-CSV report; "
            "pass its package instead, a zip or the folder with report.json"
        )
    document = _inspect(str(path), content)
    if document.syntax == "xBRL-CSV":
        return read_csv_package(open_package(path.parent), path.name, document.content["documentInfo"], cells)
    if document.syntax is None and document.root is None:
        kind = document.content["documentInfo"].get("documentType", "")
        raise UserError(f"{path}: documentType is {kind!r}; expected https://xbrl.org/2021/xbrl-json")
    if document.syntax is None:
        raise UserError(f"{path}: this XML file is neither an XBRL instance nor inline XBRL")
    return _to_report(path, [document], cells, taxonomy)


def merge_reports(reports: Iterable[Report]) -> Report:
    """Join the reports that one bank filed for one date (one per module) into a single report.

    Identical duplicates (same cell, same value) are dropped. Inconsistent values are kept and give a warning. Different
    currencies and contradicting filing indicators give a warning, too. Raise UserError if the entity or the period differs.
    """
    reports = list(reports)
    first = reports[0]
    facts: dict[str, Fact] = {}
    indicators: dict[str, Report] = {}
    warnings: list[str] = []
    for report in reports:
        for name in ("entity", "period"):
            if getattr(report, name) != getattr(first, name):
                raise UserError(
                    f"{report.path} has the {name} {getattr(report, name)!r}, but {first.path} has"
                    f" {getattr(first, name)!r}; only reports of one bank for one date can be merged"
                )
        if report.currency and first.currency and report.currency != first.currency:
            warnings.append(f"{report.path} is in {report.currency}, but {first.path} is in {first.currency}")
        warnings += report.warnings
        for template, filed in report.filing_indicators.items():
            earlier = indicators.setdefault(template, report)
            if earlier.filing_indicators[template] != filed:
                yes, no = (report, earlier) if filed else (earlier, report)
                warnings.append(f"{template} is filed according to {yes.path}, but not according to {no.path}")
                indicators[template] = yes
        for fact in report.facts:
            facts.setdefault(json.dumps(_identity(fact), default=str), fact)
    merged = tuple(facts.values())
    warnings += duplicate_warnings(merged)
    return Report(
        path=first.path,
        format="+".join(dict.fromkeys(report.format for report in reports)),
        entity=first.entity,
        period=first.period,
        currency=next((report.currency for report in reports if report.currency), None),
        filing_indicators={template: report.filing_indicators[template] for template, report in indicators.items()},
        facts=merged,
        warnings=tuple(dict.fromkeys(warnings)),
        notes=join_notes(note for report in reports for note in report.notes),
        files=tuple(path for report in reports for path in report.files or (report.path,)),
        incomplete=tuple(dict.fromkeys(reason for report in reports for reason in report.incomplete)),
        breaches=tuple(dict.fromkeys(breach for report in reports for breach in report.breaches)),
    )


def is_package(folder: Path) -> bool:
    """Return whether a folder is an unpacked report package rather than a folder of reports."""
    return any((folder / name).is_file() for name in ("META-INF/reportPackage.json", "reports/report.json"))


def _read_package(package: Package, cells: Cells, taxonomy: tuple[Path, ...]) -> Report:
    """Read the only report of a package, from `reports/` if that folder exists (Report Packages 1.0).

    Raise UserError if the package has no report, or more than one. Several inline documents in one folder are one report.
    """
    path = package.path
    names = [name for name in package.names if "META-INF/" not in f"/{name}"]
    names = [name for name in names if "/reports/" in f"/{name}"] or names
    by_name: dict[str, _Document] = {}
    for name in names:
        if name.lower().endswith(NAMES):
            document = _inspect(f"{path}: {name}", package.read(name), name.lower().endswith(".json"))
            if document.syntax:  # else drop its tree, to free the memory
                by_name[name] = document
    documents = list(by_name.values())
    folders = {(document.syntax, name.rpartition("/")[0]) for name, document in by_name.items()}
    if len(documents) != 1 and not (len(folders) == 1 and documents[0].syntax == "iXBRL"):
        content = f"{len(documents)} reports ({', '.join(list(by_name)[:3])} ...)" if documents else "no XBRL report"
        raise UserError(f"{path}: the package contains {content}; expected one report.json or instance in reports/")
    if documents[0].syntax == "xBRL-CSV":
        return read_csv_package(package, next(iter(by_name)), documents[0].content["documentInfo"], cells)
    return _to_report(path, documents, cells, taxonomy)


def _to_report(path: Path, documents: Sequence["_Document"], cells: Cells, taxonomy: tuple[Path, ...]) -> Report:
    """Build the report of an xBRL-JSON document, of an instance, or of all documents of an inline report."""
    first = documents[0]
    parsed = read_json(path, first.where, first.content) if first.syntax == "xBRL-JSON" else _parse_xml(path, documents)
    if not parsed.facts and not parsed.indicators:
        raise UserError(f"{parsed.path}: the report contains no facts")
    concepts = None
    if taxonomy:
        concepts = _read_concepts(parsed.taxonomy, taxonomy)
        if not concepts:
            missing = ", ".join(parsed.taxonomy) or "any schema of the report"
            warning = f"the taxonomy package contains no concepts for {missing}"
            parsed = replace(parsed, warnings=(*parsed.warnings, warning))
    return assemble(parsed, cells, concepts)


@functools.lru_cache(maxsize=8)
def _read_concepts(entry_points: tuple[str, ...], packages: tuple[Path, ...]) -> dict[tuple[str, str], Concept]:
    for package in packages:
        if not package.is_file():
            raise UserError(f"{package}: taxonomy package not found")
    return read_concepts(entry_points, packages)


@dataclass(frozen=True)
class _Document:
    """A JSON or XML file that may be a report."""

    where: str  # the beginning of an error message
    syntax: str | None  # "xBRL-CSV" (its metadata), "xBRL-JSON", "xBRL-XML", "iXBRL"; None if it is no report
    content: Any  # JSON: the parsed object; XML: the bytes without hints at schemas
    root: Any = None  # XML: the root element of the lxml tree
    breaches: tuple[tuple[str, str], ...] = ()  # of filing rules, see Report


def _is_json(content: bytes) -> bool:
    return content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")


def _inspect(where: str, content: bytes, is_json: bool | None = None) -> _Document:
    """Parse a file strictly and determine its syntax. With `is_json=None` the content decides whether it is JSON.

    Raise UserError, prefixed with `where`, for JSON and XML that cannot be trusted.
    """
    head = content[:64]
    if b"\0" in head and _is_json(head.replace(b"\0", b"").lstrip(b"\xff\xfe")):
        raise UserError(f"{where}: this JSON is in UTF-16, but JSON must be in UTF-8; ask the bank to file it again")
    if _is_json(content) if is_json is None else is_json:
        document = load_json(where, content)
        kind = str(document["documentInfo"].get("documentType", ""))
        is_report = re.search(r"xbrl\.org/.*xbrl-json/?$", kind)
        return _Document(
            where, "xBRL-CSV" if kind.endswith("xbrl-csv") else "xBRL-JSON" if is_report else None, document
        )
    tree = strict_xml(where, content)
    root = tree.getroot()
    inline = root.tag != INSTANCE and any(
        next(root.iter(f"{{{namespace}}}*"), None) is not None for namespace in INLINE
    )
    syntax = "xBRL-XML" if root.tag == INSTANCE else "iXBRL" if inline else None
    breaches = breaches_of_instance(tree) if syntax == "xBRL-XML" else ()
    return _Document(where, syntax, without_schema_locations(tree, content), root, breaches)


def _parse_xml(path: Path, documents: Sequence[_Document]) -> ParsedFile:
    """Read an instance, or the documents of one inline report. Schemas are never fetched or opened.

    A schema with a URL can be provided by the user's taxonomy package. A local schema cannot, and gives a warning.
    """
    roots = [document.root for document in documents]
    references = sum(element.get("contextRef") is not None for root in roots for element in root.iter("*"))
    contents = [document.content for document in documents]
    parsed = read_with_arelle(path, str(documents[0].syntax), contents, references)
    schemas = dict.fromkeys(element.get(HREF) or "" for root in roots for element in root.iter(SCHEMA_REF))
    urls = tuple(schema for schema in schemas if schema.startswith(("http://", "https://")))
    warnings = tuple(
        f"the schema {schema[:80]!r} is a local file, which is not read: the facts have no types and labels of its taxonomy"
        for schema in schemas
        if schema not in urls
    )
    parsed = replace(parsed, taxonomy=urls, warnings=(*warnings, *parsed.warnings), breaches=documents[0].breaches)
    return add_footnotes(parsed, roots)


def _identity(fact: Fact) -> list:
    return [fact.concept, fact.value, fact.unit, fact.decimals, fact.period, sorted(fact.dimensions.items()), fact.cell]
