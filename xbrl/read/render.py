"""Format reports and figures as text for the model. All numbers in reports, answers and letters are formatted here."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from common.errors import UserError
from xbrl.read.dpm import Cell, Cells
from xbrl.read.filed_report import CellKey, Fact, Report, template_of
from xbrl.read.report_notes import one_line

STYLES = ("cells", "labels")
MAX_DIGITS = 27  # a longer number is not rounded: one digit less than the precision of decimal arithmetic
MAX_LABEL_CHARACTERS = 64

PURE = (None, "", "pure", "xbrli:pure")  # units of a dimensionless figure
# Notation of the EBA's templates, cells and codes, and of articles of CRR and CRD. Each match is worth a token of its own.
NOTATION = (
    r"\{[rcs]\d{4}\}",  # {c0010} in a formula of the DPM (DPM-XL)
    r"t?[A-Z][ _]\d\d\.\d\d(?:\.[a-z])?",  # C 03.00, F 01.01, C_76.00.a; tC_01.00 in a formula
    r"[rcs]\d{3,4}(?:-\d{4})?",  # r0010, c0010, c010; r0040-0060 in a formula
    r"(?:CRR|CRD) Art\. \d+[a-z]*(?:\(\d+\))?(?:\([a-z]\))?",  # CRR Art. 92(1)(a)
    r"Art(?:icle|\.) \d+[a-z]*(?:\(\d+\))?(?:\([a-z]\))?",
    r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+",  # TC_MIN, OCR_CET1: rules
    r"eba_[A-Za-z]+:[\w.]*\w",  # eba_BT:x15, eba_GA:IMF.CL_AREA.7H: members
    r", default: \w+(?:, interval: \w+)?\}:?",  # the end of {tC_01.00, r0010, default: 0, interval: true}:
)
# Short labels for the style "labels" and for letters.
SHORT_LABELS: dict[CellKey, str] = {
    ("C_01.00", "r0010", "c0010"): "Own funds",
    ("C_01.00", "r0015", "c0010"): "Tier 1",
    ("C_01.00", "r0020", "c0010"): "CET1",
    ("C_01.00", "r0530", "c0010"): "AT1",
    ("C_01.00", "r0750", "c0010"): "Tier 2",
    ("C_02.00.a", "r0010", "c0010"): "TREA",
    ("C_03.00", "r0010", "c0010"): "CET1 ratio",
    ("C_03.00", "r0030", "c0010"): "Tier 1 ratio",
    ("C_03.00", "r0050", "c0010"): "Total capital ratio",
    ("C_03.00", "r0130", "c0010"): "TSCR",
    ("C_03.00", "r0140", "c0010"): "TSCR CET1",
    ("C_03.00", "r0150", "c0010"): "TSCR Tier 1",
    ("C_03.00", "r0160", "c0010"): "OCR",
    ("C_03.00", "r0170", "c0010"): "OCR CET1",
    ("C_03.00", "r0180", "c0010"): "OCR Tier 1",
    ("C_28.00", "*", "c350"): "Client",
    ("C_47.00", "r0300", "c0010"): "Leverage exposure",
    ("C_47.00", "r0340", "c0010"): "Leverage ratio",
    ("C_47.00", "r0440", "c0010"): "OLRR",
    ("C_76.00.a", "r0010", "c0010"): "Liquidity buffer",
    ("C_76.00.a", "r0020", "c0010"): "Net outflow",
    ("C_76.00.a", "r0030", "c0010"): "LCR",
    ("C_84.00.a", "r0220", "c0040"): "NSFR",
}


@dataclass(frozen=True)
class Addressee:
    """An entry in a register of banks: the details of a bank that its reports do not contain."""

    entity: str
    name: str
    country: str
    type: str


def render_report(report: Report, cells: Cells, style: str = "cells", bank: Addressee | None = None) -> str:
    """Format a report as lines of text, with labels from `cells`.

    `style="cells"` gives a header, then for each table its code and label and one line per cell, for example
    `r0010 c0010 CET1 Capital ratio | 4.31%`. In a table with open rows, each row starts with a line that contains
    its key.
    `style="labels"` gives a compact form with lines such as `CET1 ratio 4.31%`.
    Facts without a cell are included with their concept and dimensions. The notes of the bank come last. No text of the
    report can begin a line of its own.
    """
    name = bank.name if bank else report.entity
    if style == "labels":
        facts = sorted(report.facts, key=lambda fact: _sort_key(fact.cell, fact))
        lines = [f"{_label_of(fact, cells)} {format_fact(fact, True, kind_of(fact, cells))}" for fact in facts]
        notes = [f"Note: {note.text}" for note in report.notes]
        return "\n".join(map(one_line, [name, *lines, *notes]))
    header = [name if not bank else f"{name} ({report.entity})", f"reference date {report.period}"]
    if report.currency:
        header.append(f"amounts in {report.currency.removeprefix('iso4217:')}")
    lines = [" | ".join(header)]
    unfiled = sorted(template for template, filed in report.filing_indicators.items() if not filed)
    if unfiled:
        lines.append(f"not filed: {', '.join(map(table_name, unfiled))}")
    columns = {}
    for fact in report.facts:
        if fact.cell:
            columns.setdefault(fact.cell[0], set()).add(fact.cell[2])
    table, key, written = None, "", set()
    for where, fact in _facts_by_cell(report):
        if where is None:
            lines.append(f"{_label_of(fact, cells)} | {format_fact(fact)}")
            continue
        cell = cells.by_cell(*where)
        if where[0] != table:
            table, key = where[0], ""
            lines.append(f"{table_name(table)} {cell.table_label}".rstrip() if cell else table_name(table))
        keys = " ".join(member for _, member in sorted(fact.keys.items()))
        if keys != key:  # each row of an open table starts with its key
            key = keys
            lines.append(key or "(no key)")
        label = cell.row_label if cell else ""
        if cell and (where[1] == "*" or len(columns.get(table, ())) > 1):
            label = f"{label}, {cell.column_label}" if label else cell.column_label
        place = where[2] if where[1] == "*" else f"{where[1]} {where[2]}"
        line = f"{place} {_truncate(label)} | {format_fact(fact, kind=cell.type if cell else '')}"
        if (where, keys, line) not in written:
            written.add((where, keys, line))
            lines.append(line)
    for note in report.notes:
        place = ", ".join(map(cell_name, note.cells))
        lines.append(f"note on {place or 'the report'} | {note.text}")
    return "\n".join(map(one_line, lines))


def render_earlier(earlier: Sequence[Report], cells: Iterable[CellKey]) -> str:
    """Format the ratios in `cells` of earlier reports, one line per report: `2026-03-31: CET1 ratio 4.31%, LCR 131%`."""
    selected, lines = list(cells), []
    for report in earlier:
        facts = {fact.cell: fact for fact in report.facts if fact.cell and isinstance(fact.value, Decimal)}
        figures = [
            f"{short_label(cell)} {format_fact(facts[cell], kind='percentage')}" for cell in selected if cell in facts
        ]
        lines.append(f"{report.period}: {', '.join(figures) or 'none of these figures was reported'}")
    return "\n".join(["Earlier reports", *lines]) if lines else ""


def short_label(cell: CellKey) -> str:
    """Return the short label of a cell, or the cell's name if it has no short label."""
    return SHORT_LABELS.get(cell) or cell_name(cell)


