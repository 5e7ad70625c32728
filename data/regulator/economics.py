"""The economics of an invented bank at one reference date: amounts first, from which every reported ratio then follows.

A violation is planted here, by having less capital or a smaller buffer, never by editing a ratio. Each front has
**levels** bounded by the limits of the law and the bank's own requirements; a level says between which two limits a
ratio lies, and values are drawn near the limits on both sides more often than chance would.
"""

import random
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal

from data.regulator.banks import Bank, Requirements, requirements

STEP = Decimal("0.0001")  # one basis point: ratios are reported to four decimal places

# What can be wrong, as levels, with its weight: cet1, t1, total, leverage, lcr, nsfr. "ok" where nothing is said.
Troubles = tuple[tuple[int, dict[str, str]], ...]
TROUBLES: Troubles = (
    (11, {"cet1": "minimum"}),
    (5, {"cet1": "own"}),
    (16, {"t1": "minimum"}),
    (6, {"t1": "own"}),
    (24, {"total": "minimum"}),
    (11, {"total": "own"}),
    (2, {"total": "overall"}),
    (2, {"cet1": "own", "t1": "own"}),
    (2, {"cet1": "minimum", "t1": "minimum"}),
    (2, {"t1": "own", "total": "overall"}),
    (2, {"cet1": "own", "total": "overall"}),
    (13, {"leverage": "minimum"}),
    (5, {"leverage": "own"}),
    (13, {"lcr": "minimum"}),
    (13, {"nsfr": "minimum"}),
)
# With large exposures and the output floor, see positions.py: these levels say nothing about the amounts here.
ALL_TROUBLES: Troubles = (
    *((weight * 2 if "lcr" in trouble or "nsfr" in trouble else weight, trouble) for weight, trouble in TROUBLES),
    (24, {"exposure": "over"}),
    (50, {"floor": "missed"}),
)
CAPITAL = {"cet1", "t1", "total"}
# How far above its last limit a sound ratio lies at most.
COMFORT = {
    "cet1": Decimal("0.08"),
    "t1": Decimal("0.08"),
    "total": Decimal("0.09"),
    "leverage": Decimal("0.05"),
    "lcr": Decimal("1.2"),
    "nsfr": Decimal("0.5"),
}


@dataclass(frozen=True)
class Economics:
    """Amounts in units of the bank's currency, whole numbers."""

    trea: Decimal
    cet1: Decimal
    at1: Decimal
    t2: Decimal
    exposure: Decimal  # leverage exposure measure
    liquid_assets: Decimal  # liquidity buffer
    net_outflow: Decimal
    available_funding: Decimal
    required_funding: Decimal


def draw_levels(rng: random.Random, how_many: int, troubles: Troubles | None = None) -> dict[str, str]:
    """Levels with `how_many` of `troubles` (default `TROUBLES`) on different fronts; 0 is a sound bank. Capital is one front."""
    levels: dict[str, str] = {}
    taken: set[str] = set()
    for _ in range(how_many):
        possible = [(weight, trouble) for weight, trouble in troubles or TROUBLES if not set(trouble) & taken]
        if possible:
            trouble = rng.choices([trouble for _, trouble in possible], [weight for weight, _ in possible])[0]
            levels |= trouble
            taken |= CAPITAL if set(trouble) & CAPITAL else set(trouble)
    return levels


def draw_economics(
    rng: random.Random,
    bank: Bank,
    trea: Decimal,
    levels: dict[str, str],
    near: float = 0.45,
    ratio_step: Decimal = STEP,
    before: Economics | None = None,
    has_at1: bool = True,
    comfort: Decimal = Decimal(1),
) -> Economics | None:
    """Amounts of a bank whose ratios lie on `levels`; None where the levels exclude each other (say T1 below 6% over a CET1 above it).

    `near` is the share of ratios within 10 steps of a limit. `ratio_step` is the step of LCR and NSFR. `before` are the
    amounts of the quarter before: most ratios then move little, as far as their level lets them. Without AT1 the Tier 1
    ratio is the CET1 ratio. `comfort` scales `COMFORT`.
    """
    need = requirements(bank)
    ratios: dict[str, Decimal] = {}
    bounds = {
        front: level_bounds(limits(need, front), levels.get(front, "ok"), comfort * most)
        for front, most in COMFORT.items()
    }
    for front in ("total", "t1", "cet1", "leverage", "lcr", "nsfr"):
        low, high = bounds[front]
        for part in {"total": ("cet1", "t1"), "t1": ("cet1",)}.get(front, ()):  # a whole is not smaller than its parts
            low = max(low, bounds[part][0])
        above = {"t1": ratios.get("total"), "cet1": ratios.get("t1")}.get(front)
        step = ratio_step if front in ("lcr", "nsfr") else STEP
        last = ratios_of(before)[front] if before else None
        ratio = _draw(rng, low, high, levels.get(front, "ok"), near, step, above, last)
        if front == "cet1" and not has_at1:
            ratio = ratios["t1"] if low <= ratios["t1"] else None
        if ratio is None:
            return None
        ratios[front] = ratio

    # Real amounts do not give round ratios. The rest is cut off by the rounding of the reported ratio, and it is never
    # negative: amounts must not show a breach where the rounded ratio just meets its limit.
    jitter = Decimal(rng.randint(15, 40)) / 1_000_000
    tier1 = whole(trea * (ratios["t1"] + jitter))
    own_funds = whole(trea * (ratios["total"] + jitter))
    common = whole(trea * (ratios["cet1"] + jitter))
    exposure = whole(tier1 / (ratios["leverage"] + Decimal(rng.randint(15, 40)) / 1_000_000))
    net_outflow = whole(exposure * _uniform(rng, "0.06", "0.20"))
    required = whole(exposure * _uniform(rng, "0.45", "0.80"))
    return Economics(
        trea=trea,
        cet1=common,
        at1=tier1 - common,
        t2=own_funds - tier1,
        exposure=exposure,
        liquid_assets=whole(net_outflow * (ratios["lcr"] + jitter)),
        net_outflow=net_outflow,
        available_funding=whole(required * (ratios["nsfr"] + jitter)),
        required_funding=required,
    )


