"""Read citations of law, in English and German.

`CRR Art. 92(1)(a)`, `Articles 102 and 104(1) CRD`, `Article 412(1) of Regulation (EU) No 575/2013` and `Artikel 92 Absatz 1
Buchstabe a CRR` are read. An article is the pair (act, number), e.g. ("CRR", "92(1)(a)"). Acts without a usual short name
are named by their number, e.g. ("2015/61", "4(2)").
"""

import re
from dataclasses import dataclass

_ACTS = {"575/2013": "CRR", "2013/36": "CRD"}
_NUMBER = r"\d+[a-z]{0,2}(?: ?\(\w+\))*(?:-\(\w+\))?"
_TOKEN = re.compile(
    rf"(?P<act>\b(?:CRR|CRD)\b|\b\d{{3,4}}/\d+\b)"
    rf"|\b(?:Articles?|Arts?)\b\.? ?(?P<first>{_NUMBER})(?P<more>(?: ?(?:,|and|or|to) (?:Art\. ?)?{_NUMBER}(?![\w/%.]))*)"
    r"|\b(?P<annex>Annex [IVXLC]+)\b",
    re.IGNORECASE,
)

# Other forms of a citation -> the one that `_TOKEN` knows.
_FORMS = (
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


def articles(text: str) -> frozenset[tuple[str, str]]:
    """All articles that a text cites, normalised.

    Within a sentence, an article belongs to the act before it if the sentence names the act first (`CRR Art. 92`), else to
    the act after it (`Article 92 CRR`), or else to the last one. An article of a clause without an act has the act "".
    """
    for pattern, form in _FORMS:
        text = re.sub(pattern, form, text)
    found: set[tuple[str, str]] = set()
    for clause in re.split(r";|\n|(?<=[\w)])\. (?=[A-Z])", re.sub(r"\b(Arts?)\. ", r"\1 ", text)):
        found |= _articles_of_clause(clause)
    return frozenset(found)


def find_citations(text: str) -> list[Citation]:
    """The articles that a text cites, sorted, with their paragraphs apart."""
    found = []
    for act, number in articles(text):
        article, *paragraphs = [number] if number.startswith("Annex") else re.findall(r"[0-9a-z]+", number)
        found.append(Citation(act, article, tuple(paragraphs)))
    return sorted(found)


def _articles_of_clause(clause: str) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    act, waiting = "", []
    tokens = list(_TOKEN.finditer(clause))
    act_first = bool(tokens) and bool(tokens[0]["act"])
    for token in tokens:
        if token["act"]:
            act = _ACTS.get(token["act"], token["act"].upper())
            found |= {(act, number) for number in waiting}
            waiting = []
            continue
        numbers = [token["annex"]] if token["annex"] else re.findall(_NUMBER, f"{token['first']}{token['more']}")
        numbers = [re.sub(r"\s", "", number) if not token["annex"] else number for number in numbers]
        if act_first:
            found |= {(act, number) for number in numbers}
        else:
            waiting += numbers
    return found | {(act, number) for number in waiting}
