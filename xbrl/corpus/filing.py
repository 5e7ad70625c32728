"""Write the figures of a bank as EBA report files, one per module: xBRL-CSV report packages or xBRL-JSON.

Sources: XBRL International, xBRL-CSV 1.0, xBRL-JSON 1.0 and Report Packages 1.0; EBA filing rules v5 (names and
layout). The files are reproducible byte for byte: fixed order, fixed time stamps, no compression.
"""

import datetime
import functools
import io
import json
import pathlib
import zipfile
from collections.abc import Iterable, Sequence
from decimal import Decimal

from common.errors import UserError
from xbrl.corpus.banks import Bank
from xbrl.read.dpm import WRITTEN_TABLES, Cell, Cells, Table
from xbrl.read.filed_report import CellKey, Note
from xbrl.rules.remittance import due_date

FRAMEWORK = {"COREP": "COREP040200", "FINREP": "FINREP040200"}  # framework and release as written in file names
Row = tuple[Cell, str, Decimal | str]  # (cell, key of its row in an open table or "", value)
Content = list[tuple[Table, list[Row]]]  # what a module files
FOOTNOTE = "http://www.xbrl.org/2003/arcrole/fact-footnote"
LINK = "http://www.xbrl.org/2003/role/link"
INDICATORS = "http://www.xbrl.org/taxonomy/int/filing-indicators/REC/2021-02-03"
NAMESPACES = {
    "eba_met": "http://www.eba.europa.eu/xbrl/crr/dict/met",
    "fi": INDICATORS,
    "iso4217": "http://www.xbrl.org/2003/iso4217",
    "lei": "http://standards.iso.org/iso/17442",
    "xbrl": "https://xbrl.org/2021",
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
    notes: Sequence[Note] = (),
) -> list[pathlib.Path]:
    """Write the figures of one bank for one reference date into `folder`. Returns the files, one per module.

    `notes` need the syntax "json": EBA xBRL-CSV packages have no place for them. A note stands in the module of the cells
    that it is attached to.

    The templates in `unfiled` are declared as not filed in the file of their module. In a table with open rows, the row
    of a cell is its key. Raises `UserError` for a cell that is not in the DPM.
    """
    index, tables = _index_by_code(cells)
    modules: dict[str, dict[str, list[Row]]] = {}
    for (table, row, column), value in figures.items():
        opened = table in tables and tables[table].keys
        cell = index.get((table, "*" if opened else row, column))
        if cell is None:
            raise UserError(f"the DPM has no cell {{{table}, {row}, {column}}}; fix the cells of the report generator")
        modules.setdefault(tables[table].module, {}).setdefault(table, []).append((cell, row if opened else "", value))
    files = []
    for module, filed in sorted(modules.items()):
        indicators = {tables[code].template: True for code in filed}
        for table in tables.values():
            if table.template in unfiled and table.module == module:
                indicators.setdefault(table.template, False)
        content = [(tables[code], rows) for code, rows in sorted(filed.items())]
        name = _file_name(bank, period, module)
        if syntax == "csv":
            path = folder / f"{name}.zip"
            path.write_bytes(_csv_package(name, bank, period, content, dict(sorted(indicators.items()))))
        else:
            path = folder / f"{name}.json"
            of_module = [note for note in notes if any(cell[0] in filed for cell in note.cells)]
            document = _json_report(bank, period, content, dict(sorted(indicators.items())), of_module)
            path.write_text(json.dumps(document, indent=0) + "\n", encoding="utf-8")
        files.append(path)
    return files


@functools.lru_cache(maxsize=2)
def _index_by_code(cells: Cells) -> tuple[dict[CellKey, Cell], dict[str, Table]]:
    """(cell key -> cell, code -> table) for the tables that the generator fills.

    Cached, because one query per figure would take half of the run time.
    """
    codes = WRITTEN_TABLES
    found = {(cell.table, cell.row, cell.column): cell for code in codes for cell in cells.in_table(code)}
    return found, {code: table for code in codes if (table := cells.table(code))}


def _file_name(bank: Bank, period: str, module: str) -> str:
    """File name without suffix.

    The time stamp is noon of the day on which the return is due.
    """
    sent = datetime.date.fromisoformat(due_date(module, period))
    framework = FRAMEWORK[module[:6] if module.startswith("FINREP") else "COREP"]
    return f"{bank.entity}.{bank.scope}_{bank.country}_{framework}_{module.replace('_', '')}_{period}_{sent:%Y%m%d}120000000"


