"""The formula language of the rules, and its interval arithmetic.

A formula is an expression over cells, e.g. `{C_03.00,r0010,c0010} < 0.045`. It supports `+ - * /`, `max`, `min`,
comparisons, `and`, `or` and `not`. `zero({...})` is a figure that counts as 0 if it is not reported. `says({...},
'member')` is 1 if a cell contains this member of an enumeration, else 0. A bare name is a legal parameter that
depends on the year. The row `*` stands for each row of an open table in turn.

Every number has an interval given by its rounding. A comparison is true or false only if it has this result for all values
in the intervals, as in the interval arithmetic of the EBA's filing rules. `a != b` is true if the intervals do not overlap.
"""

import ast
import functools
import operator
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from decimal import Decimal

from xbrl.read.filed_report import CellKey

CELL = re.compile(r"\{([A-Z]+_\d+\.\d+(?:\.[a-z])?),(r\d+|\*),(c\d+)\}")
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
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
        """Return how the right side of the first comparison limits the left one: "min", "max" or "expected"."""
        return RELATIONS[type(self.comparison.ops[0])]

    @property
    def sides(self) -> tuple[ast.expr, ast.expr]:
        """Return the left and the right side of the first comparison."""
        return self.comparison.left, self.comparison.comparators[0]

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Return the names of cells (x0, x1, ...) and legal parameters in the expression."""
        return frozenset(node.id for node in ast.walk(self.expression) if isinstance(node, ast.Name))


@dataclass(frozen=True)
class Number:
    """A figure and the interval of unrounded values that it may have been rounded from."""

    value: Decimal
    low: Decimal
    high: Decimal


def keeps_to(value: Decimal, relation: str, limit: Decimal) -> bool:
    """Return whether a figure keeps to its limit. `relation` is "min", "max" or, for equality, "expected"."""
    return {"min": value >= limit, "max": value <= limit, "expected": value == limit}[relation]


def exactly(value: Decimal) -> Number:
    """Return a number whose interval contains only `value`."""
    return Number(value, value, value)


def rounded(value: Decimal, decimals: int | str | None) -> Number:
    """Return a number that is accurate to `decimals` places, or exact if `decimals` is INF or None."""
    if not isinstance(decimals, int):
        return exactly(value)
    half = Decimal((0, (5,), -decimals - 1))  # half a unit in the last accurate place
    return Number(value, value - half, value + half)


def parse_formula(text: str, parameters: Set[str]) -> Formula:
    """Parse a formula without ever executing it as Python.

    Raise ValueError or SyntaxError for anything outside the formula language. A trial evaluation on arbitrary numbers
    detects it.
    """
    cells: dict[CellKey, str] = {}
    plain = CELL.sub(lambda match: cells.setdefault((match[1], match[2], match[3]), f"x{len(cells)}"), text)
    expression = ast.parse(plain.strip(), mode="eval").body
    nodes = list(ast.walk(expression))
    comparison = next((node for node in nodes if isinstance(node, ast.Compare)), None)
    if comparison is None:
        raise ValueError("violated_if contains no comparison")
    names = (*cells.values(), *parameters)
    truth(expression, {name: exactly(Decimal(3**index)) for index, name in enumerate(names)}, {})
    read: dict[str, set[str]] = {"zero": set(), "says": set(), "": set()}  # function, or "" -> names that it reads
    called = {id(node.args[0]): ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        if isinstance(node, ast.Name):
            function = called.get(id(node), "")
            read[function if function in read else ""].add(node.id)
    optional = frozenset(cell for cell, name in cells.items() if name not in read[""])
    return Formula(expression, tuple(cells), optional, comparison, frozenset(read["says"]))


def truth(node: ast.expr, numbers: Mapping[str, Number], texts: Mapping[str, str]) -> bool | None:
    """Evaluate a condition in three-valued (Kleene) logic.

    Return True or False if all values in the intervals give this result, else None. Raise ValueError for a node that is no
    condition.
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
    relation = type(node.ops[0])
    if relation is ast.NotEq:
        if left.high < right.low or right.high < left.low:
            return True
        return False if left.low == left.high == right.low == right.high else None
    if relation in (ast.Gt, ast.LtE):  # a > b is b < a; a <= b is not (b < a)
        left, right = right, left
    less = True if left.high < right.low else False if left.low >= right.high else None
    if relation in (ast.GtE, ast.LtE):
        return None if less is None else not less
    return less


def arithmetic(node: ast.expr, numbers: Mapping[str, Number], texts: Mapping[str, str]) -> Number:
    """Evaluate a figure. Raise ZeroDivisionError if a divisor's interval contains 0, ValueError for a node that is no figure."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return exactly(Decimal(str(value)))
        case ast.Name(id=name):
            if name not in numbers:
                raise ValueError(f"violated_if contains {name}, which is neither a cell nor a legal parameter")
            return numbers[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return combine(operator.sub, exactly(Decimal(0)), arithmetic(operand, numbers, texts))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in OPERATIONS:
            parts = (arithmetic(part, numbers, texts) for part in (left, right))
            return combine(OPERATIONS[type(sign)], *parts)
        case ast.Call(
            func=ast.Name(id="says"), args=[ast.Name(id=name), ast.Constant(value=str() as member)], keywords=[]
        ):
            return exactly(Decimal(texts.get(name) == member))
        case ast.Call(func=ast.Name(id="zero"), args=[ast.Name() as cell], keywords=[]):
            return arithmetic(cell, numbers, texts)
        case ast.Call(func=ast.Name(id="max" | "min" as called), args=[_, *_] as args, keywords=[]):
            choose, parts = max if called == "max" else min, [arithmetic(part, numbers, texts) for part in args]
            return Number(*(choose(getattr(part, end) for part in parts) for end in ("value", "low", "high")))
    raise ValueError(f"violated_if contains {ast.unparse(node)} where a figure is expected")


def combine(operation: Callable[[Decimal, Decimal], Decimal], left: Number, right: Number) -> Number:
    """Apply an operation to two numbers. The interval of the result spans the results at the four pairs of interval ends.

    Raise ZeroDivisionError if the interval of a divisor contains zero.
    """
    if operation is operator.truediv and right.low <= 0 <= right.high:
        raise ZeroDivisionError
    corners = [operation(a, b) for a in (left.low, left.high) for b in (right.low, right.high)]
    return Number(operation(left.value, right.value), min(corners), max(corners))
