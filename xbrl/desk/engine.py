"""What the rules find in a report, corrected by what the desk has decided about its notes."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from xbrl.corpus.examples import letter_context
from xbrl.corpus.profiles import FULL
from xbrl.desk.letters import Context
from xbrl.read.render import cell_name, format_figure, format_limit
from xbrl.read.report import Report
from xbrl.rules.findings import Finding, apply_findings
from xbrl.rules.rule_lines import all_results, figure_text, readable
from xbrl.rules.rules import RuleResult

# Findings about a report that do not contradict a letter without findings: what is missing is no figure that it judges.
OMISSIONS = ("MANDATORY",)


@dataclass(frozen=True)
class Examination:
    """The engine's results on one report.

    `violated` are the findings, after the desk's `decisions`; `about` are findings about the report itself.
    """

    results: tuple[RuleResult, ...]  # of every rule
    about: tuple[RuleResult, ...]
    violated: tuple[RuleResult, ...]
    decisions: tuple[Finding, ...]
    context: Context  # what a letter may mention besides the findings

    def of_state(self, *states: str) -> list[RuleResult]:
        """The results of rules with one of these states."""
        return [result for result in self.results if result.state in states]

    @property
    def contradictions(self) -> list[RuleResult]:
        """The findings about the report that make a letter without findings doubtful."""
        return [one for one in self.about if one.rule_id not in OMISSIONS]


def examine(report: Report, earlier: Sequence[Report], decisions: Sequence[Finding]) -> Examination:
    """Evaluate every rule on a report. `earlier` are previous reports of the bank, oldest first."""
    everything = all_results(report)
    results = tuple(result for result in everything if result.kind != "quality")
    about = tuple(result for result in everything if result.kind == "quality")
    applicable = [result for result in results if result.state != "not applicable"]
    violated = tuple(apply_findings(applicable, decisions))
    context = letter_context(report, applicable, earlier, FULL, decisions)
    return Examination(results, about, violated, tuple(decisions), context)


def describe_result(result: RuleResult) -> dict:
    """A result as texts that a person can check: cell, formula, inputs, value, limit, article, reason."""
    word = "triggered" if result.kind == "trigger" else "violated"
    has_sides = result.value is not None and result.limit is not None
    value = "" if result.value is None else format_figure(result.value, result.unit, result.decimals)
    return {
        "rule": result.rule_id,
        "kind": result.kind,
        "title": result.title,
        "cell": cell_name(result.cell, result.row).strip(),
        "value": "not reported" if has_sides and result.missing else value,
        "limit": f"{result.relation} {format_limit(result.known_limit, result.unit, result.decimals)}"
        if has_sides
        else "",
        "legal": result.legal,
        "formula": f"{word} if {readable(result.formula)}" if result.formula else "",
        "inputs": [
            *map(figure_text, result.inputs),
            *(f"{name} = {_plain(value)} (law)" for name, value in result.parameters),
        ],
        "reason": result.reason,
    }


def _plain(value: Decimal) -> str:
    return f"{value:f}"
