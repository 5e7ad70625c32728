"""The corpus for continual pre-training: the EBA's DPM as text (tables, the meaning of their rows and columns, rules, terms).

Source: European Banking Authority, DPM 2.0 database. Cells are named as in rendered reports:
`C 76.00.a r0030 c0010 LIQUIDITY COVERAGE RATIO (%), Value / Percentage`.

Text for evaluation must not occur in training, so whole tables are held out. Each document lists the tables that it is about; a
definition lists none. Many tables overlap: parts of one template, copies per currency, disclosures that mirror a return.
Tables that share most of their labels therefore go to the same split. A rule about tables of several splits goes to the
strictest of these splits (test, then validation, then training).
"""

import random
import re
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product
from pathlib import Path

from common.durable_files import new_directory, write_json, write_json_lines
from common.errors import UserError
from eval import general_text
from xbrl.corpus.card import SPLITS
from xbrl.read.dpm import RELEASE, WRITTEN_TABLES
from xbrl.read.dpm_database import PACKAGE, TYPES, clean, place_in, release_id, table_label
from xbrl.read.filed_report import template_of
from xbrl.read.render import table_name

MIN_OVERLAP = 0.5  # Jaccard similarity of labels at or above which two tables go to the same split
MAX_SEEN = 0.5  # held-out documents with a larger fraction of lines seen in training are dropped
MIN_WORDS = 4  # shorter lines ("Total assets") are too common to count as seen
CITATION = f"European Banking Authority, DPM {RELEASE}"  # the source on every line of the DPM files
SOURCE = (
    f"European Banking Authority, DPM 2.0 database, release {RELEASE} (31 October 2025), as carried by the PyPI package "
    f"{PACKAGE}. Texts are the EBA's, arranged by xbrl/scripts/regulator.py cpt."
)
LIMITS = (
    "Contains labels, dimensions, rules and definitions, but no legal prose and no instructions. A rule about tables of "
    "several splits is in the strictest split. Tables used by the bank reports of xbrl/scripts/make_reports.py are in training. "
    "Definitions belong to no table and are assigned to splits at random. A held-out document may share single lines with "
    "training."
)
MAX_LABEL_LINES = 24  # lines with cell labels per rule
MAX_CELLS_PER_OPERAND = 12
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
RULES = f"""select ov.OperationVID, o.Code, ov.Expression, coalesce(ov.Description, '')
from Operation o join OperationVersion ov on ov.OperationID = o.OperationID
where o.Type = 'validation' and {CURRENT.format("ov")} order by o.Code, ov.OperationVID"""
SEVERITIES = """select OperationVID, group_concat(distinct Severity) from OperationScope
where IsActive = 1 group by OperationVID"""
MEMBERS = "select ic.Signature, i.Name from ItemCategory ic join Item i on i.ItemID = ic.ItemID"
AXES = {"Y": "r", "X": "c", "Z": "s"}


@dataclass(frozen=True)
class Header:
    """A row, column or sheet of a table."""

    code: str  # "r0030"
    label: str
    depth: int  # indentation level in the template
    heading: bool  # whether it has no cells
    key: bool  # whether its values identify the rows or sheets of an open table
    meaning: str  # its dimensions as text: "Accounting items: Assets; Liquidity quality of assets: Liquid assets"


@dataclass(frozen=True)
class TableText:
    """A table of the release, with its headers and cells."""

    code: str  # "C_76.00.a"
    label: str
    filed: str  # frameworks and modules that include the table, as text
    meaning: str  # dimensions shared by the whole table, as text
    headers: dict[str, list[Header]] = field(default_factory=lambda: {"r": [], "c": [], "s": []})
    cells: dict[tuple[str, str], str] = field(default_factory=dict)  # (row, column) -> data type; open rows are "*"

    @property
    def title(self) -> str:
        return f"{table_name(self.code)} {self.label}".strip()

    @cached_property
    def labels(self) -> dict[str, str]:
        """Return the label of each row, column and sheet, by code."""
        return {header.code: header.label for part in self.headers.values() for header in reversed(part)}


