"""Build a `Report` from the facts of an xBRL-XML, iXBRL or xBRL-JSON file: add EBA cells, types and warnings."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.errors import UserError
from xbrl.read.dpm import Cell, Cells, local_name
from xbrl.read.filed_report import (
    NUMERIC_TYPES,
    CellKey,
    Fact,
    Note,
    Report,
    describe,
    duplicate_warnings,
    is_day,
    parse_number,
)
from xbrl.read.report_notes import make_notes

EBA_METRICS = "http://www.eba.europa.eu/xbrl/crr/dict/met"  # some releases append a version: .../met/3.5
FILING_INDICATORS = (
    "http://www.eurofiling.info/xbrl/ext/filing-indicators",
    "http://www.xbrl.org/taxonomy/int/filing-indicators",
)


@dataclass(frozen=True)
class Concept:
    """A concept of a taxonomy."""

    type: str  # e.g. "xbrli:monetaryItemType"
    label: str  # in English
    numeric: bool
    boolean: bool


@dataclass(frozen=True)
class FiledFact:
    """A fact as it was filed, with the defects that its reader noticed."""

    fact: Fact  # its value is text or None
    namespace: str
    numeric: bool  # True if the file itself marks it as a number
    typed: tuple[str, ...] = ()  # names of the typed dimensions, with prefix
    problems: tuple[str, ...] = ()  # parts of warnings that follow the name of the fact, e.g. "names no context"
    default_unit: str | None = None  # unit for a number that was filed without a unit
    notes: tuple[str, ...] = ()  # ids of the attached notes
    id: str = ""  # id in an XML file, to which footnotes refer


@dataclass(frozen=True)
class ParsedFile:
    """The content of one file, as its reader returns it."""

    path: Path
    format: str
    facts: tuple[FiledFact, ...]
    indicators: dict[str, bool]
    taxonomy: tuple[str, ...] = ()  # entry points (schema URLs) referenced by the file
    warnings: tuple[str, ...] = ()
    notes: dict[str, tuple[str, str]] = field(default_factory=dict)  # id -> (text, language)
    breaches: tuple[tuple[str, str], ...] = ()  # of filing rules, see Report


def assemble(parsed: ParsedFile, cells: Cells, concepts: Mapping[tuple[str, str], Concept] | None = None) -> Report:
    """Build the report: assign cells, types and values to the facts, and collect warnings.

    `concepts` is keyed by (namespace, local name). Raise `UserError` if periods are filed but all are invalid, because the
    report then has no reference date.
    """
    facts: list[Fact] = []
    warnings = list(parsed.warnings)
    without_cell: list[str] = []
    attached: dict[str, list[CellKey]] = {name: [] for name in parsed.notes}
    for filed in parsed.facts:
        concept = (concepts or {}).get((filed.namespace, local_name(filed.fact.concept)))
        shown_in, opened = _find_cells(filed, cells, parsed.indicators)
        if not shown_in and filed.namespace.startswith(EBA_METRICS) and not filed.problems:
            without_cell.append(filed.fact.concept)
        fact, problems = _resolve(filed, shown_in, opened, concept)
        warnings += [f"{describe(fact)} {problem}" for problem in (*filed.problems, *problems)]
        facts.append(fact)
        for name in filed.notes:
            if name not in attached:
                warnings.append(f"{describe(fact)} refers to the note {name!r}, which the report does not contain")
            elif fact.cell:
                table, row, column = fact.cell
                key = " ".join(member for _, member in sorted(fact.keys.items()))
                attached[name].append((table, key or row if row == "*" else row, column))
    footnotes = (Note(text, tuple(attached[name]), language) for name, (text, language) in parsed.notes.items())
    notes, problems = make_notes(footnotes)
    warnings += problems
    entity = _most_frequent(fact.entity for fact in facts)
    foreign = sorted({fact.entity for fact in facts} - {entity, ""})
    if foreign:
        warnings.append(f"facts of entities other than {entity}: {', '.join(foreign[:5])}")
    period = _most_frequent(day for fact in facts if is_day(day := fact.period.rpartition("/")[2][:10]))
    if facts and not period:
        reason = next((warning for warning in warnings if "period" in warning), "")
        if reason:
            raise UserError(
                f"{parsed.path}: no fact has a valid period ({reason}); ask the bank to file the report again"
            )
        warnings.append("no fact has a period that ends, so the report has no reference date")
    currencies = {
        fact.unit for fact in facts if fact.unit and fact.unit.startswith("iso4217:") and "/" not in fact.unit
    }
    if parsed.notes and parsed.format != "xBRL-XML" and any(fact.cell for fact in facts):
        sentence = f"the file has footnotes, in place of a reply beside the report ({len(parsed.notes)} in all)"
        parsed = replace(parsed, breaches=(("2.25", sentence),))
    unknown = cells.explain_unknown(parsed.path, len(facts), without_cell, parsed.format)
    return Report(
        path=parsed.path,
        format=parsed.format,
        entity=entity,
        period=period,
        currency=local_name(currencies.pop()) if len(currencies) == 1 else None,
        filing_indicators=parsed.indicators,
        facts=tuple(facts),
        warnings=(*warnings, *duplicate_warnings(tuple(facts))),
        notes=notes,
        incomplete=unknown,
        breaches=parsed.breaches,
    )


def _find_cells(
    filed: FiledFact, cells: Cells, indicators: dict[str, bool]
) -> tuple[tuple[Cell, ...], tuple[str, ...]]:
    """Return (EBA cells that show the fact, cells of filed templates first; dimensions that the cells leave open)."""
    if not filed.namespace.startswith(EBA_METRICS):
        return (), ()
    fact = filed.fact
    typed = {local_name(name) for name in filed.typed}
    explicit = {
        local_name(name): local_name(member) for name, member in fact.dimensions.items() if name not in filed.typed
    }
    shown_in, opened = cells.by_signature(local_name(fact.concept), explicit, typed)

    def is_filed(cell: Cell) -> bool:
        table = cells.table(cell.table)
        return table is not None and indicators.get(table.template, False)

    return tuple(sorted(shown_in, key=is_filed, reverse=True)), opened


def _resolve(
    filed: FiledFact, shown_in: tuple[Cell, ...], opened: tuple[str, ...], concept: Concept | None
) -> tuple[Fact, list[str]]:
    """Return (the fact with its cells and its value converted to the right type, problems with the value)."""
    fact, problems = filed.fact, []
    if shown_in:
        places = [(cell.table, cell.row, cell.column) for cell in shown_in]
        fixed = tuple(name for name in fact.dimensions if local_name(name) not in opened)
        fact = replace(fact, cell=places[0], other_cells=tuple(places[1:]), fixed=fixed)
    if concept:
        fact = replace(fact, type=concept.type, label=concept.label)
    if not isinstance(fact.value, str):  # nil
        return fact, problems
    boolean = concept.boolean if concept else bool(shown_in) and shown_in[0].type in ("boolean", "true")
    numeric = concept.numeric if concept else shown_in[0].type in NUMERIC_TYPES if shown_in else filed.numeric
    if boolean and fact.value.strip() in ("true", "false", "1", "0"):
        return replace(fact, value=fact.value.strip() in ("true", "1")), problems
    if numeric or filed.numeric:
        number = parse_number(fact.value)
        if number is None:
            problems.append(f"has the non-numeric value {fact.value[:40]!r}")
        else:
            fact = replace(fact, value=number, unit=fact.unit or filed.default_unit)
    return fact, problems


def _most_frequent(values: Iterable[str]) -> str:
    """Return the most frequent non-empty value, in a tie the last in sort order; "" if all are empty."""
    counts = Counter(value for value in values if value)
    return max(counts, key=lambda value: (counts[value], value)) if counts else ""
