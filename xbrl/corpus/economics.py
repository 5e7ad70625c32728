"""Capital, liquidity and funding amounts of an invented bank at one reference date.

The amounts come first, and every reported ratio is computed from them. A breach is created by giving the bank too
little capital or too small a buffer, never by editing a ratio.

Each ratio ("cet1", "t1", "total", "leverage", "lcr", "nsfr") has one or more limits: the legal minimum, the bank's own
requirement, the overall requirement (with the buffers). The *level* of a ratio is the name of the lowest limit that it
misses ("minimum", "own", "overall"), or "ok". A bank meets the combined buffer only if CET1, Tier 1 and total capital
are all "ok" (CRD Art. 141a). Ratios close to a limit are over-represented, on both sides of it.
"""

import random
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal

from xbrl.corpus.banks import Bank, Requirements, requirements

STEP = Decimal("0.0001")  # one basis point: ratios are reported to four decimal places

# (weight, level of each affected ratio). Ratios that are not listed are "ok". CET1 is part of Tier 1 and Tier 1 of total
# capital, so that a breach of one ratio mostly takes the buffer away from the others too.
WeightedBreaches = tuple[tuple[int, dict[str, str]], ...]
BREACHES: WeightedBreaches = (
    (9, {"cet1": "overall"}),
    (9, {"t1": "overall"}),
    (7, {"total": "overall"}),
    (4, {"cet1": "overall", "t1": "overall"}),
    (6, {"cet1": "overall", "t1": "overall", "total": "overall"}),
    (9, {"cet1": "own"}),
    (8, {"cet1": "overall", "t1": "own"}),
    (9, {"cet1": "overall", "t1": "overall", "total": "own"}),
    (2, {"cet1": "own", "t1": "own", "total": "own"}),
    (9, {"cet1": "minimum"}),
    (12, {"cet1": "overall", "t1": "minimum"}),
    (14, {"cet1": "overall", "t1": "overall", "total": "minimum"}),
    (2, {"cet1": "own", "t1": "own", "total": "minimum"}),
    (2, {"cet1": "minimum", "t1": "minimum", "total": "minimum"}),
    (13, {"leverage": "minimum"}),
    (9, {"leverage": "own"}),
    (60, {"leverage": "overall"}),  # only a G-SII has a leverage ratio buffer
    (26, {"lcr": "minimum"}),
    (26, {"nsfr": "minimum"}),
    # Large exposures and the output floor. positions.py implements these two; they do not affect the amounts here.
    (24, {"exposure": "over"}),
    (50, {"floor": "missed"}),
)
CAPITAL = {"cet1", "t1", "total"}
# The largest distance of a sound ratio above its highest limit.
MAX_HEADROOM = {
    "cet1": Decimal("0.08"),
    "t1": Decimal("0.08"),
    "total": Decimal("0.09"),
    "leverage": Decimal("0.05"),
    "lcr": Decimal("1.2"),
    "nsfr": Decimal("0.5"),
}


@dataclass(frozen=True)
class Economics:
    """Amounts in whole units of the bank's currency."""

    trea: Decimal
    cet1: Decimal
    at1: Decimal
    t2: Decimal
    exposure: Decimal  # leverage exposure measure
    liquid_assets: Decimal  # liquidity buffer
    net_outflow: Decimal
    available_funding: Decimal
    required_funding: Decimal


@dataclass(frozen=True)
class RatioDistribution:
    """How ratios are distributed within their levels."""

    near_limit: float = 0.45  # probability that a ratio is within 10 steps of a limit
    headroom: Decimal = Decimal(1)  # factor on MAX_HEADROOM


