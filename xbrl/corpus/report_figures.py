"""The figures that a bank reports: its amounts as values of cells of DPM release 4.2, without the cells that it leaves out.

Amounts are rounded to the bank's reporting accuracy. Each ratio is computed from the unrounded amounts. Parts add up to
their totals except for rounding. Zero items are not reported. In a table with open rows, the row of a cell is its key.

`bank_rng` yields the same values in every quarter of a bank and splits totals into parts. `rng` yields different values for
each report.
"""

import pathlib
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from xbrl.answers.profiles import BLOCKS, SHORT_CELLS
from xbrl.corpus.banks import Bank, requirements
from xbrl.corpus.economics import EXPOSURE_LIMIT, NEAR, Economics, whole
from xbrl.corpus.note_texts import NO_NOTE, HandNote
from xbrl.read.dpm import load_cells
from xbrl.read.filed_report import CellKey, Fact, Note, Report, template_of
from xbrl.read.replies import BankReply
from xbrl.rules.rules import Rule, built_in_rules, evaluate, legal_parameters, violations

Figures = dict[CellKey, Decimal | str]  # a str is a member of an enumeration or a name
Amounts = dict[CellKey, Decimal]

INSTITUTION = "eba_qTE:qx2056"  # "I - Institutions" in C 27.00
G_SII_LIMIT = Decimal("0.15")  # exposure of a G-SII to another G-SII over Tier 1, CRR Art. 395(1), fourth subparagraph
# (probability that a bank files the module, templates of the module). Drawn once per bank. Own funds are always filed.
MODULES = (
    (0.93, ("C_47.00",)),
    (0.93, ("C_76.00",)),
    (0.88, ("C_84.00",)),
    (0.6, ("C_26.00", "C_27.00", "C_28.00")),
    (0.45, ("F_01.01", "F_01.02", "F_01.03", "F_02.00")),
)
# Figures that rules read but that may be missing without an error. The rules derive a missing CET1 or Tier 1 part of OCR.
OMITTABLE = (
    *(("C_03.00", row, "c0010") for row in ("r0140", "r0150", "r0170", "r0180")),
    *(("C_47.00", "r0440", "c0010"), ("C_76.00.a", "r0030", "c0010")),
)
MAX_FIGURES = 74
# Total -> (its parts with the range of their shares per mille, the row of the rest). The parts of C 84.00.c stand in C 84.00.a.
PARTS: dict[CellKey, tuple[tuple[tuple[str, int, int], ...], str]] = {
    ("C_02.00.a", "r0060", "c0010"): ((("r0120", 20, 100), ("r0125", 100, 350), ("r0140", 100, 300)), "r0150"),
    ("C_47.00", "r0300", "c0010"): (
        (("r0010", 10, 100), ("r0061", 10, 100), ("r0165", 2, 20), ("r0170", 2, 50), ("r0180", 2, 30)),
        "r0190",
    ),
    ("C_84.00.c", "r0010", "c0020"): (
        (("r0030", 5, 60), ("r0040", 10, 120), ("r0100", 20, 120), ("r0110", 5, 40)),
        "r0050",
    ),
    ("F_01.01", "r0380", "c0010"): (
        (("r0010", 20, 140), ("r0050", 0, 120), ("r0141", 10, 110), ("r0270", 2, 15), ("r0300", 0, 10)),
        "r0181",
    ),
    ("F_01.02", "r0300", "c0010"): ((("r0010", 0, 90), ("r0280", 5, 40)), "r0110"),
    ("F_01.02", "r0110", "c0010"): ((("r0130", 30, 350),), "r0120"),
    ("F_01.03", "r0190", "c0010"): ((("r0010", 150, 350),), "r0190"),
}


@dataclass(frozen=True)
class Filing:
    """The figures that one bank files for one reference date.

    In a table with open rows, the row of a cell is its key.
    """

    bank: Bank
    period: str  # YYYY-MM-DD
    figures: Figures
    unfiled: tuple[str, ...] = ()  # templates declared as not filed
    note: HandNote = NO_NOTE
    attached: tuple[CellKey, ...] = ()  # the cells to which the note is attached
    pair: str = ""  # shared by the two members of a minimal pair
    dropped: tuple[str, ...] = ()  # names of the note's statements that the figures contradict

    @property
    def replies(self) -> list[BankReply]:
        """Return the note as the bank sends it beside its report; an empty list without a note. Its cells stand as in the files."""
        tables, order = {cell[0]: load_cells().table(cell[0]) for cell in self.attached}, list(self.figures)
        key = {cell: (table.module, cell[0], order.index(cell)) for cell in self.attached if (table := tables[cell[0]])}
        note = Note(self.note.text, tuple(sorted(self.attached, key=lambda cell: key[cell])))
        return [BankReply(f"{self.bank.entity}.{self.bank.scope}", self.period, note)] if self.note.id else []


