"""Look up cells and labels of the EBA Data Point Model (DPM), release 4.2, for example by datapoint id.

Source: European Banking Authority, DPM 2.0 database, release 4.2 of 31 October 2025. `scripts/regulator.py dpm` distils the
complete model into one SQLite file under `artifacts/dpm/`. The two small tables next to this module, `dpm_cells.csv`
and `dpm_tables.csv`, contain only the cells used by the rules and by the bank generator; `scripts/regulator.py dpm
--builtin` generates them.

A datapoint id is `dp` followed by the id of a variable version. The same datapoint can appear in several cells; the
table in which it was reported identifies the cell. Open rows, and sheets identified by a key, have the code `*`.
"""

import csv
import functools
import hashlib
import itertools
import re
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

RELEASE = "4.2"
BUILT_IN = Path(__file__).with_name("dpm_cells.csv")
BUILT_IN_TABLES = Path(__file__).with_name("dpm_tables.csv")
DISTILLED = Path(__file__).resolve().parents[2] / "artifacts" / "dpm" / f"dpm-{RELEASE}.sqlite"

TABLE_COLUMNS = ("table", "label", "template", "module", "module_version", "entry_point", "csv_file", "keys")
CELL_COLUMNS = (
    "datapoint",
    "table",
    "row",
    "column",
    "sheet",
    "type",
    "row_label",
    "column_label",
    "metric",
    "members",
)
SCHEMA = """
create table tables (id integer primary key, code text unique, label, template, module, module_version, entry_point,
  csv_file, keys);
create table labels (id integer primary key, text unique);
create table cells (datapoint integer, table_id integer, row, col, sheet, type, row_label integer, column_label integer,
  metric, members, current integer, signature integer);
create index by_datapoint on cells (datapoint);
create index by_table on cells (table_id, row);
create index by_signature on cells (signature);
"""
SELECT = """select c.datapoint, t.code, c.row, c.col, c.type, t.label, r.text, k.text, c.sheet, c.metric, c.members
from cells c join tables t on t.id = c.table_id join labels r on r.id = c.row_label join labels k on k.id = c.column_label"""
MAX_OPEN_KEYS = 4  # explicit dimensions of one fact that are tried as keys of an open table


@dataclass(frozen=True)
class Cell:
    """One cell of a table and the datapoint that it shows."""

    datapoint: str  # "dp5435202"
    table: str  # "C_76.00.a"
    row: str  # "r0030", or "*" in a table with open rows
    column: str  # "c0010"
    type: str  # monetary, percentage, integer, decimal, string, boolean, date, enumeration, ...
    table_label: str
    row_label: str
    column_label: str
    sheet: str  # "" for no sheet, "s0001" for a fixed sheet, "*" for sheets identified by a key
    metric: str  # name of its XML element in xBRL-XML, e.g. "qIKI"; only for tables of the built-in file
    members: str  # its dimensions in xBRL-XML, e.g. "eba_dim_4.0:qADT=eba_qOR:qx2005 ..."; also built-in only


@dataclass(frozen=True)
class Table:
    """One table and the module that it is filed in."""

    code: str  # "C_76.00.a"
    label: str
    template: str  # its name in FilingIndicators.csv: "C_76.00"
    module: str  # "COREP_LCR_DA"
    module_version: str  # "3.3.0"
    entry_point: str  # the module URL in `extends` of report.json
    csv_file: str  # "c_76.00.a.csv"
    keys: tuple[str, ...]  # the key columns of an open table


@dataclass(frozen=True)
class Cells:
    """Queries on the DPM. Do not share an instance between processes; each process must load its own."""

    database: sqlite3.Connection
    open_keys: frozenset[str]  # dimensions that are keys of at least one open table

    def by_datapoint(self, datapoint: str, table: str | None = None) -> Cell | None:
        """The cell of `datapoint` in `table`, or in the first table that shows it if `table` is None.

        None if unknown.
        """
        found = self.all_of(datapoint)
        return next((cell for cell in found if table is None or cell.table == table), None)

    def all_of(self, datapoint: str) -> tuple[Cell, ...]:
        """All cells that show `datapoint`, cells of release 4.2 first."""
        if not re.fullmatch(r"dp[0-9]{1,18}", datapoint):
            return ()
        query = f"{SELECT} where c.datapoint = ? order by c.current desc, c.rowid"
        return tuple(map(_cell_of_row, self.database.execute(query, (int(datapoint[2:]),))))

    def by_cell(self, table: str, row: str, column: str) -> Cell | None:
        """The cell at a position, from release 4.2 or else the last release that had it.

        None if unknown or greyed out.
        """
        query = f"{SELECT} where t.code = ? and c.row = ? and c.col = ? order by c.current desc, c.rowid limit 1"
        found = self.database.execute(query, (table, row, column)).fetchone()
        return _cell_of_row(found) if found else None

    def in_table(self, table: str) -> tuple[Cell, ...]:
        """The cells of a table in release 4.2, in the order of the template."""
        query = f"{SELECT} where t.code = ? and c.current = 1 order by c.rowid"
        return tuple(map(_cell_of_row, self.database.execute(query, (table,))))

    def table(self, code: str) -> Table | None:
        """The table with that code. None if unknown."""
        row = self.database.execute("select * from tables where code = ?", (code,)).fetchone()
        if row is None:
            return None
        _, *columns, keys = row
        return Table(*columns, keys=tuple(keys.split()))

    def table_code(self, csv_file: str) -> str:
        """The table of a CSV file: `c_76.00.a.csv` -> `C_76.00.a`.

        Unknown file names are converted by the same pattern.
        """
        file = csv_file.lower()
        row = self.database.execute("select code from tables where csv_file = ?", (file,)).fetchone()
        return row[0] if row else re.sub(r"^[a-z]+", lambda letters: letters[0].upper(), file.removesuffix(".csv"))

    def by_signature(
        self, metric: str, explicit: Mapping[str, str], typed: Iterable[str] = ()
    ) -> tuple[tuple[Cell, ...], tuple[str, ...]]:
        """Find the cells of a fact filed in xBRL-XML or xBRL-JSON.

        `explicit` maps explicit dimensions to members; `typed` lists the typed dimensions. All names are without
        prefix. An explicit dimension can also be the key of an open table or sheet. Returns (cells, dimensions that
        they leave open). Cells of older releases are returned only if release 4.2 has none.
        """
        keys = [name for name in explicit if name in self.open_keys][:MAX_OPEN_KEYS]
        for count in range(len(keys) + 1):
            for opened in itertools.combinations(keys, count):
                fixed = {name: member for name, member in explicit.items() if name not in opened}
                key = signature(metric, fixed, (*typed, *opened))
                for current in (1, 0):
                    query = f"{SELECT} where c.signature = ? and c.current = ? order by c.rowid"
                    found = map(_cell_of_row, self.database.execute(query, (key, current)))
                    places = {(cell.table, cell.row, cell.column): cell for cell in reversed(list(found))}
                    if places:
                        return tuple(reversed(places.values())), (*typed, *opened)
        return (), ()


