"""The figures that a bank reports: its economics and positions as values of cells of DPM release 4.2.

Amounts are rounded to the bank's reporting accuracy. Each ratio is computed from the unrounded amounts. Parts add up to
their totals except for rounding. Zero items are not reported. In a table with open rows, the row is its key.
"""

import random
from decimal import Decimal

from xbrl.corpus.banks import Bank, requirements
from xbrl.corpus.economics import Economics
from xbrl.corpus.positions import Positions
from xbrl.corpus.reporting_capital import Amounts, capital_amounts, capital_ratios
from xbrl.corpus.reporting_positions import balance_amounts, exposure_figures
from xbrl.corpus.rounding import ratio, rounded, share
from xbrl.read.report import CellKey

Figures = dict[CellKey, Decimal | str]  # a str is a member of an enumeration


def full_figures(
    bank_rng: random.Random, rng: random.Random, bank: Bank, economics: Economics, positions: Positions
) -> Figures:
    """All figures of one bank at one date: about 180 in the 18 tables that the rules read.

    `bank_rng`, which yields the same values in every quarter of a bank, splits totals into parts. `rng` varies them
    slightly.
    """
    amounts = capital_amounts(bank_rng, bank, economics, positions)
    amounts |= _leverage_exposure(bank_rng, bank, economics) | _liquidity(bank_rng, economics)
    amounts |= _stable_funding(bank_rng, economics) | balance_amounts(bank_rng, rng, economics, positions)
    figures: Figures = {key: rounded(amount, bank.decimals) for key, amount in amounts.items()}
    figures |= capital_ratios(bank_rng, bank, economics, positions) | _leverage_ratios(bank_rng, bank, economics)
    figures |= exposure_figures(bank_rng, bank, economics, positions)
    places = bank.ratio_decimals
    figures["C_76.00.a", "r0030", "c0010"] = ratio(economics.liquid_assets, economics.net_outflow, places)
    figures["C_84.00.a", "r0220", "c0040"] = ratio(economics.available_funding, economics.required_funding, places)
    return {key: value for key, value in sorted(figures.items()) if value != 0}


def _leverage_exposure(bank_rng: random.Random, bank: Bank, economics: Economics) -> Amounts:
    """C 47.00: the exposure measure, its parts, and Tier 1 capital."""
    exposure, tier1 = economics.exposure, economics.cet1 + economics.at1
    trading = bank.model in ("investment bank", "universal bank")
    securities, derivatives = (exposure * share(bank_rng, 10, 120 if trading else 30) for _ in range(2))
    low, half, full = (exposure * share(bank_rng, 2, limit) for limit in (20, 50, 30))
    rows = {
        "r0010": securities,
        "r0061": derivatives,
        "r0165": low,
        "r0170": half,
        "r0180": full,
        "r0190": exposure - securities - derivatives - low - half - full,
        "r0300": exposure,
        "r0320": tier1,
        "r0350": bank.leverage_pillar2 * exposure,
        "r0370": bank.buffers["g_sii"] / 2 * exposure,
    }
    return {("C_47.00", row, "c0010"): amount for row, amount in rows.items()}


def _leverage_ratios(bank_rng: random.Random, bank: Bank, economics: Economics) -> Amounts:
    places = bank.ratio_decimals
    tier1 = economics.cet1 + economics.at1
    rows = {
        "r0340": ratio(tier1, economics.exposure, places),
        "r0410": Decimal("0.03"),
        "r0420": requirements(bank).tslrr,
        "r0440": requirements(bank).olrr,
    }
    if bank_rng.random() < 0.4:
        rows["r0330"] = ratio(tier1 * (1 - share(bank_rng, 1, 25)), economics.exposure, places)
    return {("C_47.00", row, "c0010"): value for row, value in rows.items()}


def _liquidity(bank_rng: random.Random, economics: Economics) -> Amounts:
    """C 76.00.a: the liquidity buffer by level, and outflows minus capped inflows."""
    buffer, net = economics.liquid_assets, economics.net_outflow
    covered, level2a, level2b = (buffer * share(bank_rng, 0, limit) for limit in (80, 100, 40))
    level1 = buffer - covered - level2a - level2b
    kind = bank_rng.random()
    reduction = net * (share(bank_rng, 100, 900) if kind < 0.75 else share(bank_rng, 2600, 2990))
    if kind > 0.9:
        reduction = net * 3  # the cap on inflows, 75% of outflows, is binding
    inflows = reduction * share(bank_rng, 1000, 1300) if kind > 0.9 else reduction
    outflows = net + reduction
    out, back, cash_out, cash_back = (level1 * share(bank_rng, 0, limit) for limit in (60, 40, 30, 50))
    if bank_rng.random() < 0.4:  # no secured funding matures within 30 days
        out = back = cash_out = cash_back = Decimal(0)
    rows = {
        "r0010": buffer,
        "r0020": net,
        "r0040": level1 + out - back + cash_out - cash_back,
        "r0050": out,
        "r0060": back,
        "r0070": cash_out,
        "r0080": cash_back,
        "r0091": level1,
        "r0100": covered,
        "r0131": covered,
        "r0160": level2a,
        "r0191": level2a,
        "r0220": level2b,
        "r0251": level2b,
        "r0300": outflows,
        "r0330": inflows,
        "r0360": reduction,
    }
    return {("C_76.00.a", row, "c0010"): amount for row, amount in rows.items()}


def _stable_funding(bank_rng: random.Random, economics: Economics) -> Amounts:
    """C 84.00: required stable funding by type of asset (.a), total required (.c) and total available funding (.d)."""
    required = economics.required_funding
    liquid, securities, other, off_balance = (
        required * share(bank_rng, low, high) for low, high in ((5, 60), (10, 120), (20, 120), (5, 40))
    )
    rows = {
        "r0030": liquid,
        "r0040": securities,
        "r0050": required - liquid - securities - other - off_balance,
        "r0100": other,
        "r0110": off_balance,
    }
    return {("C_84.00.a", row, "c0020"): amount for row, amount in rows.items()} | {
        ("C_84.00.c", "r0010", "c0020"): required,
        ("C_84.00.d", "r0120", "c0030"): economics.available_funding,
    }