def draw_figures(
    rng: random.Random, bank_rng: random.Random, bank: Bank, economics: Economics, period: str
) -> Figures | None:
    """Draw all figures of one bank at one date, about 180.

    Return None if the levels ask for a missed output floor and the bank has no internal models.
    """
    if "floor" in economics.levels and not bank.uses_irb:
        return None
    floor = legal_parameters(int(period[:4])).get("output_floor", Decimal("0.5"))
    unfloored, standardised = _draw_floor(rng, bank_rng, bank, economics, floor)
    leverage = {
        "r0300": economics.exposure,
        "r0320": economics.tier1,
        "r0350": bank.leverage_pillar2 * economics.exposure,
        "r0370": bank.buffers["g_sii"] / 2 * economics.exposure,
    }
    fx = whole(_foreign_exchange(rng, bank_rng, bank) * (economics.tier1 + economics.t2))
    amounts = (
        _own_funds(bank_rng, economics)
        | _risk_exposure(bank_rng, bank, economics, unfloored, standardised, fx)
        | _buffers(bank_rng, bank, economics)
        | _column("C_47.00", leverage)
        | _liquidity(bank_rng, economics)
        | _column("C_84.00.c", {"r0010": economics.required_funding}, "c0020")
        | _column("C_84.00.d", {"r0120": economics.available_funding}, "c0030")
        | _balance(bank_rng, rng, economics)
    )
    figures: Figures = {key: rounded(amount, bank.decimals) for key, amount in _parts(bank_rng, amounts).items()}
    figures |= _ratios(bank_rng, bank, economics, unfloored, floor if standardised else Decimal(0))
    figures |= _exposures(bank_rng, bank, economics)
    return {key: value for key, value in sorted(figures.items()) if value != 0}


def leave_out(
    rng: random.Random, bank_rng: random.Random, figures: Figures, kept: Iterable[CellKey]
) -> tuple[Figures, tuple[str, ...]]:
    """Return (the figures without modules that this bank never files and without some details, templates not filed).

    The templates of the cells in `kept` are always filed.
    """
    needed = {template_of(cell[0]) for cell in kept}
    missing: set[str] = set()
    for share, templates in MODULES:
        if bank_rng.random() >= share and not needed & set(templates):
            missing |= set(templates)
    unfiled = {"C_22.00"} if rng.random() < 0.05 else set()
    figures = {key: value for key, value in figures.items() if template_of(key[0]) not in missing | unfiled}
    read = {cell for rule in built_in_rules() for cell in rule.cells} | {("C_27.00", "*", "c021")}
    details = [key for key in figures if key not in read and (key[0], "*", key[2]) not in read]
    num_details = round(len(details) * bank_rng.choice((0.25, 0.5, 0.75, 1.0)))
    num_details = max(0, min(num_details, MAX_FIGURES - (len(figures) - len(details))))
    order = {key: bank_rng.random() for key in sorted(details)}
    read_templates = {template_of(key[0]) for key in figures.keys() - set(details)}
    only = {template_of(key[0]): key for key in details if template_of(key[0]) not in read_templates}
    order |= dict.fromkeys(only.values(), -1.0)  # each filed template keeps at least one figure
    omitted = set(sorted(details, key=order.__getitem__)[max(num_details, len(only)) :])
    omitted |= {cell for cell in rng.sample(OMITTABLE, rng.choice((0, 0, 0, 1, 1, 2))) if cell not in kept}
    lcr, outflow = ("C_76.00.a", "r0030", "c0010"), figures.get(("C_76.00.a", "r0020", "c0010"))
    if lcr in figures and outflow and abs(Decimal(figures[lcr]) - 1) < Decimal("0.002"):  # too close to recompute it
        omitted.discard(lcr)
    return {key: value for key, value in figures.items() if key not in omitted}, tuple(sorted(unfiled))


def shorten(rng: random.Random, figures: Figures, kept: Iterable[CellKey]) -> Figures:
    """Return the figures of a short report: all ratios, each block that has a cell of `kept`, and other blocks at random."""
    needed = {(table, row if re.fullmatch(r"r\d+", row) else "*", column) for table, row, column in kept}
    left_out = {cell for block in BLOCKS if rng.random() < 0.6 and not needed & block for cell in block}

    def is_shown(key: CellKey) -> bool:
        cell = key if key in SHORT_CELLS else (key[0], "*", key[2])
        return cell in SHORT_CELLS and cell not in left_out

    return {key: value for key, value in figures.items() if is_shown(key)}


