"""Figures of large exposures (C 26.00 to C 28.00), balance sheet (F 01.01 to F 01.03), income statement (F 02.00)."""

import random
from decimal import Decimal

from xbrl.corpus.banks import Bank
from xbrl.corpus.economics import Economics
from xbrl.corpus.positions import EXPOSURE_LIMIT, G_SII_LIMIT, Positions
from xbrl.corpus.rounding import ratio, rounded, share
from xbrl.read.report import CellKey

INSTITUTION = "eba_qTE:qx2056"  # "I - Institutions" in C 27.00


def exposure_figures(
    bank_rng: random.Random, bank: Bank, economics: Economics, positions: Positions
) -> dict[CellKey, Decimal | str]:
    """C 26.00: the limits. C 27.00 and C 28.00: one open row per counterparty, with its code as the row key."""
    tier1 = economics.cet1 + economics.at1
    limit = positions.institution_limit
    figures: dict[CellKey, Decimal | str] = {
        ("C_26.00", "r010", "c010"): rounded(EXPOSURE_LIMIT * tier1, bank.decimals),
        ("C_26.00", "r020", "c010"): rounded(limit * tier1, bank.decimals),
    }
    if bank.buffers["g_sii"]:
        figures["C_26.00", "r040", "c010"] = rounded(G_SII_LIMIT * tier1, bank.decimals)
    if limit > EXPOSURE_LIMIT:
        figures["C_26.00", "r030", "c010"] = rounded(limit, bank.ratio_decimals)
    detailed = bank_rng.random() < 0.3
    for exposure in positions.exposures:
        if exposure.institution:
            figures["C_27.00", exposure.code, "c070"] = INSTITUTION
        columns = {
            "c210": exposure.before,
            "c320": exposure.after - exposure.before,
            "c330": exposure.after,
        }
        if detailed:
            columns["c040"] = exposure.before * (1 + share(bank_rng, 0, 30))
            columns["c190"] = exposure.before - columns["c040"]
        figures |= {
            ("C_28.00", exposure.code, column): rounded(amount, bank.decimals) for column, amount in columns.items()
        }
        for column, amount in (("c230", exposure.before), ("c350", exposure.after)):
            figures["C_28.00", exposure.code, column] = ratio(amount, tier1, bank.ratio_decimals)
    return figures


def balance_amounts(
    bank_rng: random.Random, rng: random.Random, economics: Economics, positions: Positions
) -> dict[CellKey, Decimal]:
    """Unrounded assets, liabilities and equity, and the income statement down to the profit of the owners."""
    assets, equity, profit = positions.assets, positions.equity, positions.profit
    cash, trading, fair_value, tangible, intangible = (
        assets * share(bank_rng, low, high) * share(rng, 950, 1050)
        for low, high in ((20, 140), (0, 120), (10, 110), (2, 15), (0, 10))
    )
    liabilities = assets - equity
    issued, held, other = (liabilities * share(bank_rng, low, high) for low, high in ((30, 350), (0, 90), (5, 40)))
    minorities = equity * share(bank_rng, 0, 40) if bank_rng.random() < 0.3 else Decimal(0)
    capital = equity * share(bank_rng, 150, 350)
    interest = assets * share(bank_rng, 4, 11)
    expense = interest * share(bank_rng, 300, 600)
    fees = interest * share(bank_rng, 100, 500)
    of_minorities = profit * share(bank_rng, 0, 30) if minorities else Decimal(0)
    tables = {
        "F_01.01": {
            "r0010": cash,
            "r0050": trading,
            "r0141": fair_value,
            "r0181": assets - cash - trading - fair_value - tangible - intangible,
            "r0270": tangible,
            "r0300": intangible,
            "r0380": assets,
        },
        "F_01.02": {
            "r0010": held,
            "r0110": liabilities - held - other,
            "r0120": liabilities - held - other - issued,
            "r0130": issued,
            "r0280": other,
            "r0300": liabilities,
        },
        "F_01.03": {
            "r0010": capital,
            "r0190": equity - capital - profit + of_minorities - minorities,
            "r0250": profit - of_minorities,
            "r0270": minorities,
            "r0300": equity,
        },
        "F_02.00": {
            "r0010": interest,
            "r0090": expense,
            "r0200": fees,
            "r0670": profit,
            "r0680": of_minorities,
            "r0690": profit - of_minorities,
        },
    }
    return {(table, row, "c0010"): amount for table, rows in tables.items() for row, amount in rows.items()}
