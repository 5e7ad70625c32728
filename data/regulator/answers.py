"""The one text form of an answer, written and parsed here and nowhere else.

    Violations:
    CET1_MIN | C 03.00 r0010 c0010 | 4.31% | min 4.5% | CRR Art. 92(1)(a)
    Directive:
    To the Management Board of ...

A line is rule, cell, value, limit, legal reference; a report without violations has the one line `none`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from data.regulator.render import cell_name, format_figure, format_limit, short_label
from data.regulator.rules import RuleResult

RULE_ID = re.compile(r"[A-Z][A-Z0-9]+(_[A-Z0-9]+)*")


@dataclass(frozen=True)
class Answer:
    """What an answer says: the rules it calls violated, each once and in its order, and the letter (empty if it stopped before)."""

    rule_ids: tuple[str, ...]
    directive: str


def write_answer(violated: Iterable[RuleResult], directive: str, style: str = "cells") -> str:
    """The answer for `violated` (results of `rules.evaluate`) and its letter. `style` is that of `render.render_report`."""
    lines = [write_violation(result, style) for result in violated] or ["none"]
    return "\n".join(["Violations:", *lines, "Directive:", directive])


def write_violation(result: RuleResult, style: str = "cells") -> str:
    """One line of the analysis. In the style "labels" the cell goes by its short label and the law by its first reference."""
    compact = style == "labels"
    return " | ".join(
        (
            result.rule_id,
            short_label(result.cell) if compact else cell_name(result.cell, result.row),
            "not reported" if result.missing else format_figure(result.value, result.unit, result.decimals, compact),
            f"{result.relation} {format_limit(result.limit, result.unit, result.decimals)}",
            re.split(r"[,;]", result.legal)[0] if compact else result.legal,
        )
    )


def parse_answer(text: str) -> Answer | None:
    """Read an answer back; None if it has not that form.

    It must open with `Violations:`, then `none` or lines that begin with something of the form of a rule id. A rule that
    does not exist is kept, so that inventing one counts as a false positive. Only the id of a line is read: a model that
    names the right rule with a wrong figure has found the violation. Without `Directive:` (generation cut short) the
    letter is empty.
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
