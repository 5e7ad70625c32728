"""What a bank reports of its economics: the cells of its COREP templates, by table, row and column of DPM release 4.2.

Amounts are rounded to the accuracy that the bank files; each ratio is computed from the unrounded amounts and rounded to
four decimal places. Parts add up to their totals except for rounding. Items that are nil are not reported.
"""

import random
from decimal import Decimal

from data.regulator.banks import Bank, requirements
from data.regulator.economics import Economics
from data.regulator.report import CellKey

Cells = dict[CellKey, Decimal]

RATIO_DECIMALS = 4

# What a bank may leave unfiled: requirements of its own, one ratio.
REQUIREMENT_ROWS = (
    (("C_03.00", "r0130", "c0010"), ("C_03.00", "r0140", "c0010"), ("C_03.00", "r0150", "c0010")),
    (("C_03.00", "r0140", "c0010"),),
    (("C_03.00", "r0150", "c0010"),),
    (("C_03.00", "r0160", "c0010"),),
    (("C_47.00", "r0440", "c0010"),),
)
RATIO_ROWS = (
    (("C_03.00", "r0010", "c0010"),),
    (("C_03.00", "r0030", "c0010"),),
    (("C_03.00", "r0050", "c0010"),),
    (("C_47.00", "r0340", "c0010"),),
    (("C_76.00.a", "r0030", "c0010"),),
    (("C_84.00.a", "r0220", "c0040"),),
)


def full_cells(rng: random.Random, bank: Bank, economics: Economics) -> Cells:
    """About 70 cells of C 01.00, C 02.00.a, C 03.00, C 47.00, C 76.00.a and C 84.00.a; the optional ones vary by `rng`."""
    amounts: dict[CellKey, Decimal] = {}
    amounts |= _own_funds(rng, economics)
    amounts |= _risk_exposure(rng, bank, economics)
    amounts |= _leverage_exposure(rng, bank, economics)
    amounts |= _liquidity(rng, economics)
    amounts |= _stable_funding(rng, economics)
    if rng.random() < 0.35:  # surplus or deficit over the minimum: it gives the verdict away, so it is mostly left out
        for row, amount, share in (
            ("r0020", economics.cet1, "0.045"),
            ("r0040", economics.cet1 + economics.at1, "0.06"),
            ("r0060", economics.cet1 + economics.at1 + economics.t2, "0.08"),
        ):
            amounts["C_03.00", row, "c0010"] = amount - Decimal(share) * economics.trea
    cells = {key: _rounded(amount, bank.decimals) for key, amount in amounts.items()}
    cells |= _capital_ratios(rng, bank, economics) | _leverage_ratios(rng, bank, economics)
    cells["C_76.00.a", "r0030", "c0010"] = _ratio(economics.liquid_assets, economics.net_outflow)
    cells["C_84.00.a", "r0220", "c0040"] = _ratio(economics.available_funding, economics.required_funding)
    return {key: value for key, value in sorted(cells.items()) if value != 0}


def short_cells(bank: Bank, economics: Economics) -> Cells:
    """The five ratios and requirements that five rules need, and one amount that no rule reads."""
    tier1 = economics.cet1 + economics.at1
    return {
        ("C_02.00.a", "r0010", "c0010"): economics.trea,
        ("C_03.00", "r0010", "c0010"): _ratio(economics.cet1, economics.trea),
        ("C_03.00", "r0140", "c0010"): requirements(bank).tscr_cet1,
        ("C_47.00", "r0340", "c0010"): _ratio(tier1, economics.exposure),
        ("C_76.00.a", "r0030", "c0010"): _ratio(economics.liquid_assets, economics.net_outflow, 3),
        ("C_84.00.a", "r0220", "c0040"): _ratio(economics.available_funding, economics.required_funding, 3),
    }


def _own_funds(rng: random.Random, economics: Economics) -> Cells:
    """C 01.00: own funds, its tiers, and the items of each."""
    cet1, at1, t2 = economics.cet1, economics.at1, economics.t2
    goodwill, intangibles, tax_assets = (-cet1 * _share(rng, 0, limit) for limit in (60, 40, 50))
    gross = cet1 - goodwill - intangibles - tax_assets
    retained, income, reserves = (
        gross * _share(rng, 300, 550),
        gross * _share(rng, -20, 20),
        gross * _share(rng, 20, 120),
    )
    adjustments = t2 * _share(rng, 0, 150)
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
        "r0530": at1,
        "r0540": at1,
        "r0750": t2,
        "r0760": t2 - adjustments,
        "r0920": adjustments,
    }
    return {("C_01.00", row, "c0010"): amount for row, amount in rows.items()}


