"""Evaluate prudential rules on the figures that a bank reported.

The rules are data (`rule_file.py`). There are three kinds:

- A **breach** is a requirement of the law that the bank does not meet. Figures that are as accurate as the EBA's filing
  rules demand count as reported. A coarser one stands for the interval that its `decimals` allow.
- A **filing** error is a contradiction between figures that rounding cannot explain. Each figure stands for the
  interval that its `decimals` allow. Rules of the other kinds can ask for this with `"interval": true`.
- A **trigger** is a duty that follows from a figure. It is never a violation.

A rule applies only if all tables that it needs are filed and the law is in force at the reference date. Breaches and
triggers recompute a missing ratio from its numerator and denominator (`figures.py`). A rule over the rows of an open
table (`*`) is evaluated for each row.

No rule is passed over in silence: `evaluate_all` has a result for every rule, with the reason why it does not apply or
is undecided.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal

from data.regulator.figures import (
    RATIO_DECIMALS,
    RECOMPUTED,
    Figure,
    Figures,
    Key,
    as_accurate,
    index_facts,
    is_accurate,
    numbers_of,
    read_figure,
    recompute,
    row_keys,
)
from data.regulator.formula import Number, arithmetic, exactly, truth
from data.regulator.reasons import why_too_coarse, why_unfiled, why_unreadable
from data.regulator.render import cell_name, table_name
from data.regulator.report import CellKey, Report, template_of
from data.regulator.rule_file import (
    LEGAL_PARAMETERS,
    RULES_FILE,
    Rule,
    built_in_rules,
    legal_parameters,
    load_rules,
)

__all__ = [
    "RULES_FILE",
    "Rule",
    "RuleResult",
    "built_in_rules",
    "evaluate",
    "evaluate_all",
    "filed_tables",
    "legal_parameters",
    "load_rules",
    "violations",
]


@dataclass(frozen=True)
class RuleResult:
    """The result of one rule on one report, or on one row of an open table.

    `value` and `limit` are the two sides of the rule's first comparison; None if undecided. If a rule does not apply
    because its facts are not covered by a filing indicator, they say what it would compare.
    """

    rule_id: str
    kind: str
    state: str  # "violated" ("triggered" for a trigger), "ok", "undecided", "not applicable"
    cell: CellKey
    value: Decimal | None
    limit: Decimal | None
    relation: str  # the meaning of the limit for the value: "min", "max" or "expected"
    legal: str
    unit: str | None  # unit of the value: `iso4217:EUR` for an amount, `xbrli:pure` or None for a ratio
    decimals: int | str | None  # XBRL `decimals` of the value
    row: str = ""  # key of the row in an open table
    missing: bool = False  # whether `cell` was not reported and is read as 0
    title: str = ""
    formula: str = ""  # the condition of a violation, in the language of `formula.py`
    inputs: tuple[Figure, ...] = ()  # the figures of the formula, in its order
    parameters: tuple[tuple[str, Decimal], ...] = ()  # the legal parameters of the formula
    reason: str = ""  # why the rule is undecided, not applicable, or met in spite of a difference

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


def evaluate(report: Report, rules: Iterable[Rule] | None = None) -> list[RuleResult]:
    """Evaluate all applicable rules on one merged report, in the order of the rules.

    A rule that does not apply has no result. A rule over the rows of an open table has one result per row that is
    violated or undecided, or a single result if there is no such row.
    """
    return [result for result in _results(report, rules, explain=False) if result.state != "not applicable"]


def evaluate_all(report: Report, rules: Iterable[Rule] | None = None) -> list[RuleResult]:
    """As `evaluate`, with a result "not applicable" and its reason for each rule that does not apply."""
    return _results(report, rules, explain=True)


def _results(report: Report, rules: Iterable[Rule] | None, explain: bool) -> list[RuleResult]:
    """The results of all rules. Unless `explain`, those of rules that do not apply have no reason."""
    figures = index_facts(report)
    filed = filed_tables(report, figures.tables)
    results = []
    for rule in built_in_rules() if rules is None else rules:
        current = rule.at(report.period)
        if current is None:
            results.append(_result(rule, "not applicable", reason=rule.dates))
        elif any(not current.recomputes(table, filed) for table in current.tables if table not in filed):
            results += _not_applicable(current, report, figures, filed) if explain else ()
        else:
            results += _evaluate_rule(current, figures, report.period, filed)
    return results


def violations(results: Iterable[RuleResult]) -> list[RuleResult]:
    """The results that are violated: breaches and filing errors, but not triggers."""
    return [result for result in results if result.state == "violated"]


def filed_tables(report: Report, tables_with_facts: Iterable[str]) -> frozenset[str]:
    """The tables that are filed, by the filing indicators of their templates; without any indicators, all with a fact.

    A table that is filed without a fact is included if it occurs in a rule.
    """
    if not report.filing_indicators:
        return frozenset(tables_with_facts)
    known = {*tables_with_facts, *_tables_of_rules()}
    indicators = report.filing_indicators
    return frozenset(table for table in known if indicators.get(template_of(table), indicators.get(table, False)))


@functools.cache
def _tables_of_rules() -> frozenset[str]:
    return frozenset(cell[0] for rule in built_in_rules() for cell in rule.cells)


def _evaluate_rule(rule: Rule, figures: Figures, period: str, filed: frozenset[str]) -> list[RuleResult]:
    """The results of one rule: one per violated or undecided row, if it is over the rows of an open table."""
    given = [
        cell
        for cell in rule.unless_reported
        if cell[0] in filed and read_figure(figures, cell).source != "not reported"
    ]
    if given:
        reason = f"{' and '.join(map(cell_name, given))} is reported, and another rule reads it"
        return [_result(rule, "not applicable", reason=reason)]
    open_cells = [cell for cell in rule.cells if cell[1] == "*"]
    if not open_cells:
        return [_evaluate_row(rule, figures, (), period, filed)]
    main = [cell for cell in open_cells if cell[0] == open_cells[0][0]]
    parts = [RECOMPUTED[cell][0] for cell in main if cell in RECOMPUTED and rule.kind != "filing"]
    keys = row_keys(figures, (*main, *parts))
    results = [_evaluate_row(rule, figures, key, period, filed) for key in keys]
    if not results:
        return [_result(rule, "not applicable", reason=f"{table_name(open_cells[0][0])} has no rows")]
    return [result for result in results if result.state != "ok"] or results[:1]


def _not_applicable(rule: Rule, report: Report, figures: Figures, filed: frozenset[str]) -> list[RuleResult]:
    """Results of a rule whose tables are not all filed.

    They name the facts that no filing indicator covers, and what the rule would give if these counted.
    """
    reasons = [why_unfiled(report, table) for table in rule.tables if table not in filed]
    reason = "; ".join(dict.fromkeys(reasons))
    covered = {template for template, filed in report.filing_indicators.items() if filed}
    uncovered = frozenset(
        cell[0]
        for fact in report.facts
        if fact.cell and not any(template_of(cell[0]) in covered for cell in (fact.cell, *fact.other_cells))
        for cell in (fact.cell, *fact.other_cells)
    )
    if not set(rule.tables) - filed <= uncovered:
        return [_result(rule, "not applicable", reason=reason)]
    results = _evaluate_rule(rule, figures, report.period, filed | uncovered)
    return [_as_if_covered(result, reason, filed) for result in results]


def _as_if_covered(result: RuleResult, reason: str, filed: frozenset[str]) -> RuleResult:
    """The result of a rule on facts that are not covered, as a result "not applicable"."""
    parts = [part for figure in result.inputs for part in (figure, *figure.parts)]
    cells = [cell_name(part.cell, part.row) for part in parts if part.value is not None and part.cell[0] not in filed]
    verdict = {"ok": "met", "undecided": f"undecided ({result.reason})"}.get(result.state, result.state)
    names = ", ".join(dict.fromkeys(cells)) or "its facts"
    text = f"{reason}, yet {names} is reported; if that counted, the rule would be {verdict}"
    return replace(result, state="not applicable", reason=text)


def _evaluate_row(rule: Rule, figures: Figures, key: Key, period: str, filed: frozenset[str]) -> RuleResult:
    """Evaluate the formula of a rule on the figures of one row, or of the whole report (`key` is then empty)."""
    inputs = {f"x{index}": _input(rule, figures, cell, key, filed) for index, cell in enumerate(rule.cells)}
    law = {name: exactly(value) for name, value in _parameters(period).items()}
    missing = sorted(rule.formula.names & LEGAL_PARAMETERS - law.keys())
    reason = why_unreadable(inputs, rule.formula.texts)
    reason = reason or ", ".join(f"the law has no {name} on {period}" for name in missing)
    if reason:
        return _result(rule, "undecided", inputs, reason=reason)
    if all(figure.source == "read as 0" for figure in inputs.values()):
        return _result(rule, "not applicable", inputs, reason="none of its figures is reported")
    texts = {
        name: str(figure.value).rpartition(":")[2] for name, figure in inputs.items() if name in rule.formula.texts
    }
    try:
        numbers = law | numbers_of(inputs, exact=not rule.interval)
        violated = truth(rule.formula.expression, numbers, texts)
        value, limit = (arithmetic(side, numbers, texts).value for side in rule.formula.sides)
        if violated is None and _depends_on_accuracy(rule, inputs, law, texts):
            return _result(rule, "undecided", inputs, reason=why_too_coarse(inputs))
    except ZeroDivisionError:
        return _result(rule, "undecided", inputs, reason="a denominator is 0, or may be 0 within its rounding")
    state = "ok" if not violated else "triggered" if rule.kind == "trigger" else "violated"
    as_filed = {name: exactly(number.value) for name, number in numbers.items()}
    tolerated = violated is None and truth(rule.formula.expression, as_filed, texts) is True
    reason = "the difference is within the rounding of the figures" if tolerated else ""
    result = _result(rule, state, inputs, (value, limit), reason)
    used = tuple((name, law[name].value) for name in sorted(rule.formula.names & law.keys()))
    return replace(result, parameters=used) if used else result


def _input(rule: Rule, figures: Figures, cell: CellKey, key: Key, filed: frozenset[str]) -> Figure:
    """The figure of a cell: reported, else recomputed (not for filing rules), else read as 0 if the rule allows it.

    Facts of a table that is not filed do not count.
    """
    figure = read_figure(figures, cell, key)
    if figure.source != "not reported" and cell[0] in filed:
        return figure
    missing = Figure(cell, figure.row, None, None, None, "not reported")
    ratio = missing if rule.kind == "filing" else recompute(figures, cell, key, filed)
    if ratio.source == "recomputed":
        return ratio
    zero = rule.absent_cell == "zero" or cell in rule.formula.optional
    return replace(missing, source="read as 0") if zero else ratio


def _depends_on_accuracy(
    rule: Rule, inputs: Mapping[str, Figure], law: Mapping[str, Number], texts: Mapping[str, str]
) -> bool:
    """Whether a rule without a certain result is undecided rather than met.

    A filing rule is met if some choice of values inside the rounding agrees, as with the EBA. A breach that allows for
    rounding (`interval`) is undecided only if it would be one with figures as accurate as they must be.
    """
    if not rule.interval:
        return True
    if rule.kind == "filing" or all(map(is_accurate, inputs.values())):
        return False
    numbers = {**law, **numbers_of({name: as_accurate(figure) for name, figure in inputs.items()}, exact=False)}
    return truth(rule.formula.expression, numbers, texts) is True


def _result(
    rule: Rule,
    state: str,
    inputs: Mapping[str, Figure] | None = None,
    sides: tuple[Decimal, Decimal] | None = None,
    reason: str = "",
) -> RuleResult:
    """The result of a rule. `sides`: value and limit. The first figure with a number determines how they are printed."""
    figures = tuple((inputs or {}).values())
    first = next((figure for figure in figures if isinstance(figure.value, Decimal)), None)
    decimals = first.decimals if first else None
    value, limit = sides or (None, None)
    if sides and first and first.source == "recomputed":
        value, decimals = _round_ratio(*sides)
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
        decimals=decimals,
        row=next((figure.row for figure in figures if figure.row), ""),
        missing=bool(figures) and figures[0].source in ("not reported", "read as 0"),
        title=rule.title,
        formula=rule.violated_if,
        inputs=figures,
        reason=reason,
    )


def _round_ratio(value: Decimal, limit: Decimal) -> tuple[Decimal, int]:
    """(a recomputed ratio rounded to at least four places, the number of places): on the same side of the limit."""
    for places in range(RATIO_DECIMALS, 12):
        rounded = round(value, places)
        if (rounded < limit, rounded > limit) == (value < limit, value > limit):
            return rounded, places
    return value, 12


def _parameters(period: str) -> dict[str, Decimal]:
    return legal_parameters(int(period[:4])) if period[:4].isdigit() else {}
