"""Whether a letter demands the required measures within the required time."""

import re
from collections.abc import Iterator, Sequence

# subject of a measure -> words by which a demand is recognised
_SUBJECTS = {
    "capital": r"\bcapital\b(?! requirement| ratio)|recapitalis|own funds(?! templates| items)|restore the ratios",
    "distributions": r"distribut|capital conservation plan|dividends",
    "leverage": r"leverage|balance sheet|raise tier 1|reduce exposure",
    "liquidity": r"liquidity|liquid assets|\bbuffer\b|contingency funding|\bLCR\b|pledged",
    "funding": r"(?<!contingency )funding|\bNSFR\b|long-term lending|term deposits",
    "exposure": r"\b(?:the|joint|this) exposure\b(?! amount)|\bexcess\b|\bclient|over the limit",
    "floor": r"output floor|floored|total risk exposure|standardised total|corrected report",
    "items": r"own funds items?|instrument|prudential filter|deduct|CET1 items|eligib",
    "filing": r"\bfil(?:e|ed|ing)\b|correct|resubmit",
}
_WORDS = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen"),
)
_NUMBERS = {"a": 1, "an": 1, "twenty": 20, "thirty": 30, "sixty": 60, "ninety": 90}
_NUMBERS |= {word: number for number, word in enumerate(_WORDS, start=1)}
_TERM = re.compile(
    rf"\b(?:within|in|no later than|not later than|at the latest|before the end of) "
    rf"(?P<number>\d+|{'|'.join(sorted(_NUMBERS, key=len, reverse=True))}) "
    r"(?P<kind>working |business |banking |calendar )?(?P<unit>day|week|month)s?\b",
    re.IGNORECASE,
)
_RIGHTS = re.compile(r"\bobject|\bappeal|\bbe heard\b|\bcomment", re.IGNORECASE)  # terms that are not demands


def deadlines(text: str) -> list[frozenset[int]]:
    """The terms that a text sets, each as the numbers of days that it may stand for.

    `within ten working days` is 10, `within 30 days` is 30. Two weeks are 14 days or 10 working days, a month is 30 days or 20
    working days.
    """
    return [days for _, days in find_terms(text)]


def find_terms(text: str) -> Iterator[tuple[re.Match, frozenset[int]]]:
    """Yield each term that a text sets, as (its match, the numbers of days that it may stand for)."""
    for match in _TERM.finditer(text):
        number = match["number"].casefold()
        count = int(number) if number.isdigit() else _NUMBERS[number]
        days = {"day": {1}, "week": {7, 5}, "month": {30, 20}}[match["unit"].casefold()]
        yield match, frozenset(count * one for one in days)


def demands(letter: str) -> Iterator[tuple[frozenset[str], frozenset[int]]]:
    """Yield (subjects, days) of each sentence of a letter that sets one term and names a subject."""
    for sentence in re.split(r"\n|(?<=[a-z)])\. (?=[A-Z])", letter):
        terms = deadlines(sentence)
        subjects = frozenset(name for name, words in _SUBJECTS.items() if re.search(words, sentence, re.IGNORECASE))
        if terms and subjects and not _RIGHTS.search(sentence):
            yield subjects, frozenset().union(*terms)


def not_demanded(required: Sequence[dict], letter: str) -> list[dict]:
    """Those of the `required` measures (as in `score_measures`) that a letter does not demand in time."""
    said = list(demands(letter))
    return [measure for measure in required if not _is_demanded(measure, said)]


def score_measures(examples: Sequence[dict], letters: Sequence[str]) -> dict | None:
    """The share of the required measures that a letter demands in time; None if no example has the field `measures`.

    A measure `{"subject", "deadline_days"}` is right if a sentence names its subject and sets its deadline, and no sentence
    on this subject alone sets another one. `reports` is the share of the letters that are right as a whole: every measure,
    and on a report that requires none, no demand with a deadline. An empty letter (that of an unparsable answer) is wrong.
    `n` counts measures, `n_reports` letters.
    """
    pairs = [(one["measures"], letter) for one, letter in zip(examples, letters, strict=True) if "measures" in one]
    if not pairs:
        return None
    right = [[_is_demanded(measure, list(demands(letter))) for measure in required] for required, letter in pairs]
    silent = [bool(required) or (letter.strip() != "" and not list(demands(letter))) for required, letter in pairs]
    n = sum(map(len, right))
    return {
        "right": sum(map(sum, right)) / n if n else None,
        "n": n,
        "reports": sum(all(one) and quiet for one, quiet in zip(right, silent, strict=True)) / len(pairs),
        "n_reports": len(pairs),
    }


def _is_demanded(measure: dict, said: Sequence[tuple[frozenset[str], frozenset[int]]]) -> bool:
    subject, days = measure["subject"], measure["deadline_days"]
    about = [(subjects, terms) for subjects, terms in said if subject in subjects]
    contradicted = any(subjects == {subject} and days not in terms for subjects, terms in about)
    return any(days in terms for _, terms in about) and not contradicted
