"""Prudential rules as data (`rules.jsonl`), decided on the figures that a bank itself reported.

A rule's `violated_if` is a small expression over cells, e.g. `{C_03.00,r0010,c0010} < 0.045`: `+ - * /`, `max`,
comparisons, `and`, `or`, `not`. Two kinds of arithmetic:

- A **breach** of law is decided on the reported figures as they stand.
- A **filing** error is a contradiction that rounding cannot explain. Each figure stands for the interval that its
  `decimals` allow and a rule counts as violated only when every choice inside the intervals violates it (the interval
  arithmetic of the EBA's filing rules). So `a != b` means that the intervals do not meet.

A rule is applied only when all of its tables are filed. `absent_cell` says how a missing figure counts: `unknown`
leaves the rule undecided, `zero` reads it as 0.
"""

import ast
import functools
import json
import pathlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from data.regulator.report import CellKey, Fact, Report
from errors import UserError

RULES_FILE = pathlib.Path(__file__).with_name("rules.jsonl")
CELL = re.compile(r"\{([A-Z]+_\d+\.\d+(?:\.[a-z])?),(r\d+),(c\d+)\}")


@dataclass(frozen=True)
class Rule:
    """One rule. `cells[0]` is the cell that a finding points at; `formula` is `violated_if`, parsed, over names x0, x1, ..."""

    id: str
    kind: str  # "breach" of law, "filing" error, "trigger" of a duty
    title: str
    legal: str
    cells: tuple[CellKey, ...]
    violated_if: str
    absent_cell: str  # "unknown" or "zero"
    formula: ast.expr


@dataclass(frozen=True)
class RuleResult:
    """What one rule says about one report. `value` and `limit` are the two sides of its comparison; None if undecided."""

    rule_id: str
    kind: str
    state: str  # "violated", "ok", "undecided"
    cell: CellKey
    value: Decimal | None
    limit: Decimal | None
    relation: str  # what the limit is to the value: "min", "max" or "expected"
    legal: str
    unit: str | None  # of the value: a currency, or None for a ratio
    decimals: int | str | None


@dataclass(frozen=True)
class _Number:
    """A reported figure, and the interval that its rounding allows."""

    value: Decimal
    low: Decimal
    high: Decimal


