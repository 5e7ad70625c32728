"""Extract the cells and labels that `dpm.py` needs from the EBA's DPM 2.0 database (326 MB).

Tables, variables and headers of that database have versions, each valid from one release to another. A datapoint id in
xBRL-CSV is the id of a variable version. Reports from before DPM 2.0 use the id of the variable itself.
"""

import csv
import io
import re
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from common.durable_files import publish, temporary_path, write_durably
from common.errors import UserError
from xbrl.read.dpm import (
    BUILT_IN,
    BUILT_IN_TABLES,
    CELL_COLUMNS,
    RELEASE,
    SCHEMA,
    TABLE_COLUMNS,
    add_cell,
    add_table,
    load_cells,
    local_name,
    signature,
)
from xbrl.read.dpm_download import open_dpm_database

ENTRY_POINT = "http://www.eba.europa.eu/eu/fr/xbrl/crr/fws/{framework}/{release}/mod/{module}.json"
BUILT_IN_CODES = [  # tables that the rules read and the bank generator fills
    *("C_01.00", "C_02.00.a", "C_02.00.b", "C_03.00", "C_04.00", "C_22.00", "C_26.00", "C_27.00", "C_28.00"),
    *("C_47.00", "C_76.00.a", "C_84.00.a", "C_84.00.c", "C_84.00.d", "F_01.01", "F_01.02", "F_01.03", "F_02.00"),
]
BUILT_IN_COLUMNS = (
    *("datapoint", "table", "row", "column", "type", "table_label", "row_label", "column_label"),
    *("sheet", "metric", "members"),
)
PREFERRED_MODULES = ("COREP_OF", "FINREP9")  # chosen for a table that belongs to several modules
TYPES = {
    **{"m": "monetary", "p": "percentage", "i": "integer", "r": "decimal", "s": "string", "es": "string"},
    **{"b": "boolean", "t": "true", "d": "date", "dt": "datetime", "e": "enumeration", "u": "uri", "o": "ordinal"},
}
TABLES = """
select tv.Code, tv.Name, coalesce(a.Code, tv.Code), f.Code, mv.Code, mv.VersionNumber, r.Code, k.Signature
from TableVersion tv join ModuleVersionComposition using (TableVID) join ModuleVersion mv using (ModuleVID)
join Module m using (ModuleID) join Framework f using (FrameworkID) join Release r on r.ReleaseID = mv.StartReleaseID
left join TableVersion a on a.TableID = tv.AbstractTableID and a.StartReleaseID <= ?1
left join CompoundKey k on k.KeyID = tv.KeyID
where tv.StartReleaseID <= ?1 and mv.StartReleaseID <= ?1
order by mv.StartReleaseID desc, a.StartReleaseID desc, mv.Code"""
CELLS = """
select c.VariableVID, v.VariableID, tv.Code, c.CellCode, d.Code, rh.Label, ch.Label, v.PropertyID, v.ContextID, q.Signature,
  coalesce(tv.EndReleaseID, 1e18) > ?1
from TableVersion tv join TableVersionCell c using (TableVID) join Cell ce using (CellID)
join VariableVersion v using (VariableVID)
left join CompoundKey q on q.KeyID = v.KeyID
left join Property p on p.PropertyID = v.PropertyID left join DataType d using (DataTypeID)
left join TableVersionHeader r on r.TableVID = tv.TableVID and r.HeaderID = ce.RowID
left join HeaderVersion rh on rh.HeaderVID = r.HeaderVID
left join TableVersionHeader k on k.TableVID = tv.TableVID and k.HeaderID = ce.ColumnID
left join HeaderVersion ch on ch.HeaderVID = k.HeaderVID
where tv.StartReleaseID <= ?1
order by tv.StartReleaseID desc, tv.Code, r."Order", k."Order", c.CellCode"""


def release_id(database: sqlite3.Connection) -> int:
    """The id of release 4.2 in the database. Raises UserError if the database has no such release or is not a DPM."""
    query = "select ReleaseID from Release where Code = ? and Status = 'released'"
    try:
        row = database.execute(query, (RELEASE,)).fetchone()
    except sqlite3.DatabaseError as error:
        raise UserError(f"this is not a DPM 2.0 database ({error})") from error
    if row is None:
        raise UserError(f"the database does not contain DPM release {RELEASE}")
    return row[0]


def fetch(out: Path, database: Path | None, builtin: bool) -> str:
    """Distil the DPM database at `database`, or a downloaded one, to `out` unless it exists. Returns a sentence.

    builtin: make the tables in this folder instead. Raises UserError if a file is not what it should be.
    """
    if out.is_file() and not builtin:
        load_cells(out)
        return f"{out} already exists."
    with open_dpm_database(database) as opened:
        if builtin:
            write_built_in(opened)
            return f"wrote {BUILT_IN} and {BUILT_IN_TABLES}"
        contents = distil(opened, out)
    size = out.stat().st_size / 2**20
    return f"{out}: {contents}, {size:.0f} MiB. Source: European Banking Authority, DPM {RELEASE}."


