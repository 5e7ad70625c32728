"""Read EBA xBRL-CSV report packages.

A package contains `reports/report.json`, `parameters.csv`, `FilingIndicators.csv` and one CSV file per table, with a fact per
row: `datapoint,factValue` and the key columns of an open table. The DPM (`dpm.py`) gives the cell and the type of a datapoint.
A datapoint that the DPM does not have in that table makes the report incomplete: its figure is there, and no rule can see it.
The reason counts and names such datapoints, and the command that fetches a newer DPM. Tables with a row per entry, as in the
register of information (DORA), are refused: no rule reads them.

Sources: XBRL International, xBRL-CSV 1.0 and Report Packages 1.0; EBA filing rules v5.
"""

import csv
import io
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path

from common.errors import UserError
from xbrl.read.dpm import Cells, local_name
from xbrl.read.filed_report import Fact, Report, describe, duplicate_warnings, is_day, parse_number
from xbrl.read.safety import Package
from xbrl.read.xbrl_json import load_json

DOCUMENT_TYPE = re.compile(r"https?://xbrl\.org/((CR|PR|REC|PWD|WGWD)/)?\d{4}(-\d\d-\d\d)?/xbrl-csv/?")
DECIMALS_PARAMETERS = {  # DPM type -> name of the parameter with its decimals
    "monetary": "decimalsMonetary",
    "percentage": "decimalsPercentage",
    "integer": "decimalsInteger",
    "decimal": "decimalsDecimal",
}
MAX_FIELD_CHARACTERS = 2**20
ABSENT = ("", "#none")  # no member of a dimension, no value of a fact
Row = tuple[int, dict[str, str]]  # (line number, column -> text)


def read_csv_package(package: Package, report_json: str, cells: Cells) -> Report:
    """Read the package whose metadata file is the member `report_json`.

    Raises UserError with the file and line at fault.
    """
    path = package.path
    _check_metadata(path, report_json, package.read(report_json))
    folder = report_json.rpartition("/")[0]
    tables = {}
    for name in package.names:
        parent, _, file = name.rpartition("/")
        if parent == folder and file.lower().endswith(".csv"):
            tables[file.lower()] = name
    parameters = _parameters(package, tables.pop("parameters.csv", None))
    indicators = _filing_indicators(package, tables.pop("filingindicators.csv", None))
    facts: list[Fact] = []
    warnings: list[str] = []
    for file, name in sorted(tables.items()):
        filed, problems = _read_table(package, name, cells.table_code(file), parameters, cells)
        facts += filed
        warnings += problems
    if not facts and not indicators:
        raise UserError(f"{path}: the report is empty: no facts and no filing indicators in {folder or 'the package'}")
    currency = parameters.get("baseCurrency")
    unknown = cells.explain_unknown(path, len(facts), [fact.concept for fact in facts if fact.cell is None])
    return Report(
        path=path,
        format="xBRL-CSV",
        entity=local_name(parameters["entityID"]),
        period=parameters["refPeriod"],
        currency=local_name(currency) if currency else None,
        filing_indicators=indicators,
        facts=tuple(facts),
        warnings=(*warnings, *duplicate_warnings(tuple(facts))),
        incomplete=unknown,
    )


def _check_metadata(path: Path, name: str, content: bytes) -> None:
    """Check that the metadata has the document type xBRL-CSV and extends a taxonomy module. Raises UserError."""
    info = load_json(f"{path}: {name}", content)["documentInfo"]
    kind, extends = info.get("documentType"), info.get("extends")
    if not DOCUMENT_TYPE.fullmatch(str(kind)):
        raise UserError(f"{path}: {name} has documentType {kind!r}; expected https://xbrl.org/2021/xbrl-csv")
    if not isinstance(extends, list) or not extends:
        raise UserError(
            f"{path}: {name} extends no module; only reports that extend an EBA taxonomy module are supported"
        )


def _parameters(package: Package, name: str | None) -> dict[str, str]:
    """Report parameters, name -> value.

    Raises UserError if the entity or reference date is missing, or a value is invalid.
    """
    if name is None:
        raise UserError(
            f"{package.path}: parameters.csv with the entity and the reference period is missing next to report.json"
        )
    parameters = {}
    for line, row in csv_rows(package, name):
        where = f"{package.path}: {name} line {line}"
        if "name" not in row or "value" not in row:
            raise UserError(f"{package.path}: {name} line 1: the columns must be name,value")
        key, value = row["name"], row["value"].strip()
        if key in parameters:
            raise UserError(f"{where}: duplicate parameter {key}")
        if key == "refPeriod" and value and not is_day(value):
            raise UserError(
                f"{where}: refPeriod {value!r} is not a date (YYYY-MM-DD); ask the bank to file the report again"
            )
        if key in DECIMALS_PARAMETERS.values() and value and not re.fullmatch(r"INF|[+-]?[0-9]{1,4}", value):
            raise UserError(f"{where}: {key} {value!r} is neither an integer nor INF")
        parameters[key] = value
    for key in ("entityID", "refPeriod"):
        if not parameters.get(key):
            raise UserError(f"{package.path}: {name} has no {key}")
    return parameters


