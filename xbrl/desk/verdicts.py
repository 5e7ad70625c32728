"""Evaluate the rules on a report, give a verdict on each finding of a model's answer, and check the model's letter.

A finding is confirmed only if rule, cell, value, limit and article all agree with the engine or with the desk's decision. A
finding with a wrong figure is refuted, and the reason gives the right figure. A finding that only a note can show has no
formula: it must follow from the facts that the model read in the note, and is not decidable by rule until a person decides.

The model's letter is shown beside the decision and never sent: its figures are checked, its sentences are not. Every sentence
that no approved block contains is listed, with words of `blocks/LANGUAGE/flags.toml` that may reverse a finding. No list of
words makes a text safe, so the letter that is sent is made of blocks alone (`letters.py`).
"""

import functools
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from xbrl.answers.answer_reader import Claim
from xbrl.answers.profiles import FULL, Profile
from xbrl.answers.statements import quantities, sentences, statements
from xbrl.desk.decisions import in_force, limits_without
from xbrl.desk.letter_context import letter_context
from xbrl.desk.letters import BLOCKS, Context
from xbrl.read.filed_report import Report
from xbrl.read.render import PURE, cell_name, format_figure, format_limit
from xbrl.rules.findings import Finding, apply_findings, concerns, note_rules
from xbrl.rules.remittance import RULE as LATE_FILING
from xbrl.rules.rule_lines import all_results, describe_result
from xbrl.rules.rules import RuleResult

CONFIRMED, REFUTED, OPEN, MISSED = "confirmed", "refuted", "not decidable by rule", "missed"
NOT_COVERED = "not covered"  # an engine finding that the profile of the model does not ask about
BY_RULE = "found by rule"  # a finding in an analysis without a model, or with a model that reads notes alone
VERDICTS = (CONFIRMED, REFUTED, OPEN, MISSED, NOT_COVERED, BY_RULE)
DECIDE = "a person reads the note and decides in a file for --findings"
WHY_NOT_VIOLATED = {
    "ok": "the figures meet the rule",
    "triggered": "this is a duty, which the figures trigger; it is no violation",
    "violated": "the desk's decisions lift it",
    "undecided": "the figures do not decide it",
    "not applicable": "the rule does not apply",
}
Judgement = tuple[str, str, RuleResult | None]  # the verdict, the reason, the engine's result on the rule
_MARKS = re.compile(r"^(?:[-*•]|\d{1,2}[.)])\s+")


@dataclass(frozen=True)
class Examination:
    """The engine's results on one report."""

    results: tuple[RuleResult, ...]  # the result of every rule
    about: tuple[RuleResult, ...]  # findings about the report itself, which are never labels
    violated: tuple[RuleResult, ...]  # the violations, corrected by `decisions`
    decisions: tuple[Finding, ...]  # the desk's decisions that are in force
    context: Context  # what a letter may mention besides the findings

    def of_state(self, state: str) -> list[RuleResult]:
        """Return the results of rules with this state."""
        return [result for result in self.results if result.state == state]


def examine(report: Report, earlier: Sequence[Report], decisions: Sequence[Finding]) -> Examination:
    """Evaluate every rule on a report. `earlier` has previous reports of the bank, oldest first.

    A decision on a note of the report holds only if the note still has the same words. Decisions on earlier reports count too:
    a rule that they lift was not violated in the earlier report.
    """
    all_rules = all_results(report)
    results = tuple(result for result in all_rules if result.kind != "quality")
    about = tuple(result for result in all_rules if result.kind == "quality")
    applicable = [result for result in results if result.state != "not applicable"]
    judged = [result for result in applicable if result.rule_id != LATE_FILING]  # the time of filing is no figure
    states = {result.state for result in judged}
    valid = in_force(report, decisions)
    violated = tuple(apply_findings(applicable, valid))
    context = replace(
        letter_context(report, applicable, earlier, FULL.rules, valid, decisions),
        without=limits_without(report, results, valid),
        untested=tuple(result for result in judged if result.state == "undecided" and result.kind != "trigger"),
        unexamined="" if states & {"ok", "violated"} else "undecided" if states else "not applicable",
    )
    return Examination(results, about, violated, tuple(valid), context)


@dataclass(frozen=True)
class Verdict:
    """The verdict on one finding, with its reason. `result` is the engine's result on the same rule, if it has one."""

    verdict: str
    rule: str
    reason: str
    line: str = ""  # as the model wrote it
    claim: Claim | None = None
    result: RuleResult | None = None

    def describe(self) -> dict[str, Any]:
        """Return the verdict as texts. Value and limit come from the engine if it has them."""
        names = ("kind", "title", "cell", "value", "limit", "legal", "formula")
        known: dict[str, Any] = (
            describe_result(self.result) if self.result else dict.fromkeys(names, "") | {"inputs": []}
        )
        if note_rule := note_rules().get(self.rule):
            known["title"] = note_rule.title
            if not self.result:
                known |= {"kind": "note", "legal": note_rule.legal}
        reason = "; ".join(filter(None, (self.reason, known.pop("reason", ""))))
        written = f"the model wrote: {self.line}" if self.line else ""
        details = [text for text in (reason, known["formula"], *known["inputs"], written) if text]
        own = {"rule": self.rule, "line": self.line, "reason": reason, "details": details}
        return {"verdict": self.verdict, **known, **own}