@functools.lru_cache(maxsize=4)
def load_cells(path: Path | None = None) -> Cells:
    """Open the distilled DPM at `path` (default: `artifacts/dpm/` if `regulator.py dpm` was run, else the built-in tables).

    Code whose output must not depend on a previous fetch calls `load_cells(BUILT_IN)`. Raises UserError if the file is
    missing or invalid.
    """
    if path is None:
        path = DISTILLED if DISTILLED.is_file() else BUILT_IN
    if not path.is_file():
        raise UserError(f"{path}: no such file; run scripts/regulator.py dpm to create it")
    if path.suffix == ".csv":
        return _with_open_keys(_from_csv(path))
    database = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    try:
        database.execute("select datapoint, signature from cells limit 1")
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path}: not a distilled DPM ({error}); delete it and run scripts/regulator.py dpm") from error
    return _with_open_keys(database)


def signature(metric: str, members: Mapping[str, str], keys: Iterable[str]) -> int:
    """64-bit hash of what identifies a fact in xBRL-XML: the metric, its dimensions with members, and its open keys.

    Names are without prefix, because a prefix contains the release that introduced a dimension and differs by taxonomy.
    """
    parts = sorted([f"{name}={member}" for name, member in members.items()] + [f"{name}=*" for name in keys])
    return int.from_bytes(hashlib.sha256("|".join([metric, *parts]).encode()).digest()[:8], "big", signed=True)


def _with_open_keys(database: sqlite3.Connection) -> Cells:
    keys = {name for (names,) in database.execute("select distinct keys from tables") for name in names.split()}
    return Cells(database, frozenset(keys))


def _from_csv(path: Path) -> sqlite3.Connection:
    """Load the built-in cells and the tables in `dpm_tables.csv` next to them into an in-memory database."""
    database = sqlite3.connect(":memory:")
    database.executescript(SCHEMA)
    keys = {}
    with path.with_name(BUILT_IN_TABLES.name).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            add_table(database, row)
            keys[row["table"]] = row["keys"].split()
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            members = dict(part.partition(":")[2].split("=") for part in row["members"].split())
            members = {name: local_name(member) for name, member in members.items()}
            key = signature(row["metric"], members, keys[row["table"]])
            add_cell(database, {**row, "datapoint": int(row["datapoint"][2:])}, True, key)
    return database


def local_name(name: str) -> str:
    """A name without its prefix: `eba_qOR:qx2003` -> `qx2003`."""
    return name.rpartition(":")[2]


def add_table(database: sqlite3.Connection, table: dict) -> None:
    """Insert a table, given as a dict with the keys `TABLE_COLUMNS`."""
    values = [table[name] for name in TABLE_COLUMNS]
    database.execute("insert into tables values (null,?,?,?,?,?,?,?,?)", values)


def add_cell(database: sqlite3.Connection, cell: dict, current: bool, cell_signature: int | None) -> None:
    """Insert a cell, given as a dict with the keys `CELL_COLUMNS`. Equal labels are stored once."""
    labels = []
    for name in ("row_label", "column_label"):
        database.execute("insert or ignore into labels (text) values (?)", (cell[name],))
        labels.append(database.execute("select id from labels where text = ?", (cell[name],)).fetchone()[0])
    table = database.execute("select id from tables where code = ?", (cell["table"],)).fetchone()[0]
    place = [cell[name] for name in ("row", "column", "sheet", "type")]
    values = [cell["datapoint"], table, *place, *labels, cell["metric"], cell["members"], int(current), cell_signature]
    database.execute("insert into cells values (?,?,?,?,?,?,?,?,?,?,?,?)", values)


def _cell_of_row(row: tuple) -> Cell:
    return Cell(f"dp{row[0]}", *row[1:])
