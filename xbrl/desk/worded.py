"""Numbers and periods that a letter writes in words: `ninety-four per cent`, `seven exposures`, `two calendar days`."""

import re
from collections.abc import Iterator
from decimal import Decimal

_SMALL = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
    *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_VALUES = {word: number for number, word in enumerate(_SMALL, 1)} | {
    word: 10 * number for number, word in enumerate(_TENS, 2)
}
_VALUES |= {"a hundred": 100, "one hundred": 100, "hundred": 100, "a dozen": 12, "dozen": 12}
_WORD = rf"(?:{'|'.join(_TENS)})(?:[- ](?:{'|'.join(_SMALL[:9])}))?|{'|'.join(sorted(_VALUES, key=len, reverse=True))}"
_UNITS = {"per cent": -2, "percent": -2, "percentage point": -2, "%": -2, "basis point": -4}
_UNITS |= {"thousand": 3, "million": 6, "billion": 9}
_WORDED = re.compile(
    rf"\b(?P<number>{_WORD})\b(?: (?P<unit>{'|'.join(_UNITS)})s?)?"
    r"|\b(?:half(?! a day)(?![-\w])|twice|thrice|doubled?|tripled?|(?:a|one|two|three)[ -](?:third|quarter|fifth|tenth)s? of)\b",
    re.IGNORECASE,
)
_DAYS = {"day": 1, "week": 7, "month": 30, "year": 365}
_PERIOD = re.compile(
    rf"\b(?:(?P<number>\d+|{_WORD}|an?)[- ](?:(?:working|business|banking|calendar|full)[- ])?(?P<unit>day|week|month|year)s?"
    r"|(?P<name>fortnight|tomorrow|overnight))\b",
    re.IGNORECASE,
)


def value_of(words: str) -> int:
    """The number that `ninety-four` or `ninety four` stands for."""
    words = words.casefold()
    return _VALUES[words] if words in _VALUES else sum(_VALUES[word] for word in re.split("[- ]", words))


def find_worded(text: str) -> Iterator[tuple[re.Match, Decimal | None, bool]]:
    """Yield the numbers in words, as (match, number, whether it is a bare count); number None for a share or a multiple.

    `one` without a unit is no number: it is a pronoun as often.
    """
    for match in _WORDED.finditer(text):
        if not match["number"]:
            yield match, None, False
        elif match["unit"]:
            yield match, Decimal(value_of(match["number"])).scaleb(_UNITS[match["unit"].casefold()]), False
        elif match["number"].casefold() != "one":
            yield match, Decimal(value_of(match["number"])), True


def find_periods(text: str) -> Iterator[tuple[re.Match, int]]:
    """Yield the periods that no preposition makes a term (`find_terms`), as (match, days)."""
    for match in _PERIOD.finditer(text):
        if match["name"]:
            yield match, 14 if match["name"].casefold() == "fortnight" else 1
        elif match["number"].casefold() not in ("a", "an"):
            number = int(match["number"]) if match["number"].isdigit() else value_of(match["number"])
            yield match, number * _DAYS[match["unit"].casefold()]