def _csv_package(name: str, bank: Bank, period: str, content: Content, indicators: dict[str, bool]) -> bytes:
    """One module as an xBRL-CSV report package, which identifies a fact by its datapoint."""
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
        "reports/parameters.csv": _csv("name,value", parameters.items()),
        "reports/FilingIndicators.csv": _csv(
            "templateID,reported", ((template, str(reported).lower()) for template, reported in indicators.items())
        ),
    }
    for table, rows in content:
        header = ",".join(["datapoint", *table.keys, "factValue"])
        lines = (
            (cell.datapoint, *_key_columns(table, key).values(), _format_value(value)) for cell, key, value in rows
        )
        files[f"reports/{table.csv_file}"] = _csv(header, lines)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as package:
        for member, text in files.items():
            package.writestr(zipfile.ZipInfo(f"{name}/{member}", (1980, 1, 1, 0, 0, 0)), text)
    return packed.getvalue()


def _json_report(bank: Bank, period: str, content: Content, indicators: dict[str, bool], notes: Sequence[Note]) -> dict:
    """One module as an xBRL-JSON report, which identifies a fact by its metric and dimensions instead of its datapoint."""
    places = {cell: f"note{number}" for number, note in enumerate(notes, start=1) for cell in note.cells}
    core = {"entity": f"lei:{bank.entity}.{bank.scope}", "period": _instant(period)}
    namespaces, facts = dict(NAMESPACES), []
    for template, reported in indicators.items():
        facts.append(
            {"value": str(reported).lower(), "dimensions": {"concept": "fi:filed", **core, "fi:template": template}}
        )
    for table, rows in content:
        for cell, key, value in rows:
            members = dict(part.split("=") for part in cell.members.split())
            members |= {f"eba_dim_4.2:{name}": text for name, text in _key_columns(table, key).items()}
            for name in (*members, *(member for member in members.values() if ":" in member)):
                prefix = name.partition(":")[0]
                namespaces[prefix] = _namespace(prefix)
            fact: dict = {"value": _format_value(value)}
            dimensions = {"concept": f"eba_met:{cell.metric}", **core, **members}
            if isinstance(value, Decimal):
                fact["decimals"] = bank.decimals if cell.type == "monetary" else bank.ratio_decimals
                if cell.type == "monetary":
                    dimensions["unit"] = f"iso4217:{bank.currency}"
            elif cell.type == "enumeration":
                namespaces[value.partition(":")[0]] = _namespace(value.partition(":")[0])
            fact["dimensions"] = dimensions
            name = places.get((table.code, key or cell.row, cell.column))
            if name:
                fact["links"] = {"footnote": {"_": [name]}}
            facts.append(fact)
    info = {
        "documentType": "https://xbrl.org/2021/xbrl-json",
        "namespaces": dict(sorted(namespaces.items())),
        "taxonomy": [content[0][0].entry_point.removesuffix(".json") + ".xsd"],
    }
    if notes:
        info |= {"linkTypes": {"footnote": FOOTNOTE}, "linkGroups": {"_": LINK}}
    by_id = {f"f{number}": fact for number, fact in enumerate(facts, start=1)}
    for number, note in enumerate(notes, start=1):
        dimensions = {"concept": "xbrl:note", "noteId": f"note{number}", "language": note.language or "en"}
        by_id[f"note{number}"] = {"value": note.text, "dimensions": dimensions}
    return {"documentInfo": info, "facts": by_id}


def _key_columns(table: Table, key: str) -> dict[str, str]:
    """Key columns and values of an open row. C 27.00 has a second key column with the type of the code, "LEI"."""
    return {name: key if name == "qINC" else "LEI" for name in table.keys}


def _namespace(prefix: str) -> str:
    if prefix.startswith("eba_dim"):
        return f"http://www.eba.europa.eu/xbrl/crr/dict/dim/{prefix.removeprefix('eba_dim_')}"
    return f"http://www.eba.europa.eu/xbrl/crr/dict/dom/{prefix.removeprefix('eba_')}"


def _instant(period: str) -> str:
    """The end of a day in OIM notation, which is midnight of the next day."""
    return f"{datetime.date.fromisoformat(period) + datetime.timedelta(days=1)}T00:00:00"


def _format_value(value: Decimal | str) -> str:
    return value if isinstance(value, str) else f"{value:f}"


def _json(document_type: str, **more: list[str]) -> str:
    return json.dumps({"documentInfo": {"documentType": document_type, **more}})


def _csv(header: str, rows: Iterable[tuple]) -> str:
    """CSV without quoting, because generated values contain no commas or quotes."""
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"
