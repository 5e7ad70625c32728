"""Read an answer: lenient in its form, strict in its content.

The reader takes both forms of `answers.py`, with the facts of a note above the violations. The form may vary: a preamble, bold
or numbered lines, a Markdown table, headings in other letters. The content may not: a line that lacks one of its parts is void,
and void lines are counted.
"""

import re
from dataclasses import dataclass
from decimal import Decimal

from xbrl.answers.answers import SUBJECTS
from xbrl.answers.statements import BARE_QUANTITY, articles, parse_quantity
from xbrl.read.filed_report import is_day
from xbrl.rules.formula import keeps_to
from xbrl.rules.note_facts import KINDS, NoteFact

RULE_ID = re.compile(r"[A-Z][A-Z0-9]+(?:_[A-Z0-9]+)*")
APPLIES = {"applies": True, "does not apply": False}
NOT_REPORTED = "not reported"
MAX_CHECK = 600  # characters of a check; the time to read one grows with the square of its length
_HEADING = re.compile(r"(note|violations|checks|directive)\s*(?::\s*(.*)|$)", re.IGNORECASE)
_MARKS = re.compile(r"^(?:(?:[#•]|>(?!=))+\s*|[-*+]\s+|\(?\d{1,2}[.)]\s+)+")  # headings, quotes, bullets, numbers
_RELATIONS = {
    **{"min": "min", "minimum": "min", "at least": "min", ">=": "min", "≥": "min"},
    **{"max": "max", "maximum": "max", "at most": "max", "<=": "max", "≤": "max", "expected": "expected"},
}
_COMPARISON = re.compile(r"\s(<=?|>=?|≤|≥|!=|≠|(?:min|max)(?=\s[-\u2212\d]))\s")
_MORE = re.compile(r"(?:<=?|>=|≤|≥|min|max)\s")  # the start of a line that compares the figure of the line above
_AS_REPORTED = re.compile(r"(.* = \S+)( = )(\S+)")  # a quotient, and the ratio that it must equal
_NOT_EURO = re.compile(r"\b(?!EUR\b)[A-Z]{3}\b|[$£¥%]")
_KIND_OF = {name: (kind, not number) for kind, names in SUBJECTS.items() for number, name in enumerate(names)}
_IN_CHECK = re.compile(rf"(\S.*), so ({'|'.join(_KIND_OF)})\b.*")
_CODE = re.compile(r"\b[A-Z]\d\d\b")  # of a client
_VALUE = rf"(?:\d{{4}}-\d\d-\d\d|{BARE_QUANTITY}(?: days?)?)"
_STEP = rf"{BARE_QUANTITY}(?: ?[-+/=\u2212]|,) ?"
_CHECKED = re.compile(rf"(?P<subject>\S.*?)(?:\s+(?P<working>(?:{_STEP})*{BARE_QUANTITY} = )?(?P<value>{_VALUE}))?")


@dataclass(frozen=True)
class Claim:
    """The content of one line of an answer, normalised so that claims can be compared.

    `state` is "violated", "met" (rule "") or "lifts". `where` is a cell, with the counterparty in an open table, or the subject
    of a check. `value` and `limit` are numbers, so `4.310%` and `4.31%` are equal; None if the line states none.
    """

    state: str
    rule: str
    where: str
    value: Decimal | str | None  # "not reported" or a date is a str
    relation: str  # "min", "max", "expected"; "" without a limit
    limit: Decimal | str | None
    legal: frozenset[tuple[str, str]]

    @property
    def contradicts_itself(self) -> bool:
        """Whether the verdict contradicts the line's own two numbers: `CET1 ratio 9.48% min 9.5%: met`."""
        if not isinstance(self.value, Decimal) or not isinstance(self.limit, Decimal) or self.state == "lifts":
            return False
        return bool(self.relation) and keeps_to(self.value, self.relation, self.limit) != (self.state == "met")


