"""Convert the EBA's validation rules to text: the DPM-XL expression, the same with labels, and the labels of its cells.

Cells are formatted as in rendered reports: `C 76.00.a r0030 c0010 LIQUIDITY COVERAGE RATIO (%), Value / Percentage`.
Source: European Banking Authority, DPM 2.0 database, release 4.2.
"""

import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping

from xbrl.corpus.dpm_corpus import CURRENT, Document, TableText, template_of
from xbrl.read.dpm_distil import clean
from xbrl.read.render import table_name

MAX_LABEL_LINES = 24  # lines with cell labels per rule
MAX_CELLS_PER_OPERAND = 12  # a larger operand lists the labels of its rows and columns instead of its cells
RULES = f"""select ov.OperationVID, o.Code, ov.Expression, coalesce(ov.Description, '')
from Operation o join OperationVersion ov on ov.OperationID = o.OperationID
where o.Type = 'validation' and {CURRENT.format("ov")} order by o.Code, ov.OperationVID"""
SEVERITIES = """select OperationVID, group_concat(distinct Severity) from OperationScope
where IsActive = 1 group by OperationVID"""


def rule_documents(
    database: sqlite3.Connection, release: int, tables: Mapping[str, TableText], dropped: dict[str, int]
) -> Iterator[Document]:
    """Yield the validation rules with the labels of their cells. Counts omitted rules in `dropped`, by reason."""
    names = {
        signature: clean(name)
        for signature, name in database.execute(
            "select ic.Signature, i.Name from ItemCategory ic join Item i on i.ItemID = ic.ItemID"
        )
    }
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
            reason = "rules on tables that are not filed in the release" if unknown else "rules that name no table"
            dropped[reason] = dropped.get(reason, 0) + 1
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
    """Lines that explain an expression.

    First the expression with labels instead of codes, if each operand is a single cell, row or column. Then the label
    of each cell it uses, at most `MAX_LABEL_LINES`.
    """
    start = re.match(r"\s*with\s*\{([^{}]*)\}\s*:", expression)
    default = _parse_operand(start[1]) if start else {}
    body = expression[start.end() :] if start else expression
    lines: dict[str, None] = {}
    labelled, complete = [], True
    last = 0
    for operand in re.finditer(r"\{([^{}]*)\}", body):
        own = _parse_operand(operand[1])
        place = default | own
        table = tables.get(place.get("t", ("",))[0])
        if table is None:
            complete = False
            continue
        rows, columns = (_headers_of(table, place.get(axis, ())) for axis in "rc")
        lines.update(dict.fromkeys(_operand_lines(table, rows, columns)))
        shown = [_label(table, codes[0]) for codes in (rows, columns) if len(codes) == 1]
        single = len(rows) <= 1 and len(columns) <= 1 and shown
        if len(shown) == 2 and "c" not in own:
            shown.pop()  # the column is the same for the whole rule
        complete = complete and bool(single)
        labelled += [body[last : operand.start()], f"[{', '.join(shown)}]"]
        last = operand.end()
    sentence = clean("".join([*labelled, body[last:]]))
    found = list(lines)
    more = [f"and {len(found) - MAX_LABEL_LINES} more"] if len(found) > MAX_LABEL_LINES else []
    return ([sentence] if complete and labelled else []) + found[:MAX_LABEL_LINES] + more


def _operand_lines(table: TableText, rows: list[str], columns: list[str]) -> Iterator[str]:
    """Labels of the cells of an operand, or of its rows and columns if there are too many cells."""
    name = table_name(table.code)
    if rows and columns and len(rows) * len(columns) <= MAX_CELLS_PER_OPERAND:
        for row in rows:
            for column in columns:
                if (row, column) in table.cells:
                    yield f"{name} {row} {column} {_label(table, row)}, {_label(table, column)}"
        return
    for code in rows + columns:
        yield f"{name} {code} {_label(table, code)}"


def _label(table: TableText, code: str) -> str:
    """The label of a row or column that `_headers_of` found in the table."""
    header = table.header(code)
    assert header is not None, f"{table.code} has no {code}"
    return header.label


def _parse_operand(operand: str) -> dict[str, tuple[str, ...]]:
    """Parse an operand into its table, rows, columns and sheets.

    `tC_01.00, (r0010, r0020), c0010, default: 0` -> {"t": ("C_01.00",), "r": ("r0010", "r0020"), "c": ("c0010",)}
    """
    found: dict[str, tuple[str, ...]] = {}
    for part in re.findall(r"\([^()]*\)|[^,()]+", operand):
        members = [member.strip() for member in part.strip("() ").split(",")]
        if re.fullmatch(r"t[A-Z]+_\d[\w.]*", members[0]):
            found["t"] = (members[0][1:],)
        elif re.fullmatch(r"[rcs](\*|\d+)(-\d+)?", members[0]):
            found[members[0][0]] = tuple(members)
    return found


def _headers_of(table: TableText, codes: Iterable[str]) -> list[str]:
    """Expand codes to headers of the table: `r0290-0310` is a range of rows; `r*` matches none."""
    found = []
    for code in codes:
        first, dash, last = code.partition("-")
        if dash:
            last = first[0] + last
            found += [
                header.code for header in table.headers[first[0]] if first <= header.code <= last and not header.heading
            ]
        elif table.header(code):
            found.append(code)
    return found
