"""Collect what a letter may mention besides the violations."""

from collections.abc import Iterable, Sequence
from decimal import Decimal

from xbrl.answers.profiles import EARLIER_CELLS, MAX_EARLIER
from xbrl.desk.letters import Context
from xbrl.read.filed_report import CellKey, Report
from xbrl.rules.findings import Finding, lifted_results
from xbrl.rules.reported_figures import index_facts, read_figure
from xbrl.rules.rules import Rule, RuleResult, evaluate, violations


def letter_context(
    report: Report,
    results: Sequence[RuleResult],
    earlier: Sequence[Report],
    rules: Iterable[Rule],
    findings: Sequence[Finding] = (),
    before: Sequence[Finding] = (),
) -> Context:
    """Collect what the letter on a report may mention besides the violations: duties, margins, trends and repetitions.

    Trends and repetitions come from the `earlier` reports, oldest first. An earlier report that lacks the figure is skipped,
    because liquidity is filed every month and capital every quarter. `findings` are about this report; `before` may contain
    findings about the earlier ones.
    """
    repeated: dict[str, int] = {}
    previous: dict[CellKey, Decimal] = {}
    missing = {result.cell for result in results if result.cell in EARLIER_CELLS}
    persisting = {result.rule_id for result in results if result.state == "violated" and result.cell in EARLIER_CELLS}
    for old in reversed(earlier):
        if missing:
            facts = index_facts(old)
            figures = [read_figure(facts, cell) for cell in missing]
            missing = {figure.cell for figure in figures if figure.source == "not reported"}
            previous |= {figure.cell: figure.value for figure in figures if isinstance(figure.value, Decimal)}
        if persisting:
            tested = evaluate(old, rules)
            missed = {result.rule_id for result in violations(tested)}
            missed -= {line.rule for line in before if (line.period, line.state) == (old.period, "lifted")}
            persisting -= {result.rule_id for result in tested} - missed
            repeated |= {rule: repeated.get(rule, 0) + 1 for rule in persisting & missed}
            persisting = {rule for rule in persisting if repeated.get(rule, 0) < MAX_EARLIER}
    return Context(
        triggers=tuple(result for result in results if result.state == "triggered"),
        margins=tuple(result for result in results if result.kind == "breach" and result.state == "ok"),
        previous=previous,
        repeated=repeated,
        templates=tuple(sorted(template for template, filed in report.filing_indicators.items() if filed)),
        lifted=lifted_results(results, findings),
    )