def _filing_indicators(package: Package, name: str | None) -> dict[str, bool]:
    indicators = {}
    for line, row in csv_rows(package, name) if name else ():
        reported = row.get("reported", "").strip().lower()
        if "templateID" not in row or reported not in ("true", "false", "1", "0"):
            raise UserError(
                f"{package.path}: {name} line {line}: expected the columns templateID,reported; "
                "reported must be true or false"
            )
        template, filed = row["templateID"].strip(), reported in ("true", "1")
        if indicators.setdefault(template, filed) != filed:
            raise UserError(
                f"{package.path}: {name} line {line}: {template} is both filed and not filed; ask the bank which is right"
            )
    return indicators


def csv_rows(package: Package, name: str) -> Iterator[Row]:
    """Yield (line number, column -> text) for each row of a CSV member.

    Raises UserError for bad encoding or ragged rows.
    """
    where = f"{package.path}: {name}"
    try:
        text = package.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not valid UTF-8 at byte {error.start}; xBRL-CSV requires UTF-8") from error
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if not header or len(set(header)) != len(header):
            raise UserError(f"{where} line 1: expected a header with distinct column names")
        for row in reader:
            if not any(row):
                continue
            if len(row) != len(header):
                raise UserError(f"{where} line {reader.line_num}: {len(row)} fields, but the header has {len(header)}")
            yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{where} line {reader.line_num}: invalid CSV ({error})") from error


def _read_table(
    package: Package, name: str, table: str, parameters: Mapping[str, str], cells: Cells
) -> tuple[list[Fact], list[str]]:
    """(the facts, one per row, warnings) of the member `name`. Raises `UserError` with the file and line at fault."""
    where = f"{package.path}: {name}"
    facts, warnings, empty = [], [], 0
    for line, row in csv_rows(package, name):
        if not {"datapoint", "factValue"} <= row.keys():
            raise UserError(
                f"{where} line 1: the columns datapoint and factValue are required; tables with a row per entry, as in "
                "DORA's register of information, are not read"
            )
        datapoint, text = row.pop("datapoint"), row.pop("factValue")
        if not re.fullmatch(r"dp[0-9]{1,12}", datapoint):
            raise UserError(f"{where} line {line}: {datapoint!r} is not a datapoint id such as dp5435202")
        if text in ABSENT:
            empty += 1  # an empty field and #none report no fact (xBRL-CSV 1.0, 3.1.9)
            continue
        cell = cells.by_datapoint(datapoint, table)
        kind = cell.type if cell else ""
        value, decimals, is_number = _parse_value(text, kind, parameters)
        unit = row.pop("unit", "")
        if is_number and not unit and kind:
            unit = parameters.get("baseCurrency", "") if kind == "monetary" else "xbrli:pure"
        dimensions = {key: member for key, member in row.items() if member not in ABSENT}
        if cell and cell.sheet not in ("", "*"):
            dimensions["sheet"] = cell.sheet
        fact = Fact(
            concept=datapoint,
            value=value,
            unit=unit or None,
            decimals=decimals,
            entity=local_name(parameters["entityID"]),
            period=parameters["refPeriod"],
            dimensions=dimensions,
            cell=(cell.table, cell.row, cell.column) if cell else None,
        )
        facts.append(fact)
        if kind in DECIMALS_PARAMETERS and isinstance(value, str):
            warnings.append(f"{name} line {line}: {describe(fact)} has the non-numeric value {value[:40]!r}")
    if empty:
        warnings.append(f"{name}: {empty} rows have an empty factValue and report no fact")
    return facts, warnings


def _parse_value(
    text: str, kind: str, parameters: Mapping[str, str]
) -> tuple[Decimal | str | bool | None, int | str | None, bool]:
    """Parse one value, including the special values of xBRL-CSV 1.0, 3.1.9.

    Returns (value, decimals, whether it is a number).
    """
    if text == "#nil":
        return None, None, False
    if text == "#empty":
        return "", None, False
    if text.startswith("##"):
        return text[1:], None, False
    if kind and kind not in DECIMALS_PARAMETERS:
        if kind in ("boolean", "true") and text.lower() in ("true", "false", "1", "0"):
            return text.lower() in ("true", "1"), None, False
        return text, None, False
    number, decimals = text.strip(), parameters.get(DECIMALS_PARAMETERS[kind]) if kind else None
    suffix = re.fullmatch(r"(.+)d([+-]?[0-9]{1,4}|INF)", number)  # decimals suffix, e.g. 1234d-3
    if suffix:
        number, decimals = suffix.groups()
    value = parse_number(number)
    if value is None:
        return text, None, False
    return value, int(decimals) if decimals and decimals != "INF" else decimals or None, True
