"""Write the figures of a bank as EBA report files, one per module: xBRL-CSV report packages or xBRL-JSON.

Sources: XBRL International, xBRL-CSV 1.0, xBRL-JSON 1.0 and Report Packages 1.0; EBA filing rules v5 (names and
layout). The files are reproducible byte for byte: fixed order, fixed time stamps, no compression.
"""

import datetime
import io
import json
import pathlib
import zipfile
from collections.abc import Iterable, Sequence
from decimal import Decimal

from xbrl.corpus.banks import Bank
from xbrl.read.dpm import WRITTEN_TABLES, Cell, Cells, Table
from xbrl.read.filed_report import CellKey
from xbrl.rules.remittance import due_date

FRAMEWORK = {"COREP": "COREP040200", "FINREP": "FINREP040200"}  # framework and release as written in file names
# Tables with their values: (cell, key of the open row or "", value)
Content = list[tuple[Table, list[tuple[Cell, str, Decimal | str]]]]
DICTIONARY = "http://www.eba.europa.eu/xbrl/crr/dict"
NAMESPACES = {
    "eba_met": f"{DICTIONARY}/met",
    "fi": "http://www.xbrl.org/taxonomy/int/filing-indicators/REC/2021-02-03",
    "iso4217": "http://www.xbrl.org/2003/iso4217",
    "lei": "http://standards.iso.org/iso/17442",
    "xbrli": "http://www.xbrl.org/2003/instance",
}


def write_reports(
    folder: pathlib.Path,
    bank: Bank,
    period: str,
    figures: dict[CellKey, Decimal | str],
    cells: Cells,
    unfiled: Iterable[str] = (),
    syntax: str = "csv",
) -> list[pathlib.Path]:
    """Write the figures of one bank for one reference date into `folder`. Return the files, one per module.

    The templates in `unfiled` are declared as not filed in the file of their module. In a table with open rows, the row of a cell
    is its key.
    """
    tables = {code: table for code in WRITTEN_TABLES if (table := cells.table(code))}
    modules: dict[str, dict[str, list[tuple[Cell, str, Decimal | str]]]] = {}
    for (code, row, column), value in figures.items():
        is_open = code in tables and tables[code].keys
        cell = cells.by_cell(code, "*" if is_open else row, column)
        assert cell, f"the DPM has no cell {code} {row} {column}"
        modules.setdefault(tables[code].module, {}).setdefault(code, []).append((cell, row if is_open else "", value))
    files = []
    for module, filed in sorted(modules.items()):
        templates = {
            table.template for table in tables.values() if table.template in unfiled and table.module == module
        }
        indicators = dict.fromkeys(templates, False) | {tables[code].template: True for code in filed}
        content = [(tables[code], rows) for code, rows in sorted(filed.items())]
        sent = datetime.date.fromisoformat(due_date(module, period))  # at noon
        framework = FRAMEWORK[module[:6] if module.startswith("FINREP") else "COREP"]
        name = f"{bank.entity}.{bank.scope}_{bank.country}_{framework}_{module.replace('_', '')}_{period}_{sent:%Y%m%d}120000000"
        files.append(folder / (f"{name}.zip" if syntax == "csv" else f"{name}.json"))
        if syntax == "csv":
            files[-1].write_bytes(_csv_package(name, bank, period, content, sorted(indicators.items())))
        else:
            document = _json_report(bank, period, content, sorted(indicators.items()))
            files[-1].write_text(json.dumps(document, indent=0) + "\n", encoding="utf-8")
    return files


def _csv_package(name: str, bank: Bank, period: str, content: Content, indicators: list[tuple[str, bool]]) -> bytes:
    """Return one module as the bytes of an xBRL-CSV report package. Facts are identified by their datapoints."""
    parameters = {
        "entityID": f"rs:{bank.entity}.{bank.scope}",
        "refPeriod": period,
        "baseCurrency": f"iso4217:{bank.currency}",
        "decimalsMonetary": bank.decimals,
        "decimalsPercentage": bank.ratio_decimals,
    }
    files = {
        "META-INF/reportPackage.json": _json("https://xbrl.org/report-package/2023"),
        "reports/report.json": _json("https://xbrl.org/2021/xbrl-csv", extends=[content[0][0].entry_point]),
        "reports/parameters.csv": _csv(("name", "value"), parameters.items()),
        "reports/FilingIndicators.csv": _csv(
            ("templateID", "reported"), ((template, str(filed).lower()) for template, filed in indicators)
        ),
    }
    for table, rows in content:
        lines = ((cell.datapoint, *_key_columns(table, key).values(), value) for cell, key, value in rows)
        files[f"reports/{table.csv_file}"] = _csv(("datapoint", *table.keys, "factValue"), lines)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as package:
        for member, text in files.items():
            package.writestr(zipfile.ZipInfo(f"{name}/{member}", (1980, 1, 1, 0, 0, 0)), text)
    return packed.getvalue()


def _json_report(bank: Bank, period: str, content: Content, indicators: list[tuple[str, bool]]) -> dict:
    """Return one module as an xBRL-JSON report. Facts are identified by metric and dimensions, not by datapoint."""
    end = datetime.date.fromisoformat(period) + datetime.timedelta(days=1)  # OIM: midnight of the next day
    core = {"entity": f"lei:{bank.entity}.{bank.scope}", "period": f"{end}T00:00:00"}
    namespaces = dict(NAMESPACES)
    facts: list[dict] = [
        {"value": str(filed).lower(), "dimensions": {"concept": "fi:filed", **core, "fi:template": template}}
        for template, filed in indicators
    ]
    for table, rows in content:
        for cell, key, value in rows:
            members = dict(part.split("=") for part in cell.members.split())
            members |= {f"eba_dim_4.2:{name}": text for name, text in _key_columns(table, key).items()}
            named = [*members, *members.values(), *([value] if cell.type == "enumeration" else ())]
            for prefix in (name.partition(":")[0] for name in named if ":" in str(name)):
                part = prefix.removeprefix("eba_dim_")
                namespaces[prefix] = f"{DICTIONARY}/{'dom' if part == prefix else 'dim'}/{part.removeprefix('eba_')}"
            fact: dict = {"value": str(value)}
            dimensions = {"concept": f"eba_met:{cell.metric}", **core, **members}
            if isinstance(value, Decimal):
                fact["decimals"] = bank.decimals if cell.type == "monetary" else bank.ratio_decimals
                if cell.type == "monetary":
                    dimensions["unit"] = f"iso4217:{bank.currency}"
            fact["dimensions"] = dimensions
            facts.append(fact)
    info = {
        "documentType": "https://xbrl.org/2021/xbrl-json",
        "namespaces": dict(sorted(namespaces.items())),
        "taxonomy": [content[0][0].entry_point.removesuffix(".json") + ".xsd"],
    }
    return {"documentInfo": info, "facts": {f"f{number}": fact for number, fact in enumerate(facts, start=1)}}


def _key_columns(table: Table, key: str) -> dict[str, str]:
    """Return the values of the key columns of an open row. C 27.00 has a second key column: the type of the code, "LEI"."""
    return {name: key if name == "qINC" else "LEI" for name in table.keys}


def _json(document_type: str, **more: list[str]) -> str:
    return json.dumps({"documentInfo": {"documentType": document_type, **more}})


def _csv(header: Sequence[str], rows: Iterable[tuple]) -> str:
    """Return CSV text. Nothing is quoted, because generated values contain no commas or quotes."""
    return "".join(",".join(map(str, row)) + "\n" for row in (header, *rows))