def draw_levels(rng: random.Random, count: int) -> dict[str, str]:
    """Levels of a bank with up to `count` of `BREACHES`; 0 is a sound bank.

    No two breaches affect the same ratio. The three capital ratios count as one for this purpose.
    """
    levels: dict[str, str] = {}
    taken: set[str] = set()
    for _ in range(count):
        possible = [(weight, breach) for weight, breach in BREACHES if not set(breach) & taken]
        if possible:
            breach = rng.choices([breach for _, breach in possible], [weight for weight, _ in possible])[0]
            levels |= breach
            taken |= CAPITAL if set(breach) & CAPITAL else set(breach)
    return levels


def draw_economics(
    rng: random.Random,
    bank: Bank,
    trea: Decimal,
    levels: dict[str, str],
    distribution: RatioDistribution = RatioDistribution(),  # noqa: B008 (frozen)
    previous: Economics | None = None,
    has_at1: bool = True,
) -> Economics | None:
    """Draw amounts of a bank whose ratios are at `levels`.

    With `previous`, the amounts of the quarter before, most ratios move only a little, as far as their level allows.
    Without AT1 the Tier 1 ratio equals the CET1 ratio.

    Returns None if the levels are contradictory, for example a Tier 1 ratio below 6% with a CET1 ratio above that.
    """
    ratios = _draw_ratios(rng, requirements(bank), levels, distribution, previous, has_at1)
    if ratios is None:
        return None
    # Real amounts do not give round ratios, so add a fraction that disappears when the ratio is rounded for the report.
    # It is never negative: amounts must not show a breach where the rounded ratio just meets its limit.
    jitter = Decimal(rng.randint(15, 40)) / 1_000_000
    tier1 = whole(trea * (ratios["t1"] + jitter))
    own_funds = whole(trea * (ratios["total"] + jitter))
    cet1 = whole(trea * (ratios["cet1"] + jitter))
    exposure = whole(tier1 / (ratios["leverage"] + Decimal(rng.randint(15, 40)) / 1_000_000))
    net_outflow = whole(exposure * _uniform(rng, "0.06", "0.20"))
    required_funding = whole(exposure * _uniform(rng, "0.45", "0.80"))
    return Economics(
        trea=trea,
        cet1=cet1,
        at1=tier1 - cet1,
        t2=own_funds - tier1,
        exposure=exposure,
        liquid_assets=whole(net_outflow * (ratios["lcr"] + jitter)),
        net_outflow=net_outflow,
        available_funding=whole(required_funding * (ratios["nsfr"] + jitter)),
        required_funding=required_funding,
    )


def ratios_of(economics: Economics) -> dict[str, Decimal]:
    """The six ratios that follow from the amounts."""
    tier1 = economics.cet1 + economics.at1
    return {
        "cet1": economics.cet1 / economics.trea,
        "t1": tier1 / economics.trea,
        "total": (tier1 + economics.t2) / economics.trea,
        "leverage": tier1 / economics.exposure,
        "lcr": economics.liquid_assets / economics.net_outflow,
        "nsfr": economics.available_funding / economics.required_funding,
    }


def ratio_limits(required: Requirements, ratio: str) -> tuple[tuple[str, Decimal], ...]:
    """The limits of a ratio in ascending order, as (name of the level just below the limit, limit)."""
    return {
        "cet1": (("minimum", Decimal("0.045")), ("own", required.tscr_cet1), ("overall", required.ocr_cet1)),
        "t1": (("minimum", Decimal("0.06")), ("own", required.tscr_t1), ("overall", required.ocr_t1)),
        "total": (("minimum", Decimal("0.08")), ("own", required.tscr), ("overall", required.ocr)),
        "leverage": (("minimum", Decimal("0.03")), ("own", required.tslrr), ("overall", required.olrr)),
        "lcr": (("minimum", Decimal(1)),),
        "nsfr": (("minimum", Decimal(1)),),
    }[ratio]