def cell_name(cell: CellKey, row: str = "") -> str:
    """Return the name of a cell, `C 03.00 r0010 c0010`. `row` replaces the row code, e.g. by the key of an open row."""
    return f"{table_name(cell[0])} {row or cell[1]} {cell[2]}"


def table_name(table: str) -> str:
    """Return the name of a table: `C 03.00` for `C_03.00`."""
    return table.replace("_", " ")


def format_fact(fact: Fact, compact: bool = False, kind: str = "") -> str:
    """Format the value of a fact, an empty value as `nil`. `kind` is the type of its cell in the DPM, "" if unknown."""
    if fact.value is None:
        return "nil"
    if not isinstance(fact.value, Decimal):
        return str(fact.value)
    is_unknown = fact.cell is None and not fact.type  # it may be no ratio
    if fact.unit in PURE and (is_unknown or _is_count(fact, fact.value, kind or fact.type)):
        return _format_decimal(fact.value)
    return format_figure(fact.value, fact.unit, fact.decimals, compact)


def _is_count(fact: Fact, value: Decimal, kind: str) -> bool:
    """Return whether a dimensionless figure is a count (staff, years), not a ratio.

    Its type decides. Without a type, a whole number with `decimals` 0 or INF is a count.
    """
    if kind:
        return kind != "percentage"
    return fact.decimals in (0, "INF") and value == value.to_integral_value()


def format_figure(value: Decimal, unit: str | None, decimals: int | str | None = None, compact: bool = False) -> str:
    """Format a ratio as a percentage and an amount in the unit of its accuracy: `4.31%`, `1340 thousand`.

    `decimals` determines the number of decimal places. `compact` drops trailing zeros and uses the largest unit that is
    exact: `104.2%`, `12.4 bn`.
    """
    if unit in PURE:
        percent = value * 100
        if compact or not isinstance(decimals, int):
            return f"{_format_decimal(percent)}%"
        places = max(decimals - 2, 0)
        if percent.adjusted() + places >= MAX_DIGITS:  # too large to be rounded
            return f"{_format_decimal(percent)}%"
        rounded = percent.quantize(Decimal(1).scaleb(-places))
        return f"{rounded:f}%" if rounded == percent else f"{_format_decimal(percent)}%"
    if compact:
        for name, size in (("bn", 9), ("mn", 6), ("k", 3)):
            if abs(value) >= Decimal(1).scaleb(size - 1) and value == round(value, 1 - size):
                return f"{_format_decimal(value.scaleb(-size))} {name}"
        return _format_decimal(value)
    accuracy = decimals if isinstance(decimals, int) else 0
    exponent, name = (6, " million") if accuracy < -5 else (3, " thousand") if accuracy < -2 else (0, "")
    return f"{_format_decimal(value.scaleb(-exponent))}{name}"


