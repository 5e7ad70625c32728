"""Prudential rules as data (`rules.jsonl`, in the language of `formula.py`), decided on the figures that a bank itself reported.

- A **breach** of law is decided on the reported figures as they stand.
- A **filing** error is a contradiction that rounding cannot explain: figures stand for the interval that their
  `decimals` allow. A rule on computed amounts asks for the same with `"interval": true`.
- A **trigger** is a duty that a figure sets off, never a violation.

A rule is applied only when all tables that it needs are filed. `absent_cell` says how a missing figure counts: `unknown`
leaves the rule undecided, `zero` reads it as 0. A rule over the rows of an open table (`*`) is decided for each row.
"""

import functools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal

from common.errors import UserError
from data.regulator.formula import Formula, Number, arithmetic, exactly, parse_formula, rounded, truth
from data.regulator.report import CellKey, Fact, Report

RULES_FILE = pathlib.Path(__file__).with_name("rules.jsonl")
KINDS = ("breach", "filing", "trigger")
# CRR Art. 465(1): the output floor as phased in; Art. 92(3) has the rest. Before 2025 there is none.
OUTPUT_FLOOR = {2025: "0.5", 2026: "0.55", 2027: "0.6", 2028: "0.65", 2029: "0.7"}
PARAMETERS = frozenset({"output_floor", "output_floor_cap"})


@dataclass(frozen=True)
class Rule:
    """One rule. `cells[0]` is the cell that a finding points at."""

    id: str
    kind: str  # "breach" of law, "filing" error, "trigger" of a duty
    title: str
    legal: str
    cells: tuple[CellKey, ...]
    violated_if: str
    absent_cell: str  # "unknown" or "zero"
    interval: bool  # whether rounding is allowed for
    formula: Formula


@dataclass(frozen=True)
class RuleResult:
    """What one rule says about one report, or about one row of an open table. `value` and `limit` are the two sides of its comparison; None if undecided."""

    rule_id: str
    kind: str
    state: str  # "violated" ("triggered" for a trigger), "ok", "undecided"
    cell: CellKey
    value: Decimal | None
    limit: Decimal | None
    relation: str  # what the limit is to the value: "min", "max" or "expected"
    legal: str
    unit: str | None  # of the value: a currency, or None for a ratio
    decimals: int | str | None
    row: str = ""  # the key of the row in an open table
    missing: bool = False  # whether `cell` was not reported and counts as 0


@dataclass(frozen=True)
class _Figures:
    """The facts of a report by cell. A cell is None where its facts disagree. In open tables each row has a key."""

    closed: dict[CellKey, Fact | None]
    rows: dict[CellKey, dict[tuple[tuple[str, str], ...], Fact]]
    tables: set[str]


