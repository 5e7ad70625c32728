"""Facts as filed in xBRL-XML, iXBRL or xBRL-JSON -> a `Report`: EBA cells, types, reference date, warnings."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from data.regulator.dpm import Cell, Cells, local
from data.regulator.report import NUMERIC_TYPES, Fact, Report, describe, disagreements, parse_number

EBA_METRICS = "http://www.eba.europa.eu/xbrl/crr/dict/met"  # some releases add theirs: .../met/3.5
FILING_INDICATORS = (
    "http://www.eurofiling.info/xbrl/ext/filing-indicators",
    "http://www.xbrl.org/taxonomy/int/filing-indicators",
)


@dataclass(frozen=True)
class Concept:
    """What a taxonomy says of a concept: its type (`xbrli:monetaryItemType`), English label, and whether it is a number."""

    type: str
    label: str
    numeric: bool
    boolean: bool


@dataclass(frozen=True)
class Filed:
    """A fact as its file has it: `fact.value` is text or None, `numeric` whether the file itself marks it as a number."""

    fact: Fact
    namespace: str
    numeric: bool
    typed: tuple[str, ...] = ()  # its typed dimensions, with prefix
    problems: tuple[str, ...] = ()  # each completes the sentence "this fact ..."
    default_unit: str | None = None  # what a number without a unit is in


@dataclass(frozen=True)
class Filing:
    """Everything that was read from one file."""

    path: Path
    format: str
    filed: tuple[Filed, ...]
    indicators: dict[str, bool]
    taxonomy: tuple[str, ...] = ()  # the entry points that the file names
    warnings: tuple[str, ...] = ()


def assemble(filing: Filing, cells: Cells, concepts: Mapping[tuple[str, str], Concept] | None = None) -> Report:
    """Give the facts their cells and types, and say what is odd about them. `concepts` is keyed by (namespace, name)."""
    facts: list[Fact] = []
    warnings = list(filing.warnings)
    for filed in filing.filed:
        concept = (concepts or {}).get((filed.namespace, local(filed.fact.concept)))
        found, opened = _cells_of(filed, cells, filing.indicators)
        fact, problems = _complete(filed, found, opened, concept)
        warnings += [f"{describe(fact)} {problem}" for problem in (*filed.problems, *problems)]
        facts.append(fact)
    entity = _most_frequent(fact.entity for fact in facts)
    others = sorted({fact.entity for fact in facts} - {entity, ""})
    if others:
        warnings.append(f"facts of other entities than {entity}: {', '.join(others[:5])}")
    currencies = {
        fact.unit for fact in facts if fact.unit and fact.unit.startswith("iso4217:") and "/" not in fact.unit
    }
    return Report(
        path=filing.path,
        format=filing.format,
        entity=entity,
        period=_most_frequent(fact.period.rpartition("/")[2] for fact in facts if fact.period != "forever"),
        currency=local(currencies.pop()) if len(currencies) == 1 else None,
        filing_indicators=filing.indicators,
        facts=tuple(facts),
        warnings=tuple(warnings + disagreements(tuple(facts))),
    )


def _cells_of(filed: Filed, cells: Cells, indicators: dict[str, bool]) -> tuple[tuple[Cell, ...], tuple[str, ...]]:
    """(the EBA cells that show a fact, those of filed templates first; the dimensions that they leave open)."""
    if not filed.namespace.startswith(EBA_METRICS):
        return (), ()
    fact = filed.fact
    typed = {local(name) for name in filed.typed}
    explicit = {local(name): local(member) for name, member in fact.dimensions.items() if name not in filed.typed}
    found, opened = cells.by_signature(local(fact.concept), explicit, typed)
    return tuple(sorted(found, key=lambda cell: not indicators.get(cells.table(cell.table).template, False))), opened


def _complete(
    filed: Filed, found: tuple[Cell, ...], opened: tuple[str, ...], concept: Concept | None
) -> tuple[Fact, list[str]]:
    """The fact with its cells, and with a value of its type; and what is wrong with that value."""
    fact, problems = filed.fact, []
    if found:
        places = [(cell.table, cell.row, cell.column) for cell in found]
        fixed = tuple(name for name in fact.dimensions if local(name) not in opened)
        fact = replace(fact, cell=places[0], other_cells=tuple(places[1:]), fixed=fixed)
    if concept:
        fact = replace(fact, type=concept.type, label=concept.label)
    if fact.value is None:
        return fact, problems
    boolean = concept.boolean if concept else bool(found) and found[0].type in ("boolean", "true")
    numeric = concept.numeric if concept else found[0].type in NUMERIC_TYPES if found else filed.numeric
    if boolean and fact.value.strip() in ("true", "false", "1", "0"):
        return replace(fact, value=fact.value.strip() in ("true", "1")), problems
    if numeric or filed.numeric:
        number = parse_number(fact.value)
        if number is None:
            problems.append(f"has the non-numeric value {fact.value[:40]!r}")
        else:
            fact = replace(fact, value=number, unit=fact.unit or filed.default_unit)
    return fact, problems


def decimals_of(value: Decimal, precision: int) -> int:
    """The `decimals` that a `precision` means for `value` (XBRL 2.1, 4.6.6): both count correct digits."""
    return precision - value.adjusted() - 1


def _most_frequent(values: Iterable[str]) -> str:
    """The value that occurs most often, the last in order among equals; empty values do not count."""
    counts = Counter(value for value in values if value)
    return max(counts, key=lambda value: (counts[value], value)) if counts else ""
