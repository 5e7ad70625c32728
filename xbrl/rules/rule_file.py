"""Rules as data, and the law that they depend on.

A rule is a line of `rules.jsonl`:

- `violated_if`: the condition of a violation, in the language of `formula.py`; `cells`: its cells, in the same order.
- `kind`: "breach", "filing" or "trigger"; `rules.py` says what they mean.
- `absent_cell`: how a missing figure is treated. With "unknown" the rule is undecided, with "zero" it is read as 0.
- `interval`: whether figures stand for the interval that their `decimals` allow (default: only in filing rules).
- `legal`: one citation, or a list of `{"from": date, "text": citation}` in ascending order if the citation changes with
  the reference date of the report.
- `guidance`: a guideline on the rule, cited beside the law and never as law.
- `applies_from` and `applies_until` (YYYY-MM-DD, both inclusive): the reference dates of the rule, if it has bounds.
- `unless_reported`: cells whose figure makes the rule superfluous, because another rule reads it: the rule derives what
  they would say.

Other keys are remarks.
"""

import datetime
import functools
import json
import pathlib
from dataclasses import dataclass, replace
from decimal import Decimal

from common.errors import UserError
from xbrl.read.report import CellKey
from xbrl.rules.figures import can_recompute
from xbrl.rules.formula import Formula, parse_formula

RULES_FILE = pathlib.Path(__file__).with_name("rules.jsonl")
KINDS = ("breach", "filing", "trigger")
# The output floor is phased in: CRR Art. 465(1), then Art. 92(3). Before 2025 there is none.
OUTPUT_FLOOR = {2025: "0.5", 2026: "0.55", 2027: "0.6", 2028: "0.65", 2029: "0.7"}
LEGAL_PARAMETERS = frozenset({"output_floor", "output_floor_cap"})


@dataclass(frozen=True)
class Rule:
    """One rule. Findings refer to the first of its `cells`."""

    id: str
    kind: str  # "breach", "filing" or "trigger"
    title: str
    legal: str  # the citation; the latest one if it changes with the reference date
    cells: tuple[CellKey, ...]
    violated_if: str
    absent_cell: str  # "unknown" or "zero"
    interval: bool  # whether figures stand for the interval that their `decimals` allow
    formula: Formula
    citations: tuple[tuple[str, str], ...] = ()  # (first reference date, citation), if the citation changes
    applies_from: str = ""  # first reference date of the rule, YYYY-MM-DD; "" if there is none
    applies_until: str = ""  # last reference date, likewise
    guidance: str = ""  # a guideline beside the law: it explains, and binds nobody
    unless_reported: tuple[CellKey, ...] = ()  # the rule stands in for a rule on these cells where they are missing

    def at(self, date: str) -> "Rule | None":
        """The rule as it stands at a reference date (YYYY-MM-DD), with the citation of that date.

        None if the rule does not apply then. Without a date ("") it is the rule in its latest form.
        """
        if date and (date < self.applies_from or date > (self.applies_until or date)):
            return None
        legal = next((text for first, text in reversed(self.citations) if first <= date), self.legal)
        return replace(self, legal=legal) if date and legal != self.legal else self

    @property
    def dates(self) -> str:
        """The reference dates of the rule, in words."""
        bounds = (("from", self.applies_from), ("until", self.applies_until))
        return "applies " + " ".join(f"{word} {date}" for word, date in bounds if date)

    @functools.cached_property
    def tables(self) -> tuple[str, ...]:
        """The tables that must be filed."""
        return tuple(dict.fromkeys(cell[0] for cell in self.cells if cell not in self.formula.optional))

    def recomputes(self, table: str, filed: frozenset[str]) -> bool:
        """Whether everything that the rule reads in an unfiled table can be recomputed from tables that are filed."""
        needed = [cell for cell in self.cells if cell[0] == table and cell not in self.formula.optional]
        return self.kind != "filing" and all(can_recompute(cell, filed) for cell in needed)


def load_rules(path: str | pathlib.Path = RULES_FILE) -> tuple[Rule, ...]:
    """Read rules from a JSON Lines file, in file order.

    Raises `UserError` with the line number of the first invalid rule.
    """
    rules = []
    for number, line in enumerate(pathlib.Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rules.append(_parse_rule(json.loads(line)))
            except (ValueError, KeyError, SyntaxError) as error:
                raise UserError(
                    f"{path}, line {number}: invalid rule ({error}); xbrl/rules/rule_file.py describes the format."
                ) from error
    return tuple(rules)


@functools.cache
def built_in_rules() -> tuple[Rule, ...]:
    """The rules of `rules.jsonl`, cached."""
    return load_rules()


def legal_parameters(year: int) -> dict[str, Decimal]:
    """Parameters of the law in a given year; empty before 2025.

    These are the output floor and its cap (CRR Art. 92(3), 465(1) and (2)).
    """
    if year < min(OUTPUT_FLOOR):
        return {}
    cap = "1.25" if year <= 2029 else "1000000"  # from 2030 there is no cap
    return {"output_floor": Decimal(OUTPUT_FLOOR.get(year, "0.725")), "output_floor_cap": Decimal(cap)}


def _parse_rule(row: dict) -> Rule:
    """Make a `Rule` from its JSON object. Raises an error if a key is missing or a value is invalid."""
    try:
        formula = parse_formula(row["violated_if"], LEGAL_PARAMETERS)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{row['id']}: {error}") from error
    cells = tuple(tuple(cell) for cell in row["cells"])
    if cells != formula.cells:
        raise ValueError(f"the cells of {row['id']} must be the cells of violated_if, in the same order")
    if row["kind"] not in KINDS or row["absent_cell"] not in ("unknown", "zero"):
        raise ValueError(f"{row['id']}: unknown value of kind or absent_cell")
    keys = ("id", "kind", "title", "violated_if", "absent_cell")
    interval = row.get("interval", row["kind"] == "filing")
    return Rule(
        **{key: row[key] for key in keys},
        **_parse_versions(row),
        cells=cells,
        interval=interval,
        formula=formula,
        guidance=row.get("guidance", ""),
        unless_reported=tuple(tuple(cell) for cell in row.get("unless_reported", ())),
    )


def _parse_versions(row: dict) -> dict:
    """The fields of a `Rule` that depend on the reference date. Raises ValueError for an invalid date or order."""
    dates = {key: row.get(key, "") for key in ("applies_from", "applies_until")}
    citations: tuple[tuple[str, str], ...] = ()
    if isinstance(row["legal"], list):
        citations = tuple((version["from"], version["text"]) for version in row["legal"])
    for date in filter(None, (*dates.values(), *(first for first, _ in citations))):
        datetime.date.fromisoformat(date)
    if sorted(citations) != list(citations) or (isinstance(row["legal"], list) and not citations):
        raise ValueError(f"{row['id']}: `legal` must list its versions in ascending order of `from`")
    return {**dates, "citations": citations, "legal": citations[-1][1] if citations else row["legal"]}
