"""Whether a sentence gives each figure its own role: value, limit, gap and cell of one result, none in the place of another.

The sentences of letters are known (`phrases.py`). One that is written as they are is read with its roles: `{value} ... limit
{limit}` with both figures swapped names right figures and is wrong.
"""

import functools
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal

from xbrl.answers import phrases
from xbrl.read.render import cell_name
from xbrl.rules.quantities import QUANTITY, parse_quantity
from xbrl.rules.rules import RuleResult

ROLES = ("value", "limit", "gap")
_OTHER = r"[^;\n]+?"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def misplaced(letter: str, results: Iterable[RuleResult]) -> list[tuple[int, int, str]]:
    """(start, end, problem) of each figure that a known sentence gives a role, or a cell, in which no result has it."""
    results = list(results)
    right: set[tuple[int, int]] = set()
    wrong: dict[tuple[int, int], str] = {}
    for match in _sentences(letter):
        spans = [match.span(role) for role in ROLES if match.groupdict().get(role)]
        stated = ", ".join(f"the {role} {match[role]}" for role in ROLES if match.groupdict().get(role))
        if any(_fits(match, result) for result in results):
            right |= set(spans)
        else:
            wrong |= dict.fromkeys(spans, f"no result has {stated}, as the sentence says")
    return sorted((*span, problem) for span, problem in wrong.items() if span not in right)


def _sentences(letter: str) -> Iterator[re.Match]:
    for pattern, fragment in _templates():
        if fragment in letter.casefold():
            yield from pattern.finditer(letter)


@functools.cache
def _templates() -> tuple[tuple[re.Pattern, str], ...]:
    """(pattern, longest fixed part in lower case) of each sentence that gives figures at least two fields."""
    found = []
    for text in sorted(set(_strings(vars(phrases)))):
        names = _PLACEHOLDER.findall(text)
        known = set(names) & {*ROLES, "cell", "row"}
        if len(known) < 2 or not known & set(ROLES) or len(names) != len(set(names)):
            continue
        pieces = _PLACEHOLDER.split(text.rstrip("."))
        fields = (
            rf"(?P<{name}>{QUANTITY if name in ROLES else _OTHER if name != 'legal' else '.+?'})"
            for name in pieces[1::2]
        )
        fixed = [re.escape(piece) for piece in pieces[0::2]]
        pattern = "".join(part for pair in zip(fixed, [*fields, ""], strict=True) for part in pair)
        ending = r"(?:\.(?=\s|$)|$)" if text.endswith(".") else r"(?!\w)"
        found.append(
            (re.compile(pattern + ending, re.IGNORECASE | re.MULTILINE), max(pieces[0::2], key=len).casefold())
        )
    return tuple(found)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for one in value.values() for text in _strings(one))
    elif isinstance(value, tuple):
        yield from (text for one in value for text in _strings(one))


def _fits(match: re.Match, result: RuleResult) -> bool:
    """Whether a result has the figures of a sentence in their roles, at the cell and the row that it names."""
    if result.value is None or result.limit is None:
        return False
    stated = match.groupdict()
    own = {"value": result.value, "limit": result.limit, "gap": abs(result.limit - result.value)}
    if any(stated.get(role) and not _is_same(stated[role], own[role], result.decimals) for role in ROLES):
        return False
    cell = cell_name(result.cell, result.row) if result.cell[0] else ""
    if stated.get("cell") and cell and not stated["cell"].casefold().endswith(cell.casefold()):
        return False
    return not (stated.get("row") and result.row and not stated["row"].casefold().endswith(result.row.casefold()))


def _is_same(text: str, number: Decimal, decimals: int | str | None) -> bool:
    stated = parse_quantity(text.strip())
    if stated is None or stated == number:
        return stated is not None
    return isinstance(decimals, int) and number.adjusted() + decimals < 27 and stated == round(number, decimals)
