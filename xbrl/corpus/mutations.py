"""Plant realistic filing errors in a consistent report, and small differences that the rules tolerate.

An error changes one figure (moves it, drops it, flips its sign, files it in the wrong unit, swaps two digits) or makes
the same mistake consistently in several figures. Some errors move a figure by the smallest amount that violates the
rule. The tolerated differences move it by the largest amount that does not. Together they are near misses on both sides
of the tolerance.
"""

import random
from collections.abc import Callable
from decimal import Decimal

from xbrl.corpus.rounding import exponent
from xbrl.read.report import CellKey

Figures = dict[CellKey, Decimal | str]
Violates = Callable[[Figures], bool]  # True if these figures violate the rule in question
# Changes `figures` in place; returns False if the report lacks the figures that the error needs.
CompoundError = Callable[[random.Random, Figures], bool]

_OF, _RATIO, _MEMO, _LEV, _LCR = ("C_01.00", "C_03.00", "C_04.00", "C_47.00", "C_76.00.a")


def _cell(table: str, row: int) -> CellKey:
    return table, f"r{row:04}", "c0010"


def _number(figures: Figures, key: CellKey) -> Decimal:
    """The figure in a cell that is not an enumeration."""
    value = figures[key]
    assert isinstance(value, Decimal), f"{key} is the enumeration member {value}"
    return value


_TREA = _cell("C_02.00.a", 10)  # total risk exposure amount

# rule -> figures in which an error can be planted; the rule reads each of them. A repeated figure is chosen more often.
ERROR_CELLS: dict[str, tuple[CellKey, ...]] = {
    "OF_SUM": (_cell(_OF, 750), _cell(_OF, 750), _cell(_OF, 10)),
    "T1_SUM": (_cell(_OF, 530),),
    "AT1_EXCESS": (_cell(_OF, 740), _cell(_OF, 440)),
    "CET1_RATIO": (_cell(_RATIO, 10),),
    "T1_RATIO": (_cell(_RATIO, 30),),
    "TC_RATIO": (_cell(_RATIO, 50),),
    "CET1_SURPLUS": (_cell(_RATIO, 20),),
    "T1_SURPLUS": (_cell(_RATIO, 40),),
    "TC_SURPLUS": (_cell(_RATIO, 60),),
    "OCR_CALC": (_cell(_RATIO, 160),),
    "LR_CALC": (_cell(_LEV, 340), _cell(_LEV, 300)),
    "LCR_CALC": (_cell(_LCR, 30), _cell(_LCR, 10), _cell(_LCR, 20)),
    "LCR_L1ADJ": (_cell(_LCR, 91), _cell(_LCR, 40), _cell(_LCR, 50), _cell(_LCR, 70)),
    "NSFR_CALC": (("C_84.00.a", "r0220", "c0040"), ("C_84.00.c", "r0010", "c0020"), ("C_84.00.d", "r0120", "c0030")),
    "FX_12_5": (("C_22.00", "r0010", "c0090"),),
    "FX_XTAB": (_cell("C_02.00.a", 560),),
    "FIN_BS": (_cell("F_01.01", 380), _cell("F_01.02", 300)),
    "FIN_PL": (_cell("F_02.00", 690), _cell("F_01.03", 250)),
}
# rule -> figures that can be moved within the tolerance of the rule
TOLERANCE_CELLS = ERROR_CELLS | {"CCB": (_cell(_MEMO, 750),), "CBR": (_cell(_MEMO, 740),)}
# Rules that read a missing figure as 0, so that leaving it out is an error too. The surplus rows are not among them: they
# would be missing in reports with violations alone.
DROPPABLE = (
    "OF_SUM",
    "T1_SUM",
    "AT1_EXCESS",
    "CET1_RATIO",
    "T1_RATIO",
    "TC_RATIO",
    "LR_CALC",
    "NSFR_CALC",
    "FX_XTAB",
    "FX_12_5",
    "FIN_PL",
)
# Rules for which a figure with the wrong sign is a plausible error.
SIGN_FLIPS = ("AT1_EXCESS", "CET1_SURPLUS", "T1_SURPLUS", "TC_SURPLUS", "LCR_L1ADJ", "FIN_PL")


def plant_error(rng: random.Random, rule_id: str, figures: Figures, violates: Violates) -> Figures | None:
    """A copy of `figures` with an error that violates `rule_id`; None if the error cannot be planted in this report."""
    changed = dict(figures)
    if rule_id in ERROR_CELLS or rule_id == "LE_PCT":
        keys = [key for key in _error_cells(rule_id, figures) if key in figures]
        if not keys:
            return None
        key = rng.choice(keys)
        kind = rng.random()
        if kind < 0.25:
            moved = boundary_value(rng, key, figures, violates)
            return {**figures, key: moved} if moved is not None else None
        if kind < 0.45 and rule_id in DROPPABLE:
            del changed[key]
        elif kind < 0.55 and rule_id in SIGN_FLIPS:
            changed[key] = -_number(figures, key)
        else:
            changed[key] = _mistyped(rng, _number(figures, key))
    elif not COMPOUND_ERRORS[rule_id](rng, changed):
        return None
    return changed if violates(changed) else None


