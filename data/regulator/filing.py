"""Write what a bank reports as EBA xBRL-CSV report packages, one zip per module, as banks file them.

Sources: XBRL International, xBRL-CSV 1.0 and Report Packages 1.0; EBA filing rules v5 (names and layout). The bytes
depend on the figures alone: fixed order, fixed time stamps, stored without compression.
"""

import datetime
import io
import json
import pathlib
import zipfile
from collections.abc import Iterable
from decimal import Decimal

from data.regulator.banks import Bank
from data.regulator.dpm import Cells
from data.regulator.report import CellKey
from data.regulator.reporting import RATIO_DECIMALS
from errors import UserError

FRAMEWORK = "COREP040200"  # framework and taxonomy release, as file names carry them


def write_packages(
    folder: pathlib.Path,
    bank: Bank,
    period: str,
    figures: dict[CellKey, Decimal],
    cells: Cells,
    templates: Iterable[str] = (),
) -> list[pathlib.Path]:
    """Write `figures` of one bank at one reference date into `folder`; returns the files, one per module.

    Templates of the DPM codes `templates` that have no figure are declared as not filed. Raises `UserError` for a cell
    that the DPM does not have.
    """
    modules: dict[str, dict[str, list[tuple[str, Decimal]]]] = {}
    tables = {}
    for (table, row, column), value in figures.items():
        cell = cells.by_cell(table, row, column)
        if cell is None:
            raise UserError(f"the DPM has no cell {{{table}, {row}, {column}}}; correct the generator's list of cells.")
        if table not in tables:
            tables[table] = cells.table(table)
        modules.setdefault(tables[table].module, {}).setdefault(table, []).append((cell.datapoint, value))
    unfiled = {cells.table(code).template: cells.table(code).module for code in templates if code not in tables}
    return [
        _write_package(
            folder, bank, period, module, [(tables[code], rows) for code, rows in sorted(filed.items())], unfiled
        )
        for module, filed in sorted(modules.items())
    ]


def _write_package(
    folder: pathlib.Path, bank: Bank, period: str, module: str, filed: list, unfiled: dict[str, str]
) -> pathlib.Path:
    sent = datetime.date.fromisoformat(period) + datetime.timedelta(
        days=42
    )  # the remittance date of quarterly reports, about
    name = f"{bank.entity}.CON_{bank.country}_{FRAMEWORK}_{module.replace('_', '')}_{period}_{sent:%Y%m%d}120000000"
    indicators = dict.fromkeys((table.template for table, _ in filed), "true")
    indicators |= {
        template: "false"
        for template, of_module in unfiled.items()
        if of_module == module and template not in indicators
    }
    parameters = {
        "entityID": f"rs:{bank.entity}.CON",
        "refPeriod": period,
        "baseCurrency": f"iso4217:{bank.currency}",
        "decimalsMonetary": bank.decimals,
        "decimalsPercentage": RATIO_DECIMALS,
    }
    files = {
        "META-INF/reportPackage.json": _json("https://xbrl.org/report-package/2023"),
        "reports/report.json": _json("https://xbrl.org/2021/xbrl-csv", extends=[filed[0][0].entry_point]),
        "reports/parameters.csv": _csv("name,value", parameters.items()),
        "reports/FilingIndicators.csv": _csv("templateID,reported", sorted(indicators.items())),
    }
    for table, rows in filed:
        files[f"reports/{table.csv_file}"] = _csv(
            "datapoint,factValue", ((datapoint, f"{value:f}") for datapoint, value in rows)
        )
    path = folder / f"{name}.zip"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as package:
        for member, text in files.items():
            package.writestr(zipfile.ZipInfo(f"{name}/{member}", (1980, 1, 1, 0, 0, 0)), text)
    path.write_bytes(content.getvalue())
    return path


def _json(document_type: str, **more: list[str]) -> str:
    return json.dumps({"documentInfo": {"documentType": document_type, **more}})


def _csv(header: str, rows: Iterable[tuple]) -> str:
    """No value of ours holds a comma or a quote."""
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"
