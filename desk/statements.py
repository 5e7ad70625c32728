"""Every figure, date, article, deadline and count of a letter with its place, checked against what supports it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

from data.regulator.citations import Citation, find_citations
from data.regulator.quantities import find_quantities
from data.regulator.render import cell_name
from data.regulator.report import CellKey
from desk.support import Support
from eval.regulator.letters import find_dates
from eval.regulator.measures import find_terms

KINDS = ("figure", "date", "article", "deadline", "number")
_SEGMENT = re.compile(r"[^\n;]+?(?:(?<=[\w)%])\. (?=[A-ZÄÖÜ])|(?=\n)|;|$)")  # clauses, as citations.py splits them
_CELL = re.compile(r"\b([A-Z] \d\d\.\d\d(?:\.[a-z])?)(?: (r\d{4}))?(?: (c\d{3,4}))?\b")
_ACT = re.compile(r"(?:\(EU\) )?(?:No )?\b\d{3,4}/\d+(?:/[A-Z]+)?\b")
_NAMES = re.compile(
    r"\b(?:Tier|Pillar|Level|Basel|IFRS|Stage) ?\d+\b|^\s*(?:\d+[.)]|[-*•]) ", re.IGNORECASE | re.MULTILINE
)
_BARE = re.compile(r"(?<![\w./(-])\d{1,3}(?:,\d{3})+(?!\w)|(?<![\w./(-])\d+(?![\w(/%]|[.,-]\d)")


@dataclass(frozen=True)
class Statement:
    """One statement of a letter. `source` says what supports it; without one it is unsupported, and `problem` says why."""

    kind: str
    text: str
    start: int
    end: int
    source: str = ""
    problem: str = ""


def check_letter(letter: str, support: Support) -> list[Statement]:
    """The statements of a letter in its order."""
    found: list[Statement] = []
    masked = list(letter)  # what is read already is not read again as a bare number

    def take(kind: str, start: int, end: int, source: str, problem: str) -> None:
        found.append(Statement(kind, letter[start:end], start, end, source, "" if source else problem))
        masked[start:end] = " " * (end - start)

    for match, date in find_dates(letter):
        take("date", *match.span(), support.dates.get(date, ""), "the report and its notes do not have this date")
    for match, days in find_terms("".join(masked)):
        source = next((support.days[one] for one in sorted(days) if one in support.days), "")
        take("deadline", *match.span(), source, "no measure that follows from the findings has this deadline")
    plain = "".join(masked)
    for segment in _SEGMENT.finditer(plain):
        _take_articles(segment, plain, support, take)
    for pattern in (_ACT, _NAMES):
        for match in pattern.finditer("".join(masked)):
            masked[match.start() : match.end()] = " " * len(match[0])
    without_cells = _CELL.sub(lambda match: " " * len(match[0]), "".join(masked))
    for match, value in find_quantities(without_cells):
        start, end = match.start() + len(match[0]) - len(match[0].lstrip()), match.start() + len(match[0].rstrip())
        take("figure", start, end, *_figure(value, _cells_beside(letter, start, end), support))
    for match in _BARE.finditer(_CELL.sub(lambda one: " " * len(one[0]), "".join(masked))):
        value = Decimal(match[0].replace(",", ""))
        source = support.numbers.get(value, "")
        if not source and value in support.figures:
            source = support.figures[value][0][0]
        take("number", *match.span(), source, "the report and its findings do not have this number")
    return sorted(found, key=lambda one: one.start)


def _take_articles(segment: re.Match, text: str, support: Support, take) -> None:  # noqa: ANN001 (a closure)
    """The articles of one clause. Each is marked at its number."""
    taken: set[tuple[int, int]] = set()
    for citation in find_citations(segment[0]):
        start, end = _place(citation, segment[0], taken)
        taken.add((start, end))
        source = next((f"{citation}: {source}" for known, source in support.articles if _supports(known, citation)), "")
        problem = f"{citation} is no article of a finding, of a measure or of a duty of this report"
        take("article", segment.start() + start, segment.start() + end, source, problem)


def _supports(known: Citation, stated: Citation) -> bool:
    """Whether a letter may cite `stated` where a source has `known`: the same article, or less of its paragraphs."""
    same_act = known.act == stated.act or not stated.act
    prefix = known.paragraphs[: len(stated.paragraphs)] == stated.paragraphs
    return same_act and known.article.casefold() == stated.article.casefold() and prefix


def _place(citation: Citation, text: str, taken: set[tuple[int, int]]) -> tuple[int, int]:
    """Where a clause cites an article; the whole clause if its number is written in a way that is not known here."""
    word = r"(?:,? (?:Absatz|Abs\.|paragraph|para\.|Buchstabe|Buchst\.|lit\.|point|letter))?"
    paragraphs = "".join(rf"{word} ?\(?{re.escape(part)}\)?" for part in citation.paragraphs)
    for pattern in (re.escape(citation.article) + paragraphs, re.escape(citation.article)):
        for match in re.finditer(rf"(?<![\w/.]){pattern}", text):
            if match.span() not in taken and not text[match.end() :].startswith("/"):
                return match.span()
    return 0, len(text)


def _figure(value: Decimal, cells: frozenset[CellKey], support: Support) -> tuple[str, str]:
    """(what supports a figure, why nothing does). A figure beside a cell must belong to that cell."""
    sources = support.figures.get(value, [])
    if not sources:
        return "", "neither the report nor a rule has this figure"
    if not cells:
        return sources[0][0], ""
    fitting = [source for source, own in sources if not own or own & cells]
    if fitting:
        return fitting[0], ""
    names = " and ".join(sorted(cell_name(cell) for cell in cells))
    return "", f"this figure is that of {sources[0][0]}, not of {names}"


def _cells_beside(letter: str, start: int, end: int) -> frozenset[CellKey]:
    """The fixed cells that the sentence around a place names."""
    before = max(letter.rfind("\n", 0, start), letter.rfind(". ", 0, start)) + 1
    after = min(
        (place for place in (letter.find("\n", end), letter.find(". ", end)) if place >= 0), default=len(letter)
    )
    found = set()
    for table, row, column in _CELL.findall(letter[before:after]):
        if row and column:
            found.add((table.replace(" ", "_"), row, column))
    return frozenset(found)


def unsupported(statements: list[Statement]) -> list[Statement]:
    """Those that nothing supports."""
    return [one for one in statements if not one.source]


def marked(letter: str, statements: list[Statement]) -> Iterator[tuple[str, Statement | None]]:
    """The letter in pieces: each with its statement, or None for the text between them. Statements do not overlap."""
    place = 0
    for one in statements:
        if one.start < place:
            continue
        if one.start > place:
            yield letter[place : one.start], None
        yield letter[one.start : one.end], one
        place = one.end
    if place < len(letter):
        yield letter[place:], None