def move_within_tolerance(rng: random.Random, rule_id: str, figures: Figures, violates: Violates) -> Figures:
    """A copy of `figures` with one figure moved as far as `rule_id` tolerates.

    Returns `figures` unchanged if they violate the rule already or no figure can be moved.
    """
    keys = [key for key in TOLERANCE_CELLS[rule_id] if key in figures]
    if not keys or violates(figures):
        return figures
    key = rng.choice(keys)
    moved = boundary_value(rng, key, figures, violates, inside=True)
    return figures if moved is None else {**figures, key: moved}


def boundary_value(
    rng: random.Random, key: CellKey, figures: Figures, violates: Violates, inside: bool = False
) -> Decimal | None:
    """The value of figure `key` at the edge of the tolerance, in a random direction.

    Finds the smallest number of units in the last place by which the figure must move to violate the rule. Returns the
    value moved by this number, or with `inside` by one unit less. Returns None if no move violates the rule, or if
    with `inside` the figure would not move at all.
    """
    value = _number(figures, key)
    unit = _unit_in_last_place(value) * rng.choice((-1, 1))
    high = 1
    while not violates({**figures, key: value + unit * high}):
        high *= 2
        if high > 2**24:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if violates({**figures, key: value + unit * middle}) else (middle, high)
    steps = high - 1 if inside else high
    return value + unit * steps if steps else None


def _error_cells(rule_id: str, figures: Figures) -> tuple[CellKey, ...]:
    """`ERROR_CELLS`; for LE_PCT the cells of the rows that are filed in the open table C 28.00."""
    if rule_id != "LE_PCT":
        return ERROR_CELLS[rule_id]
    return tuple(key for key in figures if key[0] == "C_28.00" and key[2] in ("c330", "c350"))


def _unit_in_last_place(value: Decimal) -> Decimal:
    """The unit of the last digit of a ratio. For an amount, the largest of 10^6, 10^3 and 1 that divides it."""
    if exponent(value) < 0:
        return Decimal(1).scaleb(exponent(value))
    return next(Decimal(unit) for unit in (1_000_000, 1000, 1) if value % unit == 0)


def _mistyped(rng: random.Random, value: Decimal) -> Decimal:
    """The figure with a manual error: the wrong unit, two digits swapped, or off by 0.5% to 8%."""
    unit = _unit_in_last_place(value)
    kind = rng.random()
    if kind < 0.12 and unit >= 1000 and abs(value) >= 1_000_000:
        return (value / 1000 / unit).quantize(Decimal(1)) * unit  # filed in thousands instead of units
    if kind < 0.35:
        digits = str(int(value / unit))
        places = [
            place for place in range(len(digits) - 1) if digits[place] != digits[place + 1] and digits[place] != "-"
        ]
        if places:
            place = rng.choice(places)
            swapped = digits[:place] + digits[place + 1] + digits[place] + digits[place + 2 :]
            return (Decimal(swapped) * unit).quantize(unit)
    difference = (abs(value) * rng.randint(5, 80) / 1000 / unit).quantize(Decimal(1)) * unit
    return value + max(difference, unit).quantize(unit) * rng.choice((-1, 1))


def _hidden_deficit(ratio_row: int, surplus_row: int) -> CompoundError:
    """The error for a SIGN rule: hide the deficit in `surplus_row` of C 03.00.

    The ratio in `ratio_row` must be filed too, because the rule reads it.
    """

    def change(rng: random.Random, figures: Figures) -> bool:
        """File a deficit as a surplus."""
        key = _cell(_RATIO, surplus_row)
        if key not in figures or _number(figures, key) >= 0 or _cell(_RATIO, ratio_row) not in figures:
            return False
        figures[key] = -_number(figures, key)
        return True

    return change


def _low_requirement(row: int, floor: str) -> CompoundError:
    """The error for a FLOOR rule: a requirement in C 03.00 that is below its Pillar 1 part, `floor`."""

    def change(rng: random.Random, figures: Figures) -> bool:
        """File a capital requirement without its Pillar 1 part, or slightly below `floor`."""
        key = _cell(_RATIO, row)
        if key not in figures:
            return False
        value = _number(figures, key)
        own = (value - Decimal(floor)).quantize(value)
        figures[key] = own if rng.random() < 0.5 and own > 0 else Decimal(floor) - Decimal(rng.randint(1, 60)) / 10_000
        if row == 130 and rng.random() < 0.8:
            _raise_overall(figures, Decimal("0.08") - value, (160,))
        return True

    return change