def judge_answer(
    report: Report,
    engine: Examination,
    profile: Profile,
    lines: Iterable[tuple[str, Claim | None]],
    proposed: Sequence[Finding] = (),
    is_decided: bool = False,
) -> list[Verdict]:
    """Judge the readable `lines` of an answer, then add the findings that the model missed or was not asked about.

    `proposed` has the findings that follow from the facts that the model read in the notes, for facts whose words stand there.
    `is_decided` says that a person has decided on every note.
    """
    read = list(dict.fromkeys((line, claim) for line, claim in lines if claim))
    by_rule: dict[str, list[RuleResult]] = {}
    for result in engine.results:
        by_rule.setdefault(result.rule_id, []).append(result)

    def decided(rule: str) -> list[Finding]:
        return [decision for decision in engine.decisions if decision.rule == rule]

    def truths(rule: str) -> list[tuple[Claim | None, RuleResult]]:
        """Return the violations of a rule, each with the claim of a right answer."""
        return [(profile.claim_of(result), result) for result in engine.violated if result.rule_id == rule]

    def nearest(claim: Claim) -> RuleResult | None:
        """Return the engine's result on the rule of a claim, on the row that the model names if the engine has that row.

        The engine keeps one of the rows that meet a rule. If the model names a different row, the result has no row or figure.
        """
        same = by_rule.get(claim.rule, [])
        named = [result for result in same if result.row and result.row.casefold() in claim.where]
        result = next(iter(named or same), None)
        if result and result.row and not named and result.state == "ok":
            return replace(result, row="", value=None, limit=None, inputs=())
        return result

    def judge_violation(claim: Claim) -> Judgement:
        """Judge the claim that a rule is violated."""
        known = truths(claim.rule)
        if same := [pair for pair in known if pair[0] is None or pair[0].where == claim.where]:
            truth, result = min(same, key=lambda pair: len(_differences(claim, *pair)))
            if wrong := _differences(claim, truth, result):
                return REFUTED, f"the rule is violated, but {'; '.join(wrong)}", result
            reason = ""
            for decision in decided(claim.rule):
                if decision.state == "violated" and concerns(decision, result):
                    reason = f"the desk has decided: violated ({decision.where})"
            return CONFIRMED, reason, result
        if known:
            places = ", ".join(cell_name(result.cell, result.row) for _, result in known)
            return REFUTED, f"the rule is violated at {places}, not where the model says", known[0][1]
        result = nearest(claim)
        if result is None and claim.rule not in note_rules():
            return REFUTED, "no rule has this id", None
        if otherwise := decided(claim.rule):
            return REFUTED, f"the desk has decided otherwise: {otherwise[0].state} ({otherwise[0].where})", result
        if result is None:
            return judge_note_rule(claim)
        uncovered = result.state == "not applicable" and result.value is not None
        verdict = OPEN if result.state == "undecided" or uncovered else REFUTED
        return verdict, WHY_NOT_VIOLATED[result.state], result

    def judge_note_rule(claim: Claim) -> Judgement:
        """Judge a finding that only a note can show."""
        if not report.notes:
            return REFUTED, "only a note of the bank can show this, and the report has none", None
        if is_decided:
            return REFUTED, "the desk has decided on the note, and not that", None
        follows = [finding for finding in proposed if (finding.rule, finding.state) == (claim.rule, "violated")]
        if not follows:
            return REFUTED, "it does not follow from the facts that the model read in the note", None
        corrected = apply_findings(engine.results, follows)
        result = next(result for result in corrected if result.rule_id == claim.rule)
        reason = "it follows from the facts that the model read in the note"
        if wrong := _differences(claim, profile.claim_of(result), result):
            return REFUTED, f"{reason}, but {'; '.join(wrong)}", result
        return OPEN, f"{reason}; {DECIDE}", result

    verdicts = []
    for line, claim in read:
        verdict, reason, result = judge_violation(claim)
        verdicts.append(Verdict(verdict, claim.rule, reason, line, claim, result))
    lifted = {finding.rule for finding in proposed if finding.state == "lifted"}  # as the model reads the note
    covered = {rule.id for rule in profile.rules} | set(note_rules())
    for result in engine.violated:
        rule, truth = result.rule_id, profile.claim_of(result)
        claims = [claim for _, claim in read if claim.rule == rule]
        if rule not in covered:
            reason = f"the profile {profile.name} does not cover this rule: the model was not asked about it"
            verdicts.append(Verdict(NOT_COVERED, rule, reason, result=result))
        elif any(truth is None or truth.where == claim.where for claim in claims):
            continue
        elif rule in lifted:
            reason = f"the model read in the note that this limit does not bind the bank; {DECIDE}"
            verdicts.append(Verdict(OPEN, rule, reason, result=result))
        else:
            own = decided(rule)
            reason = f"the desk has decided that it is violated ({own[0].where})" if own else ""
            verdicts.append(Verdict(BY_RULE if profile.states_facts_alone else MISSED, rule, reason, result=result))
    if profile.states_facts_alone and not is_decided:
        computed = {result.rule_id for result in engine.violated}
        for result in apply_findings(engine.results, proposed):
            if result.rule_id not in computed and not decided(result.rule_id):
                reason = f"it follows from the facts that the model read in the note; {DECIDE}"
                verdicts.append(Verdict(OPEN, result.rule_id, reason, result=result))
    return verdicts