@dataclass(frozen=True)
class Document:
    """One document of the corpus."""

    kind: str  # table | meaning | rule | definition
    text: str
    tables: tuple[str, ...]  # codes of the tables that it is about


def make_corpus(database: sqlite3.Connection, out: Path, held_out: float, seed: int) -> dict:
    """Write the splits, general English texts and the data card to the new folder `out`. Return the data card.

    Validation and test each get about the fraction `held_out` of the text of the tables. `general.jsonl` is for mixing into
    training, `general_held_out.jsonl` is for evaluation. Raise UserError if the database has no tables of the release.
    """
    release = release_id(database)
    tables = read_table_texts(database, release)
    if not tables:
        raise UserError(f"the database contains no tables of release {RELEASE}")
    documents = [text for table in tables.values() for text in (*table_documents(table), *meaning_documents(table))]
    left_out: Counter[str] = Counter()
    documents += rule_documents(database, release, tables, left_out)
    documents += definition_documents(database, release)
    groups, sizes = group_tables(tables), Counter()
    for document in documents:
        if document.kind == "table":
            sizes[document.tables[0]] += len(document.text)
    splits = split_tables(groups, sizes, held_out, seed, WRITTEN_TABLES)
    parts = assign_documents(documents, splits, held_out, seed, left_out)
    parts["general"] = [Document("general", text, ()) for text in general_text.training_texts()]
    parts["general_held_out"] = [Document("general", text, ()) for text in general_text.held_out_texts()]
    files = {}
    with new_directory(out) as folder:
        for name, part in parts.items():
            source, citation = (general_text.SOURCE,) * 2 if name.startswith("general") else (SOURCE, CITATION)
            files[f"{name}.jsonl"] = {
                "source": source,
                "documents": len(part),
                "characters": sum(len(document.text) for document in part),
                "tables": len({code for document in part for code in document.tables}),
                "documents_by_kind": dict(sorted(Counter(document.kind for document in part).items())),
            }
            write_json_lines(
                folder / f"{name}.jsonl",
                [
                    {"text": text.text, "kind": text.kind, "tables": list(text.tables), "source": citation}
                    for text in part
                ],
            )
        card = {
            "arguments": {"held_out": held_out, "seed": seed},
            "sources": [SOURCE, general_text.SOURCE],
            "files": files,
            "tables": {split: sorted(code for code in splits if splits[code] == split) for split in SPLITS},
            "groups_of_tables": len(set(groups.values())),
            "kept_together": f"parts of one template; tables with at least {MIN_OVERLAP:.0%} of their labels in common",
            "left_out": dict(left_out),
            "left_out_above": f"{MAX_SEEN:.0%} of the lines of a held-out document",
            "how_made": "xbrl/scripts/regulator.py cpt",
            "limits": LIMITS,
        }
        write_json(folder / "dataset.json", card)
    return card


def read_table_texts(database: sqlite3.Connection, release: int) -> dict[str, TableText]:
    """Read all tables of the release that can be filed and have cells, by code."""
    meanings = _meanings(database)
    tables: dict[str, TableText] = {}
    filed: dict[str, list[str]] = {}
    for _, code, label, framework, module, context in database.execute(TABLES, (release,)):
        filed.setdefault(code, []).append(f"{framework}, module {module}")
        tables[code] = TableText(code, table_label(label), "; ".join(filed[code][:3]), meanings.get(context, ""))
    depths: dict[tuple[str, int], int] = {}
    for code, axis, number, label, heading, key, header_id, parent, context in database.execute(HEADERS, (release,)):
        if code in tables and axis in AXES:
            depths[code, header_id] = depth = depths.get((code, parent), -1) + 1
            name, meaning = f"{AXES[axis]}{number}", meanings.get(context, "")
            tables[code].headers[name[0]].append(Header(name, clean(label), depth, bool(heading), bool(key), meaning))
    for code, cell, type_code in database.execute(CELLS, (release,)):
        if code in tables:
            place = place_in(cell)
            tables[code].cells[place.get("r", "*"), place.get("c", "*")] = TYPES.get(type_code, "")
    return {code: table for code, table in tables.items() if table.cells}