def level_bounds(limits: tuple[tuple[str, Decimal], ...], level: str, headroom: Decimal) -> tuple[Decimal, Decimal]:
    """The interval [low, high) of a level, between two neighbouring limits.

    The lowest level extends down to 40% of the lowest limit, "ok" up to `headroom` above the highest.
    """
    levels = [name for name, _ in limits] + ["ok"]
    values = [value for _, value in limits]
    index = levels.index(level)
    low = values[index - 1] if index else values[0] * Decimal("0.4")
    return low, values[index] if index < len(values) else values[-1] + headroom


def _draw_ratios(
    rng: random.Random,
    required: Requirements,
    levels: dict[str, str],
    distribution: RatioDistribution,
    previous: Economics | None,
    has_at1: bool,
) -> dict[str, Decimal] | None:
    """Draw the six ratios, on their grids; None if the levels are contradictory."""
    bounds = {
        ratio: level_bounds(ratio_limits(required, ratio), levels.get(ratio, "ok"), distribution.headroom * headroom)
        for ratio, headroom in MAX_HEADROOM.items()
    }
    last = ratios_of(previous) if previous else {}
    ratios: dict[str, Decimal] = {}
    for ratio in ("total", "t1", "cet1", "leverage", "lcr", "nsfr"):
        low, high = bounds[ratio]
        for part in {"total": ("cet1", "t1"), "t1": ("cet1",)}.get(ratio, ()):  # a sum is at least each of its parts
            low = max(low, bounds[part][0])
        ceiling = {"t1": ratios.get("total"), "cet1": ratios.get("t1")}.get(ratio)
        level = levels.get(ratio, "ok")
        drawn = _draw_ratio(rng, (low, high), level, distribution.near_limit, ceiling, last.get(ratio))
        if ratio == "cet1" and not has_at1:
            drawn = ratios["t1"] if low <= ratios["t1"] and (level == "ok" or ratios["t1"] < high) else None
        if drawn is None:
            return None
        ratios[ratio] = drawn
    return ratios


def _draw_ratio(
    rng: random.Random,
    bounds: tuple[Decimal, Decimal],
    level: str,
    near_limit: float,
    ceiling: Decimal | None,
    previous: Decimal | None,
) -> Decimal | None:
    """Draw a multiple of `STEP` in [low, high) that is at most `ceiling`; None if there is none.

    With probability `near_limit` it is within 10 steps of a limit. A sound ratio with a ceiling (CET1 below Tier 1,
    Tier 1 below the total) is usually close to the ceiling.
    """
    low, high = bounds
    first, last = _ceil(low / STEP), _ceil(high / STEP) - 1
    if ceiling is not None:
        last = min(last, int(ceiling / STEP))
    if first > last:
        return None
    if previous is not None and rng.random() < (0.7 if first <= previous / STEP <= last else 0.5):
        width = max(3, (last - first) // 40)
        middle = min(max(int(previous / STEP), first), last)  # a ratio that changes its level stays near the limit
        return STEP * rng.randint(max(first, middle - width), min(last, middle + width))
    if ceiling is not None and level == "ok" and rng.random() >= near_limit / 2:
        return STEP * rng.randint(max(first, last - 300), last)
    between_limits = level not in ("minimum", "ok")  # there are two limits to be close to
    if rng.random() < (1.5 * near_limit if between_limits else near_limit):
        at_top = level == "minimum" or (between_limits and rng.random() < 0.5)
        return STEP * (rng.randint(max(first, last - 9), last) if at_top else rng.randint(first, min(last, first + 9)))
    return STEP * rng.randint(first, last)


def _ceil(value: Decimal) -> int:
    return int(value.to_integral_value(rounding="ROUND_CEILING"))


def whole(value: Decimal) -> Decimal:
    """Round to whole units of currency."""
    return value.quantize(Decimal(1), rounding=ROUND_HALF_EVEN)


def _uniform(rng: random.Random, low: str, high: str) -> Decimal:
    """A uniform draw from [low, high], on a grid of 10,001 values."""
    return Decimal(low) + (Decimal(high) - Decimal(low)) * rng.randint(0, 10_000) / 10_000
