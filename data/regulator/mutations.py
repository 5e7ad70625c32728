"""Filing errors as banks make them, planted in an otherwise consistent report; and harmless differences that look like them.

An error moves one figure (or drops it, turns its sign, files it in the wrong unit, swaps two digits), or is one consistent
mistake over several figures. A size "just" moves the figure by the least that the rule notices, "inside" by the most that
it does not: near misses on both sides of the tolerance.
"""

import random
from collections.abc import Callable
from decimal import Decimal

from data.regulator.report import CellKey

Figures = dict[CellKey, Decimal | str]
Check = Callable[[Figures], bool]  # whether these figures violate the rule in question

_OF, _RATIO, _MEMO, _LEV, _LCR = ("C_01.00", "C_03.00", "C_04.00", "C_47.00", "C_76.00.a")


def _cell(table: str, row: int) -> CellKey:
    return table, f"r{row:04}", "c0010"


# rule -> figures that a slip of the pen may hit, each of which this rule reads
MOVES: dict[str, tuple[CellKey, ...]] = {
    "OF_SUM": (_cell(_OF, 750), _cell(_OF, 750), _cell(_OF, 10)),
    "T1_SUM": (_cell(_OF, 530),),
    "AT1_EXCESS": (_cell(_OF, 740), _cell(_OF, 440)),
    "CET1_RATIO": (_cell(_RATIO, 10),),
    "T1_RATIO": (_cell(_RATIO, 30),),
    "TC_RATIO": (_cell(_RATIO, 50),),
    "CET1_SURPLUS": (_cell(_RATIO, 20),),
    "T1_SURPLUS": (_cell(_RATIO, 40),),
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
# further figures that may differ by rounding from what they should be
BRUSHES = MOVES | {"CCB": (_cell(_MEMO, 750),), "CBR": (_cell(_MEMO, 740),)}
# figures that count as 0 where they are missing, so that leaving them out is an error too
DROPS = (
    "OF_SUM",
    "T1_SUM",
    "AT1_EXCESS",
    "CET1_SURPLUS",
    "T1_SURPLUS",
    "CET1_RATIO",
    "T1_RATIO",
    "TC_RATIO",
    "LR_CALC",
)
DROPS += ("NSFR_CALC", "FX_XTAB", "FX_12_5", "FIN_PL")
SIGNS = ("AT1_EXCESS", "CET1_SURPLUS", "T1_SURPLUS", "LCR_L1ADJ", "FIN_PL")


def plant(rng: random.Random, rule_id: str, figures: Figures, check: Check) -> Figures | None:
    """`figures` with an error that violates `rule_id`; None if this report has no place for it."""
    changed = dict(figures)
    if rule_id in MOVES or rule_id == "LE_PCT":
        keys = [key for key in _targets(rule_id, figures) if key in figures]
        if not keys:
            return None
        key = rng.choice(keys)
        how = rng.random()
        if how < 0.25:
            moved = just_beyond(rng, key, figures, check)
            return {**figures, key: moved} if moved is not None else None
        if how < 0.45 and rule_id in DROPS:
            del changed[key]
        elif how < 0.55 and rule_id in SIGNS:
            changed[key] = -figures[key]
        else:
            changed[key] = _slipped(rng, figures[key])
    elif not SPECIAL[rule_id](rng, changed):
        return None
    return changed if check(changed) else None


def brush(rng: random.Random, rule_id: str, figures: Figures, check: Check) -> Figures:
    """`figures` with one of them moved as far as `rule_id` just tolerates."""
    keys = [key for key in BRUSHES[rule_id] if key in figures]
    if not keys or check(figures):
        return figures
    key = rng.choice(keys)
    moved = just_beyond(rng, key, figures, check, inside=True)
    return figures if moved is None else {**figures, key: moved}


def just_beyond(
    rng: random.Random, key: CellKey, figures: Figures, check: Check, inside: bool = False
) -> Decimal | None:
    """The figure moved by the fewest units of its last place that the rule notices, or by one less; None if it never does."""
    value = figures[key]
    unit = _unit(value) * rng.choice((-1, 1))
    high = 1
    while not check({**figures, key: value + unit * high}):
        high *= 2
        if high > 2**24:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if check({**figures, key: value + unit * middle}) else (middle, high)
    steps = high - 1 if inside else high
    return value + unit * steps if steps else None


def _targets(rule_id: str, figures: Figures) -> tuple[CellKey, ...]:
    if rule_id != "LE_PCT":
        return MOVES[rule_id]
    return tuple(key for key in figures if key[0] == "C_28.00" and key[2] in ("c330", "c350"))


def _unit(value: Decimal) -> Decimal:
    """The last place of a figure: that of its digits for a ratio, of its closing zeros by threes for an amount."""
    exponent = value.as_tuple().exponent
    if exponent < 0:
        return Decimal(1).scaleb(exponent)
    return next(Decimal(unit) for unit in (1_000_000, 1000, 1) if value % unit == 0)


def _slipped(rng: random.Random, value: Decimal) -> Decimal:
    """A figure as it gets wrong by hand: stale, mistyped, in the wrong unit."""
    unit = _unit(value)
    how = rng.random()
    if how < 0.12 and unit >= 1000 and abs(value) >= 1_000_000:
        return (value / 1000).quantize(unit)  # thousands taken for units
    if how < 0.35:
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


def _positive_surplus(ratio_row: int, surplus_row: int) -> Callable[[random.Random, Figures], bool]:
    def change(rng: random.Random, figures: Figures) -> bool:
        """A deficit filed as a surplus, or not at all."""
        key = _cell(_RATIO, surplus_row)
        if key not in figures or figures[key] >= 0 or _cell(_RATIO, ratio_row) not in figures:
            return False
        if rng.random() < 0.4:
            del figures[key]
        else:
            figures[key] = -figures[key]
        return True

    return change


def _low_requirement(row: int, floor: str) -> Callable[[random.Random, Figures], bool]:
    def change(rng: random.Random, figures: Figures) -> bool:
        """A total requirement filed without its Pillar 1 part, or a little too low."""
        key = _cell(_RATIO, row)
        if key not in figures:
            return False
        value, total = figures[key], figures.get(_cell(_RATIO, 130))
        own = (value - Decimal(floor)).quantize(value)
        figures[key] = own if rng.random() < 0.5 and own > 0 else Decimal(floor) - Decimal(rng.randint(1, 60)) / 10_000
        if row == 130 and total is not None and _cell(_RATIO, 160) in figures and rng.random() < 0.8:
            figures[_cell(_RATIO, 160)] -= total - Decimal("0.08")  # the overall requirement follows the wrong total
        return True

    return change


def _conservation(rng: random.Random, figures: Figures) -> bool:
    """The conservation buffer at a rate of the past, carried into the combined buffer and the overall requirement."""
    part, total, overall = _cell(_MEMO, 750), _cell(_MEMO, 740), _cell(_RATIO, 160)
    trea = figures.get(_cell("C_02.00.a", 10))
    if trea is None or not {part, total} <= set(figures):
        return False
    rate = rng.choice(("0.00625", "0.0125", "0.01875", "0.02", "0.0245", "0.0255", "0.03"))
    wrong = (trea * Decimal(rate) / _unit(trea)).quantize(Decimal(1)) * _unit(trea)
    difference = wrong - figures[part]
    figures[part] += difference
    figures[total] += difference
    if overall in figures:
        figures[overall] = (figures[overall] + difference / trea).quantize(figures[overall])
    return True


def _combined(rng: random.Random, figures: Figures) -> bool:
    """The combined buffer with a part too many or too few, carried into the overall requirement."""
    total, overall = _cell(_MEMO, 740), _cell(_RATIO, 160)
    trea = figures.get(_cell("C_02.00.a", 10))
    parts = [key for key in (_cell(_MEMO, row) for row in (770, 780, 800, 810)) if key in figures]
    if trea is None or total not in figures or not parts:
        return False
    before = figures[total]
    both = all(_cell(_MEMO, row) in figures for row in (800, 810))
    if both and rng.random() < 0.5:
        figures[total] += min(figures[_cell(_MEMO, 800)], figures[_cell(_MEMO, 810)])  # both systemic buffers added up
    elif rng.random() < 0.5:
        figures[total] -= figures[rng.choice(parts)]
    else:
        figures[total] = _slipped(rng, figures[total])
    if overall in figures:
        figures[overall] = (figures[overall] + (figures[total] - before) / trea).quantize(figures[overall])
    return True


def _inflow_cap(rng: random.Random, figures: Figures) -> bool:
    """Inflows taken in full where the cap of 75% of outflows binds; the net outflow stays the difference."""
    net, outflows, inflows, reduction = (_cell(_LCR, row) for row in (20, 300, 330, 360))
    if not {net, outflows, reduction} <= set(figures):
        return False
    unit = _unit(figures[net])
    taken = Decimal(rng.randint(7510, 7600) if rng.random() < 0.4 else rng.randint(7610, 9300)) / 10_000
    figures[outflows] = (figures[net] / (1 - taken) / unit).quantize(Decimal(1)) * unit
    figures[reduction] = figures[inflows] = figures[outflows] - figures[net]
    return True


SPECIAL: dict[str, Callable[[random.Random, Figures], bool]] = {
    "CET1_SIGN": _positive_surplus(10, 20),
    "T1_SIGN": _positive_surplus(30, 40),
    "TC_SIGN": _positive_surplus(50, 60),
    "TSCR_FLOOR": _low_requirement(130, "0.08"),
    "TSCR_CET1_FLOOR": _low_requirement(140, "0.045"),
    "TSCR_T1_FLOOR": _low_requirement(150, "0.06"),
    "CCB": _conservation,
    "CBR": _combined,
    "LCR_INFLOWCAP": _inflow_cap,
}
FILING_RULES = (*MOVES, "LE_PCT", *SPECIAL)
# How often each is tried: more often where few banks file the template, less where it brings other violations along.
WEIGHTS = dict.fromkeys(FILING_RULES, 10) | {"AT1_EXCESS": 60, "LE_PCT": 22, "FX_12_5": 22, "FX_XTAB": 22, "FIN_BS": 18}
WEIGHTS |= {"FIN_PL": 18, "CET1_SURPLUS": 6, "T1_SURPLUS": 6, "CET1_SIGN": 5, "T1_SIGN": 5, "TC_SIGN": 8, "OCR_CALC": 8}


def draw_errors(rng: random.Random, count: int) -> list[str]:
    """`count` different filing rules, by their weights."""
    left = dict(WEIGHTS)
    drawn: list[str] = []
    for _ in range(count):
        drawn += rng.choices(list(left), list(left.values()))
        del left[drawn[-1]]
    return drawn