def ratios_of(economics: Economics) -> dict[str, Decimal]:
    """The ratio of each front."""
    tier1 = economics.cet1 + economics.at1
    return {
        "cet1": economics.cet1 / economics.trea,
        "t1": tier1 / economics.trea,
        "total": (tier1 + economics.t2) / economics.trea,
        "leverage": tier1 / economics.exposure,
        "lcr": economics.liquid_assets / economics.net_outflow,
        "nsfr": economics.available_funding / economics.required_funding,
    }


def limits(need: Requirements, front: str) -> tuple[tuple[str, Decimal], ...]:
    """The limits of one front, lowest first, with the level that lies just below each; above the last one is "ok"."""
    return {
        "cet1": (("minimum", Decimal("0.045")), ("own", need.tscr_cet1)),
        "t1": (("minimum", Decimal("0.06")), ("own", need.tscr_t1)),
        "total": (("minimum", Decimal("0.08")), ("own", need.tscr), ("overall", need.ocr)),
        "leverage": (("minimum", Decimal("0.03")), ("own", need.olrr)),
        "lcr": (("minimum", Decimal(1)),),
        "nsfr": (("minimum", Decimal(1)),),
    }[front]


def level_bounds(steps: tuple[tuple[str, Decimal], ...], level: str, comfort: Decimal) -> tuple[Decimal, Decimal]:
    """The ratios [low, high) of a level: from the limit under it to the limit over it. Below the lowest limit down to 40% of it."""
    names = [name for name, _ in steps] + ["ok"]
    limit = [value for _, value in steps]
    place = names.index(level)
    low = limit[place - 1] if place else limit[0] * Decimal("0.4")
    return low, limit[place] if place < len(limit) else limit[-1] + comfort


def _draw(
    rng: random.Random,
    low: Decimal,
    high: Decimal,
    level: str,
    near: float,
    step: Decimal,
    above: Decimal | None,
    before: Decimal | None = None,
) -> Decimal | None:
    """A ratio on the grid of `step` in [low, high), not over `above`; None if there is none.

    With probability `near` it lies within 10 steps of a limit. The parts of a sound total usually lie close under it.
    """
    first, last = _ceil(low / step), _ceil(high / step) - 1
    if above is not None:
        last = min(last, int(above / step))
    if first > last:
        return None
    if before is not None and rng.random() < (0.7 if first <= before / step <= last else 0.5):
        width = max(3, (last - first) // 40)
        middle = min(max(int(before / step), first), last)  # what has left its level has not gone far
        return step * rng.randint(max(first, middle - width), min(last, middle + width))
    if above is not None and level == "ok" and rng.random() >= near / 2:
        return step * rng.randint(max(first, last - 300), last)
    between = level not in ("minimum", "ok")  # two limits to be near to
    if rng.random() < (1.5 * near if between else near):
        at_top = level == "minimum" or (between and rng.random() < 0.5)
        return step * (rng.randint(max(first, last - 9), last) if at_top else rng.randint(first, min(last, first + 9)))
    return step * rng.randint(first, last)


def _ceil(value: Decimal) -> int:
    return int(value.to_integral_value(rounding="ROUND_CEILING"))


def whole(value: Decimal) -> Decimal:
    """Rounded to whole units of currency."""
    return value.quantize(Decimal(1), rounding=ROUND_HALF_EVEN)


def _uniform(rng: random.Random, low: str, high: str) -> Decimal:
    return Decimal(low) + (Decimal(high) - Decimal(low)) * rng.randint(0, 10_000) / 10_000
