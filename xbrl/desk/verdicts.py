"""What the rules find in a report, and what they say of a model's answer: a verdict on each finding, a check of its letter.

A finding is confirmed only if rule, cell, value, limit and article are all those of the engine or of the desk's decision. One
with a wrong figure is refuted as it stands, and the reason gives the right one. A finding that only a note can show has no
formula: it must follow from the facts that the model read in the note, and is not decidable by rule until a person decides.

The letter of a model is shown beside the decision, and never sent: its figures are checked, its sentences are not. Every sentence
that is not one of the approved blocks is listed, with words of `blocks/LANGUAGE/flags.toml` that may turn a finding round. No
list of words makes a text safe: what is sent is made of blocks alone (`letters.py`).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from xbrl.answers.answer_reader import Claim
from xbrl.answers.letter_scores import flagged_words
from xbrl.answers.statements import quantities, sentences, statements
from xbrl.corpus.examples import FULL, Profile, letter_context
from xbrl.desk.decisions import in_force, limits_without
from xbrl.desk.letters import Context
from xbrl.read.filed_report import Report
from xbrl.read.render import PURE, cell_name, format_figure, format_limit
from xbrl.rules.findings import Finding, apply_findings, concerns, note_rules
from xbrl.rules.remittance import RULE as LATE_FILING
from xbrl.rules.rule_lines import all_results, describe_result
from xbrl.rules.rules import RuleResult

CONFIRMED, REFUTED, OPEN, MISSED = "confirmed", "refuted", "not decidable by rule", "missed"
NOT_COVERED = "not covered"  # by the profile of the model: an engine finding that it was never asked about
BY_RULE = "found by rule"  # without a model
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
    """The engine's results on one report.

    `violated` are the findings, after the desk's `decisions`, which are in force; `about` are findings about the report itself.
    """

    results: tuple[RuleResult, ...]  # of every rule
    about: tuple[RuleResult, ...]
    violated: tuple[RuleResult, ...]
    decisions: tuple[Finding, ...]
    context: Context  # what a letter may mention besides the findings

    def of_state(self, state: str) -> list[RuleResult]:
        """The results of rules with this state."""
        return [result for result in self.results if result.state == state]


def examine(report: Report, earlier: Sequence[Report], decisions: Sequence[Finding]) -> Examination:
    """Evaluate every rule on a report. `earlier` are previous reports of the bank, oldest first.

    Of the `decisions` on the report, those hold that are on its notes as they read now. What others have lifted in an earlier
    report was no breach there.
    """
    everything = all_results(report)
    results = tuple(result for result in everything if result.kind != "quality")
    about = tuple(result for result in everything if result.kind == "quality")
    applicable = [result for result in results if result.state != "not applicable"]
    judged = [result for result in applicable if result.rule_id != LATE_FILING]  # when a file was made is no figure
    states = {result.state for result in judged}
    held = in_force(report, decisions)
    violated = tuple(apply_findings(applicable, held))
    context = replace(
        letter_context(report, applicable, earlier, FULL.rules, held, decisions),
        without=limits_without(report, results, held),
        untested=tuple(one for one in judged if one.state == "undecided" and one.kind != "trigger"),
        unexamined="" if states & {"ok", "violated"} else "undecided" if states else "not applicable",
    )
    return Examination(results, about, violated, tuple(held), context)


@dataclass(frozen=True)
class Verdict:
    """What the rules say of one finding. `result` is the engine's on the same rule, if there is one."""

    verdict: str
    rule: str
    reason: str
    line: str = ""  # as the model wrote it
    claim: Claim | None = None
    result: RuleResult | None = None

    def describe(self) -> dict[str, Any]:
        """All of it as texts. Value and limit are the engine's where it has them."""
        names = ("kind", "title", "cell", "value", "limit", "legal", "formula")
        known: dict[str, Any] = (
            describe_result(self.result) if self.result else dict.fromkeys(names, "") | {"inputs": []}
        )
        if of_note := note_rules().get(self.rule):
            known["title"] = of_note.title
            if not self.result:
                known |= {"kind": "note", "legal": of_note.legal}
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
    """The verdicts on the readable `lines` of an answer, then the findings that the model missed or was not asked about.

    `proposed` is what follows from the facts that the model read in the notes and whose words stand there. `is_decided`: a person
    has decided on every note.
    """
    read = list(dict.fromkeys((line, claim) for line, claim in lines if claim))
    lifts = {claim.rule for _, claim in read if claim.state == "lifts"}
    by_rule: dict[str, list[RuleResult]] = {}
    for one in engine.results:
        by_rule.setdefault(one.rule_id, []).append(one)

    def decided(rule: str) -> list[Finding]:
        return [one for one in engine.decisions if one.rule == rule]

    def truths(rule: str) -> list[tuple[Claim | None, RuleResult]]:
        """The violations of a rule, as a right answer prints them.

        If the answer itself says that a note lifts the rule, its line on the rule only says what the figures say.
        """
        found = [one for one in engine.violated if one.rule_id == rule]
        if not found and rule in lifts:
            found = [one for one in by_rule.get(rule, ()) if one.state == "violated"]
        return [(profile.claim_of(one), one) for one in found]

    def nearest(claim: Claim) -> RuleResult | None:
        """The result of a rule, on the row that the model names if it has one.

        Of rows that meet the rule the engine keeps one: where the model names another, no row and no figure is shown.
        """
        same = by_rule.get(claim.rule, [])
        named = [one for one in same if one.row and one.row.casefold() in claim.where]
        found = next(iter(named or same), None)
        if found and found.row and not named and found.state == "ok":
            return replace(found, row="", value=None, limit=None, inputs=())
        return found

    def of_violation(claim: Claim) -> Judgement:
        """The judgement of a finding."""
        known = truths(claim.rule)
        if same := [pair for pair in known if pair[0] is None or pair[0].where == claim.where]:
            truth, result = min(same, key=lambda pair: len(_differences(claim, *pair)))
            if wrong := _differences(claim, truth, result):
                return REFUTED, f"the rule is violated, but {'; '.join(wrong)}", result
            reason = "by the figures; the answer says that a note lifts it" if claim.rule in lifts else ""
            for one in decided(claim.rule):
                if one.state == "violated" and concerns(one, result):
                    reason = f"the desk has decided: violated ({one.where})"
            return CONFIRMED, reason, result
        if known:
            places = ", ".join(cell_name(one.cell, one.row) for _, one in known)
            return REFUTED, f"the rule is violated at {places}, not where the model says", known[0][1]
        result = nearest(claim)
        if result is None and claim.rule not in note_rules():
            return REFUTED, "no rule has this id", None
        if otherwise := decided(claim.rule):
            return REFUTED, f"the desk has decided otherwise: {otherwise[0].state} ({otherwise[0].where})", result
        if result is None:
            return of_note(claim)
        uncovered = result.state == "not applicable" and result.value is not None
        verdict = OPEN if result.state == "undecided" or uncovered else REFUTED
        return verdict, WHY_NOT_VIOLATED[result.state], result

    def of_note(claim: Claim) -> Judgement:
        """The judgement of a finding that only a note can show."""
        if not report.notes:
            return REFUTED, "only a note of the bank can show this, and the report has none", None
        if is_decided:
            return REFUTED, "the desk has decided on the note, and not that", None
        if profile.name == "quickstart":  # its answers have no facts
            return OPEN, f"only a note shows it; {DECIDE}", None
        follows = [one for one in proposed if one.rule == claim.rule and one.state == "violated"]
        if not follows:
            return REFUTED, "it does not follow from the facts that the model read in the note", None
        result = next(one for one in apply_findings(engine.results, follows) if one.rule_id == claim.rule)
        reason = "it follows from the facts that the model read in the note"
        if wrong := _differences(claim, profile.claim_of(result), result):
            return REFUTED, f"{reason}, but {'; '.join(wrong)}", result
        return OPEN, f"{reason}; {DECIDE}", result

    def of_lifting(claim: Claim) -> Judgement:
        """The judgement of "a note lifts this rule"."""
        found = next((one for one in by_rule.get(claim.rule, ()) if one.state == "violated"), None)
        if own := decided(claim.rule):
            verdict = CONFIRMED if own[0].state == "lifted" else REFUTED
            return verdict, f"the desk has decided: {own[0].state} ({own[0].where})", found
        if not report.notes:
            return REFUTED, "only a note can lift it, and the report has none", found
        changes = "" if found else " it changes nothing, for the rule is not violated;"
        return OPEN, f"the model says that a note lifts it;{changes} {DECIDE}", found

    judges = {"violated": of_violation, "lifts": of_lifting}
    verdicts = []
    for line, claim in read:
        if claim.state in judges:
            verdict, reason, result = judges[claim.state](claim)
            verdicts.append(Verdict(verdict, claim.rule, reason, line, claim, result))
    # In the quickstart a line that names the violation and one that lifts it stand together.
    skip = {one.rule for one in verdicts if one.claim and one.claim.state == "lifts" and one.verdict != REFUTED}
    lifted = {one.rule for one in proposed if one.state == "lifted"}  # by the model's reading
    covered = {rule.id for rule in profile.rules} | set(note_rules())
    for result in engine.violated:
        rule, truth = result.rule_id, profile.claim_of(result)
        said = [claim for _, claim in read if (claim.state, claim.rule) == ("violated", rule)]
        if rule not in covered:
            reason = f"the profile {profile.name} does not cover this rule: the model was not asked about it"
            verdicts.append(Verdict(NOT_COVERED, rule, reason, result=result))
        elif rule in skip or any(truth is None or truth.where == claim.where for claim in said):
            continue
        elif rule in lifted:
            reason = f"the model read in the note that this limit does not bind the bank; {DECIDE}"
            verdicts.append(Verdict(OPEN, rule, reason, result=result))
        else:
            own = decided(rule)
            reason = f"the desk has decided that it is violated ({own[0].where})" if own else ""
            verdicts.append(Verdict(MISSED, rule, reason, result=result))
    return verdicts