def _meanings(database: sqlite3.Connection) -> dict[int, str]:
    """Return the dimensions of each context as text, by context id."""
    names = {item: clean(name) for item, name in database.execute("select ItemID, Name from Item")}
    dimensions: dict[int, list[str]] = {}
    for context, dimension, member in database.execute(MEANINGS):
        dimensions.setdefault(context, []).append(f"{names[dimension]}: {names[member]}")
    return {context: "; ".join(sorted(parts)) for context, parts in dimensions.items()}


def table_documents(table: TableText) -> Iterator[Document]:
    """Yield the table as text: sheets, columns and rows in order, with the reported cells and their data types."""
    types, columns = _data_types(table), [header.code for header in table.headers["c"] if not header.heading]
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
                reported = [code for code in columns if (header.code, code) in table.cells]
                notes += reported if reported != columns else []
            notes += [types[header.code]] if types.get(header.code) else []
            lines.append(f"{indent}{header.code} {header.label}" + (f" | {', '.join(notes)}" if notes else ""))
    yield from _documents("table", table.title, lines, (table.code,))


def _data_types(table: TableText) -> dict[str, str]:
    """Return the data type of the cells of a header, by header code.

    The result has all columns if the cells of each column have the same type. Otherwise it has the rows whose cells have the
    same type.
    """
    types_of: dict[str, set[str]] = {}
    for (row, column), data_type in table.cells.items():
        types_of.setdefault(row, set()).add(data_type)
        types_of.setdefault(column, set()).add(data_type)
    columns = [header.code for header in table.headers["c"] if header.code in types_of]
    by_column = all(len(types_of[code]) == 1 for code in columns)
    return {code: min(types) for code, types in types_of.items() if len(types) == 1 and (code in columns) == by_column}


def meaning_documents(table: TableText) -> Iterator[Document]:
    """Yield the meaning of each row, column and sheet: its label and its dimensions as text."""
    lines = [table.meaning] if table.meaning else []
    for headers in table.headers.values():
        lines += [f"{header.code} {header.label} = {header.meaning}" for header in headers if header.meaning]
    if lines:
        yield from _documents("meaning", f"What is reported in {table.title}", lines, (table.code,))


def definition_documents(database: sqlite3.Connection, release: int) -> Iterator[Document]:
    """Yield the terms that the DPM defines, grouped by category, without definitions that only repeat the name."""
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


def rule_documents(
    database: sqlite3.Connection, release: int, tables: Mapping[str, TableText], dropped: Counter[str]
) -> Iterator[Document]:
    """Yield the validation rules with the labels of their cells. Count omitted rules in `dropped`, by reason."""
    names = {signature: clean(name) for signature, name in database.execute(MEMBERS)}
    templates: dict[str, list[str]] = {}
    for code in tables:
        templates.setdefault(template_of(code), []).append(code)
    severities = dict(database.execute(SEVERITIES))
    for version, rule_code, expression, description in database.execute(RULES, (release,)):
        severity = ", ".join(sorted((severities.get(version) or "").split(",")))
        expression = clean(expression)
        mentioned = set(re.findall(r"\b[tv]_?([A-Z]+_\d[\w.]*[\w])", expression))
        used = sorted({code for name in mentioned for code in ([name] if name in tables else templates.get(name, ()))})
        unknown = [name for name in mentioned if name not in tables and name not in templates]
        if unknown or not used:
            dropped["rules on tables that are not filed in the release" if unknown else "rules that name no table"] += 1
            continue
        lines = [f"Rule {rule_code}" + (f" ({severity})" if severity else "")]
        lines += [tables[code].title for code in used[:8]] + [expression]
        description = clean(description)
        words = re.findall(r"\b[a-z]{4,}\b", re.sub(r"\{[^{}]*\}", "", description))
        if len(words) >= 3 and "default:" not in description:  # most other descriptions repeat the expression
            lines.append(description)
        lines += rule_labels(expression, tables)
        members = dict.fromkeys(re.findall(r"\[(eba_\w+:\w+)\]", expression))
        lines += [f"{member} {names[member]}" for member in list(members)[:MAX_LABEL_LINES] if member in names]
        yield Document("rule", "\n".join(lines), tuple(used))


