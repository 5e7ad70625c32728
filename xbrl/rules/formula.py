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

from xbrl.read.filed_report import CellKey

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


def keeps_to(value: Decimal, relation: str, limit: Decimal) -> bool:
    """Whether a figure keeps to its limit, which is a "min" or a "max", or is the figure that is "expected"."""
    return {"min": value >= limit, "max": value <= limit, "expected": value == limit}[relation]


def exactly(value: Decimal) -> Number:
    """A number whose interval contains only `value`."""
    return Number(value, value, value)


def rounded(value: Decimal, decimals: int | str | None) -> Number:
    """A number that is accurate to `decimals` places. Exact if `decimals` is INF or None."""
    if not isinstance(decimals, int):
        return exactly(value)
    half = Decimal((0, (5,), -decimals - 1))  # half a unit in the last accurate place
    return Number(value, value - half, value + half)


def parse_formula(text: str, parameters: Set[str]) -> Formula:
    """Parse a formula, never executing it.

    Raises ValueError or SyntaxError for anything outside the formula language: evaluating it on some numbers meets it.
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
    truth(expression, {name: exactly(Decimal(3**index)) for index, name in enumerate((*names, *parameters))}, {})
    calls = {id(node.args[0]): _called(node) for node in ast.walk(expression) if isinstance(node, ast.Call)}
    found = [node for node in ast.walk(expression) if isinstance(node, ast.Name) and node.id in names]
    needed = {node.id for node in found if calls.get(id(node)) not in ("zero", "says")}
    texts = frozenset(node.id for node in found if calls.get(id(node)) == "says")
    return Formula(
        expression, tuple(cells), frozenset(names[name] for name in names.keys() - needed), comparison, texts
    )


def truth(node: ast.expr, numbers: Mapping[str, Number], texts: Mapping[str, str]) -> bool | None:
    """Evaluate a condition in three-valued (Kleene) logic.

    Returns True or False if that is the result for all values in the intervals, else None. Raises ValueError for a node
    that is no condition.
    """
    if isinstance(node, ast.BoolOp):
        parts = [truth(part, numbers, texts) for part in node.values]
        decisive = isinstance(node.op, ast.Or)
        return decisive if decisive in parts else None if None in parts else not decisive
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = truth(node.operand, numbers, texts)
        return None if inner is None else not inner
    if not isinstance(node, ast.Compare) or len(node.ops) != 1 or type(node.ops[0]) not in RELATIONS:
        raise ValueError(f"violated_if contains {ast.unparse(node)} where a comparison is expected")
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
    """Evaluate a numeric expression.

    Raises ZeroDivisionError if the interval of a divisor contains zero, ValueError for a node that is no figure.
    """
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return exactly(Decimal(str(node.value)))
    if isinstance(node, ast.Name):
        if node.id not in numbers:
            raise ValueError(f"violated_if contains {node.id}, which is neither a cell nor a legal parameter")
        return numbers[node.id]
    if isinstance(node, ast.Call) and node.args and not node.keywords:
        return _call(node, numbers, texts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = arithmetic(node.operand, numbers, texts)
        return Number(-inner.value, -inner.high, -inner.low)
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
        raise ValueError(f"violated_if contains {ast.unparse(node)} where a figure is expected")
    left, right = arithmetic(node.left, numbers, texts), arithmetic(node.right, numbers, texts)
    if isinstance(node.op, ast.Add):
        return Number(left.value + right.value, left.low + right.low, left.high + right.high)
    if isinstance(node.op, ast.Sub):
        return Number(left.value - right.value, left.low - right.high, left.high - right.low)
    if isinstance(node.op, ast.Mult):
        corners = [a * b for a in (left.low, left.high) for b in (right.low, right.high)]
        return Number(left.value * right.value, min(corners), max(corners))
    return quotient(left, right)


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _call(node: ast.Call, numbers: Mapping[str, Number], texts: Mapping[str, str]) -> Number:
    """`max(...)`, `min(...)`, `zero(cell)` or `says(cell, 'member')`."""
    called, first, *rest = _called(node), *node.args
    of_cell = isinstance(first, ast.Name)
    if (
        called == "says"
        and of_cell
        and len(rest) == 1
        and isinstance(rest[0], ast.Constant)
        and isinstance(rest[0].value, str)
    ):
        return exactly(Decimal(texts.get(first.id) == rest[0].value))
    if called not in ("max", "min") and not (called == "zero" and of_cell and not rest):
        raise ValueError(f"violated_if contains {ast.unparse(node)} where a figure is expected")
    choose = min if called == "min" else max  # zero(x) has one argument
    parts = [arithmetic(part, numbers, texts) for part in node.args]
    return Number(*(choose(getattr(part, end) for part in parts) for end in ("value", "low", "high")))


def quotient(left: Number, right: Number) -> Number:
    """`left / right`. Raises ZeroDivisionError if the interval of `right` contains zero."""
    if right.low <= 0 <= right.high:
        raise ZeroDivisionError
    corners = [a / b for a in (left.low, left.high) for b in (right.low, right.high)]
    return Number(left.value / right.value, min(corners), max(corners))
