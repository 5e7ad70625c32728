"""Convert the EBA's DPM to text for continual pre-training: tables, the meaning of their rows and columns, and terms.

Source: European Banking Authority, DPM 2.0 database, release 4.2. The validation rules are in `dpm_corpus_rules.py`.
Each document lists the tables it is about (a definition lists none), so that `dpm_corpus_split.py` can hold out whole
tables.
"""

import re
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from xbrl.read.dpm_distil import TYPES, clean
from xbrl.read.render import table_name

MAX_CHARACTERS = 3000  # per document, about 1,000 tokens; longer tables are split between rows

CURRENT = "{0}.StartReleaseID <= ?1 and coalesce({0}.EndReleaseID, 1e18) > ?1"
TABLES = f"""select tv.TableVID, tv.Code, tv.Name, f.Name, mv.Code, tv.ContextID
from TableVersion tv join "Table" t on t.TableID = tv.TableID join ModuleVersionComposition mc on mc.TableVID = tv.TableVID
join ModuleVersion mv on mv.ModuleVID = mc.ModuleVID join Module m on m.ModuleID = mv.ModuleID
join Framework f on f.FrameworkID = m.FrameworkID
where t.IsAbstract = 0 and {CURRENT.format("tv")} and {CURRENT.format("mv")} order by tv.Code, mv.Code"""
HEADERS = f"""select tv.Code, h.Direction, hv.Code, hv.Label, t.IsAbstract, h.IsKey, t.HeaderID, t.ParentHeaderID, hv.ContextID
from TableVersion tv join TableVersionHeader t on t.TableVID = tv.TableVID join HeaderVersion hv on hv.HeaderVID = t.HeaderVID
join Header h on h.HeaderID = t.HeaderID where {CURRENT.format("tv")} order by tv.Code, h.Direction, t."Order", t.HeaderID"""
CELLS = f"""select tv.Code, c.CellCode, d.Code from TableVersion tv join TableVersionCell c on c.TableVID = tv.TableVID
join VariableVersion v on v.VariableVID = c.VariableVID left join Property p on p.PropertyID = v.PropertyID
left join DataType d on d.DataTypeID = p.DataTypeID where {CURRENT.format("tv")}"""
TERMS = """select distinct c.Name, i.Name, i.Description from Item i join ItemCategory ic on ic.ItemID = i.ItemID
join Category c on c.CategoryID = ic.CategoryID where ic.StartReleaseID <= ?1 and trim(coalesce(i.Description, '')) <> ''
order by c.Name, i.Name, i.Description"""
MEANINGS = """select ContextID, PropertyID, ItemID from ContextComposition where ContextID in
(select ContextID from HeaderVersion union select ContextID from TableVersion)"""
AXES = {"Y": "r", "X": "c", "Z": "s"}


@dataclass(frozen=True)
class Header:
    """A row, column or sheet of a table."""

    code: str  # "r0030"
    label: str
    depth: int  # indentation level in the template
    heading: bool  # True if it has no cells
    key: bool  # True if its values identify the rows or sheets of an open table
    meaning: str  # its dimensions as text: "Accounting items: Assets; Liquidity quality of assets: Liquid assets"


@dataclass(frozen=True)
class TableText:
    """A table of the release with the headers and cells of its template."""

    code: str  # "C_76.00.a"
    label: str
    filed: str  # frameworks and modules that include it, as text
    meaning: str  # dimensions shared by the whole table, as text
    headers: dict[str, list[Header]] = field(default_factory=lambda: {"r": [], "c": [], "s": []})
    cells: dict[tuple[str, str], str] = field(default_factory=dict)  # (row, column) -> data type; open rows are "*"

    @property
    def title(self) -> str:
        return f"{table_name(self.code)} {self.label}".strip()

    def header(self, code: str) -> Header | None:
        """The row, column or sheet with that code. None if unknown."""
        return next((header for header in self.headers.get(code[:1], ()) if header.code == code), None)


@dataclass(frozen=True)
class Document:
    """One document of the corpus."""

    kind: str  # table | meaning | rule | definition
    text: str
    tables: tuple[str, ...]  # codes of the tables it is about


def read_table_texts(database: sqlite3.Connection, release: int) -> dict[str, TableText]:
    """Code -> table, for all tables of the release that can be filed and have cells."""
    meanings = _meanings(database)
    tables: dict[str, TableText] = {}
    filed: dict[str, list[str]] = {}
    for _, code, label, framework, module, context in database.execute(TABLES, (release,)):
        filed.setdefault(code, []).append(f"{framework}, module {module}")
        label = re.sub(r" \.[a-z]$", "", clean(label))
        tables[code] = TableText(code, label, "; ".join(filed[code][:3]), meanings.get(context, ""))
    depths: dict[tuple[str, int], int] = {}
    for code, axis, number, label, heading, key, header_id, parent, context in database.execute(HEADERS, (release,)):
        if code in tables and axis in AXES:
            depths[code, header_id] = depth = depths.get((code, parent), -1) + 1
            header = Header(
                f"{AXES[axis]}{number}", clean(label), depth, bool(heading), bool(key), meanings.get(context, "")
            )
            tables[code].headers[AXES[axis]].append(header)
    for code, cell, type_code in database.execute(CELLS, (release,)):
        if code in tables:
            place = {part[:1]: part for part in cell.strip("{}").split(", ")[1:]}
            row, column = _cell_axis(place.get("r", "*")), _cell_axis(place.get("c", "*"))
            tables[code].cells[row, column] = TYPES.get(type_code, "")
    return {code: table for code, table in tables.items() if table.cells}


