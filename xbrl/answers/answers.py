"""The text format of an answer. Written here and nowhere else; `answer_reader.py` reads it.

    Note:
    pledged | applies | EUR 65200000 | Landesbank Mittelrhein | 2025-08-14 | "the words of the note"
    Violations:
    CET1_MIN | C 03.00 r0010 c0010 | 4.31% | min 4.5% | CRR Art. 92(1)(a)
    Directive:
    To the Management Board of ...

Each fact of the bank's note is one line: kind, `applies` or `does not apply`, amount, the other party (two clients are joined
by ` and `), since when, and the words that prove it; what the note does not say is `-`. Each violation is one line: rule,
cell, value, limit, legal reference. Without facts, or without violations, the single line is `none`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from xbrl.answers.notes import write_fact
from xbrl.read.render import PURE, cell_name, format_figure, short_label
from xbrl.rules.note_facts import NoteFact
from xbrl.rules.rules import RuleResult


def write_answer(
    violated: Iterable[RuleResult], directive: str, style: str = "cells", facts: Iterable[NoteFact] = ()
) -> str:
    """Format the facts of a note, the violated results of `rules.evaluate` and the letter as one answer.

    `style` is "cells" or "labels", as in `render.render_report`.
    """
    stated = [write_fact(fact) for fact in facts] or ["none"]
    lines = [write_violation(result, style) for result in violated] or ["none"]
    return "\n".join(["Note:", *stated, "Violations:", *lines, "Directive:", directive])


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
    cell = cell_name(result.cell, result.row)
    value = "not reported"
    if not result.missing:
        value = format_figure(result.known_value, result.unit, result.decimals, compact)
    limit = result.printed_limit
    if compact:
        cell = f"{short_label(result.cell)} {result.row}".strip()
        if result.unit not in PURE:
            limit = format_figure(result.known_limit, result.unit, result.decimals, compact)
    return " | ".join(
        (
            result.rule_id,
            cell,
            value,
            f"{result.relation} {limit}",
            re.split(r"[,;]", result.legal)[0] if compact else result.legal,
        )
    )
