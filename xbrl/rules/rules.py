"""Evaluate prudential rules on the figures that a bank reported.

The rules are data, a line of `rules.jsonl` each. There are three kinds:

- A **breach** is a requirement of the law that the bank does not meet. Figures that are as accurate as the EBA's filing
  rules demand count as reported. A coarser figure stands for the interval that its `decimals` allow.
- A **filing** error is a contradiction between figures that rounding cannot explain. Each figure stands for the
  interval that its `decimals` allow. Rules of the other kinds can ask for this with `"interval": true`.
- A **trigger** is a duty that follows from a figure. It is never a violation.

A rule applies only if all tables that it needs are filed and the law is in force at the reference date. Breaches and
triggers recompute a missing ratio from its numerator and denominator (`reported_figures.py`). A rule over the rows of an open
table (`*`) is evaluated for each row. No rule is passed over in silence: `evaluate_all` has a result for every rule.

A rule has the keys `id`, `kind`, `title` and:

- `violated_if`: the condition of a violation, in the language of `formula.py`.
- `absent_cell`: how a missing figure is treated. With "unknown" the rule is undecided, with "zero" the figure is read as 0.
- `interval`: whether figures stand for the interval that their `decimals` allow (default: only in filing rules).
- `legal`: one citation, or a list of `{"from": date, "text": citation}` in ascending order if the citation changes with
  the reference date of the report. `guidance`: a guideline on the rule, cited beside the law and never as law.
- `applies_from` (YYYY-MM-DD): the first reference date of the rule, if it has one.
- `unless_reported`: cells whose figure makes the rule superfluous, because another rule reads these cells.

Other keys are remarks.
"""

import datetime
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal

from common.errors import UserError
from xbrl.read.filed_report import CellKey, Report, template_of
from xbrl.read.render import PURE, cell_name, format_limit, round_beside, table_name
from xbrl.rules.formula import Formula, arithmetic, exactly, parse_formula, truth
from xbrl.rules.reported_figures import (
    RECOMPUTED,
    Figure,
    Figures,
    Key,
    can_recompute,
    index_facts,
    is_accurate,
    numbers_of,
    read_figure,
    recompute,
    row_keys,
    why_too_coarse,
    why_unreadable,
)

RULES_FILE = pathlib.Path(__file__).with_name("rules.jsonl")
KINDS = ("breach", "filing", "trigger")
OVERALL = ("C_03.00", "r0160", "c0010")  # the overall capital requirement: a ratio that is not recomputed
# The output floor is phased in: CRR Art. 465(1), then Art. 92(3). Before 2025 there is none.
OUTPUT_FLOOR = {2025: "0.5", 2026: "0.55", 2027: "0.6", 2028: "0.65", 2029: "0.7"}
LEGAL_PARAMETERS = frozenset({"output_floor", "output_floor_cap"})


@dataclass(frozen=True)
class Rule:
    """One rule. Findings refer to the first of its `cells`."""

    id: str
    kind: str  # "breach", "filing" or "trigger"
    title: str
    legal: str  # the citation; the latest citation if it changes with the reference date
    citations: tuple[tuple[str, str], ...]  # (first reference date, citation), in ascending order
    violated_if: str
    formula: Formula
    absent_cell: str  # "unknown" or "zero"
    interval: bool  # whether figures stand for the interval that their `decimals` allow
    guidance: str = ""  # a guideline that explains the law and binds nobody
    applies_from: str = ""  # first reference date of the rule, YYYY-MM-DD; "" if there is none
    unless_reported: tuple[CellKey, ...] = ()  # the rule replaces a rule on these cells when they are missing

    @property
    def cells(self) -> tuple[CellKey, ...]:
        """Return the cells of the formula, in order of appearance."""
        return self.formula.cells

    def at(self, date: str) -> "Rule | None":
        """Return the rule with its citation at a reference date (YYYY-MM-DD), or None if the rule does not apply then.

        Without a date ("") return the rule in its latest form.
        """
        if date and date < self.applies_from:
            return None
        legal = next((text for first, text in reversed(self.citations) if first <= date), self.legal)
        return replace(self, legal=legal) if date and legal != self.legal else self

    def missing_tables(self, filed: frozenset[str]) -> dict[str, None]:
        """Return the unfiled tables of the rule, except those whose cells can all be recomputed from the `filed` tables."""
        needed = [cell for cell in self.cells if cell[0] not in filed and cell not in self.formula.optional]
        return dict.fromkeys(cell[0] for cell in needed if self.kind == "filing" or not can_recompute(cell, filed))


