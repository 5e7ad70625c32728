"""What the rules find in a report, corrected by what the desk has decided about its notes."""

from collections.abc import Sequence
from dataclasses import dataclass

from xbrl.corpus.examples import FULL, letter_context
from xbrl.desk.letters import Context
from xbrl.read.report import Report
from xbrl.rules.findings import Finding, apply_findings
from xbrl.rules.rule_lines import all_results
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