@dataclass(frozen=True)
class Answer:
    """A parsed answer, without the facts of the bank's note (`read_facts`).

    `rule_ids` are the rules reported as violated and not lifted, without duplicates, in the order of the answer. `directive`
    is the letter; it is empty if the answer ended before the letter. `void` counts the lines on violations that could not be
    read.
    """

    rule_ids: tuple[str, ...]
    directive: str
    claims: tuple[Claim, ...] = ()
    void: int = 0


def parse_answer(text: str) -> Answer | None:
    """Read an answer. Return None if it has no heading `Violations:` or `Checks:`, or no valid line below it.

    Valid lines have the form that `answers.py` writes, or are `none` for a report without violations. An id that matches no rule
    is kept and counts as a false positive. If generation was cut short before `Directive:`, the directive is empty.
    """
    body = _sections(text).get("violations", [])
    claims = [read_line(line) for line in body if not _is_none(line)]
    read = [claim for claim in claims if claim]
    clean = any(_is_none(line) for line in body)
    contradicts = clean and any(claim.state == "violated" for claim in read)
    if not read and not clean:
        return None
    lifted = {claim.rule for claim in read if claim.state == "lifts"}
    rules = dict.fromkeys(claim.rule for claim in read if claim.state == "violated" and claim.rule not in lifted)
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


def facts_of_checks(text: str) -> list[NoteFact]:
    """Return the facts that an answer of the quickstart states in its checks, in place of a section `Note:`."""
    facts = []
    for match in filter(None, map(_IN_CHECK.fullmatch, _sections(text).get("violations", ()))):
        quote, (kind, applies) = match[1], _KIND_OF[match[2]]
        clients = tuple(_CODE.findall(quote)) if kind == "connected" else ()
        facts.append(NoteFact(kind, applies, None, clients, "", quote))
    return facts


def read_fact(line: str) -> NoteFact | None:
    """Read the fact of one line. Return None if the line has another form than `answers.write_fact` writes."""
    parts = [part.strip() for part in line.split("|", 5)]
    if len(parts) != 6 or parts[0] not in KINDS or parts[1] not in APPLIES:
        return None
    kind, state, amount, who, since, quote = parts
    value = None if amount == "-" else parse_quantity(amount)
    is_euro = value is not None and value >= 0 and not _NOT_EURO.search(amount)
    if (amount != "-" and not is_euro) or (since != "-" and not is_day(since)):
        return None
    clients = who.split(" and ") if kind == "connected" else [who]
    names = () if who == "-" else tuple(name.strip() for name in clients)
    since, quote = ("" if part == "-" else part for part in (since, quote.strip('"„“” ')))
    return NoteFact(kind, APPLIES[state], value, names, since, quote)


def read_line(line: str) -> Claim | None:
    """Read one line of either form: `RULE | cell | value | limit | article` or `subject value < limit: verdict, article`."""
    return _read_violation(line.strip("| ")) if "|" in line else _read_check(line)


def _sections(text: str) -> dict[str, list[str]]:
    """Return section -> lines: `note`, `violations` (also for the heading `Checks:`) and `directive`, as far as present.

    A section begins with its heading. Lines before the first heading are a preamble; the letter is everything after its heading.
    """
    sections: dict[str, list[str]] = {}
    section: list[str] = []
    figure = ""  # the compared figure of the check above; "" if that check compares nothing
    lines = text.splitlines()
    for number, line in enumerate(lines):
        plain = _plain(line)
        heading = _HEADING.fullmatch(plain)
        name = heading[1].casefold().replace("checks", "violations") if heading else ""
        rest = heading[2] or "" if heading else ""
        if name == "directive" and "violations" in sections:
            return sections | {"directive": [rest, *lines[number + 1 :]]}
        if name == "violations" or (name == "note" and "violations" not in sections):
            section = sections.setdefault(name, [])
            plain = rest
        elif name == "directive":
            section = []
        if name != "note" and _MORE.match(plain):
            plain = f"{figure} {plain}".strip()
        else:
            compared = _COMPARISON.search(plain)
            figure = plain[: compared.start()] if compared else ""
        if re.search(r"\w", plain) and not re.match(r"rule \|", plain.strip("| "), re.IGNORECASE):
            section.append(plain)
    return sections