@dataclass(frozen=True)
class RuleResult:
    """The result of one rule on one report, or on one row of an open table.

    `value` and `limit` are the two sides of the rule's first comparison; None if undecided.
    """

    rule_id: str
    kind: str  # kind of the rule; "quality" for a finding about the report, "note" for a finding from a note
    state: str  # "violated" ("triggered" for a trigger), "ok", "undecided", "not applicable"
    cell: CellKey
    value: Decimal | None = None
    limit: Decimal | None = None
    relation: str = ""  # whether the limit is a minimum ("min"), a maximum ("max") or the "expected" value
    legal: str = ""
    unit: str | None = None  # unit of the value: `iso4217:EUR` for an amount, `xbrli:pure` or None for a ratio
    decimals: int | str | None = None  # XBRL `decimals` of the value
    row: str = ""  # key of the row in an open table
    missing: bool = False  # whether `cell` was not reported and is read as 0
    is_stated: bool = False  # whether the report itself states the limit
    title: str = ""
    formula: str = ""  # the condition of a violation, in the language of `formula.py`
    inputs: tuple[Figure, ...] = ()  # the figures of the formula, in its order
    parameters: tuple[tuple[str, Decimal], ...] = ()  # the legal parameters of the formula
    guidance: str = ""  # a guideline beside the law
    reason: str = ""  # why the rule is undecided, not applicable, or met in spite of a difference

    @property
    def known_value(self) -> Decimal:
        """Return the value of a result that is not undecided."""
        assert self.value is not None
        return self.value

    @property
    def known_limit(self) -> Decimal:
        """Return the limit of a result that is not undecided."""
        assert self.limit is not None
        return self.limit

    @property
    def limit_decimals(self) -> int | str | None:
        """Return the number of places of the printed limit; None for a ratio that the report states (5.625%), not rounded."""
        return None if self.is_stated and self.unit in PURE else self.decimals

    @property
    def printed_limit(self) -> str:
        """Format the limit, with enough decimals to show on which side the value misses it; "" without a limit."""
        missed_by = self.value if self.state == "violated" else None
        return "" if self.limit is None else format_limit(self.limit, self.unit, self.limit_decimals, missed_by)


def evaluate(report: Report, rules: Iterable[Rule] | None = None) -> list[RuleResult]:
    """Evaluate all applicable rules on one merged report, in the order of the rules.

    A rule that does not apply has no result. A rule over the rows of an open table has one result per row that is
    violated or undecided, or a single result if there is no such row.
    """
    return [result for result in evaluate_all(report, rules) if result.state != "not applicable"]


def evaluate_all(report: Report, rules: Iterable[Rule] | None = None) -> list[RuleResult]:
    """Evaluate like `evaluate`, but with a result "not applicable" and its reason for each rule that does not apply."""
    figures = index_facts(report)
    filed = _filed_tables(report, figures.tables)
    results = []
    for rule in built_in_rules() if rules is None else rules:
        current = rule.at(report.period)
        if current is None:
            results.append(_result(rule, "not applicable", reason=f"applies from {rule.applies_from}"))
        elif missing := current.missing_tables(filed):
            reasons = dict.fromkeys(why_unfiled(report, table) for table in missing)
            results.append(_result(current, "not applicable", reason="; ".join(reasons)))
        else:
            results += _evaluate_rule(current, figures, report.period, filed)
    if report.incomplete:  # a figure that was not read may have been reported
        results = [
            replace(result, reason=result.reason.replace("is not reported", "was not read")) for result in results
        ]
    return results


def violations(results: Iterable[RuleResult]) -> list[RuleResult]:
    """Return the violated results: breaches and filing errors, but not triggers and findings about the report."""
    return [result for result in results if result.state == "violated" and result.kind != "quality"]


def why_unfiled(report: Report, table: str) -> str:
    """Return why a table counts as not filed."""
    template = template_of(table)
    if not report.filing_indicators:
        return f"{table_name(table)} has no facts"
    if template in report.filing_indicators:
        return f"{table_name(template)} is declared as not filed"
    return f"{table_name(template)} has no filing indicator"


