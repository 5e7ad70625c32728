"""Judge examples by the law, independently of the rules:   python -m tests.xbrl.rules.law_check FILE ...

FILE is an example file (JSON Lines) of xbrl/scripts/make_reports.py or `xbrl/scripts/regulator.py examples`. The command prints how many
examples each case concerns, and the first ten complaints in words. The exit code is 1 if there is any complaint.

The judge imports no module of the project. It has its own readers for the text of a report and of an answer, and compares
decimals as the articles demand. It makes no complaint where rounded or missing figures leave the matter open. docs/xbrl.md
lists the articles.
"""

import json
import pathlib
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

Cell = str  # "C 03.00 r0010 c0010"; in an open table the row is its key
Complaint = tuple[str, str]  # (case, sentence)
LimitCheck = tuple[tuple[str, ...], Decimal, str]  # (rules, shortfall: below 0 if the limit is met, sentence)

# For CET1, Tier 1 and total capital: name in rules, minimum (CRR Art. 92(1)), rows in C 03.00 of the ratio, of TSCR and of the
# overall requirement (CRD Art. 104a, 141a), row of the capital in C 01.00.
LEGS = (
    ("CET1", "0.045", "r0010", "r0140", "r0170", "r0020"),
    ("T1", "0.06", "r0030", "r0150", "r0180", "r0015"),
    ("TC", "0.08", "r0050", "r0130", "r0160", "r0010"),
)
LCR, LIQUIDITY, OUTFLOW = (f"C 76.00.a {row} c0010" for row in ("r0030", "r0010", "r0020"))
CET1, BUFFER, TREA = "C 01.00 r0020 c0010", "C 04.00 r0740 c0010", "C 02.00.a r0010 c0010"
UNFLOORED, STANDARDISED = "C 02.00.a r0036 c0010", "C 02.00.b r0010 c0020"
# (cell of a ratio, legal minimum, rule on the minimum, {cell of a requirement that the report may print: rule on it}):
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
# Kind of note -> (rule on the figure that wrongly counts the amount, cell of that figure, rule on a limit missed without it)
MISSTATED = {
    "pledged": ("PLEDGED_COUNTED", LIQUIDITY, "LCR_PLEDGED"),
    "own_shares": ("OWN_SHARES_COUNTED", CET1, "OWN_SHARES"),
    "profit": ("PROFIT_COUNTED", CET1, "INTERIM_PROFIT"),
}
CASES = (
    *("contradicted", "missed", "waived", "misstatement", "consequence", "unfounded", "facts"),
    *("leverage_buffer", "guideline", "late"),
)
# Label that the style "labels" prints -> cell
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
_UNITS = {"%": "0.01", "": 1, " k": 10**3, " thousand": 10**3, " mn": 10**6, " million": 10**6, " bn": 10**9}


@dataclass
class PrintedReport:
    """The numbers of a report's text (0.045 for 4.5%, amounts in units), its other texts, reference date and currency."""

    numbers: dict[Cell, Decimal] = field(default_factory=dict)
    units: dict[Cell, Decimal] = field(default_factory=dict)  # the unit to which each number may have been rounded
    texts: dict[Cell, str] = field(default_factory=dict)
    date: str = ""
    currency: str = ""

    def between(self, cell: Cell) -> tuple[Decimal, Decimal] | None:
        """Return the smallest and the largest unrounded value of a printed number; None if the cell is not printed."""
        number = self.numbers.get(cell)
        return None if number is None else (number - self.units[cell], number + self.units[cell])


@dataclass(frozen=True)
class Violation:
    """A line below `Violations:` in an answer."""

    rule: str
    cell: str
    value: str
    limit: str
    legal: str


@dataclass(frozen=True)
class Answer:
    """The facts and violations that an answer states. `facts` is None if the answer has no section `Note:`."""

    facts: tuple[Mapping[str, Any], ...] | None
    violations: tuple[Violation, ...]


