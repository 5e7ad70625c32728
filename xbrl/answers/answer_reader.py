"""Read an answer: lenient in its form, strict in its content.

The form may vary: a preamble, bold or numbered lines, a Markdown table, headings in other letters. The content may not: a line
that lacks one of its parts is void, and void lines are counted.
"""

import re
from dataclasses import dataclass
from decimal import Decimal

from xbrl.answers.statements import articles, parse_quantity
from xbrl.read.filed_report import is_day
from xbrl.rules.formula import keeps_to
from xbrl.rules.note_facts import KINDS, NoteFact

RULE_ID = re.compile(r"[A-Z][A-Z0-9]+(?:_[A-Z0-9]+)*")
APPLIES = {"applies": True, "does not apply": False}
NOT_REPORTED = "not reported"
_HEADING = re.compile(r"(note|violations|directive)\s*(?::\s*(.*)|$)", re.IGNORECASE)
_MARKS = re.compile(r"^(?:(?:[#•]|>(?!=))+\s*|[-*+]\s+|\(?\d{1,2}[.)]\s+)+")  # headings, quotes, bullets, numbers
_RELATIONS = {
    **{"min": "min", "minimum": "min", "at least": "min", ">=": "min", "≥": "min"},
    **{"max": "max", "maximum": "max", "at most": "max", "<=": "max", "≤": "max", "expected": "expected"},
}
_NOT_EURO = re.compile(r"\b(?!EUR\b)[A-Z]{3}\b|[$£¥%]")


@dataclass(frozen=True)
class Claim:
    """The content of one line on a violation, normalised so that claims can be compared.

    `where` is a cell, with the counterparty in an open table. `value` and `limit` are numbers, so `4.310%` and `4.31%` are equal.
    """

    rule: str
    where: str
    value: Decimal | str  # "not reported" or a date is a str
    relation: str  # "min", "max", "expected"; "" for a limit alone
    limit: Decimal | str
    legal: frozenset[tuple[str, str]]

    @property
    def contradicts_itself(self) -> bool:
        """Whether the line's own two numbers meet the rule: `CET1_MIN | ... | 4.6% | min 4.5%`."""
        if not isinstance(self.value, Decimal) or not isinstance(self.limit, Decimal):
            return False
        return bool(self.relation) and keeps_to(self.value, self.relation, self.limit)


@dataclass(frozen=True)
class Answer:
    """A parsed answer, without the facts of the bank's note (`read_facts`).

    `rule_ids` are the rules reported as violated, without duplicates, in the order of the answer. `directive` is the letter; it is
    empty if the answer ended before the letter. `void` counts the lines on violations that could not be read.
    """

    rule_ids: tuple[str, ...]
    directive: str
    claims: tuple[Claim, ...] = ()
    void: int = 0


def parse_answer(text: str) -> Answer | None:
    """Read an answer. Return None if it has no heading `Violations:`, or no valid line below it.

    Valid lines have the form that `answers.py` writes, or are `none` for a report without violations. An id that matches no rule
    is kept and counts as a false positive. If generation was cut short before `Directive:`, the directive is empty.
    """
    body = _sections(text).get("violations", [])
    claims = [read_line(line) for line in body if not _is_none(line)]
    read = [claim for claim in claims if claim]
    clean = any(_is_none(line) for line in body)
    contradicts = clean and bool(read)
    if not read and not clean:
        return None
    rules = dict.fromkeys(claim.rule for claim in read)
    return Answer(tuple(rules), letter_in(text), tuple(dict.fromkeys(read)), claims.count(None) + contradicts)


def read_lines(text: str) -> list[tuple[str, Claim | None]]:
    """Return the lines of an answer above its letter, each with its claim, or None if it cannot be read, without `none`."""
    return [(line, read_line(line)) for line in _sections(text).get("violations", ()) if not _is_none(line)]


def letter_in(text: str) -> str:
    """Return the letter of an answer, even if its lines cannot be read; "" if the text has no letter."""
    return "\n".join(_sections(text).get("directive", ())).strip()


