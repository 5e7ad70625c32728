"""Compare a supervisor's letter with the violations of its report, to find wrong pairs, missing findings and waivers.

The comparison prefers what can be checked: articles, cells, ids of rules, figures. It does not understand the letter: words
such as "no objection" count only in a letter that demands nothing, and a sentence is taken as an objection unless it says in
the words of `MET` that a requirement is met. Citations and words are known in English and German.
"""

import functools
import re
from collections.abc import Iterator, Sequence

from xbrl.answers.answers import write_violation
from xbrl.answers.statements import Citation, find_citations, find_percentages, sentences
from xbrl.read.render import cell_name
from xbrl.rules.findings import note_rules
from xbrl.rules.rules import RuleResult, built_in_rules

# Articles on powers, sanctions and duties to report: a letter cites them whatever was found.
POWERS = {
    "CRD": ("4", "18", "64", "65", "66", "67", "70", "102", "104", "105", "141", "142", "143"),
    "CRR": ("4", "99", "394", "415", "430"),
}
MET = re.compile(
    r"\b(is|are|was|were|remains?|be) (also |still )?(met|satisfied|fulfilled|observed|complied with)\b"
    r"|\b(meets?|satisf(y|ies)|compl(y|ies|ied) with)\b|\beingehalten\b|\berfüllt\b"
    r"|\b(no|keine?n?) (violation|breach|infringement|measures?|action|Verstoß|Maßnahmen?)\b",
    re.IGNORECASE,
)
CELL = re.compile(r"\b[CF] ?\d\d\.\d\d(\.\w)? r\d{3,4} c\d{3,4}\b")
MARGIN = re.compile(r"\bsmallest margin\b|\bkleinste Abstand\b", re.IGNORECASE)  # a line on a requirement that is met
NOT_MET = re.compile(r"\b(not|nor|never|fail(s|ed)?|misse[sd]|below|until|nicht|unter)\b", re.IGNORECASE)
APPROVAL = re.compile(
    r"\bnothing to object|\bno (further )?(supervisory )?(objections?|findings|measures?|action)\b|\bno need for action"
    r"|\bwithout (findings|objections?)\b|\bkeine (Beanstandung|Maßnahme|Einwände|Feststellung)",
    re.IGNORECASE,
)
DEMAND = re.compile(
    r"\b(shall|must|is to|are to|has to|have to)\b|\bwe (hereby )?(order|direct|require|instruct)\b"
    r"|\bwithin \S+ (\S+ )?(days?|weeks?|months?)\b|\b(re)?submit\b|\brestore\b|\binnerhalb von\b|\bordnen wir an\b",
    re.IGNORECASE,
)


def find_disagreements(letter: str, results: Sequence[RuleResult], violated: Sequence[RuleResult]) -> list[str]:
    """How a letter and the labels of its report contradict each other; empty if they do not, as far as can be seen.

    `results` are those of the engine, `violated` the labels, which findings.csv may have changed.
    """
    parts = sentences("\n".join(line for line in letter.splitlines() if not MARGIN.search(line)))
    objections = "\n".join(part for part in parts if NOT_MET.search(part) or not MET.search(part))
    demands, approves = DEMAND.search(objections), APPROVAL.search(letter)
    found = []
    if violated and approves and not demands:
        named = ", ".join(dict.fromkeys(result.rule_id for result in violated))
        found.append(f"the letter says {approves[0]!r} and demands nothing, but the labels have {named}")
    if not violated and demands and not approves:
        found.append(f"the letter demands something ({demands[0]!r}), but the labels have no violation")
    known = [result for result in results if result.state == "triggered"] + list(violated)
    return found + [*_only_in_letter(objections, known), *_only_in_labels(objections, violated)]


def _only_in_letter(objections: str, known: Sequence[RuleResult]) -> Iterator[str]:
    """Articles that the letter cites and no label has. `known`: violations and duties of the report."""
    legal = [citation for result in known for citation in find_citations(result.legal)]
    for citation in dict.fromkeys(find_citations(objections)):
        rules = [rule for rule, own in _rule_citations().items() if any(citation.covers(one) for one in own)]
        if rules and not any(citation.covers(one) for one in legal):
            yield f"the letter cites {citation} ({', '.join(rules[:3])}), but the labels have no violation of it"


def _only_in_labels(objections: str, violated: Sequence[RuleResult]) -> Iterator[str]:
    """Violations of which the letter has neither the cell, the id nor the percentage, nor the article.

    The article alone is enough only in a letter that names no cells: several rules share an article.
    """
    citations, percentages = find_citations(objections), list(find_percentages(objections))
    for result in violated:
        named = result.rule_id in objections or cell_name(result.cell, result.row) in objections
        cited = not CELL.search(objections) and any(
            one.covers(other) for one in _citations(result.legal) for other in citations
        )
        value = None if result.value is None else result.value * 100
        if not (named or cited) and not any(
            value is not None and abs(value - number) < 10**-places for number, places in percentages
        ):
            yield f"the labels have {write_violation(result)}, which the letter does not object to"


@functools.cache
def _rule_citations() -> dict[str, list[Citation]]:
    """Rule -> the articles by which a letter can mean it."""
    return {rule.id: _citations(rule.legal) for rule in (*built_in_rules(), *note_rules().values())}


def _citations(legal: str) -> list[Citation]:
    return [one for one in find_citations(legal) if one.article not in POWERS.get(one.act, ())]
