"""Read EBA xBRL-CSV report packages.

A package contains `reports/report.json`, `parameters.csv`, `FilingIndicators.csv` and one CSV file per table. The files of the
tables have two layouts:

- **A fact per row**: `datapoint,factValue` and the key columns of an open table. The DPM (`dpm.py`) gives the cell and the
  type of a datapoint. A datapoint that the DPM does not have in the table makes the report incomplete, because no rule can
  read its figure. The reason counts and names such datapoints.
- **A row per entry**, as in the register of information (DORA): the columns `c0010`, `c0020`, ... of the template. The
  key columns give the dimensions of all facts of a row. A value is a number only in a column that is numeric in the DPM:
  a notice period is a number, a contract called 2024-001 or 4711 is not.

Sources: XBRL International, xBRL-CSV 1.0 and Report Packages 1.0; EBA filing rules v5; Implementing Regulation (EU) 2024/2956,
Annex I, and EBA taxonomy 4.0, module DORA (key columns of the register).
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
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
ABSENT = ("", "#none")  # a dimension without a member, a fact without a value
TEMPLATE_COLUMN = re.compile(r"c[0-9]{4}")
# Table of the register -> its key columns and their dimensions. A table without a key has a single row, `FIXED_ROWS`.
KEY_COLUMNS: dict[str, dict[str, str]] = {
    table: dict(pair.split("=") for pair in keys)
    for table, *keys in map(
        str.split,
        (
            "B_01.01 c0010=ERI",
            "B_01.02 c0010=ESI",
            "B_01.03 c0010=ISB c0020=LHH",
            "B_02.01 c0010=CRZ",
            "B_02.02 c0010=CRZ c0020=qLES c0030=ICT c0050=IOB c0060=TYA c0130=qNNB c0150=qNMP c0160=qNMR",
            "B_02.03 c0010=CRN c0020=CRD",
            "B_03.01 c0010=CRZ c0020=qLEA",
            "B_03.02 c0010=CRZ c0020=ICT",
            "B_03.03 c0010=CRZ c0020=qLEB",
            "B_04.01 c0010=CRZ c0020=qLES c0040=ISB",
            "B_05.01 c0010=ICT",
            "B_05.02 c0010=CRZ c0020=TIC c0030=ICT c0050=ii1713 c0060=si1456",
            "B_06.01 c0010=IOB c0040=qLES",
            "B_07.01 c0010=CRZ c0020=ICT c0040=TIC",
            "B_99.01",
        ),
    )
}
FIXED_ROWS = {"B_99.01": "r0040"}
Row = tuple[int, dict[str, str]]  # (line number, column -> text)


def read_csv_package(package: Package, report_json: str, info: Mapping[str, Any], cells: Cells) -> Report:
    """Read the package with the metadata file `report_json`, whose `documentInfo` is `info`. Raise UserError with file and line."""
    path, folder = package.path, report_json.rpartition("/")[0]
    kind, extends = info.get("documentType"), info.get("extends")
    if not DOCUMENT_TYPE.fullmatch(str(kind)):
        raise UserError(f"{path}: {report_json} has documentType {kind!r}; expected https://xbrl.org/2021/xbrl-csv")
    if not isinstance(extends, list) or not extends:
        raise UserError(
            f"{path}: {report_json} extends no module; only reports that extend an EBA taxonomy module are supported"
        )
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
        table = _Table(f"{path}: {name}", name, table_code(file), parameters, cells)
        table.read(package.read(name))
        facts += table.facts
        warnings += table.warnings
    if not facts and not indicators:
        raise UserError(f"{path}: the report is empty: no facts and no filing indicators in {folder or 'the package'}")
    currency = parameters.get("baseCurrency")
    return Report(
        path=path,
        format="xBRL-CSV",
        entity=local_name(parameters["entityID"]),
        period=parameters["refPeriod"],
        currency=local_name(currency) if currency else None,
        filing_indicators=indicators,
        facts=tuple(facts),
        warnings=(*warnings, *duplicate_warnings(tuple(facts))),
        incomplete=cells.explain_unknown(
            path, len(facts), [fact.concept for fact in facts if fact.cell is None], "xBRL-CSV"
        ),
    )


def _parameters(package: Package, name: str | None) -> dict[str, str]:
    """Return the report parameters by name. Raise UserError for an invalid value, or without entity or reference date."""
    if name is None:
        raise UserError(
            f"{package.path}: parameters.csv with the entity and the reference period is missing next to report.json"
        )
    parameters: dict[str, str] = {}
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


def read_csv(where: str, content: bytes) -> tuple[list[str], list[Row]]:
    """Parse a CSV file in UTF-8. Return (columns, rows that are not empty).

    Raise UserError, whose message starts with `where`, for bad encoding, duplicate column names or ragged rows.
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
    """Read a CSV file that a user names. Return ("FILE, line N" for messages, {column: text without spaces around it}) per row.

    Raise UserError as `read_csv` does, if the file or a column of `required` is missing, or if `known` is not empty and lacks
    a column of the file.
    """
    columns = known or required
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a CSV with the columns {','.join(columns)}")
    names, rows = read_csv(str(path), path.read_bytes())
    wrong = [f"{name!r} is missing" for name in required if name not in names]
    wrong += [f"{name!r} is unknown" for name in names if known and name not in known]
    if wrong:
        raise UserError(f"{path}, line 1: the column {wrong[0]}; the columns are {','.join(columns)}")
    return [(f"{path}, line {line}", {name: text.strip() for name, text in row.items()}) for line, row in rows]


