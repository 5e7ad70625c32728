"""Find citations of the law and percentages in a text, in English or German: a letter, or the `legal` of a rule."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

ACTS = {  # how an act is written -> its name here
    r"CRR": "CRR",
    r"Regulation \(EU\) (?:No\.? ?)?575/2013": "CRR",
    r"Verordnung \(EU\) (?:Nr\. ?)?575/2013": "CRR",
    r"CRD(?: ?(?:IV|V|VI))?": "CRD",
    r"Directive 2013/36(?:/EU)?": "CRD",
    r"Richtlinie 2013/36(?:/EU)?": "CRD",
    r"(?:(?:Commission |Delegated |Implementing )*(?:Reg\.|Regulation)|ITS|Delegierte[n]? Verordnung|Verordnung) \(EU\) (?P<number>\d{4}/\d+)": "",
}
ACT = re.compile("|".join(f"(?:{pattern})" for pattern in ACTS))
ARTICLE = r"\d{1,3}[a-z]{0,3}(?:\([0-9a-z]{1,4}\))*"
ARTICLES = re.compile(
    rf"\b(?:Art(?:icle)?s?\b\.?|Artikels?n?) ({ARTICLE}(?:(?:, (?:and |or )?| and | or | to | und | oder | bis )(?:Art\. |Article )?{ARTICLE})*)"
)
PERCENTAGE = re.compile(r"(?<![\d.,])(-?\d+(?:[.,]\d+)?) ?(?:%|per ?cent\b|Prozent\b)(?! ?(?:points?|-?[Pp]unkte?)\b)")
SENTENCE = re.compile(r"(?<=[.;:!?])\s+(?=[A-ZÄÖÜ0-9\-*•])|\n+")


@dataclass(frozen=True)
class Citation:
    """An article: act ("CRR", "CRD", "2015/61", or "" if the text does not say), number and paragraphs."""

    act: str
    article: str  # "428b"
    paragraphs: tuple[str, ...] = ()  # ("1", "a") for Article 92(1)(a)

    def covers(self, other: "Citation") -> bool:
        """Whether both can mean the same: no difference in what both state. "Article 92" covers "Article 92(1)(a)"."""
        same_act = self.act == other.act or not self.act or not other.act
        both = zip(self.paragraphs, other.paragraphs, strict=False)
        return same_act and self.article == other.article and all(one == two for one, two in both)

    def __str__(self) -> str:
        return f"{self.act} Art. {self.article}".strip() + "".join(f"({part})" for part in self.paragraphs)


def find_citations(text: str) -> list[Citation]:
    """The articles that a text cites, in order. The act stands before ("CRR Art. 92") or after ("Article 92 of the CRR")."""
    text = _normalised(text)
    found = []
    for match in ARTICLES.finditer(text):
        act = _act_before(text[: match.start()]) or _act_after(text[match.end() :])
        for article in re.findall(ARTICLE, match[1]):
            number, *paragraphs = re.findall(r"[0-9a-z]+", article)
            found.append(Citation(act, number, tuple(paragraphs)))
    return found


def find_percentages(text: str) -> Iterator[tuple[Decimal, int]]:
    """(percentage, number of its decimal places). Differences in percentage points are left out."""
    for number in PERCENTAGE.findall(text):
        number = number.replace(",", ".")
        yield Decimal(number), len(number.partition(".")[2])


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text; the full stop of "Art. 92" does not end one."""
    parts = SENTENCE.split(re.sub(r"\b(Art|Abs|Buchst|lit|No|Nr|Reg)\. ", "\\1.\0", text))
    return [part.replace("\0", " ").strip() for part in parts if part.strip()]


def _normalised(text: str) -> str:
    """One space between words, and "Absatz 1 Buchstabe a", "paragraph 1, point (a)" as "(1)(a)"."""
    text = " ".join(text.split())
    text = re.sub(r",? (?:Absatz|Abs\.|paragraph|para\.) ?\(?(\d+[a-z]?)\)?", r"(\1)", text)
    text = re.sub(r",? (?:Buchstabe|Buchst\.|lit\.|point|letter) ?\(?([a-z])\)?(?![a-z])", r"(\1)", text)
    return re.sub(r"(?<=[0-9a-z)]) (?=\([0-9a-z]{1,4}\))", "", text)


def _act_before(text: str) -> str:
    found = re.search(rf"(?:{ACT.pattern})[ ,:]*$", text[-80:])
    return _name(found[0]) if found else ""


def _act_after(text: str) -> str:
    found = re.match(rf" ?,? ?(?:of |der |des )?(?:the |Commission )?(?:{ACT.pattern})", text[:100])
    return _name(found[0]) if found else ""


def _name(text: str) -> str:
    for pattern, name in ACTS.items():
        found = re.search(pattern, text)
        if found:
            return name or found["number"]
    return ""