def _filed_tables(report: Report, tables_with_facts: Iterable[str]) -> frozenset[str]:
    """Return the tables whose templates are filed by their indicators; without any indicators, all tables with a fact.

    A table that is filed without a fact is included if it occurs in a rule.
    """
    if not report.filing_indicators:
        return frozenset(tables_with_facts)
    tables = {*tables_with_facts, *(cell[0] for rule in built_in_rules() for cell in rule.cells)}
    indicators = report.filing_indicators
    return frozenset(table for table in tables if indicators.get(template_of(table), indicators.get(table, False)))


def _evaluate_rule(rule: Rule, figures: Figures, period: str, filed: frozenset[str]) -> list[RuleResult]:
    """Return the results of one rule. A rule over an open table has a result per violated or undecided row."""
    substitutes = (cell for cell in rule.unless_reported if cell[0] in filed)
    reported = [cell for cell in substitutes if read_figure(figures, cell).source != "not reported"]
    if reported:
        reason = f"{' and '.join(map(cell_name, reported))} is reported, and another rule reads it"
        return [_result(rule, "not applicable", reason=reason)]
    open_cells = [cell for cell in rule.cells if cell[1] == "*"]
    if not open_cells:
        return [_evaluate_row(rule, figures, (), period, filed)]
    table = open_cells[0][0]
    # A row counts even if it reports no cell of the rule. Rows with cells of the rule come first.
    own, of_table = ([cell for cell in cells if cell[0] == table] for cells in (open_cells, figures.facts))
    rows = row_keys(figures, (*own, *of_table))
    results = [_evaluate_row(rule, figures, key, period, filed) for key in rows]
    if not results:
        return [_result(rule, "not applicable", reason=f"{table_name(table)} has no rows")]
    return [result for result in results if result.state not in ("ok", "not applicable")] or results[:1]


def _evaluate_row(rule: Rule, figures: Figures, key: Key, period: str, filed: frozenset[str]) -> RuleResult:
    """Evaluate the formula of a rule on the figures of one row, or of the whole report (`key` is then empty)."""
    inputs = {f"x{index}": _input(rule, figures, cell, key, filed) for index, cell in enumerate(rule.cells)}
    parameters = legal_parameters(int(period[:4])) if period[:4].isdigit() else {}
    law = {name: exactly(value) for name, value in parameters.items()}
    missing = sorted(rule.formula.names & LEGAL_PARAMETERS - law.keys())
    reason = why_unreadable(inputs, rule.formula.texts)
    reason = reason or ", ".join(f"the law has no {name} on {period}" for name in missing)
    if reason:
        return _result(rule, "undecided", inputs, reason=reason)
    if all(figure.source == "read as 0" for figure in inputs.values()):
        return _result(rule, "not applicable", inputs, reason="none of its figures is reported")
    texts = {name: str(inputs[name].value).rpartition(":")[2] for name in rule.formula.texts}
    try:
        numbers = law | numbers_of(inputs, exact=not rule.interval)
        violated = truth(rule.formula.expression, numbers, texts)
        value, limit = (arithmetic(side, numbers, texts).value for side in rule.formula.sides)
    except ZeroDivisionError:
        return _result(rule, "undecided", inputs, reason="a denominator is 0, or may be 0 within its rounding")
    # If rounding leaves the condition open, a filing rule is met, because some unrounded values agree. A breach rule with
    # `interval` is met, too, if its figures are as accurate as they must be. Any other rule is undecided.
    if violated is None and rule.kind != "filing" and not (rule.interval and all(map(is_accurate, inputs.values()))):
        return _result(rule, "undecided", inputs, reason=why_too_coarse(inputs.values()))
    as_filed = {name: exactly(number.value) for name, number in numbers.items()}
    tolerated = violated is None and truth(rule.formula.expression, as_filed, texts) is True
    state = "ok" if not violated else "triggered" if rule.kind == "trigger" else "violated"
    reason = "the difference is within the rounding of the figures" if tolerated else ""
    used = tuple((name, law[name].value) for name in sorted(rule.formula.names & law.keys()))
    return replace(_result(rule, state, inputs, (value, limit), reason), parameters=used)


def _input(rule: Rule, figures: Figures, cell: CellKey, key: Key, filed: frozenset[str]) -> Figure:
    """Return the figure of a cell: reported, else recomputed (not for filing rules), else read as 0 if the rule allows it.

    Facts in a table that is not filed do not count.
    """
    figure = read_figure(figures, cell, key)
    if figure.source != "not reported" and cell[0] in filed:
        return figure
    missing = Figure(cell, figure.row)
    ratio = missing if rule.kind == "filing" else recompute(figures, cell, key, filed)
    if ratio.source == "recomputed":
        return ratio
    zero = rule.absent_cell == "zero" or cell in rule.formula.optional
    return replace(missing, source="read as 0") if zero else ratio


