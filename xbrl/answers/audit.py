"""An audit of the measures: answers that are wrong, or right, in one known way, and what each measure says of them.

A measure that cannot tell a wrong answer from a right one would reward a model for it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from common.errors import UserError
from xbrl.answers.answer_reader import RULE_ID, read_fact, read_facts, read_line
from xbrl.answers.answers import write_fact
from xbrl.answers.letter_scores import deadlines
from xbrl.answers.scores import score_answers, true_answers
from xbrl.answers.statements import QUANTITY
from xbrl.rules.note_facts import NoteFact

MEASURES = ("F1", "macro F1", "exact", "notes F1", "facts F1", "letter support", "measures", "ROUGE-L")
HEADINGS = ("Note:", "Violations:", "Checks:")
GARBAGE = "The report of the bank is a report of the bank."
_CITATION = re.compile(r"(?<=Art\. )\d+\w*|(?<=Articles )\d+\w*|(?<=Article )\d+\w*|(?<=Annex )[IVX]+")
_FIGURE = re.compile(rf"(?<![\w.(/-])(?<![A-Z] ){QUANTITY}(?![\w(/]|[-.]\w)")  # but not the 76.00 of a table C 76.00


def audit(examples: Sequence[dict]) -> dict[str, dict[str, float | None]]:
    """Kind of answer -> measure -> value, on examples of the regulator's task. `None` where a measure says nothing.

    `CHANGES` has the kinds; one more has the own answers where something is violated, and garbage elsewhere.

    Raises `UserError` if the examples are of another task.
    """
    truths = true_answers(examples, "the examples of the audit")
    if truths is None:
        raise UserError("the audit needs examples of bank reports; none of these has violations")
    own = [example["messages"][-1]["content"] for example in examples]
    answers = {name: [change(text) for text in own] for name, change in CHANGES.items()}
    answers["right, garbage on clean reports"] = [
        text if truth.rule_ids else GARBAGE for text, truth in zip(own, truths, strict=True)
    ]
    if not any(read_facts(text) for text in own):  # answers that do not state what notes say
        answers = {name: texts for name, texts in answers.items() if not name.startswith("notes ")}
    return {name: _measures(examples, texts) for name, texts in answers.items()}


def _measures(examples: Sequence[dict], texts: Sequence[str]) -> dict[str, float | None]:
    result = score_answers(examples, texts, "the examples of the audit", None)
    return {
        "F1": result["violations"]["micro"]["f1"],
        "macro F1": result["violations"]["macro_f1"],
        "exact": result["violations"]["exact"],
        "notes F1": result["notes"]["f1"] if result["notes"] else None,
        "facts F1": result["facts"]["f1"],
        "letter support": result["letters"]["supported"],
        "measures": result["measures"]["right"] if result["measures"] else None,
        "ROUGE-L": result["rouge_l"]["f"],
    }


def wrong_cells(answer: str) -> str:
    """The answer with another row, client or ratio in every line and every cell of the letter."""
    lines, letter = _parts(answer)
    changed = []
    for line in lines:
        fields = line.split(" | ")
        if len(fields) == 5:
            fields[1] = f"{fields[1]} other"
            line = " | ".join(fields)
        elif read_line(line):
            line = f"Other {line}"
        changed.append(line)
    return _joined(changed, re.sub(r"\br0", "r9", letter))


def with_facts(answer: str, change: Callable[[NoteFact], NoteFact]) -> str:
    """The answer with every fact of its note changed."""
    lines = [(line, read_fact(line)) for line in answer.split("\n")]
    return "\n".join(write_fact(change(fact)) if fact else line for line, fact in lines)


def invented_rule(answer: str) -> str:
    """The answer with a violation of a rule that does not exist, in the form of the answer's lines."""
    lines, letter = _parts(answer)
    new = "INVENTED_RULE | C 01.00 r0010 c0010 | 1% | min 2% | CRR Art. 1"
    if "Checks:" in lines:
        new = "An oddity 1% min 2%: INVENTED_RULE, CRR Art. 1"
    start = lines.index("Checks:" if "Checks:" in lines else "Violations:") + 1
    return _joined([*lines[:start], *(line for line in lines[start:] if line != "none"), new], letter)