def format_limit(
    value: Decimal, unit: str | None, decimals: int | str | None = None, missed_by: Decimal | None = None
) -> str:
    """Format a limit or an expected figure without trailing zeros: `4.5%`, `100%`. Round it to `decimals` if that is an int.

    `missed_by` is the figure that misses the limit. The limit gets more decimals if rounding would hide on which side of the
    limit the figure is.
    """
    if value == 0:
        return "0"
    if isinstance(decimals, int):
        value, _ = round_beside(value, missed_by, decimals)
    if unit in PURE:
        return format_figure(value, unit, compact=True)
    return format_figure(value, unit, decimals)


def round_beside(value: Decimal, reference: Decimal | None, decimals: int = 4) -> tuple[Decimal, int]:
    """Round a number to `decimals` places, or to more until it stays on its side of `reference`. Return (number, places).

    The default is the accuracy of ratios (EBA filing rules 2.18). A number with more than `MAX_DIGITS` digits is not rounded.
    """
    for places in range(decimals, MAX_DIGITS - value.adjusted()):
        rounded = round(value, places)
        if reference is None or (rounded < reference, rounded > reference) == (value < reference, value > reference):
            return rounded, places
    return value, decimals


def _format_decimal(value: Decimal) -> str:
    """Format a number without an exponent and without trailing zeros after the decimal point."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _label_of(fact: Fact, cells: Cells) -> str:
    members = fact.keys if fact.cell else fact.dimensions  # a cell fixes all dimensions but its keys
    if fact.cell is None:
        return fact.concept + "".join(f" {key}={value}" for key, value in sorted(members.items()))
    where = "".join(f" {value}" for _, value in sorted(members.items()))
    cell = cells.by_cell(*fact.cell)
    return (SHORT_LABELS.get(fact.cell) or (cell.row_label.strip() if cell else cell_name(fact.cell))) + where


def kind_of(fact: Fact, cells: Cells) -> str:
    """Return the type of the fact's cell in the DPM; "" if the fact has no cell."""
    cell = cells.by_cell(*fact.cell) if fact.cell else None
    return cell.type if cell else ""


def _truncate(label: str) -> str:
    """Truncate a long label at a word boundary. Some EBA labels are several lines long."""
    return label if len(label) <= MAX_LABEL_CHARACTERS else label[:MAX_LABEL_CHARACTERS].rpartition(" ")[0] + " ..."


def _facts_by_cell(report: Report) -> list[tuple[CellKey | None, Fact]]:
    """Return sorted (cell, fact) pairs; facts without a cell come last.

    A fact appears once in each filed template that shows it, although several tables of a template may repeat it.
    """
    placed: list[tuple[CellKey | None, Fact]] = []
    for fact in report.facts:
        placed.append((fact.cell, fact))
        shown = {template_of(fact.cell[0])} if fact.cell else set()
        for cell in fact.other_cells:
            template = template_of(cell[0])
            if template not in shown and report.filing_indicators.get(template, False):
                shown.add(template)
                placed.append((cell, fact))
    return sorted(placed, key=lambda pair: _sort_key(*pair))


def _sort_key(cell: CellKey | None, fact: Fact) -> tuple:
    """Sort by table, key of an open row, row and column. Facts without a cell come last."""
    table, row, column = cell or ("", "", "")
    keys = sorted(fact.keys.items()) if cell else []
    return cell is None, table, keys, row, column, fact.concept, sorted(fact.dimensions.items())


def form_texts(cells: Cells, modules: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield one text per table of `modules`, e.g. `COREP_LCR_DA`, or of all modules: a report with every cell filled in.

    The texts show all labels and codes, among which new tokens are searched; their figures are meaningless. Raise UserError
    for an unknown module.
    """
    module_of = {code: table.module for code in sorted(cells.codes) if (table := cells.table(code))}
    known = sorted(set(module_of.values()) - {""})
    if unknown := sorted(set(modules) - set(known)):
        raise UserError(f"the DPM has no module {', '.join(unknown)}; choose from {', '.join(known)}")
    for code, module in module_of.items():
        if (not modules or module in modules) and (facts := tuple(map(_filled_in, cells.in_table(code)))):
            report = Report(Path(code), "DPM", "", "", None, {}, facts, ())
            yield render_report(report, cells).partition("\n")[2].replace(" | nil", "")


def _filled_in(cell: Cell) -> Fact:
    """Make a fact for a cell. Figures differ between cells, because a constant number would look like part of the label."""
    number = int(cell.datapoint.removeprefix("dp")) % 100_000
    value, unit, decimals = {
        "monetary": (Decimal(number * 1000), "iso4217:EUR", -3),
        "percentage": (Decimal(number).scaleb(-4), "xbrli:pure", 4),
    }.get(cell.type, (None, None, None))
    return Fact(cell.datapoint, value, unit, decimals, "", "", {}, (cell.table, cell.row, cell.column), type=cell.type)