def read_facts(text: str) -> tuple[list[NoteFact], int] | None:
    """Return (the facts below the heading `Note:` of an answer, the number of unreadable lines); None without the heading."""
    lines = _sections(text).get("note")
    if lines is None:
        return None
    facts = [read_fact(line) for line in lines if not _is_none(line)]
    return [fact for fact in facts if fact], facts.count(None)


def read_fact(line: str) -> NoteFact | None:
    """Read the fact of one line. Return None if the line has another form than `answers.write_fact` writes."""
    parts = [part.strip() for part in line.rsplit("|", 5)]
    if len(parts) != 6 or parts[1] not in KINDS or parts[2] not in APPLIES:
        return None
    quote, kind, state, amount, who, since = parts
    value = None if amount == "-" else parse_quantity(amount)
    is_euro = value is not None and value >= 0 and not _NOT_EURO.search(amount)
    if (amount != "-" and not is_euro) or (since != "-" and not is_day(since)):
        return None
    clients = who.split(" and ") if kind == "connected" else [who]
    names = () if who == "-" else tuple(name.strip() for name in clients)
    since, quote = ("" if part == "-" else part for part in (since, quote.strip('"„“” ')))
    return NoteFact(kind, APPLIES[state], value, names, since, quote)


def read_line(line: str) -> Claim | None:
    """Read one line on a violation: `RULE | cell | value | limit | article`. Return None if a part is missing."""
    fields = [field.strip() for field in line.strip("| ").split("|")]
    if len(fields) != 5 or not RULE_ID.fullmatch(fields[0]) or not fields[1]:
        return None
    rule, where, value, limit, legal = fields
    number = NOT_REPORTED if value.casefold() in (NOT_REPORTED, "nil") else _value(value)
    relation, bound = _read_limit(limit)
    if number is None or bound is None or not legal:
        return None
    return Claim(rule, _place(where), number, relation, bound, _law(legal))


def _sections(text: str) -> dict[str, list[str]]:
    """Return section -> lines: `note`, `violations` and `directive`, as far as present.

    A section begins with its heading. Lines before the first heading are a preamble; the letter is everything after its heading.
    """
    sections: dict[str, list[str]] = {}
    section: list[str] = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        plain = _plain(line)
        heading = _HEADING.fullmatch(plain)
        name, rest = (heading[1].casefold(), heading[2] or "") if heading else ("", "")
        if name == "directive" and "violations" in sections:
            return sections | {"directive": [rest, *lines[number + 1 :]]}
        if name == "violations" or (name == "note" and "violations" not in sections):
            section = sections.setdefault(name, [])
            plain = rest
        elif name == "directive":
            section = []
        if re.search(r"\w", plain) and not re.match(r"rule \|", plain.strip("| "), re.IGNORECASE):
            section.append(plain)
    return sections


def _plain(line: str) -> str:
    """Remove the markup of Markdown from a line."""
    return " ".join(_MARKS.sub("", line.strip()).replace("**", "").replace("`", "").split())


def _is_none(line: str) -> bool:
    return line.strip("| .").casefold() == "none"


def _read_limit(text: str) -> tuple[str, Decimal | str | None]:
    """Return (relation, limit) of a text such as `min 4.5%`; a limit alone has the relation ""."""
    match = re.match(rf"({'|'.join(_RELATIONS)}) ?", text, re.IGNORECASE)
    return (_RELATIONS[match[1].casefold()], _value(text[match.end() :])) if match else ("", _value(text))


def _value(text: str) -> Decimal | str | None:
    """Return the number or the date (as written, YYYY-MM-DD) of a text; None if it is neither."""
    return text if re.fullmatch(r"\d{4}-\d\d-\d\d", text) else parse_quantity(re.sub(r" days?$", "", text))


def _law(text: str) -> frozenset[tuple[str, str]]:
    """Return the articles of a legal reference. A reference that cites no article is represented by its text."""
    return articles(text) or frozenset({("", text.casefold())})


def _place(text: str) -> str:
    return " ".join(text.replace("_", " ").casefold().split())