def _raise_overall(figures: Figures, difference: Decimal, rows: tuple[int, ...] = (160, 170, 180)) -> None:
    """Carry an error in a part of the overall capital requirement into its ratios: in total, in CET1, in Tier 1."""
    for key in (_cell(_RATIO, row) for row in rows):
        if key in figures:
            requirement = _number(figures, key)
            figures[key] = (requirement + difference).quantize(requirement)


def _wrong_conservation_buffer(rng: random.Random, figures: Figures) -> bool:
    """Compute the conservation buffer with a wrong rate.

    The combined buffer and the overall requirement change accordingly.
    """
    part, total = _cell(_MEMO, 750), _cell(_MEMO, 740)
    if not {part, total, _TREA} <= set(figures):
        return False
    trea = _number(figures, _TREA)
    rate = rng.choice(("0.00625", "0.0125", "0.01875", "0.02", "0.0245", "0.0255", "0.03"))
    wrong = (trea * Decimal(rate) / _unit_in_last_place(trea)).quantize(Decimal(1)) * _unit_in_last_place(trea)
    difference = wrong - _number(figures, part)
    figures[part] = _number(figures, part) + difference
    figures[total] = _number(figures, total) + difference
    _raise_overall(figures, difference / trea)
    return True


def _wrong_combined_buffer(rng: random.Random, figures: Figures) -> bool:
    """Add up the combined buffer with one part too many or too few, or mistype it.

    The overall requirement changes accordingly.
    """
    total = _cell(_MEMO, 740)
    parts = [key for key in (_cell(_MEMO, row) for row in (770, 780, 800, 810)) if key in figures]
    if not {total, _TREA} <= set(figures) or not parts:
        return False
    before = after = _number(figures, total)
    both = all(_cell(_MEMO, row) in figures for row in (800, 810))
    if both and rng.random() < 0.5:  # add both systemic buffers, although only the larger one applies
        after += min(_number(figures, _cell(_MEMO, 800)), _number(figures, _cell(_MEMO, 810)))
    elif rng.random() < 0.5:
        after -= _number(figures, rng.choice(parts))
    else:
        after = _mistyped(rng, before)
    figures[total] = after
    _raise_overall(figures, (after - before) / _number(figures, _TREA))
    return True


def _uncapped_inflows(rng: random.Random, figures: Figures) -> bool:
    """Deduct inflows in full although the cap of 75% of outflows applies. The net outflow remains the difference."""
    net, outflows, inflows, reduction = (_cell(_LCR, row) for row in (20, 300, 330, 360))
    if not {net, outflows, reduction} <= set(figures):
        return False
    net_outflow = _number(figures, net)
    unit = _unit_in_last_place(net_outflow)
    taken = Decimal(rng.randint(7510, 7600) if rng.random() < 0.4 else rng.randint(7610, 9300)) / 10_000
    outflow = (net_outflow / (1 - taken) / unit).quantize(Decimal(1)) * unit
    figures[outflows] = outflow
    figures[reduction] = figures[inflows] = outflow - net_outflow
    return True


# rule -> an error that is consistent over several figures
COMPOUND_ERRORS: dict[str, CompoundError] = {
    "CET1_SIGN": _hidden_deficit(10, 20),
    "T1_SIGN": _hidden_deficit(30, 40),
    "TC_SIGN": _hidden_deficit(50, 60),
    "TSCR_FLOOR": _low_requirement(130, "0.08"),
    "TSCR_CET1_FLOOR": _low_requirement(140, "0.045"),
    "TSCR_T1_FLOOR": _low_requirement(150, "0.06"),
    "CCB": _wrong_conservation_buffer,
    "CBR": _wrong_combined_buffer,
    "LCR_INFLOWCAP": _uncapped_inflows,
}
FILING_RULES = (*ERROR_CELLS, "LE_PCT", *COMPOUND_ERRORS)
# Relative frequency of each error: higher if few banks file the template, lower if the error causes further violations.
WEIGHTS = dict.fromkeys(FILING_RULES, 10) | {"AT1_EXCESS": 60, "LE_PCT": 22, "FX_12_5": 22, "FX_XTAB": 22, "FIN_BS": 18}
WEIGHTS |= {
    "FIN_PL": 18,
    "CET1_SURPLUS": 6,
    "T1_SURPLUS": 6,
    "TC_SURPLUS": 6,
    "CET1_SIGN": 5,
    "T1_SIGN": 5,
    "TC_SIGN": 8,
    "OCR_CALC": 8,
}


def draw_errors(rng: random.Random, count: int) -> list[str]:
    """Draw `count` different filing rules with probabilities proportional to `WEIGHTS`."""
    left = dict(WEIGHTS)
    drawn: list[str] = []
    for _ in range(count):
        drawn += rng.choices(list(left), list(left.values()))
        del left[drawn[-1]]
    return drawn