def negated(answer: str) -> str:
    """The answer with "You need not: " before every sentence of the letter that sets a deadline."""
    lines, letter = _parts(answer)
    sentences = re.split(r"(\n|(?<=\.) )", letter)
    changed = [re.sub(r"^(- )?", r"\1You need not: ", text) if deadlines(text) else text for text in sentences]
    return _joined(lines, "".join(changed))


def other_words(answer: str) -> str:
    """The answer with the facts of its lines in a sentence of ours as the letter."""
    lines, _ = _parts(answer)
    facts = "; ".join(re.sub(rf"^{RULE_ID.pattern} \| |(?<=: ){RULE_ID.pattern},? ?", "", line) for line in lines[1:])
    return _joined(lines, f"What your filing shows is this: {facts}. Put it right as the law foresees.")


def in_markdown(answer: str) -> str:
    """The answer with a preamble, bold headings and a numbered list."""
    lines, letter = _parts(answer)
    rows = [f"**{line}**" if line in HEADINGS else f"{number}. {line}" for number, line in enumerate(lines)]
    return "\n".join(["Here is my answer.", "", *rows, "", "**Directive:**", letter])


def _parts(answer: str) -> tuple[list[str], str]:
    """(the heading and the lines, the letter)."""
    head, _, letter = answer.partition("\nDirective:\n")
    return head.split("\n"), letter


def _joined(lines: Sequence[str], letter: str) -> str:
    return "\n".join([*lines, "Directive:", letter])


def with_others(pattern: re.Pattern, other: Callable[[re.Match], str], answer: str) -> str:
    """The answer with another text for each match of a pattern in its lines and its letter; its heading stays."""
    lines, letter = _parts(answer)
    return _joined([lines[0], *(pattern.sub(other, line) for line in lines[1:])], pattern.sub(other, letter))


def _other_number(match: re.Match) -> str:
    """Another figure of the same form: `74.31%` for `4.31%`; a short whole number stays, for it may be a year or a name."""
    figure = match[0]
    return re.sub(r"\d", r"7\g<0>", figure, count=1) if re.search(r"[.%a-z]|\d{5}", figure) else figure


def wrong_figures(answer: str) -> str:
    """The answer with every figure of its lines and its letter changed; cells, dates and articles are no figures and stay."""
    return with_others(_FIGURE, _other_number, answer)


def wrong_articles(answer: str) -> str:
    """The answer with another article in every citation."""
    return with_others(_CITATION, lambda match: "999", answer)


# Kind of answer -> how it is made of the example's own; see `audit`.
CHANGES: dict[str, Callable[[str], str]] = {
    "right": lambda own: own,
    "wrong figures": wrong_figures,
    "wrong cells": wrong_cells,
    "wrong articles": wrong_articles,
    "everything wrong but the rules": lambda own: wrong_articles(wrong_cells(wrong_figures(own))),
    "notes turned round": lambda own: with_facts(own, lambda fact: replace(fact, applies=not fact.applies)),
    "notes without proof": lambda own: with_facts(
        own, lambda fact: replace(fact, quote="this stands in no note at all")
    ),
    "an invented rule": invented_rule,
    "measures negated": negated,
    "measures deferred": lambda own: f"{own}\nAll measures are deferred until the end of next year.",
    "measures recommended": lambda own: f"{own}\nThe measures above are recommendations only.",
    "right, other words": other_words,
    "right, in Markdown": in_markdown,
    "none for every report": lambda own: "Violations:\nnone\nDirective:\nNo measures.",
    "garbage for every report": lambda own: GARBAGE,
}


def audit_table(values: dict[str, dict[str, float | None]]) -> str:
    """The audit as a Markdown table."""
    rows = [["answer", *MEASURES], ["---"] * (len(MEASURES) + 1)]
    for name, one in values.items():
        cells = (one[measure] for measure in MEASURES)
        rows.append([name, *("" if value is None else f"{value:.3f}" for value in cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
