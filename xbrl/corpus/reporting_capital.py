"""The figures of the own funds module.

C 01.00 own funds, C 02.00 risk exposure, C 03.00 ratios, C 04.00 memorandum items, C 22.00 foreign exchange.
"""

import random
from decimal import Decimal

from xbrl.corpus.banks import Bank, requirements
from xbrl.corpus.economics import Economics
from xbrl.corpus.positions import Positions
from xbrl.corpus.rounding import ratio, share
from xbrl.read.report import CellKey

Amounts = dict[CellKey, Decimal]


def capital_amounts(bank_rng: random.Random, bank: Bank, economics: Economics, positions: Positions) -> Amounts:
    """The unrounded amounts of the module."""
    return (
        _own_funds(bank_rng, economics)
        | _risk_exposure(bank_rng, bank, economics, positions)
        | _surpluses(economics)
        | _buffers(bank_rng, bank, economics)
        | _foreign_exchange(bank_rng, positions)
    )


def capital_ratios(bank_rng: random.Random, bank: Bank, economics: Economics, positions: Positions) -> Amounts:
    """C 03.00: the three capital ratios, the bank's own requirements, guidance, and figures that no rule reads.

    The latter are ratios without the output floor and fully loaded ratios.
    """
    need = requirements(bank)
    places = bank.ratio_decimals
    cet1, tier1 = economics.cet1, economics.cet1 + economics.at1
    own_funds = tier1 + economics.t2
    guidance = Decimal(max(0, bank_rng.randint(-4, 4))) * Decimal("0.0025")  # half of the banks have none
    rows = {
        "r0010": ratio(cet1, economics.trea, places),
        "r0030": ratio(tier1, economics.trea, places),
        "r0050": ratio(own_funds, economics.trea, places),
        "r0130": need.tscr,
        "r0140": need.tscr_cet1,
        "r0150": need.tscr_t1,
        "r0160": need.ocr,
        "r0170": need.ocr_cet1,
        "r0180": need.ocr_t1,
    }
    if guidance:
        rows["r0190"] = need.ocr + guidance
    if positions.unfloored != economics.trea:
        rows |= {
            "r0070": ratio(cet1, positions.unfloored, places),
            "r0090": ratio(own_funds, positions.unfloored, places),
        }
    if bank_rng.random() < 0.4:
        loaded = 1 - share(bank_rng, 1, 25)
        rows |= {
            "r0330": ratio(cet1 * loaded, economics.trea, places),
            "r0350": ratio(own_funds * loaded, economics.trea, places),
        }
    figures = {("C_03.00", row, "c0010"): value for row, value in rows.items()}
    if positions.standardised:
        figures["C_04.00", "r0900", "c0010"] = positions.floor
    return figures


def _own_funds(bank_rng: random.Random, economics: Economics) -> Amounts:
    """C 01.00: own funds, its tiers, and their items."""
    cet1, at1, t2 = economics.cet1, economics.at1, economics.t2
    goodwill, intangibles, tax_assets = (-cet1 * share(bank_rng, 0, limit) for limit in (60, 40, 50))
    excess = cet1 * share(bank_rng, 2, 25)  # deductions that exceed AT1 are deducted from CET1
    if bank_rng.random() < 0.4 or at1:
        excess = Decimal(0)
    gross = cet1 - goodwill - intangibles - tax_assets + excess
    retained, income, reserves = (
        gross * share(bank_rng, 300, 550),
        gross * share(bank_rng, -20, 20),
        gross * share(bank_rng, 20, 120),
    )
    adjustments = t2 * share(bank_rng, 0, 150)
    rows = {
        "r0010": cet1 + at1 + t2,
        "r0015": cet1 + at1,
        "r0020": cet1,
        "r0030": gross - retained - income - reserves,
        "r0130": retained,
        "r0180": income,
        "r0200": reserves,
        "r0300": goodwill,
        "r0340": intangibles,
        "r0370": tax_assets,
        "r0440": -excess,
        "r0530": at1,
        "r0540": at1,
        "r0740": excess,
        "r0750": t2,
        "r0760": t2 - adjustments,
        "r0920": adjustments,
    }
    return {("C_01.00", row, "c0010"): amount for row, amount in rows.items()}


