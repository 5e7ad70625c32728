"""Evaluate prudential rules on the figures that a bank reported.

The rules are data: `rules.jsonl`, whose formulas are in the language of `formula.py`. There are three kinds of rules:

- A **breach** is a requirement of the law that the bank does not meet. The reported figures are taken as exact.
- A **filing** error is a contradiction between figures that rounding cannot explain. Each figure stands for the
  interval that its `decimals` allow. Rules of the other kinds can ask for this with `"interval": true`.
- A **trigger** is a duty that follows from a figure. It is never a violation.

A rule applies only if all tables that it needs are filed. `absent_cell` defines how a missing figure is treated: with
`unknown` the rule is undecided, with `zero` the figure is read as 0. A rule over the rows of an open table (`*`) is
evaluated for each row.

The reference date of the report decides which law applies. `applies_from` and `applies_until` (YYYY-MM-DD, both
inclusive) bound the dates of a rule. `legal` is one citation, or a list of `{"from": date, "text": citation}` in
ascending order if the citation changes with the date.
"""

import dataclasses
import datetime
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
# The output floor is phased in: CRR Art. 465(1), then Art. 92(3). Before 2025 there is none.
OUTPUT_FLOOR = {2025: "0.5", 2026: "0.55", 2027: "0.6", 2028: "0.65", 2029: "0.7"}
PARAMETERS = frozenset({"output_floor", "output_floor_cap"})


@dataclass(frozen=True)
class Rule:
    """One rule. Findings refer to the first of its `cells`."""

    id: str
    kind: str  # "breach", "filing" or "trigger"
    title: str
    legal: str  # the citation; the latest one if it changes with the reference date
    cells: tuple[CellKey, ...]
    violated_if: str
    absent_cell: str  # "unknown" or "zero"
    interval: bool  # whether figures stand for the interval that their `decimals` allow
    formula: Formula
    citations: tuple[tuple[str, str], ...] = ()  # (first reference date, citation), if the citation changes
    applies_from: str = ""  # first reference date of the rule, YYYY-MM-DD; "" if there is none
    applies_until: str = ""  # last reference date, likewise

    def at(self, date: str) -> "Rule | None":
        """The rule as it stands at a reference date (YYYY-MM-DD), with the citation of that date.

        None if the rule does not apply then. Without a date ("") it is the rule in its latest form.
        """
        if date and (date < self.applies_from or date > (self.applies_until or date)):
            return None
        legal = next((text for first, text in reversed(self.citations) if first <= date), self.legal)
        return dataclasses.replace(self, legal=legal) if date else self


@dataclass(frozen=True)
class RuleResult:
    """The result of one rule on one report, or on one row of an open table.

    `value` and `limit` are the two sides of the rule's first comparison; None if undecided.
    """

    rule_id: str
    kind: str
    state: str  # "violated" ("triggered" for a trigger), "ok", "undecided"
    cell: CellKey
    value: Decimal | None
    limit: Decimal | None
    relation: str  # the meaning of the limit for the value: "min", "max" or "expected"
    legal: str
    unit: str | None  # unit of the value: `iso4217:EUR` for an amount, `xbrli:pure` or None for a ratio
    decimals: int | str | None  # XBRL `decimals` of the value
    row: str = ""  # key of the row in an open table
    missing: bool = False  # whether `cell` was not reported and is read as 0

    @property
    def known_value(self) -> Decimal:
        """The value of a result that is not undecided."""
        assert self.value is not None
        return self.value

    @property
    def known_limit(self) -> Decimal:
        """The limit of a result that is not undecided."""
        assert self.limit is not None
        return self.limit


@dataclass(frozen=True)
class _Figures:
    """The facts of a report, by cell.

    `closed`: cells of fixed tables, None if a cell has several facts that disagree. `rows`: cells of open tables, with
    one fact per row key. `tables`: all tables that have a fact.
    """

    closed: dict[CellKey, Fact | None]
    rows: dict[CellKey, dict[tuple[tuple[str, str], ...], Fact]]
    tables: set[str]


