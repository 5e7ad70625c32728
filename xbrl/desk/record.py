"""The record of one report: everything that the desk knows about it, as plain JSON. The pages are written from it alone.

The decision letter is made of approved blocks about the violations that the rules found, corrected by a person's decisions on
the notes. The answer of a model changes nothing in the letter: it is a proposal, shown beside the letter.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from xbrl.answers.answer_reader import Claim, letter_in, parse_answer, read_facts, read_lines
from xbrl.answers.answers import write_fact
from xbrl.answers.profiles import PROFILES
from xbrl.desk.decisions import ReadNote, read_notes
from xbrl.desk.derivation import unproven
from xbrl.desk.letters import LANGUAGES, Hearing, draft_mark, plain_name, write_letter
from xbrl.desk.verdicts import (
    BY_RULE,
    OPEN,
    REFUTED,
    VERDICTS,
    Examination,
    Verdict,
    check_draft,
    examine,
    judge_answer,
)
from xbrl.read.filed_report import Report
from xbrl.read.render import Addressee, cell_name
from xbrl.read.report_notes import EMPTY_NOTE
from xbrl.rules.findings import COLUMNS, Finding, apply_findings, can_override, note_rules
from xbrl.rules.note_facts import NoteFact, consequences
from xbrl.rules.remittance import RULE as LATE_FILING
from xbrl.rules.rule_lines import describe_result
from xbrl.rules.rules import RuleResult

LEI = re.compile(r"(?!.*[A-Z]{13})[0-9A-Z]{18}[0-9]{2}")  # 13 letters in a row may be words
CODE = re.compile(r"(?!.*[A-Za-z]{13})(?=.*\d)[A-Za-z0-9]+(?:[-_./: ][A-Za-z0-9]+){0,3}", re.ASCII)
WORD, LONG_WORD = re.compile(r"[^\W\d_]{2,}"), re.compile(r"[^\W\d_]{3,}")
LEGAL_FORM = re.compile("AB|AG|AS|ASA|BV|Bank|GmbH|Inc|KG|KGaA|Ltd|NV|Oyj|SA|SE|SpA|eG|plc")
READY, BLOCKED = "ready", "not ready"
UNREAD_NOTE = re.compile(r"\b(?:foot)?notes?\b")  # in a warning of the reader
UNREADABLE = "has the non-numeric value"  # in a warning of the reader


@dataclass(frozen=True)
class Reply:
    """The reply of a model to the question about a report, or the reason why the model was not asked."""

    profile: str
    prompt: tuple[dict, ...] = ()
    text: str | None = None  # None if the model was not asked
    problem: str = ""  # why it was not asked
    cut_short: bool = False  # whether the answer reached its maximum length
    control_tokens: tuple[str, ...] = ()  # texts of the model's control tokens that stand in the report


@dataclass(frozen=True)
class Case:
    """A report with its bank, earlier reports and decisions. `reply` is None in an analysis without a model."""

    report: Report
    bank: Addressee
    earlier: tuple[Report, ...] = ()
    decisions: tuple[Finding, ...] = ()  # on the report and on the earlier ones
    reply: Reply | None = None
    # CON or IND if the bank files several reports as of this date, so that their letters differ; else "".
    scope: str = ""
    known: frozenset[str] = frozenset()  # names in the report that stand in the register, so a person has checked them
    others: tuple[str, ...] = ()  # names of other banks of the register that stand in a note
    is_registered: bool = True  # False if there is a register and it does not have the bank
    hearing: Hearing = Hearing()
    depends: dict = field(default_factory=dict, hash=False)  # hashes of all inputs of the analysis, for the audit


@dataclass(frozen=True)
class Form:
    """The form of the letters: the legal basis (`rules/bases.json`) and the language."""

    basis: str = "model"
    language: str = "en"


def make_record(case: Case, form: Form = Form()) -> dict:  # noqa: B008 (frozen)
    """Examine a report, judge the model's answer if there is one, and write the letter. Return the record."""
    report, reply = case.report, case.reply
    engine = examine(report, case.earlier, case.decisions)
    overrides = tuple(
        (line, result)
        for line in engine.decisions
        for result in (*engine.results, *engine.violated)
        if line.state == "override" and (can_override(line, result) or line.rule == result.rule_id in note_rules())
    )
    engine = replace(
        engine, context=replace(engine.context, scope=case.scope, hearing=case.hearing, overrides=overrides)
    )
    text = reply.text if reply and reply.text else ""
    facts, void_facts = read_facts(text) or ([], 0)
    notes, unquoted = read_notes(report, engine.results, engine.decisions, facts)
    model_facts = [fact for note in notes for fact in note.facts]
    proposed = consequences(report, engine.results, model_facts)
    letter = _write(engine.violated, case, engine, form, grouped=True)
    draft = {"text": "", "outside": [], "unknown": [], "problems": []}
    warnings = [*report.warnings, *(f"incomplete: {reason}" for reason in report.incomplete)]
    if reply is None:
        verdicts = [Verdict(BY_RULE, result.rule_id, "", result=result) for result in engine.violated]
    else:
        lines = read_lines(text)
        is_decided = bool(notes) and all(note.decisions for note in notes)
        profile = PROFILES[reply.profile]
        seen, decisions = profile.as_seen(report, case.decisions)
        judged = engine if seen is report else examine(seen, case.earlier, decisions)
        follows = proposed if seen is report else consequences(seen, judged.results, model_facts)
        verdicts = judge_answer(seen, judged, profile, lines, follows, is_decided)
        draft = _draft(letter_in(text), case, engine, proposed, form)
        draft["problems"] = list(_problems(reply, lines, void_facts))
        if reply.control_tokens:
            named = ", ".join(reply.control_tokens)
            warnings.append(f"it spells control tokens of the model: {named}; see who wrote them, and why")
    reasons = [*_reasons(case, engine, verdicts, notes, letter), *unproven(letter, case, engine, form)]
    mark = draft_mark(form.language)  # read for every report, so that a wrong block fails before a letter needs it
    findings = [own for own in verdicts if own.verdict != REFUTED]
    return {
        "entity": report.entity,
        "period": report.period,
        "bank": case.bank.name,
        "format": report.format,
        "currency": report.currency,
        "amounts": report.amounts,
        "files": [path.name for path in report.files or (report.path,)],
        "facts": len(report.facts),
        "earlier": [old.period for old in case.earlier],
        "by": "engine" if reply is None else f"engine, with a model of the profile {reply.profile}",
        "has_findings": bool(findings) or any(result.state != "warning" for result in engine.about),
        "counts": {verdict: n for verdict in VERDICTS if (n := sum(own.verdict == verdict for own in verdicts))},
        "findings": [verdict.describe() for verdict in verdicts],
        "about_the_report": [describe_result(result) for result in engine.about],
        "duties": [describe_result(result) for result in engine.of_state("triggered")],
        "undecided": [describe_result(result) for result in engine.of_state("undecided")],
        "skipped": [{"rule": rule.rule_id, "reason": rule.reason} for rule in engine.of_state("not applicable")],
        "met": [result.rule_id for result in engine.of_state("ok")],
        "decisions": [
            {name: getattr(line, name) for name in ("rule", "state", "cell", "legal", "where", "reason", "second")}
            for line in engine.decisions
        ],
        "notes": [_note(note) for note in notes],
        "columns": ",".join(COLUMNS),
        "refuted_facts": [write_fact(fact) for fact in unquoted],
        "warnings": warnings,
        "control_tokens": list(reply.control_tokens) if reply else [],
        "letter": {
            "state": BLOCKED if reasons else READY,
            "reasons": reasons,
            "text": f"{mark}\n\n{letter}\n\n{mark}" if reasons else letter,
        },
        "draft": draft,
    }


