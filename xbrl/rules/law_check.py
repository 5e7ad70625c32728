"""Check examples against the law, apart from the rules: no clean report may contradict a requirement that it prints.

This module shares no code with the rules and imports none of the others: it reads the text of a report as a model sees
it, with a reader of its own, and compares decimals as the articles say. The articles are listed in docs/xbrl.md.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal

Cell = tuple[str, str, str]  # (table, row or key of the row, column), e.g. ("C 03.00", "r0010", "c0010")

# (cell of a ratio, its legal minimum, cells of requirements that the report may print): CRR Art. 92(1), 428b(2);
# Delegated Reg. (EU) 2015/61 Art. 4(2); CRD Art. 104a, 141a, 141b.
RATIOS: tuple[tuple[Cell, str, tuple[Cell, ...]], ...] = (
    *(
        (("C 03.00", row, "c0010"), minimum, tuple(("C 03.00", other, "c0010") for other in others))
        for row, minimum, others in (
            ("r0010", "0.045", ("r0140", "r0170")),
            ("r0030", "0.06", ("r0150", "r0180")),
            ("r0050", "0.08", ("r0130", "r0160")),
        )
    ),
    (("C 47.00", "r0340", "c0010"), "0.03", (("C 47.00", "r0420", "c0010"), ("C 47.00", "r0440", "c0010"))),
    (("C 76.00.a", "r0030", "c0010"), "1", ()),
    (("C 84.00.a", "r0220", "c0040"), "1", ()),
)
BUFFER, TREA = ("C 04.00", "r0740", "c0010"), ("C 02.00.a", "r0010", "c0010")
UNFLOORED, STANDARDISED = ("C 02.00.a", "r0036", "c0010"), ("C 02.00.b", "r0010", "c0020")
# Output floor by year: CRR Art. 465(1); from 2030 Art. 92(3). Until 2029 the cap of Art. 465(2) applies.
FLOOR = {"2025": "0.50", "2026": "0.55", "2027": "0.60", "2028": "0.65", "2029": "0.70"}
COARSEST = Decimal(10_000)  # amounts may be rounded to tens of thousands: ITS (EU) 2024/3117 Art. 23(1)(b)(i)
LARGEST_SHARE = Decimal("0.25")  # of Tier 1, CRR Art. 395(1)
PILLAR_1 = ("CET1_MIN", "T1_MIN", "TC_MIN", "LR_MIN", "LCR_MIN", "NSFR_MIN", "LE_LIMIT", "OUTPUT_FLOOR")
BELITTLING = (
    *("minor matter", "deviation is small", "mended by your own means", "do not doubt your intention"),
    *("No further measure is intended", "matter is closed once"),
)
_TABLE = re.compile(r"([A-Z] \d\d\.\d\d(?:\.[a-z])?)(?: .*)?")
_LINE = re.compile(r"(?:(r\d+) )?(c\d+)(?: .*)? \| (.*)")
_NUMBER = re.compile(r"(-?\d+(?:\.\d+)?)(%| thousand| million|)")
_UNITS = {"%": "0.01", "": "1", " thousand": "1000", " million": "1000000"}


@dataclass
class Printed:
    """What a report prints: numbers (0.045 for 4.5%, amounts in units), texts, and its reference date."""

    numbers: dict[Cell, Decimal] = field(default_factory=dict)
    units: dict[Cell, Decimal] = field(default_factory=dict)  # what each number may have been rounded to
    texts: dict[Cell, str] = field(default_factory=dict)
    date: str = ""


def read_printed(text: str) -> Printed:
    """Read the text of a report in the style "cells". Earlier reports and notes below it are not read."""
    printed = Printed()
    date = re.search(r"reference date (\d{4}-\d{2}-\d{2})", text)
    printed.date = date[1] if date else ""
    table = key = ""
    for line in text.partition("\nEarlier reports")[0].splitlines():
        value = _LINE.fullmatch(line)
        if value:
            cell = (table, value[1] or key, value[2])
            number = _NUMBER.fullmatch(value[3])
            if number:
                unit = Decimal(_UNITS[number[2]])
                printed.numbers[cell] = Decimal(number[1]) * unit
                last_digit = unit * Decimal(1).scaleb(-len(number[1].partition(".")[2]))
                is_coarse = number[2] != "%" and printed.numbers[cell] % COARSEST == 0
                printed.units[cell] = max(last_digit, COARSEST) if is_coarse else last_digit
            else:
                printed.texts[cell] = value[3]
        elif header := _TABLE.fullmatch(line):
            table, key = header[1], ""
        else:
            key = line
    return printed


def contradictions(text: str) -> list[str]:
    """The requirements that a report prints, or that the law sets, and that its own figures do not meet."""
    printed = read_printed(text)
    return [*_ratios(printed), *_derived(printed), *_liquidity(printed), *_exposures(printed), *_floor(printed)]


def audit(examples: Iterable[tuple[str, str, list[str]]]) -> dict[str, int]:
    """Count over (text of the report, letter, ids of the violated rules).

    `contradicted`: reports without violations whose figures miss a requirement. `belittled`: letters on a breach of
    Pillar 1 that call it a small matter or announce no further measure.
    """
    counts: dict[str, int] = dict.fromkeys(("clean", "contradicted", "pillar1", "belittled"), 0)
    for text, letter, violated in examples:
        if not violated:
            counts["clean"] += 1
            counts["contradicted"] += bool(contradictions(text))
        if set(violated) & set(PILLAR_1):
            counts["pillar1"] += 1
            counts["belittled"] += any(phrase in letter for phrase in BELITTLING)
    return counts


def _ratios(printed: Printed) -> list[str]:
    found = []
    for cell, minimum, others in RATIOS:
        value = printed.numbers.get(cell)
        if value is None:
            continue
        if value < Decimal(minimum):
            found.append(f"{cell}: {value} is below the minimum {minimum}")
        for other in others:
            limit = printed.numbers.get(other)
            if limit is not None and value < limit:
                found.append(f"{cell}: {value} is below the requirement {limit} in {other}")
    return found


def _derived(printed: Printed) -> list[str]:
    """The combined buffer on top of the shares of TSCR (CRD Art. 141a), where these are printed but not their sum."""
    found = []
    buffer, trea = printed.numbers.get(BUFFER), printed.numbers.get(TREA)
    for ratio, share, overall in (
        ("r0010", "r0140", "r0170"),
        ("r0030", "r0150", "r0180"),
        ("r0050", "r0130", "r0160"),
    ):
        value, part = (printed.numbers.get(("C 03.00", row, "c0010")) for row in (ratio, share))
        if ("C 03.00", overall, "c0010") in printed.numbers or None in (value, part, buffer, trea):
            continue
        assert value is not None and part is not None and buffer is not None and trea
        if value < part + buffer / trea - Decimal("0.0002"):  # rounding of two ratios to four places
            found.append(f"{ratio}: {value} is below {part} + {buffer} / {trea}")
    return found


def _liquidity(printed: Printed) -> list[str]:
    """LCR = liquidity buffer / net outflow (Delegated Reg. (EU) 2015/61 Art. 4(1)), also where the ratio is left out."""
    buffer, outflow = (("C 76.00.a", row, "c0010") for row in ("r0010", "r0020"))
    if buffer not in printed.numbers or outflow not in printed.numbers:
        return []
    at_most = printed.numbers[buffer] + printed.units[buffer]
    at_least = printed.numbers[outflow] - printed.units[outflow]
    return [f"liquidity buffer {at_most} below net outflow {at_least}"] if at_most < at_least else []


def _exposures(printed: Printed) -> list[str]:
    found = []
    for (table, row, column), share in printed.numbers.items():
        if (table, column) != ("C 28.00", "c350"):
            continue
        limit = LARGEST_SHARE
        clients = {key: text for (code, key, _), text in printed.texts.items() if code == "C 27.00"}
        if any(row in key.split() and text.endswith("qx2056") for key, text in clients.items()):  # an institution
            limit = max(limit, printed.numbers.get(("C 26.00", "r030", "c010"), limit))
        if share > limit:
            found.append(f"exposure to {row}: {share} of Tier 1 is above {limit}")
    return found


def _floor(printed: Printed) -> list[str]:
    cells = (TREA, UNFLOORED, STANDARDISED)
    if printed.date < "2025" or any(cell not in printed.numbers for cell in cells):
        return []
    total, unfloored, standardised = (printed.numbers[cell] for cell in cells)
    share = Decimal(FLOOR.get(printed.date[:4], "0.725"))
    floored = max(unfloored, share * standardised)
    if printed.date < "2030":
        floored = min(floored, Decimal("1.25") * unfloored)
    rounding = sum(printed.units[cell] for cell in cells)
    return [f"risk exposure {total} is below the floored {floored}"] if total < floored - rounding else []
