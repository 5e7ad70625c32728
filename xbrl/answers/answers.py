"""Write the text of an answer. No other module writes one; `answer_reader.py` reads it.

The long form lists the violations:

    Note:
    pledged | applies | EUR 65200000 | Landesbank Mittelrhein | 2025-08-14 | "the words of the note"
    Violations:
    CET1_MIN | C 03.00 r0010 c0010 | 4.31% | min 4.5% | CRR Art. 92(1)(a)
    Directive:
    To the Management Board of ...

Each fact of the bank's note is one line: kind, `applies` or `does not apply`, amount, the other party (two clients are joined
by ` and `), the date since when, and the words that prove it; a part that the note does not mention is `-`. Each violation is
one line: rule, cell, value, limit, legal reference. Without facts, or without violations, the single line is `none`.

The short form compares figure after figure with its limits, because a small model finds only the breaches that it has compared:

    Note:
    pledged | applies | EUR 41000000 | Landesbank Mittelrhein | 2025-08-14 | "the words of the note"
    Checks:
    CET1 ratio 7.31% min 4.5%: met
    min 9.34%: OCR_CET1, CRD Art. 141a(a)
    LCR 601610 / 598000 = 100.6% = 100.6%: met
    Liquidity buffer 601610 k - 41000 k = 560610 k: PLEDGED_COUNTED, 2015/61 Art. 7(2)
    LCR 560610 / 598000 = 93.74% min 100%: LCR_PLEDGED, 2015/61 Art. 4(2)
    Directive:
    To the Management Board of ...

A verdict is `met`, the violated rule with its article, or `lifts RULE`. It comes after the two numbers that it compares, because a
model writes from left to right: a sign between them would have to be right before the limit is written. A line that begins with
`min` or `max` compares the figure of the line above. A computed figure comes after its working: a ratio is compared with its limit,
or with the reported ratio (`=`, `!=`); an amount that was wrongly counted is subtracted.
The quickstart has no section `Note:`. It states the fact of a note in a check (`SUBJECTS`): `We gave A38 no voice in B95, so
separate clients: met`. Its lines have signs: `CET1 ratio 7.31% >= 4.5%: met`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from xbrl.read.render import cell_name, format_figure
from xbrl.rules.note_facts import NoteFact
from xbrl.rules.rules import RuleResult

# Kind of note -> its name in a check of the quickstart if it applies, and if it does not.
SUBJECTS = {
    "pledged": ("pledged assets", "free assets"),
    "connected": ("connected clients", "separate clients"),
    "waiver": ("exempt", "bound"),
}
_LIMITS = {">=": "min", "<": "min", "<=": "max", ">": "max"}


def write_answer(violated: Iterable[RuleResult], directive: str, facts: Iterable[NoteFact] = ()) -> str:
    """Format the facts of a note, the violated results of `rules.evaluate` and the letter as one answer of the long form."""
    stated = [write_fact(fact) for fact in facts] or ["none"]
    lines = [write_violation(result) for result in violated] or ["none"]
    return "\n".join(["Note:", *stated, "Violations:", *lines, "Directive:", directive])


def write_fact(fact: NoteFact) -> str:
    """Format a fact: `pledged | applies | EUR 65200000 | Landesbank Mittelrhein | 2025-08-14 | "the words of the note"`."""
    amount = "-" if fact.amount is None else f"EUR {fact.amount:f}"
    state = "applies" if fact.applies else "does not apply"
    return " | ".join((fact.kind, state, amount, " and ".join(fact.who) or "-", fact.since or "-", f'"{fact.quote}"'))


@dataclass(frozen=True)
class Check:
    """One line of the short form: `LCR 93% < 100%: LCR_MIN, CRR Art. 412(1)`."""

    subject: str  # the ratio, or the subject of a note
    figure: str = ""  # "93%", with its working "104% - 9% = 95%"
    sign: str = ""  # between figure and limit: "<", or "min"; empty if nothing is compared
    limit: str = ""
    verdict: str = "met"  # or the id of the violated rule, or "lifts LCR_MIN"
    legal: str = ""  # article, if the verdict is not "met"

    def __str__(self) -> str:
        head = " ".join(filter(None, (self.subject, self.figure, self.sign, self.limit)))
        return f"{head}: {self.verdict}" + (f", {self.legal}" if self.legal else "")


def write_checks(checks: Iterable[Check], directive: str, facts: Iterable[NoteFact] | None = None) -> str:
    """Format an answer of the short form: the facts of the note, every check, the letter. The quickstart has `facts` None."""
    stated = [] if facts is None else ["Note:", *(list(map(write_fact, facts)) or ["none"])]
    lines, last = [], ""
    for check in checks:
        if facts is not None:
            check = replace(check, sign=_LIMITS.get(check.sign, check.sign))
        figure = f"{check.subject} {check.figure} "
        is_more = figure == last and " " not in check.figure  # a figure with its working is repeated on every line
        lines.append(str(check).removeprefix(figure) if is_more else str(check))
        last = figure
    return "\n".join([*stated, "Checks:", *(lines or ["none"]), "Directive:", directive])


def write_violation(result: RuleResult) -> str:
    """Format one violation as a line of the long form."""
    value = "not reported" if result.missing else format_figure(result.known_value, result.unit, result.decimals)
    limit = f"{result.relation} {result.printed_limit}"
    return " | ".join((result.rule_id, cell_name(result.cell, result.row), value, limit, result.legal))