def _differences(claim: Claim, truth: Claim | None, result: RuleResult) -> list[str]:
    """What a claim says otherwise than the engine or the desk's decision."""
    known = describe_result(result)
    value, limit = (truth.value, truth.limit) if truth else (result.value, result.limit)
    found = []
    if claim.value != value:
        found.append(f"the value is {known['value'] or 'not known'}, not {_printed(claim.value, result)}")
    if claim.limit != limit or (truth and claim.relation != truth.relation and truth.state == claim.state):
        wrong = f"{claim.relation} {_printed(claim.limit, result)}".strip()
        found.append(f"the limit is {known['limit'] or 'not known'}, not {wrong}")
    if truth and truth.state == claim.state and claim.legal != truth.legal:
        cited = ", ".join(sorted(" ".join(filter(None, article)) for article in claim.legal)) or "nothing"
        found.append(f"the article is {result.legal}, and the model cites {cited}")
    return found


def _printed(value: Decimal | str | None, result: RuleResult) -> str:
    """What a claim says, in the unit of the engine's result."""
    if isinstance(value, Decimal):
        return (
            format_limit(value, result.unit)
            if result.unit in PURE
            else format_figure(value, result.unit, result.decimals)
        )
    return value or "nothing"


def check_draft(text: str, approved: Sequence[str], known: Sequence[str], violated: Sequence[RuleResult]) -> dict:
    """Compare a letter with `approved` letters from blocks and `known` texts, such as the report as the model saw it.

    outside: [sentence that is not in the blocks, the words in it that are flagged]; unknown: figures, dates and articles that
    neither the report nor a rule has.
    """
    own = {sentence for letter in approved for sentence in _sentences(letter)}
    relations = {result.relation for result in violated}
    outside = [[sentence, list(flags(sentence, relations))] for sentence in _sentences(text) if sentence not in own]
    supported = statements("\n".join([*known, *approved]))
    stated = statements(text)
    unknown = [
        f"the figure {printed}" for printed, one in quantities(text) if one in stated["figures"] - supported["figures"]
    ]
    unknown += [f"the date {day}" for day in sorted(stated["dates"] - supported["dates"])]
    unknown += [f"the article {act} {number}" for act, number in sorted(stated["articles"] - supported["articles"])]
    return {"text": text, "outside": outside, "unknown": list(dict.fromkeys(unknown))}


def flags(sentence: str, relations: Iterable[str]) -> tuple[str, ...]:
    """The flagged words of a sentence, each with its class. `relations` are those of the findings ("min", "max")."""
    against, found = {f"against {relation}" for relation in relations}, []
    for name, words in flagged_words().items():
        if name.startswith("against ") and name not in against:
            continue
        found += [f"{word} ({name})" for word in words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", sentence, re.I)]
    return tuple(found)


def _sentences(text: str) -> list[str]:
    """The sentences of a letter without bullets and numbers, each once."""
    plain = (_MARKS.sub("", " ".join(sentence.split())) for sentence in sentences(text))
    return list(dict.fromkeys(sentence for sentence in plain if re.search(r"\w", sentence)))
