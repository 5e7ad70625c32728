"""Read EBA xBRL-CSV report packages.

A package contains `reports/report.json`, `parameters.csv`, `FilingIndicators.csv` and one CSV file per table, in one of two
layouts:

- **A fact per row**: `datapoint,factValue` and the key columns of an open table. The DPM (`dpm.py`) gives the cell and the
  type of a datapoint. A datapoint that the DPM does not have in that table makes the report incomplete: its figure is
  there, and no rule can see it. The reason counts and names such datapoints, and the command that fetches a newer DPM.
- **A row per entry**, as in the register of information (DORA): the columns `c0010`, `c0020`, ... of the template. The
  key columns give the dimensions of all facts of a row. A value is a number only in a column that is numeric in the DPM:
  a notice period is one, but a contract called 2024-001 or 4711 is not.

Sources: XBRL International, xBRL-CSV 1.0 and Report Packages 1.0; EBA filing rules v5; Implementing Regulation (EU) 2024/2956,
Annex I, and EBA taxonomy 4.0, module DORA (key columns of the register).
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from common.errors import UserError
from xbrl.read.dpm import Cells, local_name, table_code
from xbrl.read.filed_report import CellKey, Fact, Report, describe, duplicate_warnings, is_day, parse_number
from xbrl.read.safety import Package

DOCUMENT_TYPE = re.compile(r"https?://xbrl\.org/((CR|PR|REC|PWD|WGWD)/)?\d{4}(-\d\d-\d\d)?/xbrl-csv/?")
DECIMALS_PARAMETERS = {  # DPM type -> name of the parameter with its decimals
    "monetary": "decimalsMonetary",
    "percentage": "decimalsPercentage",
    "integer": "decimalsInteger",
    "decimal": "decimalsDecimal",
}
MAX_FIELD_CHARACTERS = 2**20
ABSENT = ("", "#none")  # no member of a dimension, no value of a fact
TEMPLATE_COLUMN = re.compile(r"c[0-9]{4}")
# Table of the register -> its key columns and their dimensions. A table without a key has a single row, `FIXED_ROWS`.
KEY_COLUMNS: dict[str, dict[str, str]] = {
    "B_01.01": {"c0010": "ERI"},
    "B_01.02": {"c0010": "ESI"},
    "B_01.03": {"c0010": "ISB", "c0020": "LHH"},
    "B_02.01": {"c0010": "CRZ"},
    "B_02.02": {
        "c0010": "CRZ",
        "c0020": "qLES",
        "c0030": "ICT",
        "c0050": "IOB",
        "c0060": "TYA",
        "c0130": "qNNB",
        "c0150": "qNMP",
        "c0160": "qNMR",
    },
    "B_02.03": {"c0010": "CRN", "c0020": "CRD"},
    "B_03.01": {"c0010": "CRZ", "c0020": "qLEA"},
    "B_03.02": {"c0010": "CRZ", "c0020": "ICT"},
    "B_03.03": {"c0010": "CRZ", "c0020": "qLEB"},
    "B_04.01": {"c0010": "CRZ", "c0020": "qLES", "c0040": "ISB"},
    "B_05.01": {"c0010": "ICT"},
    "B_05.02": {"c0010": "CRZ", "c0020": "TIC", "c0030": "ICT", "c0050": "ii1713", "c0060": "si1456"},
    "B_06.01": {"c0010": "IOB", "c0040": "qLES"},
    "B_07.01": {"c0010": "CRZ", "c0020": "ICT", "c0040": "TIC"},
    "B_99.01": {},
}
FIXED_ROWS = {"B_99.01": "r0040"}
Row = tuple[int, dict[str, str]]  # (line number, column -> text)


@dataclass(frozen=True)
class TableFile:
    """One CSV file of a package, and the parameters of its report."""

    package: Package
    name: str  # the member of the package
    table: str  # "C_76.00.a"
    parameters: Mapping[str, str]

    @property
    def where(self) -> str:
        """The beginning of an error message."""
        return f"{self.package.path}: {self.name}"


def read_csv_package(package: Package, report_json: str, info: Mapping[str, Any], cells: Cells) -> Report:
    """Read the package whose metadata file is the member `report_json`, with this `documentInfo`.

    Raises UserError with the file and line at fault.
    """
    path = package.path
    _check_metadata(f"{path}: {report_json}", info)
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
        filed, problems = read_table(TableFile(package, name, table_code(file), parameters), cells)
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


def _check_metadata(where: str, info: Mapping[str, Any]) -> None:
    """Check that the metadata has the document type xBRL-CSV and extends a taxonomy module. Raises UserError."""
    kind, extends = info.get("documentType"), info.get("extends")
    if not DOCUMENT_TYPE.fullmatch(str(kind)):
        raise UserError(f"{where} has documentType {kind!r}; expected https://xbrl.org/2021/xbrl-csv")
    if not isinstance(extends, list) or not extends:
        raise UserError(f"{where} extends no module; only reports that extend an EBA taxonomy module are supported")


def _parameters(package: Package, name: str | None) -> dict[str, str]:
    """Report parameters, name -> value.

    Raises UserError if the entity or reference date is missing, or a value is invalid.
    """
    if name is None:
        raise UserError(
            f"{package.path}: parameters.csv with the entity and the reference period is missing next to report.json"
        )
    parameters = {}
    columns, rows = read_csv(f"{package.path}: {name}", package.read(name))
    if not {"name", "value"} <= set(columns):
        raise UserError(f"{package.path}: {name} line 1: the columns must be name,value")
    for line, row in rows:
        where = f"{package.path}: {name} line {line}"
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
    for line, row in read_csv(f"{package.path}: {name}", package.read(name))[1] if name else ():
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


def read_table(file: TableFile, cells: Cells) -> tuple[list[Fact], list[str]]:
    """(facts, warnings) of one table file in either layout. Raises `UserError` with the file and line at fault."""
    columns, rows = read_csv(file.where, file.package.read(file.name))
    if not rows:
        return [], []
    if {"datapoint", "factValue"} <= set(columns):
        return _read_datapoints(file, rows, cells)
    if "datapoint" not in columns and any(TEMPLATE_COLUMN.fullmatch(column) for column in columns):
        return _read_entries(file, rows, cells)
    raise UserError(
        f"{file.where} line 1: the columns datapoint and factValue are required, or the columns c0010, c0020, ... of a register"
    )


def read_csv(where: str, content: bytes) -> tuple[list[str], list[Row]]:
    """(columns, rows that are not empty) of a CSV file in UTF-8.

    Raises UserError, which begins with `where`, for bad encoding, columns of one name or ragged rows.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not valid UTF-8 at byte {error.start}; save the file as UTF-8") from error
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    reader, rows = csv.reader(io.StringIO(text, newline=""), strict=True), []
    try:
        header = next(reader, [])
        if not header or len(set(header)) != len(header):
            raise UserError(f"{where} line 1: expected a header with distinct column names")
        for row in filter(any, reader):
            if len(row) != len(header):
                raise UserError(f"{where} line {reader.line_num}: {len(row)} fields, but the header has {len(header)}")
            rows.append((reader.line_num, dict(zip(header, row, strict=True))))
    except csv.Error as error:
        raise UserError(f"{where} line {reader.line_num}: invalid CSV ({error})") from error
    return header, rows


