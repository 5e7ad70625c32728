"""Everything that the desk knows about one report, as plain JSON: the pages are written from it alone."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data.regulator.answer_reader import letter_in, parse_answer, read_lines
from data.regulator.findings import Finding
from data.regulator.render import Addressee
from data.regulator.report import Report
from data.regulator.rules import RuleResult
from desk.engine import Examination, describe_result, examine
from desk.letter import Letter, check, engine_letter
from desk.profiles import PROFILES
from desk.support import support_for
from desk.verdicts import CONFIRMED, OPEN, REFUTED, VERDICTS, Verdict, engine_verdicts, judge_answer
from eval.regulator.measures import not_demanded


@dataclass(frozen=True)
class Reply:
    """What became of the question to a model. `text` is None if it could not be asked; `problem` says why.

    control_tokens: the texts of the model's control tokens that stand in the report.
    """

    profile: str
    prompt: tuple[dict, ...] = ()
    text: str | None = None
    problem: str = ""
    cut_short: bool = False
    control_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A report with what belongs to it. `reply` is None without a model."""

    report: Report
    bank: Addressee
    earlier: tuple[Report, ...] = ()
    decisions: tuple[Finding, ...] = ()
    reply: Reply | None = None

    @property
    def name(self) -> str:
        """Bank and date."""
        return f"{self.report.entity} {self.report.period}"


def make_record(case: Case, draft: bool) -> dict:
    """Examine a report, judge the answer of the model if there is one, and check the letter."""
    engine = examine(case.report, case.earlier, case.decisions)
    if case.reply is None:
        verdicts, unread = engine_verdicts(engine), []
        text, problems = engine_letter(case.report, case.bank, engine), _unread_notes(case)
    else:
        verdicts, unread, text, problems = _judge_reply(case, engine, case.reply)
    profile = PROFILES[case.reply.profile if case.reply else "full"]
    open_claims = [one.claim for one in verdicts if one.verdict == OPEN and one.claim and one.claim.state == "violated"]
    if text and not any(one.verdict == OPEN for one in verdicts):  # an open finding may change a measure
        required = profile.measures(engine.violated, engine.context)
        for one in not_demanded(required, text):
            demanded = f"the measure on {one['subject']} within {one['deadline_days']} days"
            problems.append(f"the letter does not demand {demanded}; add it")
    support = support_for(case.report, case.bank, engine, case.earlier, profile, open_claims)
    named = None if profile.name == "quickstart" else case.bank
    letter = check(text, case.report, named, engine, verdicts, support, problems, draft)
    return _as_json(case, engine, verdicts, unread, letter)


def _unread_notes(case: Case) -> list[str]:
    """The notes that nobody has read: without a model, and without a decision of the desk on this report."""
    if case.decisions:
        return []
    ending = "no rule reads it; decide in a file for --findings what follows from it (state benign: nothing)"
    return [f"a note of the bank: {note.text[:200]!r}: {ending}" for note in case.report.notes]


def _judge_reply(case: Case, engine: Examination, reply: Reply) -> tuple[list[Verdict], list[str], str, list[str]]:
    """(verdicts, lines that cannot be read, letter, problems with the answer)."""
    profile = PROFILES[reply.profile]
    if reply.text is None:
        problem = f"the model was not asked: {reply.problem}"
        return judge_answer(case.report, engine, profile, ()), [], "", [problem]
    problems = []
    if reply.cut_short:
        problems.append("the answer was cut short; analyse again with a larger --max-new-tokens")
    if parse_answer(reply.text) is None:
        problems.append("the answer has no findings that can be read, not even `none`; write the letter yourself")
    lines = read_lines(reply.text)
    unread = [line for line, claim in lines if claim is None]
    problems += [f"a line of the answer cannot be read: {line[:200]!r}; check it against the report" for line in unread]
    return judge_answer(case.report, engine, profile, lines), unread, letter_in(reply.text), problems


def _as_json(
    case: Case, engine: Examination, verdicts: Sequence[Verdict], unread: Sequence[str], letter: Letter
) -> dict:
    report, counts = case.report, Counter(one.verdict for one in verdicts)
    control = list(case.reply.control_tokens) if case.reply else []
    lifted = {one.rule for one in verdicts if one.claim and (one.claim.state, one.verdict) == ("lifts", CONFIRMED)}
    found = [one for one in verdicts if one.verdict != REFUTED and one.rule not in lifted]
    return {
        "entity": report.entity,
        "period": report.period,
        "bank": case.bank.name,
        "format": report.format,
        "currency": report.currency,
        "files": [path.name for path in report.files or (report.path,)],
        "facts": len(report.facts),
        "earlier": [old.period for old in case.earlier],
        "by": "engine" if case.reply is None else f"model, profile {case.reply.profile}",
        "has_findings": bool(found or engine.about or unread),
        "counts": {verdict: counts[verdict] for verdict in VERDICTS if counts[verdict]},
        "findings": [one.describe() for one in verdicts],
        "about_the_report": [describe_result(one) for one in engine.about],
        "duties": [describe_result(one) for one in engine.of_state("triggered")],
        "undecided": [describe_result(one) for one in engine.of_state("undecided")],
        "skipped": [{"rule": one.rule_id, "reason": _why_skipped(one)} for one in engine.of_state("not applicable")],
        "met": [one.rule_id for one in engine.of_state("ok")],
        "decisions": [
            {"rule": one.rule, "state": one.state, "cell": one.cell, "legal": one.legal, "where": one.where}
            for one in engine.decisions
        ],
        "notes": [note.text for note in report.notes],
        "warnings": [*report.warnings, *(f"incomplete: {reason}" for reason in report.incomplete), *_control(control)],
        "control_tokens": control,
        "letter": {
            "state": letter.state,
            "reasons": list(letter.reasons),
            "text": letter.written(),
            "statements": [
                {"kind": one.kind, "text": one.text, "source": one.source, "problem": one.problem}
                for one in letter.statements
            ],
        },
    }


def _control(tokens: Sequence[str]) -> list[str]:
    return (
        [f"it spells control tokens of the model: {', '.join(tokens)}; see who wrote them, and why"] if tokens else []
    )


def _why_skipped(result: RuleResult) -> str:
    return result.reason or "it does not apply"