def load_rules(path: str | pathlib.Path = RULES_FILE) -> tuple[Rule, ...]:
    """The rules of a JSON Lines file, in its order. Raises `UserError` that names the line of the first bad rule."""
    rules = []
    for number, line in enumerate(pathlib.Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rules.append(_parse_rule(json.loads(line)))
            except (ValueError, KeyError, SyntaxError) as error:
                raise UserError(f"{path}, line {number}: not a rule ({error}); see data/regulator/rules.py.") from error
    return tuple(rules)


@functools.cache
def built_in_rules() -> tuple[Rule, ...]:
    """The rules that ship with the project, read once."""
    return load_rules()


def evaluate(report: Report, rules: Iterable[Rule] | None = None) -> list[RuleResult]:
    """Decide every applicable rule on one merged report, in the order of the rules. Rules whose tables are not filed give nothing.

    A rule over the rows of an open table gives one result per violated row, or one that says that no row is.
    """
    figures = _figures(report)
    results = []
    for rule in built_in_rules() if rules is None else rules:
        needed = {table for table, _, _ in set(rule.cells) - rule.formula.optional}
        if all(_is_filed(report, table, figures.tables) for table in needed):
            results += _decide(rule, figures, report.period)
    return results


def violations(results: Iterable[RuleResult]) -> list[RuleResult]:
    """The violated ones of `results`: breaches and filing errors. A trigger is a duty, never a violation."""
    return [result for result in results if result.state == "violated"]


def law_of_the_year(year: int) -> dict[str, Decimal]:
    """The parameters of the law that change over the years: the output floor and its cap (CRR Art. 92(3), 465(1) and (2))."""
    if year < min(OUTPUT_FLOOR):
        return {}
    cap = "1.25" if year <= 2029 else "1000000"  # from 2030 there is no cap
    return {"output_floor": Decimal(OUTPUT_FLOOR.get(year, "0.725")), "output_floor_cap": Decimal(cap)}


def _parse_rule(row: dict) -> Rule:
    try:
        formula = parse_formula(row["violated_if"], PARAMETERS)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{row['id']}: {error}") from error
    cells = tuple(tuple(cell) for cell in row["cells"])
    if cells != formula.cells:
        raise ValueError(f"the cells of {row['id']} must be those of violated_if, in the same order")
    if row["kind"] not in KINDS or row["absent_cell"] not in ("unknown", "zero"):
        raise ValueError(f"{row['id']}: kind or absent_cell has an unknown value")
    keys = ("id", "kind", "title", "legal", "violated_if", "absent_cell")
    interval = row.get("interval", row["kind"] == "filing")
    return Rule(**{key: row[key] for key in keys}, cells=cells, interval=interval, formula=formula)


def _figures(report: Report) -> _Figures:
    closed: dict[CellKey, Fact | None] = {}
    rows: dict[CellKey, dict] = {}
    tables = set()
    for fact in report.facts:
        for cell in (fact.cell, *fact.other_cells) if fact.cell else ():
            tables.add(cell[0])
            if cell[1] == "*":
                rows.setdefault(cell, {}).setdefault(tuple(sorted(fact.keys.items())), fact)
            elif isinstance(fact.value, Decimal):
                known = closed.get(cell, fact)
                closed[cell] = known if known is not None and known.value == fact.value else None
    return _Figures(closed, rows, tables)


def _is_filed(report: Report, table: str, tables_with_facts: set[str]) -> bool:
    if not report.filing_indicators:
        return table in tables_with_facts
    template = re.sub(r"\.[a-z]$", "", table)  # C_76.00.a is the total of template C_76.00
    return report.filing_indicators.get(template, report.filing_indicators.get(table, False))


def _decide(rule: Rule, figures: _Figures, period: str) -> list[RuleResult]:
    law = law_of_the_year(int(period[:4])) if period[:4].isdigit() else {}
    if not any(row == "*" for _, row, _ in rule.cells):
        return [_decide_row(rule, figures.closed, "", law)]
    results = [_decide_row(rule, facts, name, law) for name, facts in _rows(rule, figures)]
    broken = [result for result in results if result.state in ("violated", "triggered")]
    if broken or not results:
        return broken
    return [next((result for result in results if result.state == "ok"), results[0])]


def _rows(rule: Rule, figures: _Figures) -> Iterator[tuple[str, Mapping[CellKey, Fact | None]]]:
    """(key, facts) of each row of the open table of `rule.cells[0]`. Other open tables join by the parts of the key they share."""
    starred = [cell for cell in rule.cells if cell[1] == "*"]
    main = [cell for cell in starred if cell[0] == starred[0][0]]
    keys = dict.fromkeys(key for cell in main for key in figures.rows.get(cell, {}))
    joined: dict[CellKey, dict] = {}
    for cell in set(starred) - set(main):
        for key, fact in figures.rows.get(cell, {}).items():
            for part in key:
                joined.setdefault(cell, {}).setdefault(part, fact)
    for key in keys:
        facts = dict(figures.closed)
        for cell in starred:
            found = figures.rows.get(cell, {}).get(key)
            if cell in joined:
                found = next((joined[cell][part] for part in key if part in joined[cell]), None)
            if found is not None:
                facts[cell] = found
        yield " ".join(member for _, member in key), facts


def _decide_row(rule: Rule, facts: Mapping[CellKey, Fact | None], row: str, law: dict[str, Decimal]) -> RuleResult:
    numbers: dict[str, Number | None] = {name: exactly(value) for name, value in law.items()}
    texts = {}
    for index, cell in enumerate(rule.cells):
        name, fact = f"x{index}", facts.get(cell)
        if fact is not None and isinstance(fact.value, Decimal):
            numbers[name] = rounded(fact.value, fact.decimals if rule.interval else None)
        elif fact is not None and isinstance(fact.value, str):
            texts[name] = fact.value.rpartition(":")[2]
        elif cell in facts and fact is None:  # facts that disagree
            numbers[name] = None
        elif rule.absent_cell == "zero" or cell in rule.formula.optional:
            numbers[name] = exactly(Decimal(0))
    reported = [facts[cell] for cell in rule.cells if facts.get(cell) and isinstance(facts[cell].value, Decimal)]
    pointed = reported[0] if reported else None  # says how to print the finding
    state, value, limit = "undecided", None, None
    comparison = rule.formula.comparison
    try:
        if None not in numbers.values():
            broken = "triggered" if rule.kind == "trigger" else "violated"
            state = broken if truth(rule.formula.expression, numbers, texts) is True else "ok"
            value = arithmetic(comparison.left, numbers, texts).value
            limit = arithmetic(comparison.comparators[0], numbers, texts).value
    except (ZeroDivisionError, KeyError):  # a divisor may be zero; a figure or a parameter of the law is missing
        state, value, limit = "undecided", None, None
    unit, decimals = (pointed.unit, pointed.decimals) if pointed else (None, None)
    where = {"cell": rule.cells[0], "relation": rule.formula.relation, "legal": rule.legal, "row": row}
    where["missing"] = rule.cells[0] not in facts
    return RuleResult(rule.id, rule.kind, state, value=value, limit=limit, unit=unit, decimals=decimals, **where)