def _result(
    rule: Rule,
    state: str,
    inputs: Mapping[str, Figure] | None = None,
    sides: tuple[Decimal, Decimal] | None = None,
    reason: str = "",
) -> RuleResult:
    """Make the result of a rule. `sides` are (value, limit). The first figure with a number gives their unit and decimals.

    If the judged figure is missing, the first figure of the same sort (ratio or amount) gives them, so that a missing amount
    is not printed as a percentage.
    """
    figures = tuple((inputs or {}).values())
    numbers = [figure for figure in figures if isinstance(figure.value, Decimal)]
    is_missing = bool(figures) and figures[0].source in ("not reported", "read as 0")
    if is_missing and rule.kind == "filing":
        is_ratio = rule.cells[0] in (*RECOMPUTED, OVERALL)
        numbers = [figure for figure in numbers if (figure.unit in PURE) == is_ratio]
    first = next(iter(numbers), None)
    decimals = first.decimals if first else None
    value, limit = sides or (None, None)
    if sides and first and first.source == "recomputed":
        value, decimals = round_beside(*sides)
    return RuleResult(
        rule_id=rule.id,
        kind=rule.kind,
        state=state,
        cell=rule.cells[0],
        value=value,
        limit=limit,
        relation=rule.formula.relation,
        legal=rule.legal,
        unit=first.unit if first else None,
        decimals=decimals,
        row=next((figure.row for figure in figures if figure.row), ""),
        is_stated=any(figure.value == limit for figure in figures),
        missing=is_missing,
        title=rule.title,
        formula=rule.violated_if,
        inputs=figures,
        guidance=rule.guidance,
        reason=reason,
    )


def load_rules(path: str | pathlib.Path = RULES_FILE) -> tuple[Rule, ...]:
    """Read rules from a JSON Lines file, in file order. Raise `UserError` with the line number of the first invalid rule."""
    rules = []
    for number, line in enumerate(pathlib.Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rules.append(_parse_rule(json.loads(line)))
            except (ValueError, KeyError, SyntaxError, ZeroDivisionError) as error:
                raise UserError(
                    f"{path}, line {number}: invalid rule ({error}); xbrl/rules/rules.py describes the format."
                ) from error
    return tuple(rules)


@functools.cache
def built_in_rules() -> tuple[Rule, ...]:
    """Return the rules of `rules.jsonl`, cached."""
    return load_rules()


def legal_parameters(year: int) -> dict[str, Decimal]:
    """Return the output floor and its cap in a year (CRR Art. 92(3), 465(1) and (2)); {} before 2025."""
    if year < min(OUTPUT_FLOOR):
        return {}
    cap = "1.25" if year <= 2029 else "1000000"  # from 2030 there is no cap
    return {"output_floor": Decimal(OUTPUT_FLOOR.get(year, "0.725")), "output_floor_cap": Decimal(cap)}


def _parse_rule(row: dict) -> Rule:
    """Make a `Rule` from its JSON object. Raise an error if a key is missing or a value is invalid."""
    if row["kind"] not in KINDS or row["absent_cell"] not in ("unknown", "zero"):
        raise ValueError(f"{row['id']}: unknown value of kind or absent_cell")
    legal = row["legal"] if isinstance(row["legal"], list) else [{"from": "", "text": str(row["legal"])}]
    citations = tuple((version["from"], version["text"]) for version in legal)
    if sorted(citations) != list(citations) or not citations:
        raise ValueError(f"{row['id']}: `legal` must list its versions in ascending order of `from`")
    for date in filter(None, (row.get("applies_from"), *(first for first, _ in citations))):
        datetime.date.fromisoformat(date)
    return Rule(
        **{key: row[key] for key in ("id", "kind", "title", "violated_if", "absent_cell")},
        **{key: row[key] for key in ("applies_from", "guidance") if key in row},
        legal=citations[-1][1],
        citations=citations,
        formula=parse_formula(row["violated_if"], LEGAL_PARAMETERS),
        interval=row.get("interval", row["kind"] == "filing"),
        unless_reported=tuple(tuple(cell) for cell in row.get("unless_reported", ())),
    )