def _cell_axis(code: str) -> str:
    """The row or column code of a cell, with open rows as "*"."""
    return "*" if code.endswith("*") else code


def _meanings(database: sqlite3.Connection) -> dict[int, str]:
    """Context id -> its dimensions as text."""
    names = {item: clean(name) for item, name in database.execute("select ItemID, Name from Item")}
    found: dict[int, list[str]] = {}
    for context, dimension, member in database.execute(MEANINGS):
        found.setdefault(context, []).append(f"{names[dimension]}: {names[member]}")
    return {context: "; ".join(sorted(parts)) for context, parts in found.items()}


def table_documents(table: TableText) -> Iterator[Document]:
    """The template as text: sheets, columns and rows in order, with the reported cells and their data types."""
    types = _data_types(table)
    lines = [f"Filed in {table.filed}"]
    for axis, name in (("s", "Sheets"), ("c", "Columns"), ("r", "Rows")):
        headers = table.headers[axis]
        if axis == "r" and not headers:
            keys = [header.label for header in table.headers["c"] if header.key]
            lines.append(f"Open rows, one for each {', '.join(keys)}" if keys else "Open rows")
            continue
        lines += [f"{name}:"] if headers else []
        for header in headers:
            indent = "  " * header.depth
            if header.heading:
                lines.append(f"{indent}{header.label}")
                continue
            notes = ["key"] if header.key else []
            if axis == "r" and len(table.headers["c"]) > 1:
                notes += _reported_columns(table, header.code)
            notes += [types[header.code]] if types.get(header.code) else []
            lines.append(f"{indent}{header.code} {header.label}" + (f" | {', '.join(notes)}" if notes else ""))
    yield from _documents("table", table.title, lines, (table.code,))


def _data_types(table: TableText) -> dict[str, str]:
    """Header code -> data type of its cells.

    Contains all columns if every column has cells of only one type, and otherwise the rows with cells of only one type.
    """
    found: dict[str, set[str]] = {}
    for (row, column), data_type in table.cells.items():
        found.setdefault(row, set()).add(data_type)
        found.setdefault(column, set()).add(data_type)
    columns = [header.code for header in table.headers["c"] if header.code in found]
    by_column = all(len(found[code]) == 1 for code in columns)
    return {
        code: next(iter(types)) for code, types in found.items() if len(types) == 1 and (code in columns) == by_column
    }


def _reported_columns(table: TableText, row: str) -> list[str]:
    """The columns in which a row is reported, with consecutive columns as a range (`c0010-c0040`). Empty if all are."""
    order = [header.code for header in table.headers["c"] if not header.heading]
    reported = [(row, code) in table.cells for code in order]
    if all(reported):
        return []
    runs: list[list[str]] = []
    for i, (code, is_reported) in enumerate(zip(order, reported, strict=True)):
        if is_reported and i and reported[i - 1]:
            runs[-1].append(code)
        elif is_reported:
            runs.append([code])
    return [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


def meaning_documents(table: TableText) -> Iterator[Document]:
    """The meaning of each row, column and sheet: its label and its dimensions as text."""
    lines = [table.meaning] if table.meaning else []
    for headers in table.headers.values():
        lines += [f"{header.code} {header.label} = {header.meaning}" for header in headers if header.meaning]
    if lines:
        yield from _documents("meaning", f"What is reported in {table.title}", lines, (table.code,))


def definition_documents(database: sqlite3.Connection, release: int) -> Iterator[Document]:
    """The terms that the DPM defines, grouped by category. Omits definitions that only repeat the name."""
    lines: dict[str, dict[str, None]] = {}
    for category, name, description in database.execute(TERMS, (release,)):
        name, description = clean(name), clean(description)
        if len(description) > 20 and description.casefold() != name.casefold():
            lines.setdefault(clean(category), {})[f"{name}: {description}"] = None
    for category, terms in lines.items():
        yield from _documents("definition", f"Terms: {category}", terms, ())


def _documents(kind: str, title: str, lines: Iterable[str], tables: tuple[str, ...]) -> Iterator[Document]:
    """Split the lines into documents of at most about `MAX_CHARACTERS`, each starting with the title."""
    part, size = [title], 0
    for line in lines:
        if size and size + len(line) > MAX_CHARACTERS:
            yield Document(kind, "\n".join(part), tables)
            part, size = [f"{title} (continued)"], 0
        part.append(line)
        size += len(line) + 1
    yield Document(kind, "\n".join(part), tables)


def template_of(code: str) -> str:
    """The template of a table: `C_76.00.a` -> `C_76.00`."""
    return re.sub(r"\.[a-z]+$", "", code)