def _draw_floor(
    rng: random.Random, bank_rng: random.Random, bank: Bank, economics: Economics, floor: Decimal
) -> tuple[Decimal, Decimal]:
    """Return (total risk exposure before the output floor, standardised total; 0 without internal models).

    The floor is binding for some banks, and close to or far from binding for others. A bank that misses the floor reports less
    exposure than it requires.
    """
    trea = economics.trea
    if not bank.uses_irb:
        return trea, Decimal(0)
    near = Decimal(rng.randint(1, 20)) / 10_000
    binding, distance = bank_rng.random() < 0.35, share(bank_rng, 5, 150)
    if "floor" in economics.levels:
        return trea, whole(trea * (1 + (near if rng.random() < NEAR else share(rng, 5, 200))) / floor)
    if binding:
        return whole(trea * (1 - distance)), whole(trea / floor)
    return trea, whole(trea * (1 - (near if rng.random() < NEAR / 2 else share(rng, 5, 220))) / floor)


def _foreign_exchange(rng: random.Random, bank_rng: random.Random, bank: Bank) -> Decimal:
    """Draw the own funds requirement for foreign exchange risk as a fraction of own funds. Some positions are close to 2%."""
    if bank_rng.random() >= (0.8 if _trades(bank) else 0.45):
        return Decimal(0)
    position = share(bank_rng, 12, 90)
    near = Decimal("0.02") + Decimal(rng.randint(-15, 15)) / 100_000 if rng.random() < NEAR else None
    return Decimal("0.08") * (near or position)


def _trades(bank: Bank) -> bool:
    return bank.model in ("investment bank", "universal bank")


def _ratios(bank_rng: random.Random, bank: Bank, economics: Economics, unfloored: Decimal, floor: Decimal) -> Amounts:
    """Return C 03.00, C 47.00, C 76.00, C 84.00: ratios, the bank's own requirements, guidance, and figures that no rule reads."""
    need, places = requirements(bank), bank.ratio_decimals
    cet1, tier1, own_funds = economics.cet1, economics.tier1, economics.tier1 + economics.t2
    guidance = Decimal(max(0, bank_rng.randint(-4, 4))) * Decimal("0.0025")  # half of the banks have none
    rows = {
        "r0010": ratio(cet1, economics.trea, places),
        "r0030": ratio(tier1, economics.trea, places),
        "r0050": ratio(own_funds, economics.trea, places),
        "r0130": need["total"].own,
        "r0140": need["cet1"].own,
        "r0150": need["t1"].own,
        "r0160": need["total"].overall,
        "r0170": need["cet1"].overall,
        "r0180": need["t1"].overall,
        "r0190": need["total"].overall + guidance if guidance else Decimal(0),
    }
    if unfloored != economics.trea:  # ratios without the output floor
        rows |= {"r0070": ratio(cet1, unfloored, places), "r0090": ratio(own_funds, unfloored, places)}
    leverage = {
        "r0340": ratio(tier1, economics.exposure, places),
        **dict(zip(("r0410", "r0420", "r0440"), need["leverage"], strict=True)),
    }
    figures = {("C_03.00", row, "c0010"): value for row, value in rows.items()}
    figures |= {("C_47.00", row, "c0010"): value for row, value in leverage.items()}
    figures["C_04.00", "r0900", "c0010"] = floor
    figures["C_76.00.a", "r0030", "c0010"] = ratio(economics.liquid_assets, economics.net_outflow, places)
    figures["C_84.00.a", "r0220", "c0040"] = ratio(economics.available_funding, economics.required_funding, places)
    return figures