def _risk_exposure(rng: random.Random, bank: Bank, economics: Economics) -> Cells:
    """C 02.00.a: total risk exposure by risk, credit risk by approach, the standardised part by class."""
    trea = economics.trea
    trading = bank.model in ("investment bank", "universal bank")
    market = trea * _share(rng, 20, 180) if trading else trea * _share(rng, 0, 15)
    cva = trea * _share(rng, 2, 30) if trading else Decimal(0)
    operational = trea * _share(rng, 60, 140)
    credit = trea - market - cva - operational
    irb = credit * _share(rng, 400, 800) if bank.uses_irb else Decimal(0)
    standardised = credit - irb
    corporate, retail, institutions = (
        standardised * _share(rng, low, high) for low, high in ((100, 350), (100, 300), (20, 100))
    )
    rows = {
        "r0010": trea,
        "r0036": trea,
        "r0040": credit,
        "r0050": standardised,
        "r0060": standardised,
        "r0120": institutions,
        "r0125": corporate,
        "r0140": retail,
        "r0150": standardised - corporate - retail - institutions,
        "r0240": irb,
        "r0520": market,
        "r0590": operational,
        "r0640": cva,
    }
    return {("C_02.00.a", row, "c0010"): amount for row, amount in rows.items()}


def _capital_ratios(rng: random.Random, bank: Bank, economics: Economics) -> Cells:
    """C 03.00: the three ratios, the bank's own requirements, and figures that no rule reads (guidance, fully loaded ratios)."""
    need = requirements(bank)
    cet1, tier1 = economics.cet1, economics.cet1 + economics.at1
    own_funds = tier1 + economics.t2
    guidance = Decimal(rng.randint(0, 8)) * Decimal("0.0025")
    rows = {
        "r0010": _ratio(cet1, economics.trea),
        "r0030": _ratio(tier1, economics.trea),
        "r0050": _ratio(own_funds, economics.trea),
        "r0130": need.tscr,
        "r0140": need.tscr_cet1,
        "r0150": need.tscr_t1,
        "r0160": need.ocr,
        "r0170": need.ocr_cet1,
        "r0180": need.ocr_t1,
    }
    if guidance:
        rows["r0190"] = need.ocr + guidance
    if rng.random() < 0.5:
        loaded = 1 - _share(rng, 1, 25)
        rows |= {"r0330": _ratio(cet1 * loaded, economics.trea), "r0350": _ratio(own_funds * loaded, economics.trea)}
    return {("C_03.00", row, "c0010"): value for row, value in rows.items()}


def _leverage_exposure(rng: random.Random, bank: Bank, economics: Economics) -> Cells:
    """C 47.00: the exposure measure and its parts, and Tier 1."""
    exposure, tier1 = economics.exposure, economics.cet1 + economics.at1
    trading = bank.model in ("investment bank", "universal bank")
    securities, derivatives = (exposure * _share(rng, 10, 120 if trading else 30) for _ in range(2))
    low, half, full = (exposure * _share(rng, 2, limit) for limit in (20, 50, 30))
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


def _leverage_ratios(rng: random.Random, bank: Bank, economics: Economics) -> Cells:
    tier1 = economics.cet1 + economics.at1
    rows = {
        "r0340": _ratio(tier1, economics.exposure),
        "r0410": Decimal("0.03"),
        "r0420": Decimal("0.03") + bank.leverage_pillar2,
        "r0440": requirements(bank).olrr,
    }
    if rng.random() < 0.4:
        rows["r0330"] = _ratio(tier1 * (1 - _share(rng, 1, 25)), economics.exposure)
    return {("C_47.00", row, "c0010"): value for row, value in rows.items()}


def _liquidity(rng: random.Random, economics: Economics) -> Cells:
    """C 76.00.a: the buffer by level, outflows less capped inflows."""
    buffer, net = economics.liquid_assets, economics.net_outflow
    covered, level2a, level2b = (buffer * _share(rng, 0, limit) for limit in (80, 100, 40))
    level1 = buffer - covered - level2a - level2b
    inflows = net * _share(rng, 100, 900)
    outflows = net + inflows
    rows = {
        "r0010": buffer,
        "r0020": net,
        "r0040": level1,
        "r0091": level1,
        "r0100": covered,
        "r0131": covered,
        "r0160": level2a,
        "r0191": level2a,
        "r0220": level2b,
        "r0251": level2b,
        "r0300": outflows,
        "r0330": inflows,
        "r0360": inflows,
    }
    return {("C_76.00.a", row, "c0010"): amount for row, amount in rows.items()}


def _stable_funding(rng: random.Random, economics: Economics) -> Cells:
    """C 84.00: required stable funding by kind of asset (summary .a), the totals required (.c) and available (.d)."""
    required = economics.required_funding
    liquid, securities, other, off_balance = (
        required * _share(rng, low, high) for low, high in ((5, 60), (10, 120), (20, 120), (5, 40))
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


def _ratio(part: Decimal, whole: Decimal, places: int = RATIO_DECIMALS) -> Decimal:
    return _rounded(part / whole, places)


def _rounded(value: Decimal, places: int) -> Decimal:
    """`value` to `places` decimal places; -3 is to the nearest thousand. Always written without an exponent."""
    value = value.quantize(Decimal(1).scaleb(-places))
    return value if places > 0 else value.quantize(Decimal(1))


def _share(rng: random.Random, low: int, high: int) -> Decimal:
    """A share between `low` and `high` per thousand."""
    return Decimal(rng.randint(low * 10, high * 10)) / 10_000
