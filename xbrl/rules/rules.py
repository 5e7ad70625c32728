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
from collections.abc import Iterable
from dataclasses import replace

from xbrl.read.render import cell_name, table_name
from xbrl.read.report import Report, template_of
from xbrl.rules.evaluation import RuleResult, evaluate_row, result_of
from xbrl.rules.figures import RECOMPUTED, Figures, index_facts, read_figure, row_keys
from xbrl.rules.reasons import why_unfiled
from xbrl.rules.rule_file import Rule, built_in_rules, legal_parameters, load_rules

__all__ = [
    "Rule",
    "RuleResult",
    "built_in_rules",
    "evaluate",
    "evaluate_all",
    "legal_parameters",
    "load_rules",
    "violations",
]


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
    filed = _filed_tables(report, figures.tables)
    results = []
    for rule in built_in_rules() if rules is None else rules:
        current = rule.at(report.period)
        if current is None:
            results.append(result_of(rule, "not applicable", reason=rule.dates))
        elif any(not current.recomputes(table, filed) for table in current.tables if table not in filed):
            results += _not_applicable(current, report, figures, filed) if explain else ()
        else:
            results += _evaluate_rule(current, figures, report.period, filed)
    return results


def violations(results: Iterable[RuleResult]) -> list[RuleResult]:
    """The results that are violated: breaches and filing errors, but not triggers and findings about the report."""
    return [result for result in results if result.state == "violated" and result.kind != "quality"]


def _filed_tables(report: Report, tables_with_facts: Iterable[str]) -> frozenset[str]:
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
    substitutes = (cell for cell in rule.unless_reported if cell[0] in filed)
    given = [cell for cell in substitutes if read_figure(figures, cell).source != "not reported"]
    if given:
        reason = f"{' and '.join(map(cell_name, given))} is reported, and another rule reads it"
        return [result_of(rule, "not applicable", reason=reason)]
    open_cells = [cell for cell in rule.cells if cell[1] == "*"]
    if not open_cells:
        return [evaluate_row(rule, figures, (), period, filed)]
    main = [cell for cell in open_cells if cell[0] == open_cells[0][0]]
    parts = [RECOMPUTED[cell][0] for cell in main if cell in RECOMPUTED and rule.kind != "filing"]
    keys = row_keys(figures, (*main, *parts))
    results = [evaluate_row(rule, figures, key, period, filed) for key in keys]
    if not results:
        return [result_of(rule, "not applicable", reason=f"{table_name(open_cells[0][0])} has no rows")]
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
        return [result_of(rule, "not applicable", reason=reason)]
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
