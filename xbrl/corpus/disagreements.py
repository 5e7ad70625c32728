"""Compare a supervisor's letter with the violations of its report, to find wrong pairs, missing findings and waivers.

The comparison prefers what can be checked: articles, cells, percentages and ids of rules. Words such as "no objection"
count only in a letter that demands nothing. It does not understand the letter, and its limits are these:

- A requirement without an article and without its figure is taken as not mentioned.
- An article that several rules share matches any of them. Articles that give the supervisor its powers, or the bank its
  duties to report, are ignored (`POWERS`).
- A sentence that says that a requirement is met, in words that `MET` and `NOTHING` do not know, is taken as an objection.
- Amounts are not compared, nor percentages in sentences that name no ratio.
- Only English and German citations and words are known.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal

from xbrl.answers.answers import write_violation
from xbrl.answers.letter_text import find_percentages, sentences
from xbrl.read.render import cell_name
from xbrl.read.report import Report
from xbrl.rules.citations import Citation, find_citations
from xbrl.rules.findings import note_rules
from xbrl.rules.rules import RuleResult, built_in_rules

# Articles on powers, sanctions and duties to report: a letter cites them whatever was found.
POWERS = {
    "CRD": ("4", "18", "64", "65", "66", "67", "70", "102", "104", "105", "141", "142", "143"),
    "CRR": ("4", "99", "394", "415", "430"),
}
NAMED_RULE = re.compile(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b")  # ids such as CBR are words, too
PLACE = re.compile(r"\b[CF] \d\d\.\d\d(?:\.[a-z])? r\d{4} c\d{4}\b")
RATIO = re.compile(
    r"\bratio|\bLCR\b|\bNSFR\b|liquidity coverage|stable funding|\bCET ?1\b|Tier ?1|total capital|leverage|large exposure"
    r"|quote\b|Kernkapital|Gesamtkapital|Verschuldung|Liquiditätsdeckung|Großkredit",
    re.IGNORECASE,
)
MET = re.compile(
    r"\b(is|are|was|were|remains?|be) (also |still )?(met|satisfied|fulfilled|observed|complied with)\b|\b(meets?|met|satisf(y|ies)|compl(y|ies|ied) with)\b"
    r"|\beingehalten\b|\berfüllt\b",
    re.IGNORECASE,
)
NOTHING = re.compile(
    r"\b(no|keine?n?) (violation|breach|infringement|measures?|action|Verstoß|Maßnahmen?)\b", re.IGNORECASE
)
MARGIN = re.compile(r"\bsmallest margin\b|\bkleinste Abstand\b", re.IGNORECASE)  # a line on a requirement that is met
NOT_MET = re.compile(
    r"\b(not|nor|never|fails?|failed|without|misse[sd]|below|short|breach(es|ed)?|until|again|nicht|unter)\b",
    re.IGNORECASE,
)
APPROVAL = re.compile(
    r"\bnothing to object|\bno (further )?(supervisory )?(objections?|findings|measures?|action)\b|\bno need for action"
    r"|\bwithout (findings|objections?)\b|\bkeine (Beanstandung|Maßnahme|Einwände|Feststellung)",
    re.IGNORECASE,
)
DEMAND = re.compile(
    r"\b(shall|must|is to|are to|has to|have to)\b|\bwe (hereby )?(order|direct|require|instruct)\b|\bwithin \S+ (\S+ )?(days?|weeks?|months?)\b"
    r"|\b(re)?submit\b|\brestore\b|\binnerhalb von\b|\bordnen wir an\b|\bhaben Sie\b",
    re.IGNORECASE,
)


def find_disagreements(
    letter: str,
    report: Report,
    results: Sequence[RuleResult],
    violated: Sequence[RuleResult],
    earlier: Sequence[Report] = (),
) -> list[str]:
    """How a letter and the labels of its report contradict each other; empty if they do not, as far as can be seen.

    `results` are those of the engine, `violated` the labels, which findings.csv may have changed. `earlier` are previous
    reports of the bank, whose figures the letter may mention.
    """
    lines = [line for line in letter.splitlines() if not MARGIN.search(line)]
    objections = "\n".join(part for part in sentences("\n".join(lines)) if _objects(part))
    found = [
        *_only_in_letter(objections, [result for result in results if result.state == "triggered"] + list(violated)),
        *_only_in_labels(objections, violated),
        *_unknown_figures(letter, _known_percentages((report, *earlier), (*results, *violated))),
    ]
    demands, approves = DEMAND.search(objections), APPROVAL.search(letter)
    if violated and approves and not demands:
        found.insert(0, f"the letter says {approves[0]!r} and demands nothing, but the labels have {_ids(violated)}")
    if not violated and demands and not approves:
        found.insert(0, f"the letter demands something ({demands[0]!r}), but the labels have no violation")
    return found


def _objects(sentence: str) -> bool:
    """Whether a sentence does not say that a requirement is met or that nothing follows."""
    return not NOTHING.search(sentence) and bool(NOT_MET.search(sentence) or not MET.search(sentence))


def _only_in_letter(objections: str, known: Sequence[RuleResult]) -> Iterator[str]:
    """Articles, cells and ids of rules that the letter names and no label has. `known`: violations and duties of the report."""
    legal = [citation for result in known for citation in find_citations(result.legal)]
    by_rule = _rule_citations()
    for citation in dict.fromkeys(find_citations(objections)):
        rules = [rule for rule, own in by_rule.items() if any(citation.covers(one) for one in own)]
        if rules and not any(citation.covers(one) for one in legal):
            yield f"the letter cites {citation} ({', '.join(rules[:3])}), but the labels have no violation of it"
    places = {cell_name(result.cell) for result in known}
    for place in dict.fromkeys(PLACE.findall(objections)):
        if place not in places:
            yield f"the letter names the cell {place}, but no label is on it"
    labels = {result.rule_id for result in known}
    for rule in dict.fromkeys(NAMED_RULE.findall(objections)):
        if rule in by_rule and rule not in labels:
            yield f"the letter names {rule}, but the labels do not have it"


def _only_in_labels(objections: str, violated: Sequence[RuleResult]) -> Iterator[str]:
    """Violations of which the letter has neither the article nor the figure, the cell or the id."""
    citations, percentages = find_citations(objections), list(find_percentages(objections))
    digits = re.sub(r"(?<=\d)[.,\u00a0 '](?=\d{3})", "", objections)
    for result in violated:
        cited = any(one.covers(other) for one in _citations(result.legal) for other in citations)
        value = result.value
        figure = value is not None and (
            any(_rounds_to(value * 100, *percentage) for percentage in percentages)
            or (abs(value) > 100 and any(str(abs(int(value)))[: -zeros or None] in digits for zeros in (0, 3, 6)))
        )
        named = result.rule_id in objections or cell_name(result.cell, result.row) in objections
        if not cited and not figure and not named:
            yield f"the labels have {write_violation(result)}, which the letter does not object to"


def _unknown_figures(letter: str, known: Sequence[Decimal]) -> Iterator[str]:
    """Percentages of ratios that are none of the `known` ones."""
    for part in sentences(letter):
        for percentage in find_percentages(part) if RATIO.search(part) else ():
            if not any(_rounds_to(value, *percentage) for value in known):
                yield f"the letter gives {percentage[0]}% for a ratio, which is neither in the reports nor a requirement"


def _known_percentages(reports: Iterable[Report], results: Iterable[RuleResult]) -> list[Decimal]:
    """The ratios and the percentages in notes of the reports, values and limits of the rules, percentages in their titles."""
    values, texts = [], [rule.title for rule in (*built_in_rules(), *note_rules().values())]
    for report in reports:
        values += [fact.value for fact in report.facts if isinstance(fact.value, Decimal) and not _is_amount(fact.unit)]
        texts += [note.text for note in report.notes]
    values += [value for result in results for value in (result.value, result.limit) if value is not None]
    return [value * 100 for value in values] + [number for text in texts for number, _ in find_percentages(text)]


def _is_amount(unit: str | None) -> bool:
    return (unit or "").startswith("iso4217")


def _rounds_to(value: Decimal, percentage: Decimal, places: int) -> bool:
    """Whether a value is printed as `percentage`, rounded or truncated to its decimal places."""
    return abs(value - percentage) < Decimal(1).scaleb(-places)


@functools.cache
def _rule_citations() -> dict[str, list[Citation]]:
    """Rule -> the articles by which a letter can mean it."""
    return {rule.id: _citations(rule.legal) for rule in (*built_in_rules(), *note_rules().values())}


def _citations(legal: str) -> list[Citation]:
    return [one for one in find_citations(legal) if one.article not in POWERS.get(one.act, ())]


def _ids(violated: Sequence[RuleResult]) -> str:
    return ", ".join(dict.fromkeys(result.rule_id for result in violated))