def _write(violated: Sequence, case: Case, engine: Examination, form: Form, **style: Any) -> str:
    return write_letter(violated, case.bank, case.report.period, engine.context, **vars(form), **style)


def _draft(text: str, case: Case, engine: Examination, proposed: Sequence[Finding], form: Form) -> dict:
    """Compare the model's letter with letters from blocks: on the violations as decided, and as the model proposes them."""
    versions = [engine.violated, tuple(apply_findings(engine.results, proposed))] if proposed else [engine.violated]
    forms = itertools.product(versions, sorted({"model", form.basis}), LANGUAGES, (False, True))
    approved = [
        _write(violated, case, engine, Form(basis, language), short=short) for violated, basis, language, short in forms
    ]
    known = [str(message.get("content") or "") for message in (case.reply.prompt if case.reply else ())]
    known += [note.text for note in case.report.notes]
    return check_draft(text, approved, known, versions[-1])


def is_name(text: str) -> bool:
    """Return whether a text is surely a name: an LEI or similar code, one word, or up to three words with a legal form.

    Banks choose the codes of their clients. A code may spell a sentence, with or without white space, so it is checked.
    """
    is_code = CODE.fullmatch(text) and len(WORD.findall(text)) <= 2 and len(LONG_WORD.findall(text)) <= 1
    is_word = text.isalpha() and len(text) <= 12 and text[1:].islower()
    parts = text.replace(".", "").split()
    is_firm = 0 < len(parts) <= 3 and all(part.isalpha() and not part.islower() for part in parts)
    return bool(LEI.fullmatch(text) or is_code or is_word or (is_firm and LEGAL_FORM.fullmatch(parts[-1])))


