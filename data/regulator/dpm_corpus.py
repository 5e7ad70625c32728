"""The EBA's DPM as text for continual pre-training: tables, what their rows and columns mean, and terms.

Source: European Banking Authority, DPM 2.0 database, release 4.2. The rules are in `dpm_corpus_rules.py`. Every document
says of which tables it speaks (a definition of none), so that `dpm_corpus_split.py` can hold tables out.
"""

import re
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from data.regulator.dpm_distil import TYPES, clean
from data.regulator.render import table_name

PART = 3000  # characters of a document, about 1,000 tokens: a longer table becomes several, cut between rows

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
    depth: int  # how far it is indented in the template
    heading: bool  # has no cells of its own
    key: bool  # its values name the rows, or sheets, of an open table
    meaning: str  # its dimensions in words: "Accounting items: Assets; Liquidity quality of assets: Liquid assets"


@dataclass(frozen=True)
class TableText:
    """A table of the release, as a template shows it."""

    code: str  # "C_76.00.a"
    label: str
    filed: str  # frameworks and modules, in words
    meaning: str
    headers: dict[str, list[Header]] = field(default_factory=lambda: {"r": [], "c": [], "s": []})
    cells: dict[tuple[str, str], str] = field(default_factory=dict)  # (row, column), "*" for open rows -> data type

    @property
    def title(self) -> str:
        return f"{table_name(self.code)} {self.label}".strip()

    def header(self, code: str) -> Header | None:
        """The row, column or sheet of that code."""
        return next((one for one in self.headers.get(code[:1], ()) if one.code == code), None)


@dataclass(frozen=True)
class Document:
    """One document of the corpus."""

    kind: str  # table | meaning | rule | definition
    text: str
    tables: tuple[str, ...]  # codes of the tables that it speaks of


def read_table_texts(database: sqlite3.Connection, release: int) -> dict[str, TableText]:
    """code -> table, of every table that can be filed in the release."""
    meanings = _meanings(database)
    tables: dict[str, TableText] = {}
    filed: dict[str, list[str]] = {}
    for _, code, label, framework, module, context in database.execute(TABLES, (release,)):
        filed.setdefault(code, []).append(f"{framework}, module {module}")
        label = re.sub(r" \.[a-z]$", "", clean(label))
        tables[code] = TableText(code, label, "; ".join(filed[code][:3]), meanings.get(context, ""))
    depths: dict[tuple[str, int], int] = {}
    for code, axis, number, label, heading, key, header, parent, context in database.execute(HEADERS, (release,)):
        if code in tables and axis in AXES:
            depths[code, header] = depth = depths.get((code, parent), -1) + 1
            one = Header(
                f"{AXES[axis]}{number}", clean(label), depth, bool(heading), bool(key), meanings.get(context, "")
            )
            tables[code].headers[AXES[axis]].append(one)
    for code, cell, kind in database.execute(CELLS, (release,)):
        if code in tables:
            place = {part[:1]: part for part in cell.strip("{}").split(", ")[1:]}
            tables[code].cells[_open(place.get("r", "*")), _open(place.get("c", "*"))] = TYPES.get(kind, "")
    return {code: table for code, table in tables.items() if table.cells}


def _open(code: str) -> str:
    return "*" if code.endswith("*") else code


def _meanings(database: sqlite3.Connection) -> dict[int, str]:
    """Context id -> its dimensions in words."""
    names = {item: clean(name) for item, name in database.execute("select ItemID, Name from Item")}
    found: dict[int, list[str]] = {}
    for context, dimension, member in database.execute(MEANINGS):
        found.setdefault(context, []).append(f"{names[dimension]}: {names[member]}")
    return {context: "; ".join(sorted(parts)) for context, parts in found.items()}


def table_documents(table: TableText) -> Iterator[Document]:
    """The template: columns, then rows in their order, each with the cells that are reported and their data type."""
    kinds = _kinds(table)
    lines = [f"Filed in {table.filed}"]
    for axis, name in (("s", "Sheets"), ("c", "Columns"), ("r", "Rows")):
        headers = table.headers[axis]
        if axis == "r" and not headers:
            keys = [one.label for one in table.headers["c"] if one.key]
            lines.append(f"Open rows, one for each {', '.join(keys)}" if keys else "Open rows")
            continue
        lines += [f"{name}:"] if headers else []
        for one in headers:
            indent = "  " * one.depth
            if one.heading:
                lines.append(f"{indent}{one.label}")
                continue
            notes = ["key"] if one.key else []
            if axis == "r" and len(table.headers["c"]) > 1:
                notes += _columns_of(table, one.code)
            notes += [kinds[one.code]] if kinds.get(one.code) else []
            lines.append(f"{indent}{one.code} {one.label}" + (f" | {', '.join(notes)}" if notes else ""))
    yield from _parts("table", table.title, lines, (table.code,))


def _kinds(table: TableText) -> dict[str, str]:
    """Header -> the data type of its cells: of columns where each has one, else of the rows that have one."""
    found: dict[str, set[str]] = {}
    for (row, column), kind in table.cells.items():
        found.setdefault(row, set()).add(kind)
        found.setdefault(column, set()).add(kind)
    columns = [one.code for one in table.headers["c"] if one.code in found]
    by_column = all(len(found[code]) == 1 for code in columns)
    return {
        code: next(iter(kinds)) for code, kinds in found.items() if len(kinds) == 1 and (code in columns) == by_column
    }


def _columns_of(table: TableText, row: str) -> list[str]:
    """The columns in which a row is reported, `c0010-c0040` where they follow each other; of the others the cell is grey."""
    order = [one.code for one in table.headers["c"] if not one.heading]
    reported = [(row, code) in table.cells for code in order]
    if all(reported):
        return []
    runs: list[list[str]] = []
    for i, (code, yes) in enumerate(zip(order, reported, strict=True)):
        if yes and i and reported[i - 1]:
            runs[-1].append(code)
        elif yes:
            runs.append([code])
    return [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


def meaning_documents(table: TableText) -> Iterator[Document]:
    """What each row, column and sheet means: its label, and its dimensions in words."""
    lines = [table.meaning] if table.meaning else []
    for headers in table.headers.values():
        lines += [f"{one.code} {one.label} = {one.meaning}" for one in headers if one.meaning]
    if lines:
        yield from _parts("meaning", f"What is reported in {table.title}", lines, (table.code,))


def definition_documents(database: sqlite3.Connection, release: int) -> Iterator[Document]:
    """The terms that the DPM defines, by category."""
    lines: dict[str, dict[str, None]] = {}
    for category, name, description in database.execute(TERMS, (release,)):
        name, description = clean(name), clean(description)
        if len(description) > 20 and description.casefold() != name.casefold():
            lines.setdefault(clean(category), {})[f"{name}: {description}"] = None
    for category, terms in lines.items():
        yield from _parts("definition", f"Terms: {category}", terms, ())


def _parts(kind: str, title: str, lines: Iterable[str], tables: tuple[str, ...]) -> Iterator[Document]:
    """Documents of at most about `PART` characters, each with the title in its first line."""
    part, size = [title], 0
    for line in lines:
        if size and size + len(line) > PART:
            yield Document(kind, "\n".join(part), tables)
            part, size = [f"{title} (continued)"], 0
        part.append(line)
        size += len(line) + 1
    yield Document(kind, "\n".join(part), tables)


def template_of(code: str) -> str:
    """`C_76.00.a` -> `C_76.00`."""
    return re.sub(r"\.[a-z]+$", "", code)