def read_table_of(path: Path, required: Sequence[str], known: Sequence[str] = ()) -> list[tuple[str, dict[str, str]]]:
    """(file and line, for messages; column -> text) of each row of a CSV file that a user names.

    Raises UserError as `read_csv` does, or if the file or a column of `required` is missing, or one is not `known`, if given.
    """
    columns = known or required
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a CSV with the columns {','.join(columns)}")
    names, rows = read_csv(str(path), path.read_bytes())
    wrong = [f"{name!r} is missing" for name in required if name not in names]
    wrong += [f"{name!r} is unknown" for name in names if known and name not in known]
    if wrong:
        raise UserError(f"{path}, line 1: the column {wrong[0]}; the columns are {','.join(columns)}")
    return [(f"{path}, line {line}", row) for line, row in rows]


def _read_datapoints(file: TableFile, rows: Iterable[Row], cells: Cells) -> tuple[list[Fact], list[str]]:
    """A fact per row."""
    facts, warnings, empty = [], [], 0
    for line, row in rows:
        datapoint, text = row.pop("datapoint"), row.pop("factValue")
        if not re.fullmatch(r"dp[0-9]{1,12}", datapoint):
            raise UserError(f"{file.where} line {line}: {datapoint!r} is not a datapoint id such as dp5435202")
        if text in ABSENT:
            empty += 1  # an empty field and #none report no fact (xBRL-CSV 1.0, 3.1.9)
            continue
        cell = cells.by_datapoint(datapoint, file.table)
        unit = row.pop("unit", "")
        dimensions = {key: member for key, member in row.items() if member not in ABSENT}
        if cell and cell.sheet not in ("", "*"):
            dimensions["sheet"] = cell.sheet
        place = (cell.table, cell.row, cell.column) if cell else None
        fact = _fact(file, datapoint, cell.type if cell else "", text, dimensions, place, unit)
        facts.append(fact)
        warnings += _problems(file, line, fact, cell.type if cell else "")
    if empty:
        warnings.append(f"{file.name}: {empty} rows have an empty factValue and report no fact")
    return facts, warnings


