"""Read EBA xBRL-CSV report packages.

A package contains `reports/report.json`, `parameters.csv`, `FilingIndicators.csv` and one CSV file per table.

Sources: XBRL International, xBRL-CSV 1.0 and Report Packages 1.0; EBA filing rules v5.
"""

import re
from pathlib import Path

from common.errors import UserError
from xbrl.read.dpm import Cells, local_name
from xbrl.read.report import Fact, Report, duplicate_warnings, is_day
from xbrl.read.safety import Package
from xbrl.read.xbrl_csv_tables import DECIMALS_PARAMETERS, TableFile, csv_rows, read_table
from xbrl.read.xbrl_json import load_json

DOCUMENT_TYPE = re.compile(r"https?://xbrl\.org/((CR|PR|REC|PWD|WGWD)/)?\d{4}(-\d\d-\d\d)?/xbrl-csv/?")


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
        filed, problems = read_table(TableFile(package, name, cells.table_code(file), parameters), cells)
        facts += filed
        warnings += problems
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
        warnings=tuple(warnings + duplicate_warnings(tuple(facts))),
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
