"""Read the statements of a text: figures, dates, articles of law, percentages and sentences, in English and German.

Figures may have the form of `render.format_figure`, or any other form that people write. `CRR Art. 92(1)(a)`, `Articles
102 and 104(1) CRD`, `Article 412(1) of Regulation (EU) No 575/2013` and `Artikel 92 Absatz 1 Buchstabe a CRR` are articles. An
article is the pair (act, number), e.g. ("CRR", "92(1)(a)"). Acts without a usual short name are named by their number, e.g.
("2015/61", "4(2)").
"""

import datetime
import re
from collections.abc import Iterator
from decimal import Decimal

_SCALES = {
    **{"%": -2, "per cent": -2, "percent": -2, "percentage points": -2, "percentage point": -2, "": 0},
    **{"thousand": 3, "k": 3, "million": 6, "mn": 6, "billion": 9, "bn": 9},
}
_UNIT = "|".join(sorted(filter(None, _SCALES), key=len, reverse=True))
_FIGURE = r"[-+\u2212]?\d{1,3}(?:,\d{3})+(?:\.\d+)?|[-+\u2212]?\d+(?:\.\d+)?"
_CURRENCY = r"(?:[A-Z]{3} |[€$£] ?)"
_GROUPS = rf"{_CURRENCY}?(?P<number>{_FIGURE}) ?(?P<unit>(?:{_UNIT})(?![a-z]))?(?: [A-Z]{{3}}\b)?"
QUANTITY = re.sub(r"\(\?P<\w+>", "(?:", _GROUPS)  # a pattern without groups
BARE_QUANTITY = rf"(?:{_FIGURE})(?: ?(?:{_UNIT})(?![a-z]))?"  # without a currency: a name before it may end in `SRL`
# Not inside a word, a cell code, a date or a paragraph: `r0010`, `CET1`, `2026-03-31`, `92(1)`.
_IN_TEXT = re.compile(rf"(?<![\w./(-]){_GROUPS}(?![\w(/]|[-.]\w)")

_ACTS = {"575/2013": "CRR", "2013/36": "CRD"}
_NUMBER = r"\d+[a-z]{0,2}(?: ?\(\w+\))*(?:-\(\w+\))?"
_TOKEN = re.compile(
    rf"(?P<act>\b(?:CRR|CRD)\b|\b\d{{3,4}}/\d+\b)"
    rf"|\b(?:Articles?|Arts?)\b\.? ?(?P<first>{_NUMBER})(?P<more>(?: ?(?:,|and|or|to) (?:Art\. ?)?{_NUMBER}(?![\w/%.]))*)"
    r"|\b(?P<annex>Annex [IVXLC]+)\b",
    re.IGNORECASE,
)

# Other forms of a citation -> the form that `_TOKEN` reads.
_FORMS = (
    (r",? (?:Absatz|Abs\.|paragraph|para\.) ?\(?(\d+[a-z]?)\)?", r"(\1)"),
    (r",? (?:Buchstabe|Buchst\.|lit\.|point|letter) ?\(?([a-z])\)?(?![a-z])", r"(\1)"),
    (r"\bArtikels?n?\b", "Article"),
    (r"(?<=\d) und (?=(?:Art\. )?\d)", " and "),
)

_MONTHS = [datetime.date(2000, month, 1).strftime("%B") for month in range(1, 13)]
_DATE = re.compile(
    rf"\b(?P<iso>\d{{4}}-\d\d-\d\d)\b|\b(?P<day>\d{{1,2}})(?:st|nd|rd|th)? (?P<month>{'|'.join(_MONTHS)}),? (?P<year>\d{{4}})"
    rf"|\b(?P<first>{'|'.join(_MONTHS)}) (?P<number>\d{{1,2}}),? (?P<then>\d{{4}})"
)
_TABLE = re.compile(r"\b[A-Z] \d\d\.\d\d(?:\.[a-z])?\b")
SENTENCE = re.compile(r"(?<=[.;!?])\s+(?=[A-ZÄÖÜ0-9\-*•])|\n+")


def articles(text: str) -> frozenset[tuple[str, str]]:
    """Return all articles that a text cites, normalised.

    Within a sentence, an article belongs to the act before it if the sentence names the act first (`CRR Art. 92`), else to
    the act after it (`Article 92 CRR`), or else to the last act. An article of a clause without an act has the act "".
    """
    for pattern, form in _FORMS:
        text = re.sub(pattern, form, text)
    cited: set[tuple[str, str]] = set()
    for clause in re.split(r";|\n|(?<=[\w)])\. (?=[A-Z])", re.sub(r"\b(Arts?)\. ", r"\1 ", text)):
        act, waiting, tokens = "", [], list(_TOKEN.finditer(clause))
        for token in tokens:
            if token["act"]:
                act = _ACTS.get(token["act"], token["act"].upper())
            else:
                numbers = re.findall(_NUMBER, f"{token['first']}{token['more']}")
                waiting += [token["annex"]] if token["annex"] else [number.replace(" ", "") for number in numbers]
            if token["act"] or tokens[0]["act"]:
                cited |= {(act, number) for number in waiting}
                waiting = []
        cited |= {(act, number) for number in waiting}
    return frozenset(cited)


def parse_quantity(text: str) -> Decimal | None:
    """Return the value of a printed figure; None if the text is not a single figure.

    `4.310%` and `4.31 per cent` are 0.0431, `1.340 thousand` and `1,340` are 1340. The point is the decimal sign, a comma
    separates groups of three digits. A currency is ignored: all amounts of a report are in its currency.
    """
    match = re.fullmatch(_GROUPS, " ".join(text.split()))
    return _number_of(match) if match else None


def quantities(text: str) -> Iterator[tuple[str, Decimal]]:
    """Yield the figures of a text with a unit or a decimal point, as (printed, number).

    Bare whole numbers are not figures: they count, enumerate, or belong to an article or a name.
    """
    for match in _IN_TEXT.finditer(" ".join(text.split())):
        if match["unit"] or "." in match["number"]:
            yield match[0].strip(), _number_of(match)


def _number_of(match: re.Match) -> Decimal:
    number = Decimal(match["number"].replace(",", "").replace("\u2212", "-"))
    return number.scaleb(_SCALES[match["unit"] or ""]).normalize() + 0  # no negative zero


def statements(text: str) -> dict[str, set]:
    """Return the statements of a text: `figures` (numbers), `dates` (YYYY-MM-DD) and `articles` ((act, number))."""
    plain = _TABLE.sub(" ", _DATE.sub(" ", text))
    return {
        "figures": {value for _, value in quantities(plain)},
        "dates": set(map(_iso, _DATE.finditer(text))),
        "articles": set(articles(plain)),
    }


def _iso(match: re.Match) -> str:
    """Return a date as YYYY-MM-DD."""
    if match["iso"]:
        return match["iso"]
    day, month, year = match["day"] or match["number"], match["month"] or match["first"], match["year"] or match["then"]
    return f"{year}-{_MONTHS.index(month) + 1:02}-{int(day):02}"


def sentences(text: str) -> list[str]:
    """Split a text into sentences and lines. The full stop of "Art. 92" does not end a sentence."""
    parts = SENTENCE.split(re.sub(r"\b(Art|Abs|Buchst|lit|No|Nr|Reg)\. ", "\\1.\0", text))
    return [part.replace("\0", " ").strip() for part in parts if part.strip()]