def _read_entries(file: TableFile, rows: Iterable[Row], cells: Cells) -> tuple[list[Fact], list[str]]:
    """A row per entry: a fact per cell that is neither empty nor part of the key. The rows are open (`*`) if there is a key."""
    code = FIXED_ROWS.get(file.table, "*")
    facts, warnings, without_fact = [], [], 0
    types: dict[str, str] = {}
    for number, (line, row) in enumerate(rows, start=1):
        key = _key_columns(file, row)
        dimensions = {dimension: row[column] for column, dimension in key.items() if row[column] not in ABSENT}
        if file.table not in KEY_COLUMNS and not key:
            dimensions["row"] = str(number)
        missing = [column for column in key if row[column] in ABSENT]
        if missing:
            warnings.append(f"{file.name} line {line}: the key column {missing[0]} is empty")
        filed = {column: text for column, text in row.items() if column not in key and text not in ABSENT}
        without_fact += not filed
        for column, text in filed.items():
            if column not in types:
                cell = cells.by_cell(file.table, code, column)
                types[column] = cell.type if cell else "string"
            place = (file.table, code, column)
            fact = _fact(file, f"{file.table}.{column}", types[column], text, dict(dimensions), place)
            facts.append(fact)
            warnings += _problems(file, line, fact, types[column])
    if without_fact:
        warnings.append(f"{file.name}: {without_fact} rows have only key columns and report no fact")
    if facts and file.table not in KEY_COLUMNS:
        named = sorted(facts[0].dimensions)
        assumed = "rows are numbered" if "row" in named else f"assumed: {', '.join(named)}"
        warnings.append(f"{file.name}: the key columns of {file.table} are not known; {assumed}")
    return facts, warnings


def _key_columns(file: TableFile, row: Mapping[str, str]) -> dict[str, str]:
    """Key column -> dimension. In an unknown table, these are the columns that the template does not number."""
    others = {column: column for column in row if not TEMPLATE_COLUMN.fullmatch(column)}
    known = KEY_COLUMNS.get(file.table)
    if known is None:
        return others
    missing = sorted(known.keys() - row.keys())
    if missing:
        raise UserError(f"{file.where} line 1: the key column {missing[0]} of {file.table} is missing")
    return known | others


def _fact(
    file: TableFile,
    concept: str,
    kind: str,
    text: str,
    dimensions: dict[str, str],
    cell: CellKey | None,
    unit: str = "",
) -> Fact:
    """The fact of one value. `kind` is its DPM type, or "" for an unknown datapoint."""
    value, decimals, is_number = _parse_value(text, kind, file.parameters)
    if is_number and not unit and kind:
        unit = file.parameters.get("baseCurrency", "") if kind == "monetary" else "xbrli:pure"
    return Fact(
        concept=concept,
        value=value,
        unit=unit or None,
        decimals=decimals,
        entity=local_name(file.parameters["entityID"]),
        period=file.parameters["refPeriod"],
        dimensions=dimensions,
        cell=cell,
    )


def _problems(file: TableFile, line: int, fact: Fact, kind: str) -> list[str]:
    if kind in DECIMALS_PARAMETERS and isinstance(fact.value, str):
        return [f"{file.name} line {line}: {describe(fact)} has the non-numeric value {fact.value[:40]!r}"]
    return []


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