class _Table:
    """One CSV file of a package. `read` fills `facts` and `warnings`."""

    def __init__(self, where: str, name: str, table: str, parameters: Mapping[str, str], cells: Cells) -> None:
        """Prepare to read `table`. Error messages start with `where`, warnings with `name`."""
        self.where, self.name, self.table, self.parameters, self.cells = where, name, table, parameters, cells
        self.facts: list[Fact] = []
        self.warnings: list[str] = []

    def read(self, content: bytes) -> None:
        """Read the file in either layout. Raise `UserError` with the file and line at fault."""
        columns, rows = read_csv(self.where, content)
        if not rows:
            return
        if {"datapoint", "factValue"} <= set(columns):
            self._read_datapoints(rows)
        elif "datapoint" not in columns and any(TEMPLATE_COLUMN.fullmatch(column) for column in columns):
            self._read_entries(rows)
        else:
            raise UserError(
                f"{self.where} line 1: the columns datapoint and factValue are required, or the columns c0010, c0020, ... "
                "of a register"
            )

    def _read_datapoints(self, rows: Iterable[Row]) -> None:
        """Read a file that has a fact per row."""
        empty = 0
        for line, row in rows:
            datapoint, text, unit = row.pop("datapoint"), row.pop("factValue"), row.pop("unit", "")
            if not re.fullmatch(r"dp[0-9]{1,12}", datapoint):
                raise UserError(f"{self.where} line {line}: {datapoint!r} is not a datapoint id such as dp5435202")
            if text in ABSENT:
                empty += 1  # an empty field and #none report no fact (xBRL-CSV 1.0, 3.1.9)
                continue
            cell = self.cells.by_datapoint(datapoint, self.table)
            dimensions = {key: member for key, member in row.items() if member not in ABSENT}
            if cell and cell.sheet not in ("", "*"):
                dimensions["sheet"] = cell.sheet
            place = (cell.table, cell.row, cell.column) if cell else None
            self._add(line, datapoint, cell.type if cell else "", text, dimensions, place, unit)
        if empty:
            self.warnings.append(f"{self.name}: {empty} rows have an empty factValue and report no fact")

    def _read_entries(self, rows: Iterable[Row]) -> None:
        """Read a file that has a row per entry. Each field that is neither empty nor part of the key is a fact.

        The row of the cell is `*`, except in a table of `FIXED_ROWS`.
        """
        code, is_known, without_fact = FIXED_ROWS.get(self.table, "*"), self.table in KEY_COLUMNS, 0
        for number, (line, row) in enumerate(rows, start=1):
            # In an unknown table, the columns that the template does not number are taken for the key.
            unnumbered = {column: column for column in row if not TEMPLATE_COLUMN.fullmatch(column)}
            key = KEY_COLUMNS.get(self.table, {}) | unnumbered
            if missing := sorted(key.keys() - row.keys()):
                raise UserError(f"{self.where} line 1: the key column {missing[0]} of {self.table} is missing")
            dimensions = {dimension: row[column] for column, dimension in key.items() if row[column] not in ABSENT}
            if not is_known and not key:
                dimensions["row"] = str(number)
            if empty := [column for column in key if row[column] in ABSENT]:
                self.warnings.append(f"{self.name} line {line}: the key column {empty[0]} is empty")
            filed = {column: text for column, text in row.items() if column not in key and text not in ABSENT}
            without_fact += not filed
            for column, text in filed.items():
                cell, place = self.cells.by_cell(self.table, code, column), (self.table, code, column)
                kind = cell.type if cell else "string"
                self._add(line, f"{self.table}.{column}", kind, text, dict(dimensions), place)
        if without_fact:
            self.warnings.append(f"{self.name}: {without_fact} rows have only key columns and report no fact")
        if self.facts and not is_known:
            named = sorted(self.facts[0].dimensions)
            assumed = "rows are numbered" if "row" in named else f"assumed: {', '.join(named)}"
            self.warnings.append(f"{self.name}: the key columns of {self.table} are not known; {assumed}")

    def _add(
        self, line: int, concept: str, kind: str, text: str, dimensions: dict, cell: CellKey | None, unit: str = ""
    ) -> None:
        """Append the fact of one value. `kind` is its DPM type, or "" for an unknown datapoint."""
        value, decimals, is_number = _parse_value(text, kind, self.parameters)
        if is_number and not unit and kind:
            unit = self.parameters.get("baseCurrency", "") if kind == "monetary" else "xbrli:pure"
        entity, period = local_name(self.parameters["entityID"]), self.parameters["refPeriod"]
        fact = Fact(concept, value, unit or None, decimals, entity, period, dimensions, cell)
        self.facts.append(fact)
        if kind in DECIMALS_PARAMETERS and isinstance(value, str):
            problem = f"{describe(fact)} has the non-numeric value {value[:40]!r}"
            self.warnings.append(f"{self.name} line {line}: {problem}")


def _parse_value(
    text: str, kind: str, parameters: Mapping[str, str]
) -> tuple[Decimal | str | bool | None, int | str | None, bool]:
    """Parse a value or a special value of xBRL-CSV 1.0, 3.1.9. Return (value, decimals, whether it is a number)."""
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
