"""xBRL-JSON reports (OIM, xBRL-JSON 1.0).

Arelle reads no fact of one without its taxonomy (2.47: `oime:unknownConcept`), so this small reader does, strictly.
"""

import datetime
import json
import re
from pathlib import Path

from common.errors import UserError
from data.regulator.assemble import FILING_INDICATORS, Filed, Filing
from data.regulator.dpm import local
from data.regulator.report import Fact

CORE = ("concept", "entity", "period", "unit", "language", "noteId")


def load_json(where: str, content: bytes) -> dict:
    """A JSON object, strictly: UTF-8, no name twice in an object, no NaN. UserError starts with `where`."""

    def no_repeats(pairs: list[tuple[str, object]]) -> dict:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("a name occurs twice in one object")
        return dict(pairs)

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        document = json.loads(
            content.decode("utf-8-sig"),
            object_pairs_hook=no_repeats,
            parse_constant=no_constant,
            parse_float=str,  # the digits as filed
            parse_int=str,
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(document, dict) or not isinstance(document.get("documentInfo"), dict):
        raise UserError(f"{where}: a JSON object with documentInfo is expected; this is no XBRL report")
    return document


def read_json(path: Path, where: str, document: dict) -> Filing:
    """The facts of an xBRL-JSON document that `load_json` returned."""
    info = document["documentInfo"]
    namespaces = info.get("namespaces", {})
    facts = document.get("facts")
    if not isinstance(facts, dict) or not isinstance(namespaces, dict):
        raise UserError(f"{where}: facts and documentInfo.namespaces must be JSON objects")
    filed: list[Filed] = []
    indicators: dict[str, bool] = {}
    for name, item in facts.items():
        dimensions = item.get("dimensions") if isinstance(item, dict) else None
        if not isinstance(dimensions, dict) or not isinstance(dimensions.get("concept"), str) or "value" not in item:
            raise UserError(f"{where}: fact {name!r} has no value, or no dimensions with a concept")
        namespace = str(namespaces.get(dimensions["concept"].partition(":")[0], ""))
        if namespace.startswith(FILING_INDICATORS):
            template = next((str(value) for key, value in dimensions.items() if local(key).startswith("template")), "")
            indicators[template] = str(item["value"]).lower() in ("true", "1")
            continue
        filed.append(_filed(item, dimensions, namespaces, namespace))
    taxonomy = info.get("taxonomy", [])
    entry_points = tuple(str(url) for url in taxonomy) if isinstance(taxonomy, list) else ()
    return Filing(path, "xBRL-JSON", tuple(filed), indicators, entry_points)


def _filed(item: dict, dimensions: dict, namespaces: dict, namespace: str) -> Filed:
    problems = []
    concept = dimensions["concept"]
    if not namespace:
        problems.append("has a prefix that documentInfo.namespaces does not declare")
    value, decimals = item["value"], item.get("decimals")
    if isinstance(value, bool):
        value = str(value).lower()
    if value is not None and not isinstance(value, str):
        value, problems = json.dumps(value), [*problems, "has a value that is neither text nor null"]
    numeric = "decimals" in item or "unit" in dimensions  # a pure number has no unit here
    if decimals is not None and not re.fullmatch(r"[+-]?[0-9]{1,4}", str(decimals)):
        problems.append(f"has the decimals {decimals!r}, which is no whole number")
        decimals = None
    period, problem = oim_period(str(dimensions.get("period") or "forever"))
    if problem:
        problems.append(problem)
    others = {key: str(member) for key, member in dimensions.items() if key not in CORE and member is not None}
    if dimensions.get("language"):
        others["language"] = str(dimensions["language"])
    # A member of an explicit dimension is a name with a declared prefix; anything else is the text of a typed one.
    typed = tuple(key for key, member in others.items() if member.partition(":")[0] not in namespaces)
    fact = Fact(
        concept=concept,
        value=value,
        unit=str(dimensions["unit"]) if dimensions.get("unit") else None,
        decimals=int(decimals) if decimals is not None else "INF" if numeric and value is not None else None,
        entity=local(str(dimensions.get("entity") or "")),
        period=period,
        dimensions=others,
    )
    return Filed(fact, namespace, numeric, typed, tuple(problems), "xbrli:pure")


def oim_period(text: str) -> tuple[str, str]:
    """(period with inclusive days, problem): `2020-10-01T00:00:00` is the instant that ends 30 September (OIM 1.0, 5.3.2)."""
    if text == "forever":
        return text, ""
    parts = text.split("/")
    try:
        moments = [datetime.datetime.fromisoformat(part.removesuffix("Z")) for part in parts]
    except ValueError:
        moments = []
    if len(moments) not in (1, 2):
        return text, f"has the unreadable period {text!r}"
    if len(moments) == 2:
        return f"{first_day(moments[0])}/{last_day(moments[1])}", ""
    return last_day(moments[0]), ""


def first_day(moment: datetime.datetime) -> str:
    """The day that a period starting at `moment` includes first; a moment inside a day is kept."""
    return moment.date().isoformat() if moment.time() == datetime.time.min else moment.isoformat()


def last_day(moment: datetime.datetime) -> str:
    """The day that a period ending at `moment` includes last: midnight ends the day before."""
    if moment.time() != datetime.time.min:
        return moment.isoformat()
    return (moment - datetime.timedelta(days=1)).date().isoformat() if moment.year > 1 else moment.date().isoformat()
