"""Plant filing errors in a consistent report, and small differences that the rules tolerate.

An error changes one figure that the rule reads: it is mistyped, filed in the wrong unit, has the wrong sign, is left out, or
is moved by the smallest amount that violates the rule. The tolerated differences move a figure by the largest amount that
does not. Together they are near misses on both sides of the tolerance.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal

from xbrl.corpus.figures import Figures
from xbrl.read.report import CellKey
from xbrl.rules.rules import Rule, built_in_rules

Violates = Callable[[Figures], bool]  # True if these figures violate the rule in question
# Rules on surpluses that hide a deficit can fail only where there is one; the others apply to few banks.
WEIGHTS = {"AT1_EXCESS": 40, "LE_PCT": 20, "FX_12_5": 20, "FX_XTAB": 20, "FIN_BS": 18, "FIN_PL": 18}
WEIGHTS |= {"CET1_SIGN": 40, "T1_SIGN": 40, "TC_SIGN": 40}
# Rules for which a figure with the wrong sign is a plausible error.
SIGN_FLIPS = (
    "AT1_EXCESS",
    "LCR_L1ADJ",
    "FIN_PL",
    *(f"{tier}_{what}" for tier in ("CET1", "T1", "TC") for what in ("SURPLUS", "SIGN")),
)
SHOWN_TWICE = {("C_01.00", "r0015", "c0010"), ("C_47.00", "r0320", "c0010")}  # Tier 1 is one fact in two tables
MAX_CHANGE = 2  # of a figure, as a multiple of it


def draw_errors(rng: random.Random, count: int, rules: Sequence[Rule] | None = None) -> list[Rule]:
    """Up to `count` different filing rules, those that apply to few banks more often."""
    left = [rule for rule in rules or built_in_rules() if rule.kind == "filing"]
    drawn: list[Rule] = []
    for _ in range(min(count, len(left))):
        drawn += rng.choices(left, [WEIGHTS.get(rule.id, 10) for rule in left])
        left.remove(drawn[-1])
    return drawn


def plant_error(rng: random.Random, rule: Rule, figures: Figures, free: Figures, violates: Violates) -> Figures | None:
    """A copy of `figures` with an error that violates `rule`; None if there is no room for one in this report.

    Only figures that are `free` are changed.
    """
    keys = {key: weight for key, weight in _readable(rule, free).items() if key in figures}
    if not keys or violates(figures):
        return None
    key = rng.choices(list(keys), list(keys.values()))[0]
    value = figures[key]
    assert isinstance(value, Decimal)
    changes: list[Figures] = [{**figures, key: _mistyped(rng, value)}]
    if rule.id in SIGN_FLIPS:
        changes.append({**figures, key: -value})
    if rule.absent_cell == "zero" and key[1].startswith("r"):
        changes.append({name: one for name, one in figures.items() if name != key})
    rng.shuffle(changes)
    for changed in changes if rng.random() < 0.75 else ():
        if violates(changed):
            return changed
    moved = boundary_value(rng, key, figures, violates)
    return None if moved is None else {**figures, key: moved}


def move_within_tolerance(
    rng: random.Random, rule: Rule, figures: Figures, free: Figures, violates: Violates
) -> Figures:
    """A copy of `figures` with a `free` figure moved as far as `rule` tolerates, or `figures` if none can be moved."""
    keys = {key: weight for key, weight in _readable(rule, free).items() if key in figures}
    if not keys or violates(figures):
        return figures
    key = rng.choices(list(keys), list(keys.values()))[0]
    moved = boundary_value(rng, key, figures, violates, inside=True)
    return figures if moved is None else {**figures, key: moved}


def _readable(rule: Rule, figures: Figures) -> dict[CellKey, int]:
    """The figures that a rule reads, with a weight: a figure that many rules read is rarely the one that is wrong."""
    readers = Counter(cell for other in built_in_rules() if other.kind != "trigger" for cell in other.cells)
    found = {}
    for key, value in figures.items():
        cell = key if key in rule.cells else (key[0], "*", key[2])
        if cell in rule.cells and cell not in SHOWN_TWICE and isinstance(value, Decimal):
            found[key] = 100_000 // readers[cell] ** 3
    return found


def boundary_value(
    rng: random.Random, key: CellKey, figures: Figures, violates: Violates, inside: bool = False
) -> Decimal | None:
    """The value of figure `key` at the edge of the tolerance, in a random direction.

    The figure moves by the smallest number of units in the last place that violates the rule, or with `inside` by one unit
    less. None if no move violates the rule, or if with `inside` the figure would not move at all.
    """
    value = figures[key]
    assert isinstance(value, Decimal)
    unit = _unit_in_last_place(value) * rng.choice((-1, 1))
    high = 1
    while not violates({**figures, key: value + unit * high}):
        high *= 2
        if abs(unit) * high > MAX_CHANGE * abs(value):
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if violates({**figures, key: value + unit * middle}) else (middle, high)
    steps = high - 1 if inside else high
    return value + unit * steps if steps else None


def _unit_in_last_place(value: Decimal) -> Decimal:
    """The unit of the last digit of a ratio. For an amount, the largest of 10^6, 10^3 and 1 that divides it."""
    exponent = int(value.as_tuple().exponent)
    if exponent < 0:
        return Decimal(1).scaleb(exponent)
    return next(Decimal(unit) for unit in (1_000_000, 1000, 1) if value % unit == 0)


def _mistyped(rng: random.Random, value: Decimal) -> Decimal:
    """The figure with a manual error: the wrong unit, two digits swapped, or off by 0.5% to 8%."""
    unit = _unit_in_last_place(value)
    kind = rng.random()
    if kind < 0.12 and unit >= 1000 and abs(value) >= 1_000_000:
        return (value / 1000 / unit).quantize(Decimal(1)) * unit  # filed in thousands instead of units
    digits = str(abs(int(value / unit)))
    places = [place for place in range(len(digits) - 1) if digits[place] != digits[place + 1]]
    if kind < 0.35 and places:
        place = rng.choice(places)
        swapped = digits[:place] + digits[place + 1] + digits[place] + digits[place + 2 :]
        return (Decimal(swapped) * unit).quantize(unit).copy_sign(value)
    difference = (abs(value) * rng.randint(5, 80) / 1000 / unit).quantize(Decimal(1)) * unit
    return value + max(difference, unit).quantize(unit) * rng.choice((-1, 1))
