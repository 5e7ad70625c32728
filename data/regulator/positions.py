"""What a bank holds besides the amounts of `economics.py`: large exposures, foreign exchange, the standardised total, its balance sheet."""

import random
from dataclasses import dataclass
from decimal import Decimal

from data.regulator.banks import COUNTRIES, Bank, lei
from data.regulator.economics import STEP, Economics, whole
from data.regulator.rules import legal_parameters

LARGE = Decimal("0.25")  # CRR Art. 395(1), of Tier 1
INSTITUTION_LIMIT = Decimal(150_000_000)  # euro, CRR Art. 395(1)


@dataclass(frozen=True)
class Exposure:
    """One counterparty. Amounts before and after credit risk mitigation; the shares of Tier 1 are those that will be reported."""

    code: str
    institution: bool
    before: Decimal
    after: Decimal


@dataclass(frozen=True)
class Positions:
    """Amounts in units of the bank's currency."""

    exposures: tuple[Exposure, ...]
    institution_limit: Decimal  # share of Tier 1; 0.25 where EUR 150 million are not more
    unfloored: Decimal  # total risk exposure amount before the output floor
    standardised: (
        Decimal  # total risk exposure amount by the standardised approaches (S-TREA); 0 without internal models
    )
    floor: Decimal  # the output floor of the year, as a share
    fx_requirement: Decimal  # own funds requirement for foreign exchange risk; 0 for none
    assets: Decimal
    equity: Decimal
    profit: Decimal


def draw_positions(
    rng: random.Random,
    habit: random.Random,
    bank: Bank,
    economics: Economics,
    levels: dict[str, str],
    near: float,
    year: int,
) -> Positions | None:
    """The positions behind one report; None if this bank cannot have these `levels`.

    `habit` is chance that all quarters of the bank share. Levels: "exposure" over the limit, "floor" missed.
    """
    if "floor" in levels and not bank.uses_irb:
        return None
    tier1 = economics.cet1 + economics.at1
    rate = next(rate for _, currency, rate in COUNTRIES if currency == bank.currency)
    institution_limit = max(LARGE, min(Decimal(1), INSTITUTION_LIMIT * rate / tier1))
    exposures = _exposures(rng, habit, tier1, institution_limit, "exposure" in levels, near)
    law = legal_parameters(year)
    unfloored, standardised = economics.trea, Decimal(0)
    if bank.uses_irb:
        unfloored, standardised = _floored(rng, habit, economics.trea, law["output_floor"], "floor" in levels, near)
    own_funds = tier1 + economics.t2
    fx = Decimal(0)
    if habit.random() < (0.8 if bank.model in ("investment bank", "universal bank") else 0.45):
        close = Decimal(rng.randint(-15, 15)) / 100_000  # of own funds, around 2%
        fx = Decimal("0.08") * own_funds * (Decimal("0.02") + close if rng.random() < near else _share(habit, 12, 90))
    equity = economics.cet1 * _share(habit, 1020, 1250)
    assets = economics.exposure * _share(habit, 860, 970)
    return Positions(
        exposures=exposures,
        institution_limit=institution_limit,
        unfloored=whole(unfloored),
        standardised=whole(standardised),
        floor=law["output_floor"],
        fx_requirement=whole(fx),
        assets=whole(assets),
        equity=whole(equity),
        profit=whole(equity * _share(rng, -25, 45)),
    )


def _exposures(
    rng: random.Random, habit: random.Random, tier1: Decimal, institution_limit: Decimal, over: bool, near: float
) -> tuple[Exposure, ...]:
    count = habit.randint(2, 5)
    known = [
        ("SYNC00" + "".join(habit.choices("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=12)), habit.random() < 0.35)
        for _ in range(count)
    ]
    culprit = rng.randrange(count) if over else -1
    exposures = []
    for place, (stem, institution) in enumerate(known):
        limit = institution_limit if institution else LARGE
        if place == culprit:
            share = limit + STEP * (rng.randint(1, 10) if rng.random() < near else rng.randint(11, int(limit / STEP)))
        elif rng.random() < near / 2:
            share = limit - STEP * rng.randint(0, 9)
        else:
            share = STEP * rng.randint(400, int(limit / STEP) - 10)
        covered = _share(habit, 50, 600) if habit.random() < 0.4 else Decimal(0)
        before = share / (1 - covered)
        if rng.random() < near / 2 and place != culprit:  # near the tenth that makes an exposure large
            before = Decimal("0.1") + STEP * rng.randint(-9, 9)
            share = min(share, before)
        rest = STEP * rng.randint(15, 40) / 100  # real amounts do not give round shares; rounding cuts it off
        exposures.append(Exposure(lei(stem), institution, tier1 * (before - rest), tier1 * (share - rest)))
    return tuple(exposures)


def _floored(
    rng: random.Random, habit: random.Random, trea: Decimal, floor: Decimal, missed: bool, near: float
) -> tuple[Decimal, Decimal]:
    """(total before the floor, standardised total): the floor binds for some banks, others are near it or far above it."""
    if missed:
        short = Decimal(rng.randint(1, 20)) / 10_000 if rng.random() < near else _share(rng, 5, 200)
        return trea, trea * (1 + short) / floor
    if habit.random() < 0.35:
        return trea * (1 - _share(rng, 5, 150)), trea / floor
    far = Decimal(rng.randint(1, 20)) / 10_000 if rng.random() < near / 2 else _share(rng, 5, 220)
    return trea, trea * (1 - far) / floor


def _share(rng: random.Random, low: int, high: int) -> Decimal:
    """A share between `low` and `high` per thousand."""
    return Decimal(rng.randint(low * 10, high * 10)) / 10_000
