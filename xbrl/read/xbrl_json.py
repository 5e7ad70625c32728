"""Read xBRL-JSON reports (Open Information Model, xBRL-JSON 1.0).

Arelle 2.47 reads no facts of an xBRL-JSON report without its taxonomy (`oime:unknownConcept`), hence this strict
reader.
"""

import datetime
import json
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from common.errors import UserError
from xbrl.read.assemble import FILING_INDICATORS, FiledFact, ParsedFile
from xbrl.read.dpm import local_name
from xbrl.read.filed_report import Fact
from xbrl.read.report_notes import FACT_FOOTNOTE, without_markup

XBRL = "https://xbrl.org/2021"  # namespace of xbrl:note (xBRL-JSON 1.0, 3.3.2)
# xBRL-JSON periods are date times (OIM 1.0, 4.2). A date alone is ambiguous, because its midnight is the end of the day before.
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z?", re.ASCII)
CORE = ("concept", "entity", "period", "unit", "language", "noteId")


def load_json(where: str, content: bytes) -> dict:
    """Parse a JSON object strictly: UTF-8, no duplicate names, no NaN. Numbers become text. UserErrors start with `where`."""

    def no_repeats(pairs: list[tuple[str, object]]) -> dict:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("duplicate name in an object")
        return dict(pairs)

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not valid JSON")

    try:
        document = json.loads(
            content.decode("utf-8-sig"),
            object_pairs_hook=no_repeats,
            parse_constant=no_constant,
            parse_float=str,  # keeps the digits as filed
            parse_int=str,
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(document, dict) or not isinstance(document.get("documentInfo"), dict):
        raise UserError(f"{where}: expected a JSON object with documentInfo; this is not an XBRL report")
    return document


def read_json(path: Path, where: str, document: dict) -> ParsedFile:
    """Return the facts of an xBRL-JSON document that `load_json` has parsed. Raise UserError for a malformed document."""
    info = document["documentInfo"]
    namespaces = info.get("namespaces", {})
    facts = document.get("facts")
    if not isinstance(facts, dict) or not isinstance(namespaces, dict):
        raise UserError(f"{where}: facts and documentInfo.namespaces must be JSON objects")
    filed: list[FiledFact] = []
    indicators: dict[str, bool] = {}
    notes: dict[str, tuple[str, str]] = {}
    types = info.get("linkTypes")
    footnotes = {name for name, uri in types.items() if uri == FACT_FOOTNOTE} if isinstance(types, dict) else set()
    for name, item in facts.items():
        dimensions = item.get("dimensions") if isinstance(item, dict) else None
        if not isinstance(dimensions, dict) or not isinstance(dimensions.get("concept"), str) or "value" not in item:
            raise UserError(f"{where}: fact {name!r} has no value, or no dimensions with a concept")
        namespace = str(namespaces.get(dimensions["concept"].partition(":")[0], ""))
        if namespace.startswith(FILING_INDICATORS):
            template = next(
                (str(value) for key, value in dimensions.items() if local_name(key).startswith("template")), ""
            )
            indicators[template] = str(item["value"]).lower() in ("true", "1")
            continue
        if namespace == XBRL and local_name(dimensions["concept"]) == "note":
            # A link names the id of the note's fact. The fact's noteId is the same (OIM 1.0, 5.4).
            notes[name] = (without_markup(str(item["value"] or "")), str(dimensions.get("language") or ""))
            continue
        fact = _filed_fact(item, dimensions, namespaces, namespace)
        filed.append(replace(fact, notes=_note_ids(item, footnotes)))
    taxonomy = info.get("taxonomy", [])
    entry_points = tuple(str(url) for url in taxonomy) if isinstance(taxonomy, list) else ()
    return ParsedFile(path, "xBRL-JSON", tuple(filed), indicators, entry_points, notes=notes)


def _note_ids(item: dict, footnotes: Collection[str]) -> tuple[str, ...]:
    """Return the ids of the notes to which a fact is linked by a link type in `footnotes` (OIM 1.0, 4.3), in any link group.

    Links of other types lead to facts. Malformed links are ignored.
    """
    links = item.get("links")
    ids = []
    for kind, groups in links.items() if isinstance(links, dict) else ():
        if kind in footnotes and isinstance(groups, dict):
            ids += [str(name) for names in groups.values() if isinstance(names, list) for name in names]
    return tuple(dict.fromkeys(ids))


def _filed_fact(item: dict, dimensions: dict, namespaces: dict, namespace: str) -> FiledFact:
    problems = []
    concept = dimensions["concept"]
    if not namespace:
        problems.append("has a prefix that is not declared in documentInfo.namespaces")
    value, decimals = item["value"], item.get("decimals")
    if isinstance(value, bool):
        value = str(value).lower()
    if value is not None and not isinstance(value, str):
        value, problems = json.dumps(value), [*problems, "has a value that is neither a string nor null"]
    numeric = "decimals" in item or "unit" in dimensions  # xBRL-JSON omits the unit of a pure number
    if decimals is not None and not re.fullmatch(r"[+-]?[0-9]{1,4}", str(decimals)):
        problems.append(f"has the decimals {decimals!r}, which is not an integer")
        decimals = None
    period, problem = oim_period(str(dimensions.get("period") or "forever"))
    if problem:
        problems.append(problem)
    members = {key: str(member) for key, member in dimensions.items() if key not in CORE and member is not None}
    if dimensions.get("language"):
        members["language"] = str(dimensions["language"])
    # Members of explicit dimensions are names with a declared prefix. Any other text belongs to a typed dimension.
    typed = tuple(key for key, member in members.items() if member.partition(":")[0] not in namespaces)
    fact = Fact(
        concept=concept,
        value=value,
        unit=str(dimensions["unit"]) if dimensions.get("unit") else None,
        decimals=int(decimals) if decimals is not None else "INF" if numeric and value is not None else None,
        entity=local_name(str(dimensions.get("entity") or "")),
        period=period,
        dimensions=members,
    )
    return FiledFact(fact, namespace, numeric, typed, tuple(problems), "xbrli:pure")


def oim_period(text: str) -> tuple[str, str]:
    """Return (period with inclusive days, "") or ("", problem). `2020-10-01T00:00:00` ends 30 September (OIM 1.0, 5.3.2)."""
    if text == "forever":
        return text, ""
    parts = text.split("/")
    try:
        moments = [datetime.datetime.fromisoformat(part.removesuffix("Z")) for part in parts if MOMENT.fullmatch(part)]
    except ValueError:  # a day or a time that does not exist
        moments = []
    if len(moments) not in (1, 2) or len(moments) != len(parts):
        return "", f"has the invalid period {text[:60]!r}"
    if len(moments) == 2:
        return f"{first_day(moments[0])}/{last_day(moments[1])}", ""
    return last_day(moments[0]), ""


def first_day(moment: datetime.datetime) -> str:
    """Return the first day of a period that starts at `moment`. A time other than midnight is kept."""
    return moment.date().isoformat() if moment.time() == datetime.time.min else moment.isoformat()


def last_day(moment: datetime.datetime) -> str:
    """Return the last day of a period that ends at `moment`. Midnight belongs to the day before; any other time is kept."""
    if moment.time() != datetime.time.min:
        return moment.isoformat()
    return (moment - datetime.timedelta(days=1)).date().isoformat() if moment.year > 1 else moment.date().isoformat()
