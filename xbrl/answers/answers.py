"""Write the text of an answer. No other module writes one; `answer_reader.py` reads it.

    Note:
    "the words of the note" | pledged | applies | EUR 65200000 | Landesbank Mittelrhein | 2025-08-14
    Violations:
    CET1_MIN | C 03.00 r0010 c0010 | 4.31% | min 4.5% | CRR Art. 92(1)(a)
    Directive:
    To the Management Board of ...

Each fact of the bank's note is one line: the words that prove it, kind, `applies` or `does not apply`, amount, the other party
(two clients are joined by ` and `), and the date since when; a part that the note does not mention is `-`. The words come first,
because a model writes from left to right: it quotes the note before it decides. Each violation is one line: rule, cell, value,
limit, legal reference. In short reports a label stands for the cell. Without facts, or without violations, the single line is
`none`.

An answer of the quickstart has the section `Note:` alone. The rules compute the violations from its facts.
"""

from collections.abc import Iterable

from xbrl.read.render import cell_name, format_figure, short_label
from xbrl.rules.note_facts import NoteFact
from xbrl.rules.rules import RuleResult


def write_facts(facts: Iterable[NoteFact]) -> str:
    """Format the section of the note's facts."""
    return "\n".join(["Note:", *(list(map(write_fact, facts)) or ["none"])])


def write_answer(
    violated: Iterable[RuleResult], directive: str, facts: Iterable[NoteFact] = (), style: str = "cells"
) -> str:
    """Format the facts of a note, the violated results of `rules.evaluate` and the letter. `style` is that of the report."""
    lines = [write_violation(result, style) for result in violated] or ["none"]
    return "\n".join([write_facts(facts), "Violations:", *lines, "Directive:", directive])


def write_fact(fact: NoteFact) -> str:
    """Format a fact: `"the words of the note" | pledged | applies | EUR 65200000 | Landesbank Mittelrhein | 2025-08-14`."""
    amount = "-" if fact.amount is None else f"EUR {fact.amount:f}"
    state = "applies" if fact.applies else "does not apply"
    return " | ".join((f'"{fact.quote}"', fact.kind, state, amount, " and ".join(fact.who) or "-", fact.since or "-"))


def write_violation(result: RuleResult, style: str = "cells") -> str:
    """Format one violation. In the style "labels" it names a label in place of the cell: `Client A38`."""
    is_short = style == "labels"
    where = f"{short_label(result.cell)} {result.row}".strip() if is_short else cell_name(result.cell, result.row)
    value = (
        "not reported" if result.missing else format_figure(result.known_value, result.unit, result.decimals, is_short)
    )
    limit = f"{result.relation} {result.printed_limit}"
    return " | ".join((result.rule_id, where, value, limit, result.legal))
