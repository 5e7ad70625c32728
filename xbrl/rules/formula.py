"""The formula language of the rules, and its interval arithmetic.

A formula is an expression over cells, e.g. `{C_03.00,r0010,c0010} < 0.045`. It supports `+ - * /`, `max`, `min`,
comparisons, `and`, `or` and `not`. `zero({...})` is a figure that counts as 0 if it is not reported. `says({...},
'member')` is 1 if a cell contains that member of an enumeration, else 0. A bare name is a legal parameter that
depends on the year. The row `*` stands for each row of an open table in turn.

Every number has an interval given by its rounding. A comparison is true or false only if it is so for all values in the
intervals, as in the interval arithmetic of the EBA's filing rules. `a != b` is true if the intervals do not overlap.
"""

import ast
import functools
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeGuard

from xbrl.read.report import CellKey

CELL = re.compile(r"\{([A-Z]+_\d+\.\d+(?:\.[a-z])?),(r\d+|\*),(c\d+)\}")
RELATIONS = {ast.Lt: "min", ast.LtE: "min", ast.Gt: "max", ast.GtE: "max", ast.NotEq: "expected"}


@dataclass(frozen=True)
class Formula:
    """A parsed formula: an expression in which x0, x1, ... stand for `cells`, in order of appearance."""

    expression: ast.expr
    cells: tuple[CellKey, ...]
    optional: frozenset[CellKey]  # cells that may be missing, because they occur only in `zero` or `says`
    comparison: ast.Compare  # the first comparison; its left side is the figure that a finding reports
    texts: frozenset[str]  # names of the cells that are read as text, by `says`

    @property
    def relation(self) -> str:
        """How the right side of the first comparison limits the figure: "min", "max" or "expected"."""
        return RELATIONS[type(self.comparison.ops[0])]

    @property
    def sides(self) -> tuple[ast.expr, ast.expr]:
        """Both sides of the first comparison."""
        return self.comparison.left, self.comparison.comparators[0]

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The names of cells (x0, x1, ...) and legal parameters in the expression."""
        return frozenset(node.id for node in ast.walk(self.expression) if isinstance(node, ast.Name))


@dataclass(frozen=True)
class Number:
    """A figure and the interval of unrounded values that it can stand for."""

    value: Decimal
    low: Decimal
    high: Decimal


def exactly(value: Decimal) -> Number:
    """A number whose interval contains only `value`."""
    return Number(value, value, value)


def rounded(value: Decimal, decimals: int | str | None) -> Number:
    """A number that is accurate to `decimals` places. Exact if `decimals` is INF or None."""
    if not isinstance(decimals, int):
        return exactly(value)
    half = Decimal((0, (5,), -decimals - 1))  # half a unit in the last accurate place
    return Number(value, value - half, value + half)


def parse_formula(text: str, parameters: frozenset[str]) -> Formula:
    """Parse a formula, never executing it.

    Raises ValueError or SyntaxError for anything outside the formula language.
    """
    cells: list[CellKey] = []

    def variable(match: re.Match) -> str:
        if match.groups() not in cells:
            cells.append(match.groups())
        return f"x{cells.index(match.groups())}"

    expression = ast.parse(CELL.sub(variable, text).strip(), mode="eval").body
    comparison = next((node for node in ast.walk(expression) if isinstance(node, ast.Compare)), None)
    if comparison is None:
        raise ValueError("violated_if contains no comparison")
    names = {f"x{index}": cell for index, cell in enumerate(cells)}
    _check_condition(expression, names.keys() | parameters)
    calls = [node for node in ast.walk(expression) if isinstance(node, ast.Call)]
    inside = {id(call.args[0]) for call in calls if _function_name(call) in ("zero", "says")}
    needed = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name) and id(node) not in inside}
    optional = frozenset(cell for name, cell in names.items() if name not in needed)
    says = [call.args[0] for call in calls if _function_name(call) == "says"]
    texts = frozenset(node.id for node in says if isinstance(node, ast.Name))
    return Formula(expression, tuple(cells), optional, comparison, texts)


def _function_name(node: ast.AST) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _check_condition(node: ast.expr, names: Set[str]) -> None:
    if isinstance(node, ast.BoolOp):
        for part in node.values:
            _check_condition(part, names)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check_condition(node.operand, names)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in RELATIONS:
        _check_number(node.left, names)
        _check_number(node.comparators[0], names)
    else:
        raise ValueError(f"violated_if contains {ast.unparse(node)} where a comparison is expected")


def _check_number(node: ast.expr, names: Set[str]) -> None:
    parts: list[ast.expr] = []
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
        parts = [node.left, node.right]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        parts = [node.operand]
    elif _is_valid_call(node):
        parts = node.args[:1] if _function_name(node) == "says" else node.args
    elif isinstance(node, ast.Name):
        if node.id not in names:
            raise ValueError(f"violated_if contains {node.id}, which is neither a cell nor a legal parameter")
    elif not isinstance(node, ast.Constant) or type(node.value) not in (int, float):
        raise ValueError(f"violated_if contains {ast.unparse(node)} where a figure is expected")
    for part in parts:
        _check_number(part, names)


def _is_valid_call(node: ast.expr) -> TypeGuard[ast.Call]:
    """True for a valid call: `max(...)`, `min(...)`, `zero(cell)` or `says(cell, 'member')`."""
    if not isinstance(node, ast.Call) or not node.args or node.keywords:
        return False
    of_cell = isinstance(node.args[0], ast.Name)
    member = len(node.args) == 2 and isinstance(node.args[1], ast.Constant) and isinstance(node.args[1].value, str)
    shapes = {"max": True, "min": True, "zero": of_cell and len(node.args) == 1, "says": of_cell and member}
    return shapes.get(_function_name(node), False)


def truth(node: ast.expr, numbers: Mapping[str, Number], texts: Mapping[str, str]) -> bool | None:
    """Evaluate a condition in three-valued (Kleene) logic.

    Returns True or False if that is the result for all values in the intervals, else None.
    """
    if isinstance(node, ast.BoolOp):
        parts = [truth(part, numbers, texts) for part in node.values]
        decisive = isinstance(node.op, ast.Or)
        if decisive in parts:
            return decisive
        return None if None in parts else not decisive
    if isinstance(node, ast.UnaryOp):
        inner = truth(node.operand, numbers, texts)
        return None if inner is None else not inner
    assert isinstance(node, ast.Compare)  # see _check_condition
    left, right = (arithmetic(side, numbers, texts) for side in (node.left, node.comparators[0]))
    operator = type(node.ops[0])
    if operator is ast.NotEq:
        if left.high < right.low or right.high < left.low:
            return True
        return False if left.low == left.high == right.low == right.high else None
    if operator in (ast.Gt, ast.LtE):  # a > b is b < a; a <= b is not (b < a)
        left, right = right, left
    less = True if left.high < right.low else False if left.low >= right.high else None
    if operator in (ast.GtE, ast.LtE):
        return None if less is None else not less
    return less


def arithmetic(node: ast.expr, numbers: Mapping[str, Number], texts: Mapping[str, str]) -> Number:
    """Evaluate a numeric expression. Raises ZeroDivisionError if the interval of a divisor contains zero."""
    if isinstance(node, ast.Constant):
        return exactly(Decimal(str(node.value)))
    if isinstance(node, ast.Name):
        return numbers[node.id]
    if isinstance(node, ast.Call):
        called = _function_name(node)
        if called == "says":
            cell, member = node.args
            assert isinstance(cell, ast.Name) and isinstance(member, ast.Constant)
            return exactly(Decimal(texts.get(cell.id) == member.value))
        choose = min if called == "min" else max  # zero(x) has one argument
        parts = [arithmetic(part, numbers, texts) for part in node.args]
        return Number(*(choose(getattr(part, end) for part in parts) for end in ("value", "low", "high")))
    if isinstance(node, ast.UnaryOp):
        inner = arithmetic(node.operand, numbers, texts)
        return Number(-inner.value, -inner.high, -inner.low)
    assert isinstance(node, ast.BinOp)  # see _check_number
    left, right = arithmetic(node.left, numbers, texts), arithmetic(node.right, numbers, texts)
    if isinstance(node.op, ast.Add):
        return Number(left.value + right.value, left.low + right.low, left.high + right.high)
    if isinstance(node.op, ast.Sub):
        return Number(left.value - right.value, left.low - right.high, left.high - right.low)
    if isinstance(node.op, ast.Mult):
        corners = [a * b for a in (left.low, left.high) for b in (right.low, right.high)]
        return Number(left.value * right.value, min(corners), max(corners))
    return quotient(left, right)


def quotient(left: Number, right: Number) -> Number:
    """`left / right`. Raises ZeroDivisionError if the interval of `right` contains zero."""
    if right.low <= 0 <= right.high:
        raise ZeroDivisionError
    corners = [a / b for a in (left.low, left.high) for b in (right.low, right.high)]
    return Number(left.value / right.value, min(corners), max(corners))
