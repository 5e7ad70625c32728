"""Cells and labels of the EBA Data Point Model (DPM), release 4.2: what a datapoint id in a report means.

Source: European Banking Authority, DPM 2.0 database, release 4.2 of 31 October 2025. `scripts/fetch_dpm.py` distils the
whole of it into one file under `artifacts/dpm/`; `scripts/fetch_dpm.py --builtin` made the two small tables beside this
file, `dpm_cells.csv` and `dpm_tables.csv`, which hold the cells that the rules and the generator of banks use.

A datapoint id is `dp` + the id of a variable's version. One datapoint can stand in several cells: the table in which it
was reported decides. Open rows, and sheets opened by a key, are written `*`.
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
create table rules (code text primary key, expression, severity);
create index by_datapoint on cells (datapoint);
create index by_table on cells (table_id, row);
create index by_signature on cells (signature);
"""
SELECT = """select c.datapoint, t.code, c.row, c.col, c.type, t.label, r.text, k.text, c.sheet, c.metric, c.members
from cells c join tables t on t.id = c.table_id join labels r on r.id = c.row_label join labels k on k.id = c.column_label"""
MAX_OPEN_KEYS = 4  # explicit members of one fact that may be keys


@dataclass(frozen=True)
class Cell:
    """One cell of a table with the datapoint that fills it."""

    datapoint: str  # "dp5435202"
    table: str  # "C_76.00.a"
    row: str  # "r0030", or "*" in a table with open rows
    column: str  # "c0010"
    type: str  # monetary, percentage, integer, decimal, string, boolean, date, enumeration, ...
    table_label: str
    row_label: str
    column_label: str
    sheet: str  # "" for none, "s0001" for a fixed sheet, "*" for sheets opened by a key
    metric: str  # the element that carries it in xBRL-XML, e.g. "qIKI"; only for the tables of the built-in file
    members: str  # its dimensions in xBRL-XML, e.g. "eba_dim_4.0:qADT=eba_qOR:qx2005 ..."; likewise


@dataclass(frozen=True)
class Table:
    """One table and the module in which it is filed."""

    code: str  # "C_76.00.a"
    label: str
    template: str  # what FilingIndicators.csv calls it: "C_76.00"
    module: str  # "COREP_LCR_DA"
    module_version: str  # "3.3.0"
    entry_point: str  # the URL that report.json extends
    csv_file: str  # "c_76.00.a.csv"
    keys: tuple[str, ...]  # the key columns of an open table


@dataclass(frozen=True)
class Cells:
    """Look-ups over the DPM. Not to be shared between processes: each loads its own."""

    database: sqlite3.Connection
    open_keys: frozenset[str]  # the dimensions that are keys of some open table

    def by_datapoint(self, datapoint: str, table: str | None = None) -> Cell | None:
        """The cell that `datapoint` fills in `table`, or in its first table when none is given; None if unknown."""
        found = self.all_of(datapoint)
        return next((cell for cell in found if table is None or cell.table == table), None)

    def all_of(self, datapoint: str) -> tuple[Cell, ...]:
        """Every cell that shows `datapoint`, the current release first."""
        if not re.fullmatch(r"dp[0-9]{1,18}", datapoint):
            return ()
        query = f"{SELECT} where c.datapoint = ? order by c.current desc, c.rowid"
        return tuple(map(_cell, self.database.execute(query, (int(datapoint[2:]),))))

    def by_cell(self, table: str, row: str, column: str) -> Cell | None:
        """The datapoint in a cell: of release 4.2, or of the last release that had the cell. None if unknown or grey."""
        query = f"{SELECT} where t.code = ? and c.row = ? and c.col = ? order by c.current desc, c.rowid limit 1"
        found = self.database.execute(query, (table, row, column)).fetchone()
        return _cell(found) if found else None

    def in_table(self, table: str) -> tuple[Cell, ...]:
        """The cells of a table in release 4.2 in the order in which the template presents them."""
        query = f"{SELECT} where t.code = ? and c.current = 1 order by c.rowid"
        return tuple(map(_cell, self.database.execute(query, (table,))))

    def table(self, code: str) -> Table | None:
        """The table of that code; None if unknown."""
        row = self.database.execute("select * from tables where code = ?", (code,)).fetchone()
        return Table(*row[1:-1], tuple(row[-1].split())) if row else None

    def table_code(self, csv_file: str) -> str:
        """`c_76.00.a.csv` -> `C_76.00.a`; a file that the DPM does not know gets the same treatment by its pattern."""
        file = csv_file.lower()
        row = self.database.execute("select code from tables where csv_file = ?", (file,)).fetchone()
        return row[0] if row else re.sub(r"^[a-z]+", lambda letters: letters[0].upper(), file.removesuffix(".csv"))

    def by_signature(
        self, metric: str, explicit: Mapping[str, str], typed: Iterable[str] = ()
    ) -> tuple[tuple[Cell, ...], tuple[str, ...]]:
        """(every cell of a fact filed in xBRL-XML or xBRL-JSON, its dimensions that the cells leave open).

        Cells of release 4.2 if there are any, else of older ones. `explicit` maps dimensions to members and `typed` names
        the typed dimensions, all without prefix. An explicit member may be the key of an open table or sheet too.
        """
        keys = [name for name in explicit if name in self.open_keys][:MAX_OPEN_KEYS]
        for count in range(len(keys) + 1):
            for opened in itertools.combinations(keys, count):
                fixed = {name: member for name, member in explicit.items() if name not in opened}
                number = signature(metric, fixed, (*typed, *opened))
                for which in (1, 0):
                    query = f"{SELECT} where c.signature = ? and c.current = ? order by c.rowid"
                    found = map(_cell, self.database.execute(query, (number, which)))
                    places = {(cell.table, cell.row, cell.column): cell for cell in reversed(list(found))}
                    if places:
                        return tuple(reversed(places.values())), (*typed, *opened)
        return (), ()

    def eba_rule(self, code: str) -> tuple[str, str] | None:
        """(expression in DPM-XL, severity) of an EBA validation rule; None if unknown or not distilled."""
        return self.database.execute("select expression, severity from rules where code = ?", (code,)).fetchone()


