"""Every figure, date, article, deadline and count of a letter with its place, checked against what supports it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal

from xbrl.answers.demanded_measures import find_terms
from xbrl.answers.letters import find_dates
from xbrl.desk.roles import misplaced
from xbrl.desk.support import ACT, PUNCTUATION, Support
from xbrl.desk.worded import find_periods, find_worded
from xbrl.read.render import cell_name
from xbrl.read.report import CellKey
from xbrl.rules.citations import Citation, find_citations
from xbrl.rules.quantities import find_quantities

KINDS = ("figure", "date", "article", "deadline", "number", "cell")
_SEGMENT = re.compile(r"[^\n;]+?(?:(?<=[\w)%])\. (?=[A-ZÄÖÜ])|(?=\n)|;|$)")  # clauses, as citations.py splits them
_CELL = re.compile(r"\b([A-Z] \d\d\.\d\d(?:\.[a-z])?)(?:,? (r\d{4}))?(?:,? (c\d{3,4}))?\b")
_NAMES = re.compile(
    r"\b(?:(?:Tier|Level|Basel|Stage|Pillar) ?[1-4]|IFRS ?\d{1,2}|CET1|AT1|T[12]|c\d{3,4})(?![\w%]|[.,]\d)|^\s*(?:\d{1,2}[.)]|[-*•]) ",
    re.IGNORECASE | re.MULTILINE,
)
_BRACKET = re.compile(r"(?<!\S)\((?=[-+\u2212]?\d)")
_BARE = re.compile(r"(?<![\w./(-])\d{1,3}(?:,\d{3})+(?!\w)|(?<![\w./(-])\d+(?![\w(/%]|[.,-]\d)")
_DIGITS = re.compile(r"[^\s()]*[\d¹²³¼½¾][^\s()]*")  # whatever still has a digit when all else is read

# How a letter names a ratio without its cell. A sentence with two of them is not decided.
RATIO_NAMES = {
    ("C_47.00", "r0340", "c0010"): re.compile(r"\bleverage ratio\b", re.IGNORECASE),
    ("C_76.00.a", "r0030", "c0010"): re.compile(r"\bLCR\b|\bliquidity coverage (?:ratio|requirement)\b", re.IGNORECASE),
    ("C_84.00.a", "r0220", "c0040"): re.compile(r"\bNSFR\b|\bnet stable funding ratio\b", re.IGNORECASE),
    ("C_03.00", "r0010", "c0010"): re.compile(r"\bCET1 (?:capital )?ratio\b", re.IGNORECASE),
    ("C_03.00", "r0030", "c0010"): re.compile(r"\bTier 1 (?:capital )?ratio\b", re.IGNORECASE),
    ("C_03.00", "r0050", "c0010"): re.compile(r"\btotal capital ratio\b", re.IGNORECASE),
}


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
    for match, days in find_periods("".join(masked)):
        take(
            "deadline",
            *match.span(),
            support.days.get(days, ""),
            "no measure that follows from the findings has this time",
        )
    plain = "".join(masked)
    for segment in _SEGMENT.finditer(plain):
        _take_articles(segment, plain, support, take)
    for match in ACT.finditer("".join(masked)):
        if match[1] not in support.acts:
            take("article", *match.span(), "", "no finding, measure or duty of this report is about this act")
    for match in _CELL.finditer("".join(masked)):
        if not _is_known_cell(match, support):
            take("cell", *match.span(), "", "neither the report nor a rule has this cell")
    for pattern in (ACT, _CELL, _NAMES):
        _hide(pattern, masked)
    cited = {one.text.strip("()") for one in found if one.kind == "article" and one.source}  # again in the same clause
    _take_figures(letter, masked, replace(support, words=support.words | cited), take)
    wrong = misplaced(letter, support.results)
    for place, one in enumerate(found):
        problem = next((text for start, end, text in wrong if start < one.end and one.start < end), "")
        if problem and one.source and one.kind in ("figure", "number"):
            found[place] = replace(one, source="", problem=problem)
    return sorted(found, key=lambda one: one.start)


def _hide(pattern: re.Pattern, masked: list[str]) -> None:
    """Mask what needs no support."""
    for match in pattern.finditer("".join(masked)):
        masked[match.start() : match.end()] = " " * len(match[0])


def _take_figures(letter: str, masked: list[str], support: Support, take) -> None:  # noqa: ANN001 (a closure)
    """Figures, whole numbers and numbers in words. What has a digit and is none of these is unsupported, never passed over."""
    for match in _BRACKET.finditer(letter):
        if masked[match.start()] == "(":
            masked[match.start()] = " "
    for match, value in find_quantities("".join(masked)):
        start, end = match.start() + len(match[0]) - len(match[0].lstrip()), match.start() + len(match[0].rstrip())
        take("figure", start, end, *_figure(value, _cells_beside(letter, start, end), support))
    for match in _BARE.finditer("".join(masked)):
        value = Decimal(match[0].replace(",", ""))
        take(
            "number",
            *match.span(),
            _number_source(value, support),
            "the report and its findings do not have this number",
        )
    for match, value, is_count in find_worded("".join(masked)):
        if value is None:
            take("number", *match.span(), "", "a share or a multiple in words cannot be checked; write the figure")
        elif is_count:
            source = _number_source(value, support)
            take("number", *match.span(), source, "the report and its findings do not have this number")
        else:
            take("figure", *match.span(), *_figure(value, _cells_beside(letter, *match.span()), support))
    for match in _DIGITS.finditer("".join(masked)):
        text = match[0].strip(PUNCTUATION)
        if text and not {text, _token_around(letter, *match.span())} & support.words:
            start = match.start() + match[0].index(text)
            problem = "it cannot be read as a figure, a date or a number of the report; write it as the report does"
            take("number", start, start + len(text), "", problem)


def _token_around(letter: str, start: int, end: int) -> str:
    """What stands around a place without a space, as `131(14)-(15)` around its 15."""
    before, after = re.search(r"\S*$", letter[:start]), re.match(r"\S*", letter[end:])
    return f"{before[0]}{letter[start:end]}{after[0]}".strip(PUNCTUATION + "()")  # type: ignore[index]


def _number_source(value: Decimal, support: Support) -> str:
    if source := support.numbers.get(value, ""):
        return source
    return support.figures[value][0][0] if value in support.figures else ""


def _is_known_cell(match: re.Match, support: Support) -> bool:
    """Whether the report or a rule has the table, or the fixed cell, that a letter names."""
    table, row, column = match[1].replace(" ", "_"), match[2], match[3]
    if row and column:
        return (table, row, column) in support.cells
    return table in support.tables | {cell[0] for cell in support.cells}


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
    """The fixed cells that the sentence around a place names; else that of the only ratio that it names (`NSFR`)."""
    before = max(letter.rfind("\n", 0, start), letter.rfind(". ", 0, start)) + 1
    after = min(
        (place for place in (letter.find("\n", end), letter.find(". ", end)) if place >= 0), default=len(letter)
    )
    sentence, found = letter[before:after], set()
    for table, row, column in _CELL.findall(sentence):
        if row and column:
            found.add((table.replace(" ", "_"), row, column))
    if not found and letter[start:end].rstrip().endswith(("%", "per cent", "percent")):
        named = {cell for cell, pattern in RATIO_NAMES.items() if pattern.search(sentence)}
        found = named if len(named) == 1 else set()
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
