"""Large exposures, foreign exchange, output floor and balance sheet of a bank, in addition to `economics.py`."""

import random
from dataclasses import dataclass
from decimal import Decimal

from xbrl.corpus.banks import COUNTRIES, Bank, lei
from xbrl.corpus.economics import STEP, Economics, whole
from xbrl.corpus.rounding import share
from xbrl.rules.rules import legal_parameters

EXPOSURE_LIMIT = Decimal("0.25")  # limit of a large exposure as a fraction of Tier 1 capital, CRR Art. 395(1)
G_SII_LIMIT = Decimal("0.15")  # of an exposure of a G-SII to another one, CRR Art. 395(1), fourth subparagraph
INSTITUTION_LIMIT = Decimal(150_000_000)  # alternative limit for exposures to institutions in euro, CRR Art. 395(1)


@dataclass(frozen=True)
class Exposure:
    """The exposure to one counterparty, in units of the bank's currency."""

    code: str  # identifier of the counterparty in the format of an LEI
    institution: bool
    before: Decimal  # before credit risk mitigation
    after: Decimal  # after credit risk mitigation


@dataclass(frozen=True)
class Positions:
    """Amounts in units of the bank's currency."""

    exposures: tuple[Exposure, ...]
    institution_limit: Decimal  # fraction of Tier 1; 0.25, or more if EUR 150 million is more
    unfloored: Decimal  # total risk exposure amount before the output floor
    standardised: Decimal  # total risk exposure amount under the standardised approaches (S-TREA); 0 without IRB
    floor: Decimal  # the output floor of the year, as a fraction
    fx_requirement: Decimal  # own funds requirement for foreign exchange risk, possibly 0
    assets: Decimal
    equity: Decimal
    profit: Decimal


def draw_positions(
    rng: random.Random,
    bank_rng: random.Random,
    bank: Bank,
    economics: Economics,
    levels: dict[str, str],
    near_limit: float,
    year: int,
) -> Positions | None:
    """Draw the positions behind one report. Returns None if this bank cannot have these `levels`.

    The key "exposure" in `levels` puts one exposure over its limit; "floor" makes the bank miss the output floor.
    `near_limit` is the probability of a value close to a limit. `bank_rng` yields the same values in every quarter of
    the bank.
    """
    if "floor" in levels and not bank.uses_irb:
        return None
    tier1 = economics.cet1 + economics.at1
    rate = next(rate for _, currency, rate in COUNTRIES if currency == bank.currency)
    institution_limit = max(EXPOSURE_LIMIT, min(Decimal(1), INSTITUTION_LIMIT * rate / tier1))
    exposures = _draw_exposures(rng, bank_rng, tier1, institution_limit, "exposure" in levels, near_limit)
    law = legal_parameters(year)
    unfloored, standardised = economics.trea, Decimal(0)
    if bank.uses_irb:
        missed = "floor" in levels
        unfloored, standardised = _draw_floor(rng, bank_rng, economics.trea, law["output_floor"], missed, near_limit)
    own_funds = tier1 + economics.t2
    fx = Decimal(0)
    if bank_rng.random() < (0.8 if bank.model in ("investment bank", "universal bank") else 0.45):
        # The net foreign exchange position as a fraction of own funds. Some are close to the threshold of 2%.
        offset = Decimal(rng.randint(-15, 15)) / 100_000
        net_position = Decimal("0.02") + offset if rng.random() < near_limit else share(bank_rng, 12, 90)
        fx = Decimal("0.08") * own_funds * net_position
    equity = economics.cet1 * share(bank_rng, 1020, 1250)
    assets = economics.exposure * share(bank_rng, 860, 970)
    return Positions(
        exposures=exposures,
        institution_limit=institution_limit,
        unfloored=whole(unfloored),
        standardised=whole(standardised),
        floor=law["output_floor"],
        fx_requirement=whole(fx),
        assets=whole(assets),
        equity=whole(equity),
        profit=whole(equity * share(rng, -25, 45)),
    )


def _draw_exposures(
    rng: random.Random,
    bank_rng: random.Random,
    tier1: Decimal,
    institution_limit: Decimal,
    over: bool,
    near_limit: float,
) -> tuple[Exposure, ...]:
    """Draw the exposures. `before` and `after` are fractions of Tier 1 until the last step converts them to amounts."""
    count = bank_rng.randint(2, 5)
    counterparties = [
        ("SYNC00" + "".join(bank_rng.choices("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=12)), bank_rng.random() < 0.35)
        for _ in range(count)
    ]
    over_limit = rng.randrange(count) if over else -1
    exposures = []
    for place, (stem, institution) in enumerate(counterparties):
        limit = institution_limit if institution else EXPOSURE_LIMIT
        if place == over_limit:
            steps = rng.randint(1, 10) if rng.random() < near_limit else rng.randint(11, int(limit / STEP))
            after = limit + STEP * steps
        elif rng.random() < near_limit / 2:
            after = limit - STEP * rng.randint(0, 9)
        else:
            after = STEP * rng.randint(400, int(limit / STEP) - 10)
        covered = share(bank_rng, 50, 600) if bank_rng.random() < 0.4 else Decimal(0)
        before = after / (1 - covered)
        if rng.random() < near_limit / 2 and place != over_limit:  # near the 10% threshold of a large exposure
            before = Decimal("0.1") + STEP * rng.randint(-9, 9)
            after = min(after, before)
        jitter = STEP * rng.randint(15, 40) / 100  # real amounts do not give round fractions; disappears in rounding
        exposures.append(Exposure(lei(stem), institution, tier1 * (before - jitter), tier1 * (after - jitter)))
    return tuple(exposures)


def _draw_floor(
    rng: random.Random, bank_rng: random.Random, trea: Decimal, floor: Decimal, missed: bool, near_limit: float
) -> tuple[Decimal, Decimal]:
    """Draw (total risk exposure before the output floor, standardised total).

    The floor is binding for some banks, and close to or far from binding for the others. If `missed`, the bank reports
    less than the floor requires.
    """
    if missed:
        short = Decimal(rng.randint(1, 20)) / 10_000 if rng.random() < near_limit else share(rng, 5, 200)
        return trea, trea * (1 + short) / floor
    if bank_rng.random() < 0.35:
        return trea * (1 - share(rng, 5, 150)), trea / floor
    far = Decimal(rng.randint(1, 20)) / 10_000 if rng.random() < near_limit / 2 else share(rng, 5, 220)
    return trea, trea * (1 - far) / floor
