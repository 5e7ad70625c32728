"""The small language in which rules are written, and its arithmetic.

A formula is an expression over cells, e.g. `{C_03.00,r0010,c0010} < 0.045`: `+ - * /`, `max`, `min`, comparisons, `and`,
`or`, `not`; `zero({...})` is a figure that counts as 0 where it is not reported; `says({...}, 'member')` is 1 where a cell
holds that member of an enumeration, else 0; a bare name is a parameter of the law that changes over the years. A row `*`
is each row of an open table in turn.

A number is carried with the interval that its rounding allows, and a comparison is true or false only if it is so for
every choice inside the intervals (the interval arithmetic of the EBA's filing rules): `a != b` means that they do not meet.
"""

import ast
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from decimal import Decimal

from data.regulator.report import CellKey

CELL = re.compile(r"\{([A-Z]+_\d+\.\d+(?:\.[a-z])?),(r\d+|\*),(c\d+)\}")
RELATIONS = {ast.Lt: "min", ast.LtE: "min", ast.Gt: "max", ast.GtE: "max", ast.NotEq: "expected"}


@dataclass(frozen=True)
class Formula:
    """A parsed formula: an expression over the names x0, x1, ... of `cells`, in the order in which they occur."""

    expression: ast.expr
    cells: tuple[CellKey, ...]
    optional: frozenset[CellKey]  # those that stand in `zero` or `says` only: they may be missing
    comparison: ast.Compare  # the first one: its left side is the figure that a finding is about

    @property
    def relation(self) -> str:
        """What the right side of the first comparison is to the figure: "min", "max" or "expected"."""
        return RELATIONS[type(self.comparison.ops[0])]


@dataclass(frozen=True)
class Number:
    """A figure, and the interval that its rounding allows."""

    value: Decimal
    low: Decimal
    high: Decimal


def exactly(value: Decimal) -> Number:
    """A number without rounding."""
    return Number(value, value, value)


def rounded(value: Decimal, decimals: int | str | None) -> Number:
    """A number that is right to `decimals` places; exact where decimals are INF or not given."""
    if not isinstance(decimals, int):
        return exactly(value)
    half = Decimal((0, (5,), -decimals - 1))  # half a unit of the last place that is claimed to be right
    return Number(value, value - half, value + half)


def parse_formula(text: str, parameters: frozenset[str]) -> Formula:
    """Raises ValueError or SyntaxError for anything but the language above: a rules file is data, it never runs as code."""
    cells: list[CellKey] = []

    def name(match: re.Match) -> str:
        if match.groups() not in cells:
            cells.append(match.groups())
        return f"x{cells.index(match.groups())}"

    expression = ast.parse(CELL.sub(name, text).strip(), mode="eval").body
    comparison = next((node for node in ast.walk(expression) if isinstance(node, ast.Compare)), None)
    if comparison is None:
        raise ValueError("violated_if compares nothing")
    names = {f"x{index}": cell for index, cell in enumerate(cells)}
    _check_truth(expression, names.keys() | parameters)
    inside = {id(node.args[0]) for node in ast.walk(expression) if _called(node) in ("zero", "says")}
    needed = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name) and id(node) not in inside}
    optional = frozenset(cell for name, cell in names.items() if name not in needed)
    return Formula(expression, tuple(cells), optional, comparison)


def _called(node: ast.AST) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _check_truth(node: ast.expr, names: Set[str]) -> None:
    if isinstance(node, ast.BoolOp):
        for part in node.values:
            _check_truth(part, names)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check_truth(node.operand, names)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in RELATIONS:
        _check_value(node.left, names)
        _check_value(node.comparators[0], names)
    else:
        raise ValueError(f"violated_if holds {ast.unparse(node)} where a comparison is expected")


def _check_value(node: ast.expr, names: Set[str]) -> None:
    parts: list[ast.expr] = []
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
        parts = [node.left, node.right]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        parts = [node.operand]
    elif _is_call(node):
        parts = node.args[:1] if _called(node) == "says" else node.args
    elif isinstance(node, ast.Name):
        if node.id not in names:
            raise ValueError(f"violated_if holds {node.id}, which is neither a cell nor a parameter of the law")
    elif not isinstance(node, ast.Constant) or type(node.value) not in (int, float):
        raise ValueError(f"violated_if holds {ast.unparse(node)} where a figure is expected")
    for part in parts:
        _check_value(part, names)


def _is_call(node: ast.expr) -> bool:
    """`max(...)`, `min(...)`, `zero(cell)` or `says(cell, 'member')`."""
    called = _called(node)
    if not called or not node.args or node.keywords:
        return False
    of_cell = isinstance(node.args[0], ast.Name)
    member = len(node.args) == 2 and isinstance(node.args[1], ast.Constant) and isinstance(node.args[1].value, str)
    shapes = {"max": True, "min": True, "zero": of_cell and len(node.args) == 1, "says": of_cell and member}
    return shapes.get(called, False)


def truth(node: ast.expr, numbers: Mapping[str, Number], texts: Mapping[str, str]) -> bool | None:
    """Kleene's three values: True or False only if it is so for every choice inside the intervals, else None."""
    if isinstance(node, ast.BoolOp):
        parts = [truth(part, numbers, texts) for part in node.values]
        decisive = isinstance(node.op, ast.Or)
        if decisive in parts:
            return decisive
        return None if None in parts else not decisive
    if isinstance(node, ast.UnaryOp):
        inner = truth(node.operand, numbers, texts)
        return None if inner is None else not inner
    left, right = (arithmetic(side, numbers, texts) for side in (node.left, node.comparators[0]))
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


def arithmetic(node: ast.expr, numbers: Mapping[str, Number], texts: Mapping[str, str]) -> Number:
    """The value of an expression that is not a comparison. Raises ZeroDivisionError where a divisor may be zero."""
    if isinstance(node, ast.Constant):
        return exactly(Decimal(str(node.value)))
    if isinstance(node, ast.Name):
        return numbers[node.id]
    if isinstance(node, ast.Call):
        called = _called(node)
        if called == "says":
            return exactly(Decimal(texts.get(node.args[0].id) == node.args[1].value))
        choose = min if called == "min" else max  # zero(x) has one argument
        parts = [arithmetic(part, numbers, texts) for part in node.args]
        return Number(*(choose(getattr(part, end) for part in parts) for end in ("value", "low", "high")))
    if isinstance(node, ast.UnaryOp):
        inner = arithmetic(node.operand, numbers, texts)
        return Number(-inner.value, -inner.high, -inner.low)
    left, right = arithmetic(node.left, numbers, texts), arithmetic(node.right, numbers, texts)
    if isinstance(node.op, ast.Add):
        return Number(left.value + right.value, left.low + right.low, left.high + right.high)
    if isinstance(node.op, ast.Sub):
        return Number(left.value - right.value, left.low - right.high, left.high - right.low)
    if isinstance(node.op, ast.Mult):
        corners = [a * b for a in (left.low, left.high) for b in (right.low, right.high)]
        return Number(left.value * right.value, min(corners), max(corners))
    if right.low <= 0 <= right.high:
        raise ZeroDivisionError
    corners = [a / b for a in (left.low, left.high) for b in (right.low, right.high)]
    return Number(left.value / right.value, min(corners), max(corners))