def _own_funds(bank_rng: random.Random, economics: Economics) -> Amounts:
    """Return C 01.00: own funds, their tiers and items, and C 03.00: the surplus of each tier over its minimum."""
    cet1, at1, t2 = economics.cet1, economics.at1, economics.t2
    goodwill, intangibles, tax_assets = (-cet1 * share(bank_rng, 0, limit) for limit in (60, 40, 50))
    excess = cet1 * share(bank_rng, 2, 25)  # deductions in excess of AT1 are deducted from CET1
    if bank_rng.random() < 0.4 or at1:
        excess = Decimal(0)
    gross = cet1 - goodwill - intangibles - tax_assets + excess
    retained, income, reserves = (
        gross * share(bank_rng, low, high) for low, high in ((300, 550), (-20, 20), (20, 120))
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
    trea = economics.trea
    surplus = {"r0020": cet1 - Decimal("0.045") * trea, "r0040": cet1 + at1 - Decimal("0.06") * trea}
    surplus["r0060"] = cet1 + at1 + t2 - Decimal("0.08") * trea
    return _column("C_01.00", rows) | _column("C_03.00", surplus)


def _risk_exposure(
    bank_rng: random.Random, bank: Bank, economics: Economics, before: Decimal, standardised_total: Decimal, fx: Decimal
) -> Amounts:
    """Return C 02.00.a: exposure by risk type and class, C 02.00.b: standardised approaches, and C 22.00: foreign exchange."""
    market = before * share(bank_rng, 20, 180) if _trades(bank) else before * share(bank_rng, 0, 15)
    net = fx * Decimal("12.5")
    market += net
    cva = before * share(bank_rng, 2, 30) if _trades(bank) else Decimal(0)
    operational = before * share(bank_rng, 60, 140)
    credit = before - market - cva - operational
    irb = credit * share(bank_rng, 400, 800) if bank.uses_irb else Decimal(0)
    standardised = credit - irb
    rows = {
        "r0010": economics.trea,
        "r0035": economics.trea - before,
        "r0036": before,
        "r0040": credit,
        "r0050": standardised,
        "r0060": standardised,
        "r0240": irb,
        "r0520": market,
        "r0560": net,
        "r0590": operational,
        "r0640": cva,
    }
    floor_rows = {"r0010": standardised_total, "r0040": standardised_total * share(bank_rng, 750, 900)}
    floor_rows["r0590"] = standardised_total * share(bank_rng, 60, 120)
    exchange = {"c0040": net, "c0050": net * share(bank_rng, 50, 900), "c0090": fx, "c0100": net}
    return (
        _column("C_02.00.a", rows)
        | _column("C_02.00.b", floor_rows, "c0020")
        | {("C_22.00", "r0010", column): amount for column, amount in exchange.items()}
    )


def _buffers(bank_rng: random.Random, bank: Bank, economics: Economics) -> Amounts:
    """Return C 04.00: the combined buffer requirement, its parts, and some items that no rule reads."""
    buffer = {name: fraction * economics.trea for name, fraction in bank.buffers.items()}
    original = economics.exposure * share(bank_rng, 850, 1050)
    rows = {
        "r0010": economics.cet1 * share(bank_rng, 5, 80),
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
    return _column("C_04.00", rows)


def _liquidity(bank_rng: random.Random, economics: Economics) -> Amounts:
    """Return C 76.00.a: the liquidity buffer by level, and outflows minus capped inflows."""
    buffer, net = economics.liquid_assets, economics.net_outflow
    covered, level2a, level2b = (buffer * share(bank_rng, 0, limit) for limit in (80, 100, 40))
    level1 = buffer - covered - level2a - level2b
    kind = bank_rng.random()
    reduction = net * (share(bank_rng, 100, 900) if kind < 0.75 else share(bank_rng, 2600, 2990))
    if kind > 0.9:
        reduction = net * 3  # the cap on inflows, 75% of outflows, is binding
    inflows = reduction * share(bank_rng, 1000, 1300) if kind > 0.9 else reduction
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
        "r0300": net + reduction,
        "r0330": inflows,
        "r0360": reduction,
    }
    return _column("C_76.00.a", rows)


def _exposures(bank_rng: random.Random, bank: Bank, economics: Economics) -> Figures:
    """Return C 26.00: the limits, and C 27.00 and C 28.00: an open row per counterparty, whose code is the row key."""
    tier1, limit = economics.tier1, economics.institution_limit
    limits = {"r010": EXPOSURE_LIMIT, "r020": limit, "r040": G_SII_LIMIT if bank.buffers["g_sii"] else Decimal(0)}
    figures: Figures = {
        ("C_26.00", row, "c010"): rounded(fraction * tier1, bank.decimals) for row, fraction in limits.items()
    }
    if limit > EXPOSURE_LIMIT:
        figures["C_26.00", "r030", "c010"] = rounded(limit, bank.ratio_decimals)
    detailed = bank_rng.random() < 0.3
    for client in economics.clients:
        figures["C_27.00", client.code, "c021"] = client.name
        if client.institution:
            figures["C_27.00", client.code, "c070"] = INSTITUTION
        columns = {"c210": client.before, "c320": client.after - client.before, "c330": client.after}
        if detailed:
            columns["c040"] = client.before * (1 + share(bank_rng, 0, 30))
            columns["c190"] = client.before - columns["c040"]
        figures |= {
            ("C_28.00", client.code, column): rounded(amount, bank.decimals) for column, amount in columns.items()
        }
        for column, amount in (("c230", client.before), ("c350", client.after)):
            figures["C_28.00", client.code, column] = ratio(amount, tier1, bank.ratio_decimals)
    return figures


def _balance(bank_rng: random.Random, rng: random.Random, economics: Economics) -> Amounts:
    """Return F 01.01 to F 01.03: assets, liabilities, equity, and F 02.00: the income statement down to the owners' profit."""
    equity = whole(economics.cet1 * share(bank_rng, 1020, 1250))
    assets = whole(economics.exposure * share(bank_rng, 860, 970))
    profit = economics.profit if economics.profit is not None else whole(equity * share(rng, -25, 45))
    minorities = equity * share(bank_rng, 0, 40) if bank_rng.random() < 0.3 else Decimal(0)
    of_minorities = profit * share(bank_rng, 0, 30) if minorities else Decimal(0)
    owners = profit - of_minorities
    interest = assets * share(bank_rng, 4, 11)
    equity_rows = {"r0190": equity - owners - minorities, "r0250": owners, "r0270": minorities, "r0300": equity}
    income_rows = {
        "r0010": interest,
        "r0090": interest * share(bank_rng, 300, 600),
        "r0200": interest * share(bank_rng, 100, 500),
        "r0670": profit,
        "r0680": of_minorities,
        "r0690": owners,
    }
    balance = {("F_01.01", "r0380", "c0010"): assets, ("F_01.02", "r0300", "c0010"): assets - equity}
    return balance | _column("F_01.03", equity_rows) | _column("F_02.00", income_rows)


def _parts(bank_rng: random.Random, amounts: Amounts) -> Amounts:
    """Add the parts of each total in `PARTS`. The row of the rest gets the difference to the total."""
    for (table, row, column), (parts, rest) in PARTS.items():
        total = amounts[table, row, column]
        place = "C_84.00.a" if table == "C_84.00.c" else table
        shares = {name: total * share(bank_rng, low, high) for name, low, high in parts}
        amounts = amounts | _column(place, shares | {rest: total - sum(shares.values())}, column)
    return amounts


def _column(table: str, rows: dict[str, Decimal], column: str = "c0010") -> Amounts:
    return {(table, row, column): amount for row, amount in rows.items()}


def ratio(part: Decimal, whole_amount: Decimal, places: int) -> Decimal:
    """Return `part / whole_amount`, rounded to `places` decimal places."""
    return rounded(part / whole_amount, places)


def rounded(value: Decimal, places: int) -> Decimal:
    """Round `value` to `places` decimal places (-3: to thousands), represented without an exponent."""
    value = value.quantize(Decimal(1).scaleb(-places))
    return value if places > 0 else value.quantize(Decimal(1))


def share(rng: random.Random, low: int, high: int) -> Decimal:
    """Draw a fraction between `low` and `high` per mille, as a multiple of 0.0001."""
    return Decimal(rng.randint(low * 10, high * 10)) / 10_000


def violated(bank: Bank, period: str, figures: Figures, rules: Iterable[Rule]) -> set[str]:
    """Return the ids of the rules that the figures violate. The generator accepts or rejects a report by them.

    The labels of the examples do not come from here. They come from the files, which are written and read back.
    """
    cells = {cell for rule in rules for cell in rule.cells}
    read = {key: value for key, value in figures.items() if key in cells or (key[0], "*", key[2]) in cells}
    return {result.rule_id for result in violations(evaluate(as_report(bank, period, read, figures), rules))}


def as_report(bank: Bank, period: str, read: Figures, figures: Figures) -> Report:
    """Build a report whose facts are the figures `read`. Its filing indicators cover every table of `figures`."""
    facts = []
    for (table, row, column), value in read.items():
        unit, decimals = None, None
        if isinstance(value, Decimal):
            is_ratio = int(value.as_tuple().exponent) < 0
            unit, decimals = ("xbrli:pure", bank.ratio_decimals) if is_ratio else (bank.currency, bank.decimals)
        is_open = not re.fullmatch(r"r\d+", row)  # the row is the key of an open table
        keys, place = ({"qINC": row}, (table, "*", column)) if is_open else ({}, (table, row, column))
        facts.append(Fact("", value, unit, decimals, bank.entity, period, keys, place))
    indicators = {template_of(table): True for table, _, _ in figures}
    return Report(pathlib.Path(), "", bank.entity, period, bank.currency, indicators, tuple(facts), ())
