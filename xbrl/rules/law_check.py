"""Judge examples by the law, apart from the rules: reports, the findings on them, facts of notes.

This module shares no code with the rules and imports none of the others: it reads the text of a report and an answer as a
model sees and writes them, with readers of its own, and compares decimals as the articles say. What it cannot decide for
certain, because figures are rounded or left out, it does not complain about. The articles are listed in docs/xbrl.md.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

Cell = str  # "C 03.00 r0010 c0010"; in an open table the row is its key
Complaint = tuple[str, str]  # its case, and a sentence
Tested = tuple[tuple[str, ...], Decimal, str]  # rules, by how much their limit is missed (below 0: met), a sentence

# Of CET1, Tier 1 and total capital: name in rules, minimum (CRR Art. 92(1)), rows in C 03.00 of the ratio, of TSCR and of the
# overall requirement (CRD Art. 104a, 141a), row of the capital in C 01.00.
LEGS = (
    ("CET1", "0.045", "r0010", "r0140", "r0170", "r0020"),
    ("T1", "0.06", "r0030", "r0150", "r0180", "r0015"),
    ("TC", "0.08", "r0050", "r0130", "r0160", "r0010"),
)
LCR, LIQUIDITY, OUTFLOW = (f"C 76.00.a {row} c0010" for row in ("r0030", "r0010", "r0020"))
CET1, BUFFER, TREA = "C 01.00 r0020 c0010", "C 04.00 r0740 c0010", "C 02.00.a r0010 c0010"
UNFLOORED, STANDARDISED = "C 02.00.a r0036 c0010", "C 02.00.b r0010 c0020"
# (cell of a ratio, its legal minimum, the rule on it, cells of requirements that the report may print with the rules on them):
# CRR Art. 92(1), 428b(2); Delegated Reg. (EU) 2015/61 Art. 4(2); CRD Art. 104a, 141a, 141b.
RATIOS: tuple[tuple[Cell, str, str, dict[Cell, str]], ...] = (
    *(
        (f"C 03.00 {ratio} c0010", minimum, f"{leg}_MIN", {f"C 03.00 {tscr} c0010": f"TSCR_{leg}", f"C 03.00 {ocr} c0010": f"OCR_{leg}"})
        for leg, minimum, ratio, tscr, ocr, _ in LEGS
    ),
    ("C 47.00 r0340 c0010", "0.03", "LR_MIN", {"C 47.00 r0420 c0010": "LR_TSLRR", "C 47.00 r0440 c0010": "LR_OLRR"}),
    (LCR, "1", "LCR_MIN", {}),
    ("C 84.00.a r0220 c0040", "1", "NSFR_MIN", {}),
)  # fmt: skip
BUFFERED_FROM = "2023-01-01"  # the leverage ratio buffer: CRR Art. 92(1a), Reg. (EU) 2020/873 Art. 2(2)
# Output floor by year: CRR Art. 465(1); from 2030 Art. 92(3). Until 2029 the cap of Art. 465(2) applies.
FLOOR = {"2025": "0.50", "2026": "0.55", "2027": "0.60", "2028": "0.65", "2029": "0.70"}
COARSEST = Decimal(10_000)  # amounts may be rounded to tens of thousands: ITS (EU) 2024/3117 Art. 23(1)(b)(i)
LARGEST_SHARE = Decimal("0.25")  # of Tier 1, CRR Art. 395(1)
PILLAR_1 = {"CET1_MIN", "T1_MIN", "TC_MIN", "LR_MIN", "LCR_MIN", "NSFR_MIN", "LE_LIMIT", "OUTPUT_FLOOR"}
# Kind of note -> (rule on the figure that counts the amount, its cell, rule on a limit missed without it)
MISSTATED = {
    "pledged": ("PLEDGED_COUNTED", LIQUIDITY, "LCR_PLEDGED"),
    "own_shares": ("OWN_SHARES_COUNTED", CET1, "OWN_SHARES"),
    "profit": ("PROFIT_COUNTED", CET1, "INTERIM_PROFIT"),
}
CASES = (
    *("contradicted", "missed", "waived", "misstatement", "consequence", "unfounded", "facts"),
    *("leverage_buffer", "guideline", "late", "verdict"),
)
# What the style "labels" prints in place of a cell.
LABELS: dict[str, Cell] = {
    "Own funds": "C 01.00 r0010 c0010",
    "Tier 1": "C 01.00 r0015 c0010",
    "CET1": CET1,
    "TREA": TREA,
    "CET1 ratio": "C 03.00 r0010 c0010",
    "Tier 1 ratio": "C 03.00 r0030 c0010",
    "Total capital ratio": "C 03.00 r0050 c0010",
    "TSCR": "C 03.00 r0130 c0010",
    "TSCR CET1": "C 03.00 r0140 c0010",
    "TSCR Tier 1": "C 03.00 r0150 c0010",
    "OCR": "C 03.00 r0160 c0010",
    "OCR CET1": "C 03.00 r0170 c0010",
    "OCR Tier 1": "C 03.00 r0180 c0010",
    "Leverage ratio": "C 47.00 r0340 c0010",
    "Liquidity buffer": LIQUIDITY,
    "Net outflow": OUTFLOW,
    "LCR": LCR,
    "NSFR": "C 84.00.a r0220 c0040",
}
_NOTE = re.compile(r"^(?:note on .* \||Note:)", re.MULTILINE)
_LABELLED = re.compile(rf"({'|'.join(LABELS)}|Client .+) (-?\d+(?:\.\d+)?(?:%| bn| mn| k|))")
_TABLE = re.compile(r"([A-Z] \d\d\.\d\d(?:\.[a-z])?)(?: .*)?")
_LINE = re.compile(r"(?:(r\d+) )?(c\d+)(?: .*)? \| (.*)")
_NUMBER = re.compile(r"(-?\d+(?:\.\d+)?)(%| thousand| million| bn| mn| k|)")
_FIGURE = r"-?\d+(?:\.\d+)?(?:%| thousand| million| bn| mn| k|)"
_VERDICT = re.compile(r"(.*): (?:met|([A-Z][A-Z0-9_]+), (.*))")
_COMPARED = re.compile(rf"(\S.*?)(?: {_FIGURE} [-+/] [^<>]* =)? ({_FIGURE}) ([<>]=?|!=|min|max) ({_FIGURE})")
_TAKEN_OFF = re.compile(rf"(\S.*?) ({_FIGURE}) - {_FIGURE} = ({_FIGURE})")
_UNITS = {"%": "0.01", "": 1, " k": 10**3, " thousand": 10**3, " mn": 10**6, " million": 10**6, " bn": 10**9}


@dataclass
class Printed:
    """What a report prints: numbers (0.045 for 4.5%, amounts in units), texts, its reference date and currency."""

    numbers: dict[Cell, Decimal] = field(default_factory=dict)
    units: dict[Cell, Decimal] = field(default_factory=dict)  # what each number may have been rounded to
    texts: dict[Cell, str] = field(default_factory=dict)
    date: str = ""
    currency: str = ""

    def between(self, cell: Cell) -> tuple[Decimal, Decimal] | None:
        """The least and the most that a printed number can stand for."""
        number = self.numbers.get(cell)
        return None if number is None else (number - self.units[cell], number + self.units[cell])


@dataclass(frozen=True)
class Line:
    """One line below `Violations:`, or a violation below `Checks:`."""

    rule: str
    cell: str
    value: str
    limit: str
    legal: str


@dataclass(frozen=True)
class Told:
    """What an answer says: facts of the note (None without a section `Note:`), and findings."""

    facts: tuple[Mapping[str, Any], ...] | None
    lines: tuple[Line, ...]
    checks: tuple[tuple[str, bool], ...] = ()  # (what is compared, whether the verdict is `met`)


def read_printed(text: str) -> Printed:
    """Read the text of a report in the style "cells" or "labels". Earlier reports and notes below it are not read."""
    printed = Printed()
    date = re.search(r"reference date (\d{4}-\d{2}-\d{2})", text)
    currency = re.search(r"amounts in ([A-Z]{3})", text)
    printed.date, printed.currency = date[1] if date else "", currency[1] if currency else ""
    table = key = ""
    for line in text.partition("\nEarlier reports")[0].splitlines():
        value, labelled = _LINE.fullmatch(line), _LABELLED.fullmatch(line)
        if labelled and (number := _number(labelled[2])):
            cell = LABELS.get(labelled[1]) or f"C 28.00 {labelled[1].removeprefix('Client ')} c350"
            printed.numbers[cell], printed.units[cell] = number[0], Decimal(0)
        elif value:
            cell = f"{table} {value[1] or key} {value[2]}"
            if number := _number(value[3]):
                printed.numbers[cell], printed.units[cell] = number
            else:
                printed.texts[cell] = value[3]
        elif header := _TABLE.fullmatch(line):
            table, key = header[1], ""
        else:
            key = line
    return printed


def _number(text: str) -> tuple[Decimal, Decimal] | None:
    """(a printed number, what it may have been rounded to); None if the text is no number."""
    found = _NUMBER.fullmatch(text)
    if not found:
        return None
    unit = Decimal(_UNITS[found[2]])
    number = Decimal(found[1]) * unit
    last_digit = unit * Decimal(1).scaleb(-len(found[1].partition(".")[2]))
    return number, max(last_digit, COARSEST) if found[2] != "%" and number % COARSEST == 0 else last_digit


def read_told(answer: str) -> Told:
    """Read an answer: its sections `Note:`, `Violations:` (or `Checks:`) and `Directive:`."""
    parts = re.split(r"^(Note|Violations|Checks|Directive):[ \t]*\n?", answer, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    facts = sections.get("Note")
    lines = [Line(*row) for row in _rows(sections.get("Violations", ""), 5)]
    figure, checks = "", []
    for line in sections.get("Checks", "").splitlines():
        if re.match(r"(?:>=|<|min|max) ", line):  # on the figure of the line above
            line = f"{figure} {line}"
        figure = re.split(r" (?:[<>]|(?:min|max) \d)", line)[0]
        if verdict := _VERDICT.fullmatch(line):
            said, rule, legal = verdict.groups()
            checks.append((said, rule is None))
            lines += [_violated(said, rule, legal)] if rule else []
    return Told(
        None if facts is None else tuple(_fact(*row) for row in _rows(facts, 6)),
        tuple(lines),
        tuple(checks),
    )


def _violated(said: str, rule: str, legal: str) -> Line:
    """The violation of a check: `LCR 93% < 100%`, `CET1 90 k - 20 k = 70 k`, `LCR 55 / 50 = 110% != 108%`."""
    if compared := _COMPARED.fullmatch(said):
        what, value, sign, limit = compared.groups()
        if sign == "!=":
            return Line(rule, what, limit, f"expected {value}", legal)
        relation = {"<": "min", ">": "max"}.get(sign, sign)
        return Line(rule, what, value, f"{relation} {limit}", legal)
    if taken_off := _TAKEN_OFF.fullmatch(said):
        return Line(rule, taken_off[1], taken_off[2], f"max {taken_off[3]}", legal)
    return Line(rule, said, "", "", legal)


def _rows(section: str, width: int) -> list[list[str]]:
    rows = ([part.strip() for part in line.split(" | ", width - 1)] for line in section.splitlines())
    return [row for row in rows if len(row) == width]


def _fact(kind: str, applies: str, amount: str, who: str, since: str, quote: str) -> dict[str, Any]:
    number = amount.removeprefix("EUR ")
    return {
        "kind": kind,
        "applies": applies == "applies",
        "amount": None if number == "-" else number,
        "who": who.split(" and "),
    }


def judge(example: Mapping[str, Any]) -> list[Complaint]:
    """Complaints about an example, each with its case, one of `CASES`.

    The facts of its note are those of the answer, else those of the field `note_facts`. Where a note has neither, what it
    decides is not judged.
    """
    report = next(message["content"] for message in example["messages"] if message["role"] == "user")
    told, printed = read_told(example["messages"][-1]["content"]), read_printed(report)
    printed.date = printed.date or example.get("period", "")
    violated, stated = set(example["violations"]), example.get("note_facts")
    facts = told.facts if told.facts is not None else stated
    if facts is None and not _NOTE.search(report):
        facts = ()
    found = [*_citations(printed, told), *_verdicts(told)]
    if facts is not None:
        applying = [fact for fact in facts if fact["applies"]]
        found += [*_findings(printed, violated, applying), *_facts(printed, violated, applying, told)]
    if told.facts is not None and stated is not None and _kinds(told.facts) != _kinds(stated):
        found.append(("facts", "the answer states other facts than the example"))
    return found


def _kinds(facts: Iterable[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    return sorted((fact["kind"], fact["applies"]) for fact in facts)


def audit(examples: Iterable[Mapping[str, Any]]) -> tuple[Counter[str], list[str]]:
    """(how many examples there are, are without violations, break Pillar 1, and each case concerns; complaints in words)."""
    complaints: list[str] = []
    counts: Counter[str] = Counter(dict.fromkeys((*("examples", "clean", "pillar1", "with_facts"), *CASES), 0))
    for example in examples:
        violated = set(example["violations"])
        counts.update(["examples"] + ["clean"] * (not violated) + ["pillar1"] * bool(violated & PILLAR_1))
        counts.update(["with_facts"] * bool(example.get("note_facts")))
        found = judge(example)
        counts.update({case for case, _ in found})
        complaints += [f"{example.get('id', '')}: {case}: {text}" for case, text in found]
    return counts, complaints


def _findings(printed: Printed, violated: set[str], applying: Sequence[Mapping[str, Any]]) -> Iterator[Complaint]:
    """Requirements that the figures miss and the findings do not name, and findings on what the figures meet for certain."""
    waived = any(fact["kind"] == "waiver" for fact in applying)
    if waived and "LCR_MIN" in violated:
        yield "waived", "the liquidity coverage requirement is waived (CRR Art. 8), and LCR_MIN is a finding"
    for part in (_ratios, _derived, _liquidity, _exposures, _floor):
        for rules, missed_by, text in part(printed):
            if missed_by < 0 and violated.intersection(rules):
                yield "unfounded", f"{rules[0]} is a finding; {text}"
            elif missed_by <= 0 or (waived and "LCR_MIN" in rules):
                continue
            elif not violated:
                yield "contradicted", text
            elif rules and not violated.intersection(rules):
                yield "missed", text


def _facts(
    printed: Printed, violated: set[str], applying: Sequence[Mapping[str, Any]], told: Told
) -> Iterator[Complaint]:
    """What facts of a note make of the figures: the wrong figure, and the limit that is missed without the amount."""
    kinds = {fact["kind"] for fact in applying}
    for kind, (counted, cell, limit) in MISSTATED.items():
        named = violated & {limit, f"{limit}_MIN", f"{limit}_TSCR"}
        if kind not in kinds:
            if counted in violated or named:
                yield "unfounded", f"{counted} or {limit} is a finding, and no fact of the note is {kind}"
            continue
        if counted not in violated:
            yield "misstatement", f"the note states {kind}, and {counted} is no finding"
        amounts = [fact["amount"] for fact in applying if fact["kind"] == kind]
        if printed.currency not in ("", "EUR") or None in amounts or (kinds >= {"own_shares", "profit"}):
            continue
        amount = sum(map(Decimal, amounts), Decimal(0))
        expected = set() if kind == "pledged" and "waiver" in kinds else _without(printed, kind, amount, limit)
        if expected is not None and expected != named:
            yield "consequence", f"without {amount} the figures miss {expected or 'nothing'}, the findings are {named}"
        for line in (line for line in told.lines if line.rule == counted):
            value, left = _number(line.value), _number(line.limit.removeprefix("max "))
            if not value or not left or abs(value[0] - amount - left[0]) > value[1] + left[1]:
                yield "consequence", f"{line.value} without {amount} is not {line.limit}"
            if cell not in (line.cell, LABELS.get(line.cell)):
                yield "consequence", f"{counted} stands on {line.cell}, and the amount counts in {cell}"
    shares = _column(printed.numbers, "C 28.00", "c350")
    names = {name: key.partition(" ")[0] for key, name in _column(printed.texts, "C 27.00", "c021").items()}
    for who in (fact["who"] for fact in applying if fact["kind"] == "connected"):
        codes = [code for name in who if (code := names.get(name, name)) in shares]
        total = sum((shares[code] for code in codes), Decimal(0))
        limit = max((_limit(printed, code) for code in codes), default=LARGEST_SHARE)
        if len(codes) == len(who) > 1 and (total > limit) != ("LE_CONNECTED" in violated):
            yield "consequence", f"{' and '.join(who)} have {total} of Tier 1 together, and {limit} is allowed"
    if "connected" not in kinds and "LE_CONNECTED" in violated:
        yield "unfounded", "LE_CONNECTED is a finding, and no fact of the note is connected"


def _without(printed: Printed, kind: str, amount: Decimal, limit: str) -> set[str] | None:
    """The rule on the most severe requirement that is missed without the amount; None if the figures do not decide it."""
    if kind == "pledged":
        ratio = _quotient(printed, LIQUIDITY, amount, OUTFLOW)
        return ratio and _below(ratio, Decimal(1), {limit})
    ratios = [_quotient(printed, f"C 01.00 {own} c0010", amount, TREA) for *_, own in LEGS]
    for suffix in ("_MIN", "_TSCR", ""):
        states = []
        for ratio, (_, minimum, _, tscr, ocr, _) in zip(ratios, LEGS, strict=True):
            row = tscr if suffix else ocr
            required = Decimal(minimum) if suffix == "_MIN" else printed.numbers.get(f"C 03.00 {row} c0010")
            if ratio is None or (required is None and not suffix):
                return None  # the overall requirement can follow from TSCR and the buffer
            states.append(set() if required is None else _below(ratio, required, {limit + suffix}))
        if {limit + suffix} in states:
            return {limit + suffix}
        if None in states:
            return None
    return set()


def _quotient(printed: Printed, above: Cell, amount: Decimal, below: Cell) -> tuple[Decimal, Decimal] | None:
    numerator, denominator = printed.between(above), printed.between(below)
    if numerator is None or denominator is None or denominator[0] <= 0:
        return None
    return (numerator[0] - amount) / denominator[1], (numerator[1] - amount) / denominator[0]


def _below(ratio: tuple[Decimal, Decimal], limit: Decimal, rules: set[str]) -> set[str] | None:
    """`rules` if the ratio is below the limit for certain, nothing if it is not, None between."""
    return rules if ratio[1] < limit else set() if ratio[0] >= limit else None


def _citations(printed: Printed, told: Told) -> Iterator[Complaint]:
    for line in told.lines:
        if line.rule == "LR_OLRR" and printed.date and printed.date < BUFFERED_FROM:
            yield "leverage_buffer", f"the leverage ratio buffer applies from {BUFFERED_FROM}, not on {printed.date}"
        if line.legal.startswith("EBA/GL"):
            yield "guideline", f"{line.rule} cites a guideline as law: {line.legal}"
        if line.rule == "LATE_FILING" and re.match(r"[A-Z] \d\d\.\d\d", line.cell):
            yield "late", f"a late return is a matter of its date, not of {line.cell}"


def _verdicts(told: Told) -> Iterator[Complaint]:
    """Checks whose verdict, or whose sign, is not what their two numbers say."""
    for said, is_met in told.checks:
        compared = _COMPARED.fullmatch(said)
        value, limit = (_number(compared[2]), _number(compared[4])) if compared else (None, None)
        if compared and value and limit:
            sign, difference = compared[3], value[0] - limit[0]
            holds = {
                **{"min": (difference >= 0) == is_met, "max": (difference <= 0) == is_met, "!=": difference != 0},
                **{"<": difference < 0, ">": difference > 0, "<=": difference <= 0, ">=": difference >= 0},
            }
            if not holds[sign]:
                yield "verdict", f"{said} is called {'met' if is_met else 'violated'}"


def _ratios(printed: Printed) -> Iterator[Tested]:
    """Ratios beside the minimum of the law, and beside requirements that the report prints."""
    for cell, minimum, rule, others in RATIOS:
        value = printed.numbers.get(cell)
        if value is None:
            continue
        yield (rule,), Decimal(minimum) - value, f"{cell} is {value}, and the minimum {minimum}"
        for other, other_rule in others.items():
            limit = printed.numbers.get(other)
            if limit is None or (other_rule == "LR_OLRR" and printed.date < BUFFERED_FROM):
                continue
            rules = (other_rule, "LR_TSLRR") if other_rule == "LR_OLRR" else (other_rule,)
            yield rules, limit - value, f"{cell} is {value}, and the requirement {limit} in {other}"


def _derived(printed: Printed) -> Iterator[Tested]:
    """The combined buffer on top of the shares of TSCR (CRD Art. 141a), where these are printed but not their sum."""
    for leg, _, ratio, tscr, ocr, _ in LEGS:
        numbers = [
            printed.numbers.get(cell) for cell in (f"C 03.00 {ratio} c0010", f"C 03.00 {tscr} c0010", BUFFER, TREA)
        ]
        if f"C 03.00 {ocr} c0010" in printed.numbers or None in numbers:
            continue
        value, part, buffer, trea = (number or Decimal(0) for number in numbers)
        missed_by = _beyond(part + buffer / trea - value, Decimal("0.0002"))  # rounding of two ratios to four places
        rules = () if leg == "TC" else (f"CBR_{leg}",)
        yield rules, missed_by, f"{ratio} is {value} beside {part} + {buffer} / {trea}"


def _liquidity(printed: Printed) -> Iterator[Tested]:
    """LCR = liquidity buffer / net outflow (Delegated Reg. (EU) 2015/61 Art. 4(1)), also where the ratio is left out.

    A ratio that is printed was rounded to four places: 2623.9 / 2624 may be printed as 100%.
    """
    rounding = Decimal("0.0001") if LCR in printed.numbers else Decimal(0)
    ratio = _quotient(printed, LIQUIDITY, Decimal(0), OUTFLOW)
    if ratio and ratio[1] < 1 - rounding:
        yield ("LCR_MIN", "LCR_CALC"), 1 - ratio[1], f"liquidity buffer / net outflow is {ratio[1]:.4f} at most"


def _exposures(printed: Printed) -> Iterator[Tested]:
    """The exposure that is the furthest above its limit, or the least below."""
    shares = _column(printed.numbers, "C 28.00", "c350").items()
    for missed_by, client in sorted((share - _limit(printed, client), client) for client, share in shares)[-1:]:
        yield ("LE_LIMIT",), missed_by, f"exposure to {client} is {missed_by} of Tier 1 above its limit"


def _beyond(difference: Decimal, tolerance: Decimal) -> Decimal:
    """A difference, or 0 if it is within a tolerance."""
    return difference if abs(difference) > tolerance else Decimal(0)


def _column(values: Mapping[Cell, Any], table: str, column: str) -> dict[str, Any]:
    """Key of the row -> what an open table prints in a column."""
    ends = f"{table} ", f" {column}"
    found = {cell: value for cell, value in values.items() if cell.startswith(ends[0]) and cell.endswith(ends[1])}
    return {cell.removeprefix(ends[0]).removesuffix(ends[1]): value for cell, value in found.items()}


def _limit(printed: Printed, client: str) -> Decimal:
    """The limit of an exposure: 25% of Tier 1, for an institution the bank's own limit if it is higher (CRR Art. 395(1))."""
    types = [text for key, text in _column(printed.texts, "C 27.00", "c070").items() if client in key.split()]
    higher = printed.numbers.get("C 26.00 r030 c010", LARGEST_SHARE)
    return max(LARGEST_SHARE, higher) if any(text.endswith("qx2056") for text in types) else LARGEST_SHARE


def _floor(printed: Printed) -> Iterator[Tested]:
    cells = (TREA, UNFLOORED, STANDARDISED)
    if printed.date < "2025" or any(cell not in printed.numbers for cell in cells):
        return
    total, unfloored, standardised = (printed.numbers[cell] for cell in cells)
    floored = max(unfloored, Decimal(FLOOR.get(printed.date[:4], "0.725")) * standardised)
    if printed.date < "2030":
        floored = min(floored, Decimal("1.25") * unfloored)
    missed_by = _beyond(floored - total, sum((printed.units[cell] for cell in cells), Decimal(0)))
    yield ("OUTPUT_FLOOR",), missed_by, f"risk exposure is {total}, and floored {floored}"