def read_report_text(text: str) -> PrintedReport:
    """Read the text of a report in the style "cells" or "labels". Earlier reports and notes below it are not read."""
    printed = PrintedReport()
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
    """Return (printed number, unit to which it may have been rounded), or None if the text is no number."""
    match = _NUMBER.fullmatch(text)
    if not match:
        return None
    unit = Decimal(_UNITS[match[2]])
    number = Decimal(match[1]) * unit
    last_digit = unit * Decimal(1).scaleb(-len(match[1].partition(".")[2]))
    return number, max(last_digit, COARSEST) if match[2] != "%" and number % COARSEST == 0 else last_digit


def read_answer(text: str) -> Answer:
    """Read an answer: its sections `Note:`, `Violations:` and `Directive:`."""
    parts = re.split(r"^(Note|Violations|Directive):[ \t]*\n?", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    facts = sections.get("Note")
    return Answer(
        None if facts is None else tuple(_fact(*row) for row in _rows(facts, 6)),
        tuple(Violation(*row) for row in _rows(sections.get("Violations", ""), 5)),
    )


def _rows(section: str, width: int) -> list[list[str]]:
    rows = ([part.strip() for part in line.rsplit(" | ", width - 1)] for line in section.splitlines())
    return [row for row in rows if len(row) == width]


def _fact(quote: str, kind: str, applies: str, amount: str, who: str, since: str) -> dict[str, Any]:
    number = amount.removeprefix("EUR ")
    return {
        "kind": kind,
        "applies": applies == "applies",
        "amount": None if number == "-" else number,
        "who": who.split(" and "),
    }


def judge(example: Mapping[str, Any]) -> list[Complaint]:
    """Return the complaints about an example, each with its case, one of `CASES`.

    The facts of its note are read from the answer, or else from the field `note_facts`. If a note has neither, only the
    citations of the answer are judged.
    """
    report = next(message["content"] for message in example["messages"] if message["role"] == "user")
    answer, printed = read_answer(example["messages"][-1]["content"]), read_report_text(report)
    printed.date = printed.date or example.get("period", "")
    violated, stated = set(example["violations"]), example.get("note_facts")
    facts = answer.facts if answer.facts is not None else stated
    if facts is None and not _NOTE.search(report):
        facts = ()
    complaints = list(_citations(printed, answer))
    if facts is not None:
        applying = [fact for fact in facts if fact["applies"]]
        complaints += [*_findings(printed, violated, applying), *_facts(printed, violated, applying, answer)]
    if answer.facts is not None and stated is not None and _kinds(answer.facts) != _kinds(stated):
        complaints.append(("facts", "the answer states other facts than the example"))
    return complaints


def _kinds(facts: Iterable[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    return sorted((fact["kind"], fact["applies"]) for fact in facts)


def audit(examples: Iterable[Mapping[str, Any]]) -> tuple[Counter[str], list[str]]:
    """Return (counts, complaints in words).

    The counts are the number of examples, of examples without violations, with a violation of Pillar 1, with facts of a
    note, and the number of examples that each case concerns.
    """
    complaints: list[str] = []
    counts: Counter[str] = Counter(dict.fromkeys((*("examples", "clean", "pillar1", "with_facts"), *CASES), 0))
    for example in examples:
        violated = set(example["violations"])
        counts.update(["examples"] + ["clean"] * (not violated) + ["pillar1"] * bool(violated & PILLAR_1))
        counts.update(["with_facts"] * bool(example.get("note_facts")))
        judged = judge(example)
        counts.update({case for case, _ in judged})
        complaints += [f"{example.get('id', '')}: {case}: {text}" for case, text in judged]
    return counts, complaints


def _findings(printed: PrintedReport, violated: set[str], applying: Sequence[Mapping[str, Any]]) -> Iterator[Complaint]:
    """Yield requirements that the figures miss and no finding names, and findings on limits that the figures surely meet."""
    waived = any(fact["kind"] == "waiver" for fact in applying)
    if waived and "LCR_MIN" in violated:
        yield "waived", "the liquidity coverage requirement is waived (CRR Art. 8), and LCR_MIN is a finding"
    for part in (_ratios, _derived, _liquidity, _exposures, _floor):
        for rules, shortfall, text in part(printed):
            if shortfall < 0 and violated.intersection(rules):
                yield "unfounded", f"{rules[0]} is a finding; {text}"
            elif shortfall <= 0 or (waived and "LCR_MIN" in rules):
                continue
            elif not violated:
                yield "contradicted", text
            elif rules and not violated.intersection(rules):
                yield "missed", text


def _facts(
    printed: PrintedReport, violated: set[str], applying: Sequence[Mapping[str, Any]], answer: Answer
) -> Iterator[Complaint]:
    """Compare the findings with the facts of the note: the misstated figure, and the limit that is missed without the amount."""
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
        for line in (line for line in answer.violations if line.rule == counted):
            value, rest = _number(line.value), _number(line.limit.removeprefix("max "))
            if not value or not rest or abs(value[0] - amount - rest[0]) > value[1] + rest[1]:
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


def _without(printed: PrintedReport, kind: str, amount: Decimal, limit: str) -> set[str] | None:
    """Return the rule on the most severe requirement that is missed without the amount; None if the figures leave it open."""
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


def _quotient(printed: PrintedReport, above: Cell, amount: Decimal, below: Cell) -> tuple[Decimal, Decimal] | None:
    """Return the smallest and the largest value of (above - amount) / below; None if a figure is missing or not above 0."""
    numerator, denominator = printed.between(above), printed.between(below)
    if numerator is None or denominator is None or denominator[0] <= 0:
        return None
    return (numerator[0] - amount) / denominator[1], (numerator[1] - amount) / denominator[0]


def _below(ratio: tuple[Decimal, Decimal], limit: Decimal, rules: set[str]) -> set[str] | None:
    """Return `rules` if the ratio is surely below the limit, an empty set if it surely is not, None if rounding decides."""
    return rules if ratio[1] < limit else set() if ratio[0] >= limit else None


def _citations(printed: PrintedReport, answer: Answer) -> Iterator[Complaint]:
    for line in answer.violations:
        if line.rule == "LR_OLRR" and printed.date and printed.date < BUFFERED_FROM:
            yield "leverage_buffer", f"the leverage ratio buffer applies from {BUFFERED_FROM}, not on {printed.date}"
        if line.legal.startswith("EBA/GL"):
            yield "guideline", f"{line.rule} cites a guideline as law: {line.legal}"
        if line.rule == "LATE_FILING" and re.match(r"[A-Z] \d\d\.\d\d", line.cell):
            yield "late", f"a late return is a matter of its date, not of {line.cell}"


def _ratios(printed: PrintedReport) -> Iterator[LimitCheck]:
    """Compare each ratio with the legal minimum, and with the requirements that the report prints."""
    for cell, minimum, rule, requirements in RATIOS:
        value = printed.numbers.get(cell)
        if value is None:
            continue
        yield (rule,), Decimal(minimum) - value, f"{cell} is {value}, and the minimum {minimum}"
        for limit_cell, limit_rule in requirements.items():
            limit = printed.numbers.get(limit_cell)
            if limit is None or (limit_rule == "LR_OLRR" and printed.date < BUFFERED_FROM):
                continue
            rules = (limit_rule, "LR_TSLRR") if limit_rule == "LR_OLRR" else (limit_rule,)
            yield rules, limit - value, f"{cell} is {value}, and the requirement {limit} in {limit_cell}"


def _derived(printed: PrintedReport) -> Iterator[LimitCheck]:
    """Compare each ratio with its share of TSCR plus the combined buffer (CRD Art. 141a), if the sum itself is not printed."""
    for leg, _, ratio, tscr, ocr, _ in LEGS:
        numbers = [
            printed.numbers.get(cell) for cell in (f"C 03.00 {ratio} c0010", f"C 03.00 {tscr} c0010", BUFFER, TREA)
        ]
        if f"C 03.00 {ocr} c0010" in printed.numbers or None in numbers:
            continue
        value, part, buffer, trea = (number or Decimal(0) for number in numbers)
        shortfall = _beyond(part + buffer / trea - value, Decimal("0.0002"))  # two ratios are rounded to four places
        rules = () if leg == "TC" else (f"CBR_{leg}",)
        yield rules, shortfall, f"{ratio} is {value} beside {part} + {buffer} / {trea}"


def _liquidity(printed: PrintedReport) -> Iterator[LimitCheck]:
    """Compare liquidity buffer / net outflow (Delegated Reg. (EU) 2015/61 Art. 4(1)) with 100%, with or without a printed LCR.

    A printed ratio was rounded to four places: 2623.9 / 2624 may be printed as 100%.
    """
    rounding = Decimal("0.0001") if LCR in printed.numbers else Decimal(0)
    ratio = _quotient(printed, LIQUIDITY, Decimal(0), OUTFLOW)
    if ratio and ratio[1] < 1 - rounding:
        yield ("LCR_MIN", "LCR_CALC"), 1 - ratio[1], f"liquidity buffer / net outflow is {ratio[1]:.4f} at most"


def _exposures(printed: PrintedReport) -> Iterator[LimitCheck]:
    """Compare with its limit the exposure that exceeds its limit most, or is closest below it."""
    shares = _column(printed.numbers, "C 28.00", "c350").items()
    for shortfall, client in sorted((share - _limit(printed, client), client) for client, share in shares)[-1:]:
        yield ("LE_LIMIT",), shortfall, f"exposure to {client} is {shortfall} of Tier 1 above its limit"


def _beyond(difference: Decimal, tolerance: Decimal) -> Decimal:
    """Return the difference, or 0 if it is within the tolerance."""
    return difference if abs(difference) > tolerance else Decimal(0)


def _column(values: Mapping[Cell, Any], table: str, column: str) -> dict[str, Any]:
    """Return {row key: value} for one column of an open table."""
    start, end = f"{table} ", f" {column}"
    in_column = {cell: value for cell, value in values.items() if cell.startswith(start) and cell.endswith(end)}
    return {cell.removeprefix(start).removesuffix(end): value for cell, value in in_column.items()}


def _limit(printed: PrintedReport, client: str) -> Decimal:
    """Return an exposure's limit: 25% of Tier 1, or the bank's higher limit for an institution (CRR Art. 395(1))."""
    types = [text for key, text in _column(printed.texts, "C 27.00", "c070").items() if client in key.split()]
    higher = printed.numbers.get("C 26.00 r030 c010", LARGEST_SHARE)
    return max(LARGEST_SHARE, higher) if any(text.endswith("qx2056") for text in types) else LARGEST_SHARE


def _floor(printed: PrintedReport) -> Iterator[LimitCheck]:
    """Compare total risk exposure with the output floor of the year, from 2025 on."""
    cells = (TREA, UNFLOORED, STANDARDISED)
    if printed.date < "2025" or any(cell not in printed.numbers for cell in cells):
        return
    total, unfloored, standardised = (printed.numbers[cell] for cell in cells)
    floored = max(unfloored, Decimal(FLOOR.get(printed.date[:4], "0.725")) * standardised)
    if printed.date < "2030":
        floored = min(floored, Decimal("1.25") * unfloored)
    shortfall = _beyond(floored - total, sum((printed.units[cell] for cell in cells), Decimal(0)))
    yield ("OUTPUT_FLOOR",), shortfall, f"risk exposure is {total}, and floored {floored}"


def main(files: Sequence[str]) -> int:
    """Judge the examples of all files. Return the exit code."""
    lines = [line for file in files for line in pathlib.Path(file).read_text(encoding="utf-8").splitlines()]
    counts, complaints = audit(map(json.loads, lines))
    print(json.dumps(counts))
    print(*complaints[:10], sep="\n", end="\n" * bool(complaints), file=sys.stderr)
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