def rule_labels(expression: str, tables: Mapping[str, TableText]) -> list[str]:
    """Return the labels of the cells that an expression uses, in at most `MAX_LABEL_LINES` lines.

    For an operand with more than `MAX_CELLS_PER_OPERAND` cells, return the labels of its rows and columns instead.
    """
    start = re.match(r"\s*with\s*\{([^{}]*)\}\s*:", expression)
    default = _parse_operand(start[1]) if start else {}
    lines: dict[str, None] = {}
    for operand in re.findall(r"\{([^{}]*)\}", expression[start.end() :] if start else expression):
        place = default | _parse_operand(operand)
        table = tables.get(place.get("t", ("",))[0])
        if table is None:
            continue
        rows, columns = (_headers_of(table, place.get(axis, ())) for axis in "rc")
        codes: Iterable[tuple[str, ...]] = ((code,) for code in rows + columns)
        if rows and columns and len(rows) * len(columns) <= MAX_CELLS_PER_OPERAND:
            codes = (cell for cell in product(rows, columns) if cell in table.cells)
        for place_codes in codes:
            labels = ", ".join(table.labels[code] for code in place_codes)
            lines[f"{table_name(table.code)} {' '.join(place_codes)} {labels}"] = None
    more = [f"and {len(lines) - MAX_LABEL_LINES} more"] if len(lines) > MAX_LABEL_LINES else []
    return list(lines)[:MAX_LABEL_LINES] + more


def _parse_operand(operand: str) -> dict[str, tuple[str, ...]]:
    """Parse an operand into its table, rows, columns and sheets.

    `tC_01.00, (r0010, r0020), c0010, default: 0` -> {"t": ("C_01.00",), "r": ("r0010", "r0020"), "c": ("c0010",)}
    """
    place: dict[str, tuple[str, ...]] = {}
    for part in re.findall(r"\([^()]*\)|[^,()]+", operand):
        members = [member.strip() for member in part.strip("() ").split(",")]
        if re.fullmatch(r"t[A-Z]+_\d[\w.]*", members[0]):
            place["t"] = (members[0][1:],)
        elif re.fullmatch(r"[rcs](\*|\d+)(-\d+)?", members[0]):
            place[members[0][0]] = tuple(members)
    return place


def _headers_of(table: TableText, codes: Iterable[str]) -> list[str]:
    """Expand codes to the headers of a table. `r0290-0310` is a range of rows; `r*` matches no header."""
    headers = []
    for code in codes:
        first, dash, last = code.partition("-")
        if dash:
            part = [header.code for header in table.headers[first[0]] if not header.heading]
            headers += [header for header in part if first <= header <= first[0] + last]
        elif code in table.labels:
            headers.append(code)
    return headers


def group_tables(tables: Mapping[str, TableText]) -> dict[str, str]:
    """Group tables that must be in the same split. Return the first code of its group for each table code.

    A group joins the parts of a template and, transitively, overlapping tables.
    """
    labels = {
        code: {header.label.casefold() for axis in "rc" for header in table.headers[axis]}
        for code, table in tables.items()
    }
    group = {code: code for code in tables}
    for left, right in combinations(tables, 2):
        common = len(labels[left] & labels[right])
        overlap = common >= 3 and common >= MIN_OVERLAP * len(labels[left] | labels[right])
        if group[left] != group[right] and (overlap or template_of(left) == template_of(right)):
            first, second = sorted((group[left], group[right]))
            group |= {code: first for code, name in group.items() if name == second}
    return group


