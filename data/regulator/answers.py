"""The text format of an answer. This is the only module that writes or parses it.

    Violations:
    CET1_MIN | C 03.00 r0010 c0010 | 4.31% | min 4.5% | CRR Art. 92(1)(a)
    Directive:
    To the Management Board of ...

Each violation is one line: rule, cell, value, limit, legal reference. For a report without violations the single line
is `none`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from data.regulator.render import cell_name, format_figure, format_limit, short_label
from data.regulator.rules import RuleResult

RULE_ID = re.compile(r"[A-Z][A-Z0-9]+(_[A-Z0-9]+)*")


@dataclass(frozen=True)
class Answer:
    """A parsed answer.

    `rule_ids` are the rules reported as violated, without duplicates, in the order of the answer. `directive` is the
    letter; it is empty if the answer ended before the letter.
    """

    rule_ids: tuple[str, ...]
    directive: str


def write_answer(violated: Iterable[RuleResult], directive: str, style: str = "cells") -> str:
    """Format the violated results of `rules.evaluate` and the letter as one answer.

    `style` is "cells" or "labels", as in `render.render_report`.
    """
    lines = [write_violation(result, style) for result in violated] or ["none"]
    return "\n".join(["Violations:", *lines, "Directive:", directive])


@dataclass(frozen=True)
class Check:
    """One line of an answer that checks requirement after requirement: `LCR 93% < 100%: LCR_MIN, CRR Art. 412(1)`."""

    what: str  # the ratio, or what a note is about
    comparison: str  # "93% < 100%", with its working "104% - 9% = 95% < 100%"; empty if nothing is compared
    verdict: str = "met"  # or the id of the violated rule, or "lifts LCR_MIN"
    legal: str = ""  # article, if the verdict is not "met"

    def __str__(self) -> str:
        head = f"{self.what} {self.comparison}".rstrip()
        return f"{head}: {self.verdict}" + (f", {self.legal}" if self.legal else "")


def write_checks(checks: Iterable[Check], directive: str) -> str:
    """Format an answer of the second form: every check, then the letter."""
    return "\n".join(["Checks:", *map(str, checks), "Directive:", directive])


def write_violation(result: RuleResult, style: str = "cells") -> str:
    """Format one violation as a line.

    The style "labels" is compact: it prints the cell's short label and only the first legal reference.
    """
    compact = style == "labels"
    return " | ".join(
        (
            result.rule_id,
            short_label(result.cell) if compact else cell_name(result.cell, result.row),
            "not reported"
            if result.missing
            else format_figure(result.known_value, result.unit, result.decimals, compact),
            f"{result.relation} {format_limit(result.known_limit, result.unit, result.decimals)}",
            re.split(r"[,;]", result.legal)[0] if compact else result.legal,
        )
    )


def parse_answer(text: str) -> Answer | None:
    """Parse an answer. Returns None if the text does not have the format of an answer.

    The text must start with `Violations:`, followed by `none` or by lines that start with a syntactically valid rule
    id. Only the id of a line is read, so a model that names the right rule with a wrong figure still gets credit for
    it. An id that matches no rule is kept and counts as a false positive. If `Directive:` is missing because generation
    was cut short, the directive is empty.
    """
    head, marker, directive = text.strip().partition("\nDirective:")
    lines = [line.strip() for line in head.splitlines() if line.strip()]
    if not lines or lines[0] != "Violations:" or len(lines) == 1:
        return None
    if lines[1:] == ["none"]:
        return Answer((), directive.strip())
    ids = [line.partition("|")[0].strip() for line in lines[1:]]
    if not all(RULE_ID.fullmatch(rule_id) for rule_id in ids):
        return None
    return Answer(tuple(dict.fromkeys(ids)), directive.strip())