def _risk_exposure(bank_rng: random.Random, bank: Bank, economics: Economics, positions: Positions) -> Amounts:
    """C 02.00.a: exposure by risk type, credit risk by approach and exposure class.

    C 02.00.b: under standardised approaches.
    """
    before = positions.unfloored
    trading = bank.model in ("investment bank", "universal bank")
    market = before * share(bank_rng, 20, 180) if trading else before * share(bank_rng, 0, 15)
    fx = positions.fx_requirement * Decimal("12.5")
    market += fx
    cva = before * share(bank_rng, 2, 30) if trading else Decimal(0)
    operational = before * share(bank_rng, 60, 140)
    credit = before - market - cva - operational
    irb = credit * share(bank_rng, 400, 800) if bank.uses_irb else Decimal(0)
    standardised = credit - irb
    corporate, retail, institutions = (
        standardised * share(bank_rng, low, high) for low, high in ((100, 350), (100, 300), (20, 100))
    )
    rows = {
        "r0010": economics.trea,
        "r0035": economics.trea - before,
        "r0036": before,
        "r0040": credit,
        "r0050": standardised,
        "r0060": standardised,
        "r0120": institutions,
        "r0125": corporate,
        "r0140": retail,
        "r0150": standardised - corporate - retail - institutions,
        "r0240": irb,
        "r0520": market,
        "r0560": fx,
        "r0590": operational,
        "r0640": cva,
    }
    total = positions.standardised
    standardised_rows = {
        "r0010": total,
        "r0040": total * share(bank_rng, 750, 900),
        "r0590": total * share(bank_rng, 60, 120),
    }
    return {("C_02.00.a", row, "c0010"): amount for row, amount in rows.items()} | {
        ("C_02.00.b", row, "c0020"): amount for row, amount in standardised_rows.items()
    }


def _surpluses(economics: Economics) -> Amounts:
    """C 03.00: surplus of each tier over its minimum, which may be negative."""
    tier1 = economics.cet1 + economics.at1
    rows = {
        "r0020": economics.cet1 - Decimal("0.045") * economics.trea,
        "r0040": tier1 - Decimal("0.06") * economics.trea,
        "r0060": tier1 + economics.t2 - Decimal("0.08") * economics.trea,
    }
    return {("C_03.00", row, "c0010"): amount for row, amount in rows.items()}


def _buffers(bank_rng: random.Random, bank: Bank, economics: Economics) -> Amounts:
    """C 04.00: the combined buffer requirement, its parts, and some items that no rule reads."""
    buffer = {name: fraction * economics.trea for name, fraction in bank.buffers.items()}
    deferred = economics.cet1 * share(bank_rng, 5, 80)
    original = economics.exposure * share(bank_rng, 850, 1050)
    rows = {
        "r0010": deferred,
        "r0740": sum(buffer.values()) - min(buffer["g_sii"], buffer["o_sii"]),
        "r0750": buffer["conservation"],
        "r0770": buffer["countercyclical"],
        "r0780": buffer["systemic_risk"],
        "r0800": buffer["g_sii"],
        "r0810": buffer["o_sii"],
        "r0820": bank.pillar2 * economics.trea,
        "r0850": original * share(bank_rng, 0, 400),
        "r0860": original,
    }
    return {("C_04.00", row, "c0010"): amount for row, amount in rows.items()}


def _foreign_exchange(bank_rng: random.Random, positions: Positions) -> Amounts:
    """C 22.00: net long and short positions, own funds requirement (8% of the net position), and 12.5 times that."""
    requirement = positions.fx_requirement
    net = requirement * Decimal("12.5")
    short = net * share(bank_rng, 50, 900)
    columns = {"c0040": net, "c0050": short, "c0090": requirement, "c0100": net}
    return {("C_22.00", "r0010", column): amount for column, amount in columns.items()}