def _differences(claim: Claim, truth: Claim | None, result: RuleResult) -> list[str]:
    """Return a text for each part in which a claim differs from the engine's result or the desk's decision."""
    known = describe_result(result)
    value, limit = (truth.value, truth.limit) if truth else (result.value, result.limit)
    differences = []
    if claim.value != value:
        differences.append(f"the value is {known['value'] or 'not known'}, not {_printed(claim.value, result)}")
    if claim.limit != limit or (truth and claim.relation != truth.relation):
        wrong = f"{claim.relation} {_printed(claim.limit, result)}".strip()
        differences.append(f"the limit is {known['limit'] or 'not known'}, not {wrong}")
    if truth and claim.legal != truth.legal:
        cited = ", ".join(sorted(" ".join(filter(None, article)) for article in claim.legal)) or "nothing"
        differences.append(f"the article is {result.legal}, and the model cites {cited}")
    return differences


def _printed(value: Decimal | str | None, result: RuleResult) -> str:
    """Format a value of a claim in the unit of the engine's result."""
    if isinstance(value, Decimal):
        return (
            format_limit(value, result.unit)
            if result.unit in PURE
            else format_figure(value, result.unit, result.decimals)
        )
    return value or "nothing"


def check_draft(text: str, approved: Sequence[str], known: Sequence[str], violated: Sequence[RuleResult]) -> dict:
    """Compare a model's letter with `approved` letters from blocks and with `known` texts, such as the prompt.

    Return the letter as `text`, with two lists. `outside` has [sentence, flagged words] for each sentence that no approved letter
    has. `unknown` has the figures, dates and articles that no approved letter and no known text has.
    """
    own = {sentence for letter in approved for sentence in _sentences(letter)}
    relations = {result.relation for result in violated}
    outside = [[sentence, list(flags(sentence, relations))] for sentence in _sentences(text) if sentence not in own]
    supported = statements("\n".join([*known, *approved]))
    stated = statements(text)
    unknown = [
        f"the figure {printed}"
        for printed, figure in quantities(text)
        if figure in stated["figures"] - supported["figures"]
    ]
    unknown += [f"the date {day}" for day in sorted(stated["dates"] - supported["dates"])]
    unknown += [f"the article {act} {number}" for act, number in sorted(stated["articles"] - supported["articles"])]
    return {"text": text, "outside": outside, "unknown": list(dict.fromkeys(unknown))}


def flags(sentence: str, relations: Iterable[str]) -> tuple[str, ...]:
    """Return the flagged words of a sentence, each with its class. `relations` has the relations of the findings: "min", "max"."""
    against, flagged = {f"against {relation}" for relation in relations}, []
    for name, words in flagged_words().items():
        if name.startswith("against ") and name not in against:
            continue
        flagged += [
            f"{word} ({name})" for word in words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", sentence, re.I)
        ]
    return tuple(flagged)


@functools.cache
def flagged_words() -> dict[str, list[str]]:
    """Return class -> words that may reverse a finding or a demand, of all languages, from `blocks/LANGUAGE/flags.toml`."""
    words_by_class: dict[str, list[str]] = {}
    for path in sorted(BLOCKS.glob("*/flags.toml")):
        for name, words in tomllib.loads(path.read_text(encoding="utf-8"))["flags"].items():
            words_by_class.setdefault(name.replace("_", " "), []).extend(words)
    return words_by_class


def _sentences(text: str) -> list[str]:
    """Return the sentences of a letter without bullets and numbers, each once."""
    plain = (_MARKS.sub("", " ".join(sentence.split())) for sentence in sentences(text))
    return list(dict.fromkeys(sentence for sentence in plain if re.search(r"\w", sentence)))
