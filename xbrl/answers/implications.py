"""Requirements on one ratio that contain each other: who misses 8% of total capital also misses TSCR and the buffer above it."""

import functools
import re
from collections.abc import Iterable

from xbrl.rules.rules import built_in_rules

_BELOW = re.compile(r"\{(?P<ratio>[^}]+)\} < (?P<limit>.+?)(?: and .+)?")
_CELL = re.compile(r"\{[^,]+,r(?P<row>\d+),[^}]+\}(?P<more> \+ .+)?")


@functools.cache
def implied_by() -> dict[str, frozenset[str]]:
    """Rule -> the rules that are violated whenever it is, for the breaches of `rules.jsonl`.

    They are the minima of one ratio in ascending order: the number in the law, the bank's own requirement (the cell of the
    lower row in C 03.00 and C 47.00, where requirements are added up from row to row), the same plus a buffer.
    """
    limits: dict[str, list[tuple[tuple[int, bool], str]]] = {}
    for rule in built_in_rules():
        below = _BELOW.fullmatch(rule.violated_if) if rule.kind == "breach" else None
        if below:
            cell = _CELL.fullmatch(below["limit"])
            if cell or re.fullmatch(r"[\d.]+", below["limit"]):
                order = (int(cell["row"]), bool(cell["more"])) if cell else (0, False)
                limits.setdefault(below["ratio"], []).append((order, rule.id))
    implied = {}
    for rules in limits.values():
        for order, rule in rules:
            implied[rule] = frozenset(other for higher, other in rules if higher > order)
    return implied


def strictest(rules: Iterable[str]) -> set[str]:
    """The rules without those that another one of them implies."""
    found = set(rules)
    return found - set().union(*(implied_by().get(rule, frozenset()) for rule in found))
