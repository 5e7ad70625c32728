"""Read figures from text: the reverse of `render.format_figure`, and lenient where people write them otherwise."""

import re
from collections.abc import Iterator
from decimal import Decimal

_SCALES = {
    **{"%": -2, "per cent": -2, "percent": -2, "percentage points": -2, "percentage point": -2, "": 0},
    **{"thousand": 3, "k": 3, "million": 6, "mn": 6, "billion": 9, "bn": 9},
}
_UNIT = "|".join(sorted(filter(None, _SCALES), key=len, reverse=True))
_NUMBER = r"[-+\u2212]?\d{1,3}(?:,\d{3})+(?:\.\d+)?|[-+\u2212]?\d+(?:\.\d+)?"
_CURRENCY = r"(?:[A-Z]{3} |[€$£] ?)"
QUANTITY = rf"{_CURRENCY}?(?:{_NUMBER}) ?(?:(?:{_UNIT})(?![a-z]))?(?: [A-Z]{{3}}\b)?"  # a pattern without groups
_GROUPS = rf"{_CURRENCY}?(?P<number>{_NUMBER}) ?(?P<unit>(?:{_UNIT})(?![a-z]))?(?: [A-Z]{{3}}\b)?"
# Not inside a word, a cell code, a date or a paragraph: `r0010`, `CET1`, `2026-03-31`, `92(1)`.
_IN_TEXT = re.compile(rf"(?<![\w./(-]){_GROUPS}(?![\w(/]|[-.]\w)")


def parse_quantity(text: str) -> Decimal | None:
    """The number that a printed figure stands for; None if the text is not one figure.

    `4.310%` and `4.31 per cent` are 0.0431, `1.340 thousand` and `1,340` are 1340. The point is the decimal sign, a comma
    separates groups of three digits. A currency is read over: all amounts of a report are in its currency.
    """
    match = re.fullmatch(_GROUPS, " ".join(text.split()))
    if not match:
        return None
    return _number(match)


def quantities(text: str) -> Iterator[tuple[str, Decimal]]:
    """Yield the figures of a text with a unit or a decimal point, as (printed, number).

    Bare whole numbers are not figures: they count, enumerate, or belong to an article or a name.
    """
    for match in _IN_TEXT.finditer(" ".join(text.split())):
        if match["unit"] or "." in match["number"]:
            yield match[0].strip(), _number(match)


def _number(match: re.Match) -> Decimal:
    number = Decimal(match["number"].replace(",", "").replace("\u2212", "-"))
    return number.scaleb(_SCALES[match["unit"] or ""]).normalize() + 0  # no negative zero
