"""Cells and labels of the EBA Data Point Model (DPM), release 4.2: what a datapoint id in a report means.

Source: European Banking Authority, DPM 2.0 database, release 4.2 of 31 October 2025. `scripts/fetch_dpm.py` distils the
whole of it into one file under `artifacts/dpm/`; `scripts/fetch_dpm.py --builtin` made the two small tables beside this
file, `dpm_cells.csv` and `dpm_tables.csv`, which hold the cells that the rules and the generator of banks use.

A datapoint id is `dp` + the id of a variable's version. One datapoint can stand in several cells: the table in which it
was reported decides. Open rows, and sheets opened by a key, are written `*`.
"""

import csv
import functools
import re
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from errors import UserError

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
create table tables (code text primary key, label, template, module, module_version, entry_point, csv_file, keys);
create table labels (id integer primary key, text unique);
create table cells (datapoint integer, code, row, col, sheet, type, row_label integer, column_label integer, metric,
  members, current integer);
create table rules (code text primary key, expression, severity);
create index by_datapoint on cells (datapoint);
create index by_cell on cells (code, row, col);
"""
SELECT = """select c.datapoint, c.code, c.row, c.col, c.type, t.label, r.text, k.text, c.sheet, c.metric, c.members
from cells c join tables t on t.code = c.code join labels r on r.id = c.row_label join labels k on k.id = c.column_label"""


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
    metric: str  # the element that carries it in xBRL-XML, e.g. "qIKI"
    members: str  # its dimensions in xBRL-XML, e.g. "eba_dim_4.0:qADT=eba_qOR:qx2005 ..."


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
        query = f"{SELECT} where c.code = ? and c.row = ? and c.col = ? order by c.current desc, c.rowid limit 1"
        found = self.database.execute(query, (table, row, column)).fetchone()
        return _cell(found) if found else None

    def in_table(self, table: str) -> tuple[Cell, ...]:
        """The cells of a table in release 4.2 in the order in which the template presents them."""
        query = f"{SELECT} where c.code = ? and c.current = 1 order by c.rowid"
        return tuple(map(_cell, self.database.execute(query, (table,))))

    def table(self, code: str) -> Table | None:
        """The table of that code; None if unknown."""
        row = self.database.execute("select * from tables where code = ?", (code,)).fetchone()
        return Table(*row[:-1], tuple(row[-1].split())) if row else None

    def table_code(self, csv_file: str) -> str:
        """`c_76.00.a.csv` -> `C_76.00.a`; a file that the DPM does not know gets the same treatment by its pattern."""
        file = csv_file.lower()
        row = self.database.execute("select code from tables where csv_file = ?", (file,)).fetchone()
        return row[0] if row else re.sub(r"^[a-z]+", lambda letters: letters[0].upper(), file.removesuffix(".csv"))

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
        return Cells(_from_csv(path))
    database = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    try:
        database.execute("select datapoint, metric from cells limit 1")
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path}: not a distilled DPM ({error}); delete it and run scripts/fetch_dpm.py") from error
    return Cells(database)


def _from_csv(path: Path) -> sqlite3.Connection:
    """The built-in cells with `dpm_tables.csv` beside them, as a database in memory."""
    database = sqlite3.connect(":memory:")
    database.executescript(SCHEMA)
    with path.with_name(BUILT_IN_TABLES.name).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            database.execute("insert into tables values (?,?,?,?,?,?,?,?)", [row[name] for name in TABLE_COLUMNS])
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            add_cell(database, {**row, "datapoint": int(row["datapoint"][2:])}, current=True)
    return database


def add_cell(database: sqlite3.Connection, cell: dict, current: bool) -> None:
    """Insert a cell, a dict with the names of `CELL_COLUMNS`, its labels written once."""
    cell = dict(cell)
    for name in ("row_label", "column_label"):
        database.execute("insert or ignore into labels (text) values (?)", (cell[name],))
        cell[name] = database.execute("select id from labels where text = ?", (cell[name],)).fetchone()[0]
    values = [cell[name] for name in CELL_COLUMNS] + [int(current)]
    database.execute("insert into cells values (?,?,?,?,?,?,?,?,?,?,?)", values)


def _cell(row: tuple) -> Cell:
    return Cell(f"dp{row[0]}", *row[1:])