def load_rules(path: str | pathlib.Path = RULES_FILE) -> tuple[Rule, ...]:
    """The rules of a JSON Lines file, in its order. Raises `UserError` that names the line of the first bad rule."""
    rules = []
    for number, line in enumerate(pathlib.Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rules.append(_parse_rule(json.loads(line)))
            except (ValueError, KeyError, SyntaxError) as error:
                raise UserError(f"{path}, line {number}: not a rule ({error}); see data/regulator/rules.py.") from error
    return tuple(rules)


@functools.cache
def built_in_rules() -> tuple[Rule, ...]:
    """The rules that ship with the project, read once."""
    return load_rules()


def evaluate(report: Report, rules: Iterable[Rule] | None = None) -> list[RuleResult]:
    """Decide every applicable rule on one merged report, in the order of the rules. Rules whose tables are not filed give nothing."""
    figures = _figures(report)
    tables = {table for table, _, _ in figures}
    results = []
    for rule in built_in_rules() if rules is None else rules:
        if all(_is_filed(report, table, tables) for table, _, _ in rule.cells):
            results.append(_decide(rule, figures))
    return results


def violations(results: Iterable[RuleResult]) -> list[RuleResult]:
    """The violated ones of `results`: breaches and filing errors. A trigger is a duty, never a violation."""
    return [result for result in results if result.state == "violated" and result.kind != "trigger"]


def _parse_rule(row: dict) -> Rule:
    order: list[CellKey] = []

    def name(match: re.Match) -> str:
        key = match.groups()
        if key not in order:
            order.append(key)
        return f"x{order.index(key)}"

    source = CELL.sub(name, row["violated_if"])
    formula = ast.parse(source.strip(), mode="eval").body
    cells = tuple(tuple(cell) for cell in row["cells"])
    if cells != tuple(order):
        raise ValueError(f"the cells of {row['id']} must be those of violated_if, in the same order")
    if row["kind"] not in ("breach", "filing", "trigger") or row["absent_cell"] not in ("unknown", "zero"):
        raise ValueError(f"{row['id']}: kind or absent_cell has an unknown value")
    _check(formula, row["id"], {f"x{index}" for index in range(len(cells))})
    keys = ("id", "kind", "title", "legal", "violated_if", "absent_cell")
    return Rule(**{key: row[key] for key in keys}, cells=cells, formula=formula)


_OPERATORS = (
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.Div,
    ast.USub,
    ast.And,
    ast.Or,
    ast.Not,
    ast.Lt,
    ast.Gt,
    ast.GtE,
    ast.LtE,
    ast.NotEq,
)
_NODES = (ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Name, ast.Load, ast.Constant, ast.Call, *_OPERATORS)


def _check(formula: ast.expr, rule_id: str, names: set[str]) -> None:
    """Refuse anything but the small language of the module docstring: a rules file is data, it never runs as code."""
    for node in ast.walk(formula):
        allowed = isinstance(node, _NODES)
        if isinstance(node, ast.Call):
            allowed = isinstance(node.func, ast.Name) and node.func.id == "max" and not node.keywords
        elif isinstance(node, ast.Name):
            allowed = node.id == "max" or node.id in names
        elif isinstance(node, ast.Constant):
            allowed = type(node.value) in (int, float)
        elif isinstance(node, ast.Compare):
            allowed = len(node.ops) == 1
        if not allowed:
            raise ValueError(
                f"{rule_id}: violated_if holds {ast.unparse(node) if isinstance(node, ast.expr) else node}"
            )
    if _first_comparison(formula) is None:
        raise ValueError(f"{rule_id}: violated_if compares nothing")


def _figures(report: Report) -> dict[CellKey, Fact | None]:
    """The numeric fact of each cell; None where facts of one cell disagree. Open rows (typed keys) are not single cells."""
    figures: dict[CellKey, Fact | None] = {}
    for fact in report.facts:
        if fact.cell is None or not isinstance(fact.value, Decimal):
            continue
        for cell in (fact.cell, *fact.other_cells):
            known = figures.get(cell, fact)
            figures[cell] = known if known is not None and known.value == fact.value else None
    return figures


def _is_filed(report: Report, table: str, tables_with_figures: set[str]) -> bool:
    if not report.filing_indicators:
        return table in tables_with_figures
    template = re.sub(r"\.[a-z]$", "", table)  # C_76.00.a is the total of template C_76.00
    return report.filing_indicators.get(template, report.filing_indicators.get(table, False))


def _decide(rule: Rule, figures: dict[CellKey, Fact | None]) -> RuleResult:
    numbers = {}
    for index, cell in enumerate(rule.cells):
        if cell in figures:
            fact = figures[cell]
            numbers[f"x{index}"] = None if fact is None else _number(fact, exact=rule.kind != "filing")
        else:
            numbers[f"x{index}"] = _exactly(Decimal(0)) if rule.absent_cell == "zero" else None
    pointed = next((figures[cell] for cell in rule.cells if figures.get(cell)), None)  # says how to print the finding
    state, value, limit = "undecided", None, None
    comparison = _first_comparison(rule.formula)
    if None not in numbers.values():
        try:
            state = "violated" if _truth(rule.formula, numbers) is True else "ok"
            value = _arithmetic(comparison.left, numbers).value
            limit = _arithmetic(comparison.comparators[0], numbers).value
        except ZeroDivisionError:
            state, value, limit = "undecided", None, None
    relation = {ast.Lt: "min", ast.LtE: "min", ast.Gt: "max", ast.GtE: "max", ast.NotEq: "expected"}[
        type(comparison.ops[0])
    ]
    unit, decimals = (pointed.unit, pointed.decimals) if pointed else (None, None)
    return RuleResult(rule.id, rule.kind, state, rule.cells[0], value, limit, relation, rule.legal, unit, decimals)


def _first_comparison(formula: ast.expr) -> ast.Compare | None:
    return next((node for node in ast.walk(formula) if isinstance(node, ast.Compare)), None)


def _exactly(value: Decimal) -> _Number:
    return _Number(value, value, value)


def _number(fact: Fact, exact: bool) -> _Number:
    if exact or not isinstance(fact.decimals, int):
        return _exactly(fact.value)
    half = Decimal((0, (5,), -fact.decimals - 1))  # half a unit of the last place that is claimed to be right
    return _Number(fact.value, fact.value - half, fact.value + half)


def _truth(node: ast.expr, numbers: dict[str, _Number]) -> bool | None:
    """Kleene's three values: True or False only if it is so for every choice inside the intervals, else None."""
    if isinstance(node, ast.BoolOp):
        parts = [_truth(part, numbers) for part in node.values]
        decisive = isinstance(node.op, ast.Or)
        if decisive in parts:
            return decisive
        return None if None in parts else not decisive
    if isinstance(node, ast.UnaryOp):
        inner = _truth(node.operand, numbers)
        return None if inner is None else not inner
    left, right = _arithmetic(node.left, numbers), _arithmetic(node.comparators[0], numbers)
    operator = type(node.ops[0])
    if operator is ast.NotEq:
        if left.high < right.low or right.high < left.low:
            return True
        return False if left.low == left.high == right.low == right.high else None
    if operator in (ast.Gt, ast.LtE):  # a > b is b < a, a <= b is not b < a
        left, right = right, left
    less = True if left.high < right.low else False if left.low >= right.high else None
    if operator in (ast.GtE, ast.LtE):
        return None if less is None else not less
    return less


def _arithmetic(node: ast.expr, numbers: dict[str, _Number]) -> _Number:
    if isinstance(node, ast.Constant):
        return _exactly(Decimal(str(node.value)))
    if isinstance(node, ast.Name):
        return numbers[node.id]
    if isinstance(node, ast.Call):
        parts = [_arithmetic(part, numbers) for part in node.args]
        return _Number(*(max(getattr(part, end) for part in parts) for end in ("value", "low", "high")))
    if isinstance(node, ast.UnaryOp):
        inner = _arithmetic(node.operand, numbers)
        return _Number(-inner.value, -inner.high, -inner.low)
    left, right = _arithmetic(node.left, numbers), _arithmetic(node.right, numbers)
    if isinstance(node.op, ast.Add):
        return _Number(left.value + right.value, left.low + right.low, left.high + right.high)
    if isinstance(node.op, ast.Sub):
        return _Number(left.value - right.value, left.low - right.high, left.high - right.low)
    if isinstance(node.op, ast.Mult):
        corners = [a * b for a in (left.low, left.high) for b in (right.low, right.high)]
        return _Number(left.value * right.value, min(corners), max(corners))
    if right.low <= 0 <= right.high:  # the divisor may be zero
        raise ZeroDivisionError
    corners = [a / b for a in (left.low, left.high) for b in (right.low, right.high)]
    return _Number(left.value / right.value, min(corners), max(corners))
