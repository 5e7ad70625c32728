"""Whether the figures, dates and articles of a letter are supported by the report, by the findings or by a reference letter."""

import datetime
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal

from xbrl.answers.answer_reader import Answer
from xbrl.rules.citations import articles
from xbrl.rules.quantities import quantities

KINDS = ("figures", "dates", "articles")
_MONTHS = [datetime.date(2000, month, 1).strftime("%B") for month in range(1, 13)]
_DATE = re.compile(
    rf"\b(?P<iso>\d{{4}}-\d\d-\d\d)\b|\b(?P<day>\d{{1,2}})(?:st|nd|rd|th)? (?P<month>{'|'.join(_MONTHS)}),? (?P<year>\d{{4}})"
    rf"|\b(?P<first>{'|'.join(_MONTHS)}) (?P<number>\d{{1,2}}),? (?P<then>\d{{4}})"
)
_TABLE = re.compile(r"\b[A-Z] \d\d\.\d\d(?:\.[a-z])?\b")


def statements(text: str) -> dict[str, set]:
    """What a text states: `figures` (numbers), `dates` (YYYY-MM-DD) and `articles` ((act, number))."""
    plain = _TABLE.sub(" ", _DATE.sub(" ", text))
    return {
        "figures": {value for _, value in quantities(plain)},
        "dates": {day for _, day in find_dates(text)},
        "articles": set(articles(plain)),
    }


def find_dates(text: str) -> Iterator[tuple[re.Match, str]]:
    """Yield each date of a text, as (its match, YYYY-MM-DD)."""
    for match in _DATE.finditer(text):
        yield match, _iso(match)


def score_letters(examples: Sequence[dict], true: Sequence[Answer], letters: Sequence[str]) -> dict:
    """The share of the statements of the `letters` that are supported: in all and by kind, with their numbers `n`.

    Supported are the statements of the report, the values, limits, shortfalls and articles of the true findings, and the
    statements of the reference letters. None where the letters state nothing.
    """
    stated, found = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for example, truth, letter in zip(examples, true, letters, strict=True):
        support = supported(example, truth)
        for kind, said in statements(letter).items():
            stated[kind] += len(said)
            found[kind] += len(said & support[kind])
    total = sum(stated.values())
    return {
        "supported": sum(found.values()) / total if total else None,
        "n": total,
        "by_kind": {k: {"supported": found[k] / stated[k] if stated[k] else None, "n": stated[k]} for k in KINDS},
    }


def supported(example: dict, truth: Answer) -> dict[str, set]:
    """All statements that a letter on this example may make, as `statements`."""
    texts = [message["content"] or "" for message in example["messages"][:-1]]
    known = statements("\n".join([*texts, truth.directive, *example.get("references", ())]))
    for claim in truth.claims:
        numbers = {value for value in (claim.value, claim.limit) if isinstance(value, Decimal)}
        known["figures"] |= numbers | ({abs(claim.value - claim.limit)} if len(numbers) == 2 else set())
        known["articles"] |= claim.legal
    return known


def _iso(match: re.Match) -> str:
    if match["iso"]:
        return match["iso"]
    day, month, year = match["day"] or match["number"], match["month"] or match["first"], match["year"] or match["then"]
    return f"{year}-{_MONTHS.index(month) + 1:02}-{int(day):02}"
