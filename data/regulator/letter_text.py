"""Read what a supervisor's letter says: citations of the law, percentages, sentences. English and German."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

from data.regulator.citations import articles

PERCENTAGE = re.compile(r"(?<![\d.,])(-?\d+(?:[.,]\d+)?) ?(?:%|per ?cent\b|Prozent\b)(?! ?(?:points?|-?[Pp]unkte?)\b)")
SENTENCE = re.compile(r"(?<=[.;!?])\s+(?=[A-ZÄÖÜ0-9\-*•])|\n+")
# Forms of a citation that `citations.articles` does not know -> the one that it knows.
FORMS = (
    (r",? (?:Absatz|Abs\.|paragraph|para\.) ?\(?(\d+[a-z]?)\)?", r"(\1)"),
    (r",? (?:Buchstabe|Buchst\.|lit\.|point|letter) ?\(?([a-z])\)?(?![a-z])", r"(\1)"),
    (r"\bArtikels?n?\b", "Article"),
    (r"(?<=\d) und (?=(?:Art\. )?\d)", " and "),
)


@dataclass(frozen=True, order=True)
class Citation:
    """An article: act ("CRR", "CRD", "2015/61", or "" if the text does not say), number and paragraphs."""

    act: str
    article: str  # "428b", or "Annex I"
    paragraphs: tuple[str, ...] = ()  # ("1", "a") for Article 92(1)(a)

    def covers(self, other: "Citation") -> bool:
        """Whether both can mean the same: no difference in what both state. "Article 92" covers "Article 92(1)(a)"."""
        same_act = self.act == other.act or not self.act or not other.act
        both = zip(self.paragraphs, other.paragraphs, strict=False)
        return same_act and self.article == other.article and all(one == two for one, two in both)

    def __str__(self) -> str:
        name = self.article if self.article.startswith("Annex") else f"Art. {self.article}"
        return f"{self.act} {name}".strip() + "".join(f"({part})" for part in self.paragraphs)


def find_citations(text: str) -> list[Citation]:
    """The articles that a text cites, sorted, in English or German: "Artikel 92 Absatz 1 Buchstabe a CRR"."""
    for pattern, form in FORMS:
        text = re.sub(pattern, form, text)
    found = []
    for act, number in articles(text):
        article, *paragraphs = [number] if number.startswith("Annex") else re.findall(r"[0-9a-z]+", number)
        found.append(Citation(act, article, tuple(paragraphs)))
    return sorted(found)


def find_percentages(text: str) -> Iterator[tuple[Decimal, int]]:
    """(percentage, number of its decimal places). Differences in percentage points are left out."""
    for number in PERCENTAGE.findall(text):
        number = number.replace(",", ".")
        yield Decimal(number), len(number.partition(".")[2])


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text; the full stop of "Art. 92" does not end one."""
    parts = SENTENCE.split(re.sub(r"\b(Art|Abs|Buchst|lit|No|Nr|Reg)\. ", "\\1.\0", text))
    return [part.replace("\0", " ").strip() for part in parts if part.strip()]