def load_rules(path: str | pathlib.Path = RULES_FILE) -> tuple[Rule, ...]:
    """Read rules from a JSON Lines file, in file order.

    Raises `UserError` with the line number of the first invalid rule.
    """
    rules = []
    for number, line in enumerate(pathlib.Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rules.append(_parse_rule(json.loads(line)))
            except (ValueError, KeyError, SyntaxError) as error:
                raise UserError(
                    f"{path}, line {number}: invalid rule ({error}); data/regulator/rules.py describes the format."
                ) from error
    return tuple(rules)


@functools.cache
def built_in_rules() -> tuple[Rule, ...]:
    """The rules of `rules.jsonl`, cached."""
    return load_rules()


def evaluate(report: Report, rules: Iterable[Rule] | None = None) -> list[RuleResult]:
    """Evaluate all applicable rules on one merged report, in the order of the rules.

    A rule whose tables are not filed has no result. A rule over the rows of an open table has one result per violated
    row, or a single result if no row is violated.
    """
    figures = _figures(report)
    results = []
    for rule in in_force(built_in_rules() if rules is None else rules, report.period):
        needed = {table for table, _, _ in set(rule.cells) - rule.formula.optional}
        if all(_is_filed(report, table, figures.tables) for table in needed):
            results += _evaluate_rule(rule, figures, report.period)
    return results


def in_force(rules: Iterable[Rule], date: str) -> list[Rule]:
    """The rules that apply at a reference date (YYYY-MM-DD), each with the citation of that date."""
    return [current for rule in rules if (current := rule.at(date)) is not None]


def violations(results: Iterable[RuleResult]) -> list[RuleResult]:
    """The results that are violated: breaches and filing errors, but not triggers."""
    return [result for result in results if result.state == "violated"]


def legal_parameters(year: int) -> dict[str, Decimal]:
    """Parameters of the law in a given year; empty before 2025.

    These are the output floor and its cap (CRR Art. 92(3), 465(1) and (2)).
    """
    if year < min(OUTPUT_FLOOR):
        return {}
    cap = "1.25" if year <= 2029 else "1000000"  # from 2030 there is no cap
    return {"output_floor": Decimal(OUTPUT_FLOOR.get(year, "0.725")), "output_floor_cap": Decimal(cap)}


def _parse_rule(row: dict) -> Rule:
    """Make a `Rule` from its JSON object. Raises an error if a key is missing or a value is invalid."""
    try:
        formula = parse_formula(row["violated_if"], PARAMETERS)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{row['id']}: {error}") from error
    cells = tuple(tuple(cell) for cell in row["cells"])
    if cells != formula.cells:
        raise ValueError(f"the cells of {row['id']} must be the cells of violated_if, in the same order")
    if row["kind"] not in KINDS or row["absent_cell"] not in ("unknown", "zero"):
        raise ValueError(f"{row['id']}: unknown value of kind or absent_cell")
    keys = ("id", "kind", "title", "violated_if", "absent_cell")
    interval = row.get("interval", row["kind"] == "filing")
    return Rule(
        **{key: row[key] for key in keys},
        **_parse_versions(row),
        cells=cells,
        interval=interval,
        formula=formula,
    )


def _parse_versions(row: dict) -> dict:
    """The fields of a `Rule` that depend on the reference date. Raises ValueError for an invalid date or order."""
    dates = {key: row.get(key, "") for key in ("applies_from", "applies_until")}
    citations: tuple[tuple[str, str], ...] = ()
    if isinstance(row["legal"], list):
        citations = tuple((version["from"], version["text"]) for version in row["legal"])
    for date in filter(None, (*dates.values(), *(first for first, _ in citations))):
        datetime.date.fromisoformat(date)
    if sorted(citations) != list(citations) or (isinstance(row["legal"], list) and not citations):
        raise ValueError(f"{row['id']}: `legal` must list its versions in ascending order of `from`")
    return {**dates, "citations": citations, "legal": citations[-1][1] if citations else row["legal"]}


def _figures(report: Report) -> _Figures:
    """Index the facts of a report by cell."""
    closed: dict[CellKey, Fact | None] = {}
    rows: dict[CellKey, dict] = {}
    tables = set()
    for fact in report.facts:
        for cell in (fact.cell, *fact.other_cells) if fact.cell else ():
            tables.add(cell[0])
            if cell[1] == "*":
                rows.setdefault(cell, {}).setdefault(tuple(sorted(fact.keys.items())), fact)
            elif isinstance(fact.value, Decimal):
                first = closed.get(cell, fact)
                closed[cell] = first if first is not None and first.value == fact.value else None
    return _Figures(closed, rows, tables)


def _is_filed(report: Report, table: str, tables_with_facts: set[str]) -> bool:
    """Whether a table is filed, by its filing indicator; without any indicators, whether it has a fact."""
    if not report.filing_indicators:
        return table in tables_with_facts
    template = re.sub(r"\.[a-z]$", "", table)  # C_76.00.a is a table of template C_76.00
    return report.filing_indicators.get(template, report.filing_indicators.get(table, False))


def _evaluate_rule(rule: Rule, figures: _Figures, period: str) -> list[RuleResult]:
    """The results of one rule; several if it is violated in several rows of an open table."""
    parameters = legal_parameters(int(period[:4])) if period[:4].isdigit() else {}
    if not any(row == "*" for _, row, _ in rule.cells):
        return [_evaluate_row(rule, figures.closed, "", parameters)]
    results = [_evaluate_row(rule, facts, name, parameters) for name, facts in _rows(rule, figures)]
    positive = [result for result in results if result.state in ("violated", "triggered")]
    if positive or not results:
        return positive
    return [next((result for result in results if result.state == "ok"), results[0])]


def _rows(rule: Rule, figures: _Figures) -> Iterator[tuple[str, Mapping[CellKey, Fact | None]]]:
    """Yields (key, facts) for each row of the open table that the rule refers to first.

    Rows of other open tables are joined to it on any part of the key that both have in common.
    """
    open_cells = [cell for cell in rule.cells if cell[1] == "*"]
    main = [cell for cell in open_cells if cell[0] == open_cells[0][0]]
    keys = dict.fromkeys(key for cell in main for key in figures.rows.get(cell, {}))
    joined: dict[CellKey, dict] = {}
    for cell in set(open_cells) - set(main):
        for key, fact in figures.rows.get(cell, {}).items():
            for part in key:
                joined.setdefault(cell, {}).setdefault(part, fact)
    for key in keys:
        facts = dict(figures.closed)
        for cell in open_cells:
            found = figures.rows.get(cell, {}).get(key)
            if cell in joined:
                found = next((joined[cell][part] for part in key if part in joined[cell]), None)
            if found is not None:
                facts[cell] = found
        yield " ".join(member for _, member in key), facts


def _evaluate_row(
    rule: Rule, facts: Mapping[CellKey, Fact | None], row: str, parameters: dict[str, Decimal]
) -> RuleResult:
    """Evaluate the formula of a rule on the facts of one row.

    For a rule without cells in open tables, `facts` are those of the whole report and `row` is empty.
    """
    numbers: dict[str, Number] = {name: exactly(value) for name, value in parameters.items()}
    texts = {}
    contradictory = False
    for index, cell in enumerate(rule.cells):
        name, fact = f"x{index}", facts.get(cell)
        if fact is not None and isinstance(fact.value, Decimal):
            numbers[name] = rounded(fact.value, fact.decimals if rule.interval else None)
        elif fact is not None and isinstance(fact.value, str):
            texts[name] = fact.value.rpartition(":")[2]
        elif cell in facts and fact is None:  # several facts that disagree
            contradictory = True
        elif rule.absent_cell == "zero" or cell in rule.formula.optional:
            numbers[name] = exactly(Decimal(0))
    reported = [fact for cell in rule.cells if (fact := facts.get(cell)) and isinstance(fact.value, Decimal)]
    first = reported[0] if reported else None  # determines how the finding is printed
    state, value, limit = "undecided", None, None
    comparison = rule.formula.comparison
    try:
        if not contradictory:
            positive = "triggered" if rule.kind == "trigger" else "violated"
            state = positive if truth(rule.formula.expression, numbers, texts) is True else "ok"
            value = arithmetic(comparison.left, numbers, texts).value
            limit = arithmetic(comparison.comparators[0], numbers, texts).value
    except (ZeroDivisionError, KeyError):  # division by zero; a figure or a legal parameter is missing
        state, value, limit = "undecided", None, None
    return RuleResult(
        rule_id=rule.id,
        kind=rule.kind,
        state=state,
        cell=rule.cells[0],
        value=value,
        limit=limit,
        relation=rule.formula.relation,
        legal=rule.legal,
        unit=first.unit if first else None,
        decimals=first.decimals if first else None,
        row=row,
        missing=rule.cells[0] not in facts,
    )
