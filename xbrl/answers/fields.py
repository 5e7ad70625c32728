"""The fields of an example that scoring reads, checked: a text where a list belongs would be scored letter by letter."""

from collections.abc import Sequence
from typing import Any

from common.errors import UserError


def check_scored_fields(examples: Sequence[dict], where: str) -> None:
    """Raise UserError, with the file `where` and the example, for the first field that is not of its form."""
    for i, example in enumerate(examples, 1):
        problem = _problem(example)
        if problem:
            raise UserError(f"{where}, example {example.get('id', i)}: {problem}")


def _problem(example: dict) -> str | None:
    for name in ("violations", "engine"):
        rules = example.get(name, [])
        if not isinstance(rules, list) or not all(isinstance(rule, str) for rule in rules):
            return f"`{name}` must be a list of ids of rules, not {_shown(rules)}"
    for name in ("measures", "findings"):
        entries = example.get(name, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            return f"`{name}` must be a list of objects, not {_shown(entries)}"
    for measure in example.get("measures", []):
        subject, days = measure.get("subject"), measure.get("deadline_days")
        if not isinstance(subject, str) or not subject:
            return f"a measure has the `subject` {_shown(subject)}; it must be a text"
        if type(days) is not int or days < 0:  # isinstance would take True for a number
            return (
                f"the measure on {subject} has the `deadline_days` {_shown(days)}; it must be a whole number, 0 or more"
            )
    for name in ("kind", "pair", "bank"):
        if not isinstance(example.get(name), (str, int, type(None))):
            return f"`{name}` must be a text, not {_shown(example[name])}"
    return None


def _shown(value: Any) -> str:  # noqa: ANN401  whatever stood in the file
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
