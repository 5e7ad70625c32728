"""An audit of the measures: answers that are wrong, or right, in one known way, and what each measure says of them.

A measure that cannot tell a wrong answer from a right one would reward a model for it.
"""

import re
from collections.abc import Callable, Sequence

from common.errors import UserError
from xbrl.answers.answer_reader import RULE_ID
from xbrl.answers.references import references_of
from xbrl.answers.score import score_answers
from xbrl.answers.violations import true_answers
from xbrl.rules.quantities import QUANTITY

MEASURES = ("F1", "exact", "facts F1", "letter support", "measures", "ROUGE-L")
GARBAGE = "The report of the bank is a report of the bank."
_CITATION = re.compile(r"(?<=Art\. )\d+\w*|(?<=Articles )\d+\w*|(?<=Article )\d+\w*|(?<=Annex )[IVX]+")
_FIGURE = re.compile(rf"(?<![\w.(/-])(?<![A-Z] ){QUANTITY}(?![\w(/]|[-.]\w)")  # but not the 76.00 of a table C 76.00


def audit(examples: Sequence[dict]) -> dict[str, dict[str, float | None]]:
    """Kind of answer -> measure -> value, on examples of the regulator's task. `None` where a measure says nothing.

    - `right`: the examples' own answers.
    - `wrong figures`, `wrong cells`, `wrong articles`: the own answers with every such fact changed, in the lines and in the letter.
    - `everything wrong but the rules`: all three at once.
    - `right, other words`: the lines as they are, with the letter in the example's second reference wording, or else with
      the facts of the lines in a sentence of ours.
    - `right, in Markdown`: a preamble, bold headings and a numbered list.
    - `none for every report`, `garbage for every report`: no content at all.
    - `right, garbage on clean reports`: the own answers where something is violated.

    Raises `UserError` if the examples are of another task.
    """
    truths = true_answers(examples, "the examples of the audit")
    if truths is None:
        raise UserError("the audit needs examples of bank reports; none of these has violations")
    own = [example["messages"][-1]["content"] for example in examples]
    letters = [references_of(example, truth.directive) for example, truth in zip(examples, truths, strict=True)]
    answers: dict[str, list[str]] = {
        "right": own,
        "wrong figures": [wrong_figures(text) for text in own],
        "wrong cells": [wrong_cells(text) for text in own],
        "wrong articles": [wrong_articles(text) for text in own],
        "everything wrong but the rules": [wrong_articles(wrong_cells(wrong_figures(text))) for text in own],
        "right, other words": [other_words(text, known) for text, known in zip(own, letters, strict=True)],
        "right, in Markdown": [in_markdown(text) for text in own],
        "none for every report": ["Violations:\nnone\nDirective:\nNo measures."] * len(own),
        "garbage for every report": [GARBAGE] * len(own),
        "right, garbage on clean reports": [
            text if truth.rule_ids else GARBAGE for text, truth in zip(own, truths, strict=True)
        ],
    }
    return {name: _measures(examples, texts) for name, texts in answers.items()}


def _measures(examples: Sequence[dict], texts: Sequence[str]) -> dict[str, float | None]:
    result = score_answers(examples, texts, "the examples of the audit", None)
    return {
        "F1": result["violations"]["micro"]["f1"],
        "exact": result["violations"]["exact"],
        "facts F1": result["facts"]["f1"],
        "letter support": result["letters"]["supported"],
        "measures": result["measures"]["right"] if result["measures"] else None,
        "ROUGE-L": result["rouge_l"]["f"],
    }


def wrong_figures(answer: str) -> str:
    """The answer with every figure of its lines and its letter changed."""
    return _with_parts(answer, lambda text: _FIGURE.sub(lambda match: _other_number(match[0]), text))


def wrong_cells(answer: str) -> str:
    """The answer with another row, client or ratio in every line and every cell of the letter."""
    lines, letter = _parts(answer)
    changed = []
    for line in lines:
        fields = line.split(" | ")
        if len(fields) == 5:
            fields[1] = f"{fields[1]} other"
            line = " | ".join(fields)
        elif RULE_ID.search(line):
            line = f"Other {line}"
        changed.append(line)
    return _joined(changed, re.sub(r"\br0", "r9", letter))


def wrong_articles(answer: str) -> str:
    """The answer with another article in every citation."""
    return _with_parts(answer, lambda text: _CITATION.sub("999", text))


def other_words(answer: str, letters: Sequence[str]) -> str:
    """The answer with another wording of its letter: the second reference, or else its sentences in words of their own."""
    lines, letter = _parts(answer)
    if len(letters) > 1:
        return _joined(lines, letters[1])
    facts = "; ".join(re.sub(rf"^{RULE_ID.pattern} \| |(?<=: ){RULE_ID.pattern},? ?", "", line) for line in lines[1:])
    return _joined(lines, f"What your filing shows is this: {facts}. Put it right as the law foresees.")


def in_markdown(answer: str) -> str:
    """The answer with a preamble, bold headings and a numbered list."""
    lines, letter = _parts(answer)
    heading, *rows = lines
    numbered = [f"{number}. {row}" for number, row in enumerate(rows, start=1)]
    return "\n".join(["Here is my answer.", "", f"**{heading}**", *numbered, "", "**Directive:**", letter])


def _parts(answer: str) -> tuple[list[str], str]:
    """(the heading and the lines, the letter)."""
    head, _, letter = answer.partition("\nDirective:\n")
    return head.split("\n"), letter


def _joined(lines: Sequence[str], letter: str) -> str:
    return "\n".join([*lines, "Directive:", letter])


def _with_parts(answer: str, change: Callable[[str], str]) -> str:
    """The answer with its lines and its letter changed; cells, dates and articles are no figures and stay."""
    lines, letter = _parts(answer)
    return _joined([lines[0], *map(change, lines[1:])], change(letter))


def _other_number(figure: str) -> str:
    """Another figure of the same form: `74.31%` for `4.31%`; a short whole number stays, for it may be a year or a name."""
    return re.sub(r"\d", r"7\g<0>", figure, count=1) if re.search(r"[.%a-z]|\d{5}", figure) else figure


def audit_table(values: dict[str, dict[str, float | None]]) -> str:
    """The audit as a Markdown table."""
    rows = [["answer", *MEASURES], ["---"] * (len(MEASURES) + 1)]
    for name, one in values.items():
        cells = (one[measure] for measure in MEASURES)
        rows.append([name, *("" if value is None else f"{value:.3f}" for value in cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