def _plain(line: str) -> str:
    """Remove the markup of Markdown from a line."""
    return " ".join(_MARKS.sub("", line.strip()).replace("**", "").replace("`", "").split())


def _is_none(line: str) -> bool:
    return line.strip("| .").casefold() == "none"


def _read_violation(line: str) -> Claim | None:
    fields = [field.strip() for field in line.split("|")]
    if len(fields) != 5 or not RULE_ID.fullmatch(fields[0]) or not fields[1]:
        return None
    rule, where, value, limit, legal = fields
    number = NOT_REPORTED if value.casefold() in (NOT_REPORTED, "nil") else _value(value)
    relation, bound = _read_limit(limit)
    if number is None or bound is None or not legal:
        return None
    return Claim("violated", rule, _place(where), number, relation, bound, _law(legal))


def _read_limit(text: str) -> tuple[str, Decimal | str | None]:
    """Return (relation, limit) of a text such as `min 4.5%`; a limit alone has the relation ""."""
    match = re.match(rf"({'|'.join(_RELATIONS)}) ?", text, re.IGNORECASE)
    return (_RELATIONS[match[1].casefold()], _value(text[match.end() :])) if match else ("", _value(text))


def _value(text: str) -> Decimal | str | None:
    """Return the number or the date (as written, YYYY-MM-DD) of a text; None if it is neither."""
    return text if re.fullmatch(r"\d{4}-\d\d-\d\d", text) else parse_quantity(re.sub(r" days?$", "", text))


def _law(text: str) -> frozenset[tuple[str, str]]:
    """Return the articles of a legal reference. A reference that cites no article is represented by its text."""
    return articles(text) or frozenset({("", text.casefold())} if text else ())


def _read_check(line: str) -> Claim | None:
    if len(line) > MAX_CHECK:
        return None
    head, colon, verdict = line.rpartition(":")
    ruling = re.fullmatch(rf"(?:(met)|(lifts )?({RULE_ID.pattern}))(?:, (.+))?\.?", verdict.strip(), re.IGNORECASE)
    left, sign, limit = head.strip(), "", None
    compared = list(_COMPARISON.finditer(left))
    if compared:
        sign, limit = compared[-1][1], _value(left[compared[-1].end() :])
        left = left[: compared[-1].start()]
    elif quotient := _AS_REPORTED.fullmatch(left):
        left, sign, limit = quotient[1], "=", _value(quotient[3])
    figures = _CHECKED.fullmatch(left)
    if not ruling or not figures or re.search("[<>=]|^(?:min|max)$", figures["subject"]):
        return None
    if not figures["value"] and re.search(r"\s(?:min|max)$", left):  # its limit is missing
        return None
    met, lifts, rule, legal = ruling.groups()
    if (sign and (limit is None or not figures["value"])) or not (met or RULE_ID.fullmatch(rule)):
        return None
    state = "met" if met else "lifts" if lifts else "violated"
    # A figure below its limit misses a minimum, or meets a maximum.
    relation = sign if sign in ("", "min", "max") else "min" if (sign[0] in "<≤") == (state == "violated") else "max"
    value = _value(figures["value"]) if figures["value"] else None
    if sign in ("=", "!=", "≠"):  # the reported ratio is expected to equal the computed one
        relation, value, limit = "expected", limit, value
    elif figures["working"] and not sign and (rule or "").endswith("_COUNTED"):
        # The reported figure exceeds the amount that may be counted, which is the result of the subtraction.
        relation, value, limit = "max", _value(figures["working"].split(" - ")[0]), value
    return Claim(state, rule or "", _place(figures["subject"]), value, relation, limit, _law(legal or ""))


def _place(text: str) -> str:
    return " ".join(text.replace("_", " ").casefold().split())