def _reasons(
    case: Case, engine: Examination, verdicts: Sequence[Verdict], notes: Sequence[ReadNote], letter: str
) -> Iterator[str]:
    """Yield the reasons why the decision letter is not ready. Each says what a person must do."""
    report = case.report
    for note in notes:
        if not note.decisions:
            proposal = f"; the model proposes: {'; '.join(map(write_fact, note.facts))}" if note.facts else ""
            yield (
                f"nobody has decided on note {note.id} ({note.text[:120]!r}{proposal}): read it, and copy a line of this page "
                "into a file for --findings"
            )
    for warning in report.warnings:
        if warning != EMPTY_NOTE and UNREAD_NOTE.search(warning):
            yield f"a note was not read as a whole ({warning}); read it in the file, and ask the bank to file it again"
    for decision in case.decisions:
        if decision.period == report.period and decision not in engine.decisions:
            name = decision.note or "(without its 16 digits)"
            yield (
                f"{decision.where or 'a decision'} decides nothing: it is on note {name}, which the "
                "report does not have in these words; read the note again and correct the line"
            )
    for own in verdicts:
        if own.verdict == OPEN and own.claim and own.result and own.result.kind != "note":
            yield (
                f"the model says that {own.rule} is violated, and the figures do not decide it ({own.describe()['reason']}): "
                "ask the bank, or decide in a file for --findings"
            )
    context = engine.context
    printed = (*engine.violated, *context.triggers, *context.lifted, *context.untested)
    names = [result.row for result in printed if result.row and plain_name(result.row) in letter]
    names += [case.bank.name] if case.bank.name == case.bank.entity else []
    for name in dict.fromkeys(name for name in names if name not in case.known and not is_name(name)):
        yield (
            f"{name[:120]!r} is not surely a name, and the letter prints it: add it to the register if it is one; else ask "
            "the bank to file the report again"
        )
    for reason in report.incomplete:
        yield f"the report is incomplete: {reason}; then analyse again"
    if any(result.rule_id != LATE_FILING for result in engine.violated):
        return
    if context.unexamined:
        yield {
            "not applicable": "none of the rules applies to this report, which has none of the templates that they read",
            "undecided": "none of the rules that apply can be decided on this report, as the page lists below",
        }[context.unexamined] + ": nothing was examined"
    if engine.violated or context.unexamined:
        return
    doubt = "the letter objects to nothing, but"
    for rules, why in _untestable(context.untested):
        yield f"{doubt} {rules} cannot be tested ({why}); ask the bank for the figure"
    for warning in report.warnings:
        if UNREADABLE in warning:
            yield f"{doubt} a figure cannot be read ({warning}); ask the bank to correct it first"
    for result in engine.about:
        if result.state == "violated" and result.rule_id in ("ACCURACY", "PLAUSIBLE"):  # `derivation` names the others
            yield f"{doubt} the report is doubtful ({result.rule_id}: {result.reason}); ask the bank to correct it first"


def _untestable(untested: Iterable[RuleResult]) -> list[tuple[str, str]]:
    """Return (requirements on one figure that cannot be tested, reason), one pair for each figure.

    Leave out requirements whose limit is not reported: a bank without its own requirement reports none. The letter lists them
    as not tested.
    """
    by_figure: dict[str, list[RuleResult]] = {}
    for result in (result for result in untested if result.kind == "breach"):
        judged, *limits = result.inputs
        if not isinstance(judged.value, Decimal) or all(part.source != "not reported" for part in limits):
            by_figure.setdefault(cell_name(result.cell, result.row), []).append(result)
    return [(", ".join(result.rule_id for result in group), group[0].reason) for group in by_figure.values()]


def _problems(reply: Reply, lines: Sequence[tuple[str, Claim | None]], void_facts: int) -> Iterator[str]:
    """Yield the problems of the model's answer, whose findings are `lines`."""
    if reply.text is None:
        yield f"the model was not asked: {reply.problem}"
        return
    if reply.cut_short:
        yield "the answer was cut short; analyse again with a larger --max-new-tokens"
    if PROFILES[reply.profile].states_facts_alone:
        if read_facts(reply.text) is None:
            yield "the answer has no section `Note:`"
    elif parse_answer(reply.text) is None:
        yield "the answer has no findings that can be read, not even `none`"
    void = [f"{void_facts} lines of the section Note"] if void_facts else []
    for line in [*(line for line, claim in lines if claim is None), *void]:
        yield f"a part of the answer cannot be read: {line[:200]!r}"
    for line in (line for line, claim in lines if claim and claim.contradicts_itself):
        yield f"the figures of a line meet its rule: {line[:200]!r}"


def _note(note: ReadNote) -> dict:
    decisions = [f"{line.rule or 'nothing follows'}: {line.state} ({line.where})" for line in note.decisions]
    return vars(note) | {"decisions": decisions, "facts": [_fact(fact) for fact in note.facts]}


def _fact(fact: NoteFact) -> dict:
    return {
        "kind": fact.kind,
        "state": "applies" if fact.applies else "does not apply",
        "amount": "" if fact.amount is None else f"EUR {fact.amount:f}",
        "who": " and ".join(fact.who),
        "since": fact.since,
        "quote": fact.quote,
    }