def split_tables(
    groups: Mapping[str, str], sizes: Mapping[str, int], held_out: float, seed: int, keep: Collection[str] = ()
) -> dict[str, str]:
    """Assign each table code to a split. Validation and test each get about the fraction `held_out` of the total size.

    Groups with a table in `keep` go to training. So do groups larger than half of a held-out split, because such a group would
    dominate the split.
    """
    total = sum(sizes.values())
    members: dict[str, list[str]] = {}
    for code, group in groups.items():
        members.setdefault(group, []).append(code)
    weight = {group: sum(sizes[code] for code in codes) for group, codes in members.items()}
    free = [group for group, codes in sorted(members.items()) if not set(codes) & set(keep)]
    order = [group for group in free if weight[group] <= held_out * total / 2]
    random.Random(f"tables {seed}").shuffle(order)
    split = dict.fromkeys(members, "train")
    for name in ("validation", "test"):
        filled = 0
        while order and filled < held_out * total:
            group = order.pop()
            split[group] = name
            filled += weight[group]
    return {code: split[group] for code, group in groups.items()}


def assign_documents(
    documents: Sequence[Document], tables: Mapping[str, str], held_out: float, seed: int, left_out: Counter[str]
) -> dict[str, list[Document]]:
    """Assign the documents to splits. `tables` maps table codes to splits. Count omitted documents in `left_out`, by reason.

    Definitions belong to no table and are assigned at random. Duplicates are left out: rules are compared without their own
    code, other documents without any codes or numbers. Held-out documents are also left out if more than the fraction
    `MAX_SEEN` of their lines is in training.
    """
    parts: dict[str, list[Document]] = {name: [] for name in SPLITS}
    bodies: set[tuple[str, str]] = set()
    left_out.update({"duplicates": 0, "mostly seen in training": 0})
    for document in documents:
        body = document.text.partition("\n")[2] or document.text
        key = (document.kind, body if document.kind == "rule" else mask_codes(body))
        if key in bodies:
            left_out["duplicates"] += 1
            continue
        bodies.add(key)
        strictest = max((SPLITS.index(tables[code]) for code in document.tables), default=None)
        if strictest is None:
            chance = random.Random(f"definitions {seed} {document.text}").random()
            strictest = 2 if chance < held_out else 1 if chance < 2 * held_out else 0
        parts[SPLITS[strictest]].append(document)
    known = {line for document in parts["train"] for line in distinctive_lines(document.text)}
    for name in ("validation", "test"):
        lines = [distinctive_lines(document.text) for document in parts[name]]
        seen = [sum(line in known for line in own) > MAX_SEEN * len(own) for own in lines]
        left_out["mostly seen in training"] += sum(seen)
        parts[name] = [document for document, is_seen in zip(parts[name], seen, strict=True) if not is_seen]
    return parts


def mask_codes(text: str) -> str:
    """Return the text in lower case without table codes, cell codes and numbers."""
    text = re.sub(r"\b[A-Z]{1,2}[ _]\d+(\.\d+)*(\.[a-z]+)?\b|\b[rcs]\d{2,4}\b|\bv\d+_\w\b|\d+", " ", text)
    return "\n".join(" ".join(line.split()) for line in text.casefold().splitlines())


def distinctive_lines(text: str) -> list[str]:
    """Return the lines of `mask_codes(text)` that have at least `MIN_WORDS` words."""
    return [line for line in mask_codes(text).splitlines() if len(re.findall(r"[a-z]{2,}", line)) >= MIN_WORDS]
