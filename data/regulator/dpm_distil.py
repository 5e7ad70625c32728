"""From the EBA's DPM 2.0 database (326 MB) to what we use of it: the file that `dpm.py` reads.

In that database every table, variable and header comes in versions that live from one release to another; a datapoint
id of xBRL-CSV is the id of a variable's version. Reports from before DPM 2.0 name the variable itself.
"""

import csv
import re
import sqlite3
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from data.regulator.dpm import (
    BUILT_IN,
    BUILT_IN_TABLES,
    CELL_COLUMNS,
    RELEASE,
    SCHEMA,
    TABLE_COLUMNS,
    add_cell,
    add_table,
    local,
    signature,
)

ENTRY_POINT = "http://www.eba.europa.eu/eu/fr/xbrl/crr/fws/{framework}/{release}/mod/{module}.json"
BUILT_IN_CODES = [  # what the rules read and the generator of banks writes
    *("C_01.00", "C_02.00.a", "C_02.00.b", "C_03.00", "C_04.00", "C_22.00", "C_26.00", "C_27.00", "C_28.00"),
    *("C_47.00", "C_76.00.a", "C_84.00.a", "C_84.00.c", "C_84.00.d", "F_01.01", "F_01.02", "F_01.03", "F_02.00"),
]
BUILT_IN_COLUMNS = (
    *("datapoint", "table", "row", "column", "type", "table_label", "row_label", "column_label"),
    *("sheet", "metric", "members"),
)
PREFERRED_MODULES = ("COREP_OF", "FINREP9")  # where a table belongs to several modules, these come first
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
EXPRESSIONS = """
select o.Code, ov.Expression, coalesce(group_concat(distinct s.Severity), '') from Operation o
join OperationVersion ov using (OperationID)
left join OperationScope s on s.OperationVID = ov.OperationVID and s.IsActive = 1
where o.Code glob 'v[0-9]*' and ov.StartReleaseID <= ?1 and (ov.EndReleaseID is null or ov.EndReleaseID > ?1)
group by o.Code order by o.Code"""


def release_id(database: sqlite3.Connection) -> int:
    """The id of release 4.2 in the database; UserError if it holds none."""
    query = "select ReleaseID from Release where Code = ? and Status = 'released'"
    try:
        row = database.execute(query, (RELEASE,)).fetchone()
    except sqlite3.DatabaseError as error:
        raise UserError(f"this is not a DPM 2.0 database ({error})") from error
    if row is None:
        raise UserError(f"the database holds no released DPM {RELEASE}")
    return row[0]


def distil(database: sqlite3.Connection, target: Path) -> str:
    """Write every cell up to release 4.2, with the EBA's validation rules, to `target`; returns what it holds, in words."""
    release = release_id(database)
    out = sqlite3.connect(target)
    out.executescript(SCHEMA)
    known = read_tables(database, release)
    for table in known.values():
        add_table(out, table)
    found = read_cells(database, release)
    versions = {cell["datapoint"] for cell in found}
    seen = set()
    for cell in tqdm(found, desc="cells", unit="cell"):
        if cell["table"] not in BUILT_IN_CODES:
            cell = {**cell, "metric": "", "members": ""}  # three quarters of the file; the signature is enough to read
        for datapoint in (cell["datapoint"], cell["variable"]):
            key = (datapoint, cell["table"], cell["row"], cell["column"], cell["sheet"])
            alias = datapoint != cell["datapoint"]  # the newest cell answers for a variable
            if key in seen or cell["table"] not in known or (alias and datapoint in versions):
                continue
            seen.add(key)
            add_cell(out, {**cell, "datapoint": datapoint}, cell["current"] and not alias, cell["signature"])
    expressions = database.execute(EXPRESSIONS, (release,)).fetchall()
    out.executemany(
        "insert into rules values (?,?,?)", [(code, clean(text), level) for code, text, level in expressions]
    )
    out.commit()
    out.execute("vacuum")
    out.close()
    return f"{len(known)} tables, {len(seen)} cells, {len(expressions)} validation rules"


def write_built_in(database: sqlite3.Connection) -> None:
    """Write the two small tables that come with the code."""
    release = release_id(database)
    known = read_tables(database, release)
    with BUILT_IN_TABLES.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, TABLE_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(known[code] for code in BUILT_IN_CODES)
    with BUILT_IN.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, BUILT_IN_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for cell in read_cells(database, release):
            if cell["current"] and cell["table"] in BUILT_IN_CODES:
                label = known[cell["table"]]["label"]
                writer.writerow({**cell, "datapoint": f"dp{cell['datapoint']}", "table_label": label})


def read_tables(database: sqlite3.Connection, release: int) -> dict[str, dict]:
    """code -> a dict of `TABLE_COLUMNS`, the newest version up to `release` of every table."""
    codes = _property_codes(database)
    found: dict[str, dict] = {}
    for code, label, template, framework, module, version, since, key in database.execute(TABLES, (release,)):
        if code in found and not (module in PREFERRED_MODULES and found[code]["since"] == since):
            continue
        url = ENTRY_POINT.format(framework=framework.lower(), release=since, module=module.lower())
        label = re.sub(r" \.[a-z]$", "", clean(label))  # some names of release 4.2 repeat the suffix of the code
        values = (code, label, template, module, version, url, f"{code.lower()}.csv", " ".join(_keys(key, codes)))
        found[code] = {**dict(zip(TABLE_COLUMNS, values, strict=True)), "since": since}
    return found


def read_cells(database: sqlite3.Connection, release: int) -> list[dict]:
    """The cells with a datapoint of every table version up to `release`, newest first, in the template's order.

    Each is a dict of `CELL_COLUMNS` with `variable` (what all versions of a datapoint share), `current` and `signature`.
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
        bare = {local(name): local(member) for name, member in members.items()}
        number = signature(codes.get(metric, ""), bare, _keys(key, codes))
        found.append({**dict(zip(CELL_COLUMNS, values, strict=True)), "variable": variable, "signature": number})
        found[-1]["current"] = bool(current)
    return found


def clean(label: str | None) -> str:
    """A label on one line."""
    return " ".join((label or "").split())


def _property_codes(database: sqlite3.Connection) -> dict[int, str]:
    """Property id -> code of a metric or a dimension (`qIKI`, `CUS`); the code in use comes last and so wins."""
    query = """select i.ItemID, i.Code from ItemCategory i join Category c using (CategoryID) where c.Code = '_PR'
        order by i.Code like 'old-%' desc, i.StartReleaseID"""
    return dict(database.execute(query))


def _keys(key_signature: str | None, codes: dict[int, str]) -> list[str]:
    """`1012410829#` -> `["qINC"]`: the open dimensions of a table or a variable."""
    return [codes[int(part)] for part in (key_signature or "").split("#") if part]


def _contexts(database: sqlite3.Connection) -> dict[int, dict[str, str]]:
    """Context id -> {`eba_dim_4.0:qADT`: `eba_qOR:qx2005`, ...}; the prefix names the release that brought the dimension."""
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
