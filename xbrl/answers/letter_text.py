"""Read what a supervisor's letter says: percentages and sentences, in English and German. citations.py reads its articles."""

import re
from collections.abc import Iterator
from decimal import Decimal

PERCENTAGE = re.compile(r"(?<![\d.,])(-?\d+(?:[.,]\d+)?) ?(?:%|per ?cent\b|Prozent\b)(?! ?(?:points?|-?[Pp]unkte?)\b)")
SENTENCE = re.compile(r"(?<=[.;!?])\s+(?=[A-ZÄÖÜ0-9\-*•])|\n+")


def find_percentages(text: str) -> Iterator[tuple[Decimal, int]]:
    """(percentage, number of its decimal places). Differences in percentage points are left out."""
    for number in PERCENTAGE.findall(text):
        number = number.replace(",", ".")
        yield Decimal(number), len(number.partition(".")[2])


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text; the full stop of "Art. 92" does not end one."""
    parts = SENTENCE.split(re.sub(r"\b(Art|Abs|Buchst|lit|No|Nr|Reg)\. ", "\\1.\0", text))
    return [part.replace("\0", " ").strip() for part in parts if part.strip()]