@functools.lru_cache(maxsize=4)
def load_cells(path: Path | None = None) -> Cells:
    """The distilled DPM at `path`; by default the one under `artifacts/dpm/` if it was fetched, else the built-in table.

    What must not depend on whether it was fetched asks for `load_cells(BUILT_IN)`.
    """
    if path is None:
        path = DISTILLED if DISTILLED.is_file() else BUILT_IN
    if not path.is_file():
        raise UserError(f"{path}: no such file; run scripts/fetch_dpm.py")
    if path.suffix == ".csv":
        return _cells(_from_csv(path))
    database = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    try:
        database.execute("select datapoint, signature from cells limit 1")
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path}: not a distilled DPM ({error}); delete it and run scripts/fetch_dpm.py") from error
    return _cells(database)


def signature(metric: str, members: Mapping[str, str], keys: Iterable[str]) -> int:
    """What identifies a fact in xBRL-XML: metric, dimensions with their members, and open keys, as a 64-bit number.

    Names come without prefix: prefixes carry the release in which a dimension was introduced, which differs by taxonomy.
    """
    parts = sorted([f"{name}={member}" for name, member in members.items()] + [f"{name}=*" for name in keys])
    return int.from_bytes(hashlib.sha256("|".join([metric, *parts]).encode()).digest()[:8], "big", signed=True)


def _cells(database: sqlite3.Connection) -> Cells:
    keys = {name for (names,) in database.execute("select distinct keys from tables") for name in names.split()}
    return Cells(database, frozenset(keys))


def _from_csv(path: Path) -> sqlite3.Connection:
    """The built-in cells with `dpm_tables.csv` beside them, as a database in memory."""
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
            number = signature(
                row["metric"], {name: local(member) for name, member in members.items()}, keys[row["table"]]
            )
            add_cell(database, {**row, "datapoint": int(row["datapoint"][2:])}, True, number)
    return database


def local(name: str) -> str:
    """`eba_qOR:qx2003` -> `qx2003`: a name without its prefix."""
    return name.rpartition(":")[2]


def add_table(database: sqlite3.Connection, table: dict) -> None:
    """Insert a table, a dict with the names of `TABLE_COLUMNS`."""
    values = [table[name] for name in TABLE_COLUMNS]
    database.execute("insert into tables values (null,?,?,?,?,?,?,?,?)", values)


def add_cell(database: sqlite3.Connection, cell: dict, current: bool, number: int | None) -> None:
    """Insert a cell, a dict with the names of `CELL_COLUMNS`, and its signature; its labels are written once."""
    labels = []
    for name in ("row_label", "column_label"):
        database.execute("insert or ignore into labels (text) values (?)", (cell[name],))
        labels.append(database.execute("select id from labels where text = ?", (cell[name],)).fetchone()[0])
    table = database.execute("select id from tables where code = ?", (cell["table"],)).fetchone()[0]
    place = [cell[name] for name in ("row", "column", "sheet", "type")]
    values = [cell["datapoint"], table, *place, *labels, cell["metric"], cell["members"], int(current), number]
    database.execute("insert into cells values (?,?,?,?,?,?,?,?,?,?,?,?)", values)


def _cell(row: tuple) -> Cell:
    return Cell(f"dp{row[0]}", *row[1:])
