"""The letter on a report: written from the engine's findings or by a model, checked, and blocked if it may not be sent."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from xbrl.answers.directives import write_directive
from xbrl.answers.letters import find_dates
from xbrl.desk.engine import Examination
from xbrl.desk.statements import Statement, check_letter, marked, unsupported
from xbrl.desk.support import Support
from xbrl.desk.verdicts import CONFIRMED, MISSED, NOT_COVERED, OPEN, REFUTED, Verdict
from xbrl.read.render import Addressee
from xbrl.read.report import Report

READY, BLOCKED, DRAFT, NONE = "ready", "blocked", "draft", "none"
UNREADABLE = "has the non-numeric value"  # in a warning of the reader
DRAFT_LINE = "DRAFT: not to be sent"


@dataclass(frozen=True)
class Letter:
    """A checked letter. `reasons` say why it is blocked and what the desk must do; none if it is ready."""

    text: str
    statements: tuple[Statement, ...]
    reasons: tuple[str, ...]
    state: str

    def written(self) -> str:
        """The text to be written: as it is if it is ready, with marks in a draft, "" if it is blocked."""
        if self.state == READY:
            return self.text
        if self.state != DRAFT:
            return ""
        pieces = (
            piece if one is None or one.source else f"[UNSUPPORTED {one.kind}: {piece}]"
            for piece, one in marked(self.text, list(self.statements))
        )
        return f"{DRAFT_LINE}\n\n{''.join(pieces)}\n\n{DRAFT_LINE}"


def engine_letter(report: Report, bank: Addressee, engine: Examination) -> str:
    """The letter that follows from the engine's findings (`directives.py`)."""
    return write_directive(engine.violated, bank, report.period, engine.context)


def check(
    text: str,
    report: Report,
    bank: Addressee | None,
    engine: Examination,
    verdicts: Sequence[Verdict],
    support: Support,
    problems: Sequence[str],
    draft: bool,
) -> Letter:
    """Check a letter. `problems` are what stood in the way of the answer; `bank` is None if the letter names no bank."""
    statements = check_letter(text, support)
    reasons = [*problems, *_reasons(report, engine, verdicts)]
    if text and bank and bank.name.casefold() not in text.casefold():
        reasons.append(f"the letter does not name the bank {bank.name}: correct the addressee")
    dates = {date for _, date in find_dates(text)}
    is_supported = all(one.source for one in statements if one.kind == "date")
    if dates and is_supported and report.period not in dates:
        reasons.append(
            f"the letter names {', '.join(sorted(dates))} but not the reference date {report.period}; correct it"
        )
    for one in unsupported(statements):
        reasons.append(f"unsupported {one.kind} {one.text!r}: {one.problem}; correct it against the report")
    if not text:
        return Letter("", (), (*reasons, "there is no letter: write it yourself"), NONE)
    return Letter(text, tuple(statements), tuple(reasons), READY if not reasons else DRAFT if draft else BLOCKED)


def _reasons(report: Report, engine: Examination, verdicts: Sequence[Verdict]) -> Iterator[str]:
    """What the findings have against the letter."""
    for one in verdicts:
        known = one.describe()
        place = f" at {known['cell']}" if known["cell"] else ""
        what = f"{one.rule}{place}"
        figures = ", ".join(filter(None, (known["value"], known["limit"], known["legal"])))
        if one.verdict == REFUTED:
            yield f"refuted: {what}: {known['reason']}; strike it from the letter, or correct it"
        elif one.verdict == OPEN and one.claim and one.claim.state == "lifts" and one.result:
            yield f"{what} is violated, and only the model's reading of a note lifts it: {one.reason}"
        elif one.verdict == OPEN and one.claim and one.claim.state == "violated":
            yield f"not decided: {what}: {known['reason']}; remove it from the letter unless the desk confirms it"
        elif one.verdict == MISSED or (one.verdict == NOT_COVERED and known["kind"] == "breach"):
            yield f"{one.verdict}: {what} ({figures}); add it to the letter{f', unless {one.reason}' if one.reason else ''}"
    yield from (
        f"the report is incomplete: {reason}; obtain the file and analyse again" for reason in report.incomplete
    )
    objects = engine.violated or any(one.verdict in (CONFIRMED, OPEN) for one in verdicts)
    if not objects:
        if not engine.of_state("ok", "violated"):
            yield "the letter objects to nothing, but no rule could be evaluated on this report: nothing was examined"
        for warning in report.warnings:
            if UNREADABLE in warning:
                yield f"the letter objects to nothing, but a figure cannot be read ({warning}); ask the bank to correct it first"
        for one in engine.contradictions:
            yield (
                f"the letter objects to nothing, but the report is doubtful ({one.rule_id}: {one.reason}); ask the bank to "
                "correct it first"
            )