def distil(database: sqlite3.Connection, target: Path) -> str:
    """Write all cells up to release 4.2 to `target`. Returns a summary of the contents.

    `target` appears only when it is complete.
    """
    release = release_id(database)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary_path(target).unlink(missing_ok=True)  # left by an interrupted run
    out = sqlite3.connect(temporary_path(target))
    out.executescript(SCHEMA)
    known = read_tables(database, release)
    for table in known.values():
        add_table(out, table)
    found = read_cells(database, release)
    version_ids = {cell["datapoint"] for cell in found}
    seen = set()
    for cell in tqdm(found, desc="cells", unit="cell"):
        if cell["table"] not in BUILT_IN_CODES:
            # Readers only need the signature. Omitting these saves three quarters of the file size.
            cell = {**cell, "metric": "", "members": ""}
        for datapoint in (cell["datapoint"], cell["variable"]):
            key = (datapoint, cell["table"], cell["row"], cell["column"], cell["sheet"])
            alias = datapoint != cell["datapoint"]  # a variable id refers to its newest cell
            if key in seen or cell["table"] not in known or (alias and datapoint in version_ids):
                continue
            seen.add(key)
            add_cell(out, {**cell, "datapoint": datapoint}, cell["current"] and not alias, cell["signature"])
    out.commit()
    out.execute("vacuum")
    out.close()
    publish(target)
    return f"{len(known)} tables, {len(seen)} cells"


def write_built_in(database: sqlite3.Connection) -> None:
    """Regenerate `dpm_cells.csv` and `dpm_tables.csv`, the two small tables in this repository."""
    release = release_id(database)
    known = read_tables(database, release)
    cells = [
        {**cell, "datapoint": f"dp{cell['datapoint']}", "table_label": known[cell["table"]]["label"]}
        for cell in read_cells(database, release)
        if cell["current"] and cell["table"] in BUILT_IN_CODES
    ]
    write_durably(BUILT_IN_TABLES, _csv_text(TABLE_COLUMNS, [known[code] for code in BUILT_IN_CODES]))
    write_durably(BUILT_IN, _csv_text(BUILT_IN_COLUMNS, cells))


def _csv_text(columns: Sequence[str], rows: Iterable[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_tables(database: sqlite3.Connection, release: int) -> dict[str, dict]:
    """Table code -> newest version of the table up to `release`, a dict with the keys `TABLE_COLUMNS` and `since`."""
    codes = _property_codes(database)
    found: dict[str, dict] = {}
    for code, label, template, framework, module, version, since, key in database.execute(TABLES, (release,)):
        if code in found and not (module in PREFERRED_MODULES and found[code]["since"] == since):
            continue
        url = ENTRY_POINT.format(framework=framework.lower(), release=since, module=module.lower())
        label = re.sub(r" \.[a-z]$", "", clean(label))  # some names of release 4.2 end in the suffix of the code
        values = (code, label, template, module, version, url, f"{code.lower()}.csv", " ".join(_keys(key, codes)))
        found[code] = {**dict(zip(TABLE_COLUMNS, values, strict=True)), "since": since}
    return found


def read_cells(database: sqlite3.Connection, release: int) -> list[dict]:
    """All cells with a datapoint, from all table versions up to `release`.

    Sorted by version (newest first), then in template order. Each cell is a dict with the keys `CELL_COLUMNS`,
    `variable` (the id shared by all versions of a datapoint), `current` (True if part of `release`) and `signature`.
    """
    codes = _property_codes(database)
    contexts = _contexts(database)
    found = []
    for row in database.execute(CELLS, (release,)):
        vid, variable, table, cell_code, kind, row_label, column_label, metric, context, key, current = row
        place = {part[0]: part for part in cell_code.strip("{}").split(", ")[1:]}
        place = {axis: "*" if code.endswith("*") else code for axis, code in place.items()}
        members = contexts.get(context, {})
        text = " ".join(f"{name}={member}" for name, member in sorted(members.items()))
        values = (vid, table, place.get("r", "*"), place.get("c", "*"), place.get("s", ""), TYPES.get(kind, ""))
        values += (clean(row_label), clean(column_label), codes.get(metric, ""), text)
        bare = {local_name(name): local_name(member) for name, member in members.items()}
        number = signature(codes.get(metric, ""), bare, _keys(key, codes))
        found.append({**dict(zip(CELL_COLUMNS, values, strict=True)), "variable": variable, "signature": number})
        found[-1]["current"] = bool(current)
    return found


def clean(label: str | None) -> str:
    """A label with all white space collapsed to single spaces. None becomes ""."""
    return " ".join((label or "").split())


def _property_codes(database: sqlite3.Connection) -> dict[int, str]:
    """Property id -> current code of a metric or a dimension (`qIKI`, `CUS`).

    Obsolete codes sort first and are overwritten.
    """
    query = """select i.ItemID, i.Code from ItemCategory i join Category c using (CategoryID) where c.Code = '_PR'
        order by i.Code like 'old-%' desc, i.StartReleaseID"""
    return dict(database.execute(query))


def _keys(key_signature: str | None, codes: dict[int, str]) -> list[str]:
    """The open dimensions of a table or a variable: `1012410829#` -> `["qINC"]`."""
    return [codes[int(part)] for part in (key_signature or "").split("#") if part]


def _contexts(database: sqlite3.Connection) -> dict[int, dict[str, str]]:
    """Context id -> {`eba_dim_4.0:qADT`: `eba_qOR:qx2005`, ...}.

    A dimension prefix contains the release that introduced it.
    """
    dimension = {}
    query = """select i.ItemID, i.Code, r.Code from ItemCategory i join Category c using (CategoryID)
        join Release r on r.ReleaseID = i.StartReleaseID where c.Code = '_PR' order by i.Code like 'old-%' desc"""
    for item, code, since in database.execute(query):
        dimension[item] = f"eba_dim_{since}:{code}"
    member = dict(database.execute("select ItemID, Signature from ItemCategory order by StartReleaseID"))
    contexts: dict[int, dict[str, str]] = {}
    for context, prop, item in database.execute("select ContextID, PropertyID, ItemID from ContextComposition"):
        contexts.setdefault(context, {})[dimension[prop]] = member[item]
    return contexts
