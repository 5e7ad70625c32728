"""The reports of the profile `laptop`: six ratios, two or three clients, and often one note.

The task is meant for a model with 135M parameters, and harder than the quickstart's: a note decides only together with the
figures, whose sum or difference the report does not print, and the tests use other wordings than training. All figures are
in tenths of a percent until they are filed; the liquidity ratios and what notes add up are whole percents.
"""

import random
from dataclasses import replace
from decimal import Decimal

from xbrl.corpus.banks import Bank, make_bank
from xbrl.corpus.notes import PlannedNote
from xbrl.corpus.reporting import Figures
from xbrl.read.render import cell_name
from xbrl.read.report import CellKey
from xbrl.rules.dates import long_date, quarter_end
from xbrl.rules.findings import Finding, note_rules

SHARE: CellKey = ("C_28.00", "*", "c350")  # exposure to a client as a share of Tier 1
LIMIT_OF_CLIENT = 250
WHOLE = 10  # a whole percent
# rule -> (cell, minimum, grid, steps above the minimum, steps below it)
RATIOS: dict[str, tuple[CellKey, int, int, int, int]] = {
    "CET1_MIN": (("C_03.00", "r0010", "c0010"), 45, 1, 90, 25),
    "T1_MIN": (("C_03.00", "r0030", "c0010"), 60, 1, 90, 30),
    "TC_MIN": (("C_03.00", "r0050", "c0010"), 80, 1, 90, 35),
    "LR_MIN": (("C_47.00", "r0340", "c0010"), 30, 1, 40, 15),
    "LCR_MIN": (("C_76.00.a", "r0030", "c0010"), 1000, WHOLE, 50, 40),
    "NSFR_MIN": (("C_84.00.a", "r0220", "c0040"), 1000, WHOLE, 30, 25),
}
RULES = (*RATIOS, "LE_LIMIT")
KINDS = ("pledged", "connected", "waiver")
LIQUIDITY = {
    "LCR_MIN": "the liquidity coverage rules (Article 8 CRR)",
    "NSFR_MIN": "the stable funding rules (Article 8 CRR)",
}
NOTES = 0.75  # share of reports with a note
NEAR = 0.4  # probability that a figure is within ten steps of its limit
OMITTED = 0.08  # probability that a ratio is not reported


def laptop_filing(seed: int, index: int, quarter: int, clean: float) -> tuple[Bank, str, Figures, PlannedNote | None]:
    """One report: (bank, reference date, figures, note).

    `clean` is the probability that no ratio and no client breaks its limit.
    """
    # Four decimals are what the EBA's filing rules demand: with three, a ratio at its limit would be undecided.
    bank = replace(make_bank(seed, index), ratio_decimals=4, scope="IND")
    rng = random.Random(f"laptop {seed} {index} {quarter}")
    period = quarter_end(random.Random(f"quarters {seed} {index}").randrange(8) + quarter)
    kind = rng.choice(KINDS) if rng.random() < NOTES else ""
    # Three eighths hold and decide, three eighths say that it is not so, a quarter does not decide because of the figures.
    case = rng.choices(("decides", "says no", "figures say no"), (3, 3, 2))[0]
    broken = _draw_broken(rng, clean, kind)
    ratios = _draw_ratios(rng, broken)
    clients = _draw_clients(rng, "LE_LIMIT" in broken, kind == "connected" or rng.random() < 0.7)
    note = None
    if kind == "pledged":
        note = _pledged(rng, bank, period, case, ratios)
    elif kind == "connected":
        note = _connected(rng, bank, period, case, clients)
    elif kind == "waiver":
        note = _waiver(rng, bank, period, case, broken)
    needed = broken | {"pledged": {"LCR_MIN"}, "waiver": set(LIQUIDITY)}.get(kind, set())
    figures: Figures = {
        RATIOS[rule][0]: Decimal(value).scaleb(-3)
        for rule, value in ratios.items()
        if rule in needed or rng.random() >= OMITTED
    }
    figures |= {(SHARE[0], name, SHARE[2]): Decimal(share).scaleb(-3) for name, share in clients.items()}
    return bank, period, figures, note


def _draw_broken(rng: random.Random, clean: float, kind: str) -> set[str]:
    """The rules that the figures break. The LCR of a report on pledged assets is sound; a waiver has something to waive."""
    count = 0 if rng.random() < clean else 1 if rng.random() < 0.7 else 2
    broken = set(rng.sample(RULES, count))
    if kind == "pledged":
        broken.discard("LCR_MIN")
    if kind == "connected":
        broken.discard("LE_LIMIT")
    if kind == "waiver":
        broken.add(rng.choice(tuple(LIQUIDITY)))
    return broken


def _draw_ratios(rng: random.Random, broken: set[str]) -> dict[str, int]:
    """rule -> its ratio. CET1 is at most Tier 1, and Tier 1 at most total capital."""
    while True:
        ratios = {}
        for rule, (_, limit, grid, above, below) in RATIOS.items():
            near = rng.random() < NEAR
            if rule in broken:
                ratios[rule] = limit - grid * rng.randint(1, 10 if near else below)
            else:
                ratios[rule] = limit + grid * rng.randint(0, 10 if near else above)
        if ratios["CET1_MIN"] <= ratios["T1_MIN"] <= ratios["TC_MIN"]:
            return ratios


def _draw_clients(rng: random.Random, over: bool, reported: bool) -> dict[str, int]:
    """Name of a client -> its share of Tier 1. One is above the limit if `over`."""
    if not (over or reported):
        return {}
    names = sorted(rng.sample([f"{letter}{number}" for letter in "ABDEFGHKLM" for number in range(10, 100)], 3))
    clients = {name: WHOLE * rng.randint(3, 24) for name in names[: rng.choice((2, 3))]}
    if over:
        clients[rng.choice(sorted(clients))] = LIMIT_OF_CLIENT + WHOLE * rng.randint(1, 15)
    return clients


def _finding(bank: Bank, period: str, rule: str, cell: str, case: str, value: int | None, limit: int) -> Finding:
    """The line of findings.csv. `value` is None if the note says that nothing is to be computed."""
    state = "violated" if case == "decides" else "benign"
    number = None if value is None else Decimal(value).scaleb(-3)
    known = note_rules()[rule]
    threshold = None if value is None else Decimal(limit).scaleb(-3)
    return Finding(bank.entity, period, rule, state, cell, number, threshold, known.legal, known.kind)


def _pledged(rng: random.Random, bank: Bank, period: str, case: str, ratios: dict[str, int]) -> PlannedNote:
    """Assets of some per cent of net outflows are said to be pledged; without them the LCR is below 100% or not."""
    cell, limit, *_ = RATIOS["LCR_MIN"]
    room = (ratios["LCR_MIN"] - limit) // WHOLE
    crosses = case == "decides" or (case == "says no" and rng.random() < 0.6)
    if not crosses and room < 2:  # no amount leaves the ratio at its limit
        room = rng.randint(2, 40)
        ratios["LCR_MIN"] = limit + WHOLE * room
    amount = WHOLE * (room + rng.randint(1, 3 if rng.random() < NEAR else 15) if crosses else rng.randint(1, room))
    value = None if case == "says no" else ratios["LCR_MIN"] - amount
    finding = _finding(bank, period, "LCR_PLEDGED", cell_name(cell), case, value, limit)
    text = f"{amount // WHOLE}% of net outflows"
    return PlannedNote("pledged", case != "says no", (("amount", text),), (cell,), (finding,))


def _connected(rng: random.Random, bank: Bank, period: str, case: str, clients: dict[str, int]) -> PlannedNote:
    """Two clients are said to be connected; their shares together are above 25% or not."""
    one, two = rng.sample(sorted(clients), 2)
    crosses = case == "decides" or (case == "says no" and rng.random() < 0.6)
    near = rng.random() < NEAR
    steps = rng.randint(1, 3 if near else 15) if crosses else -rng.randint(0, 3 if near else 12)
    total = LIMIT_OF_CLIENT + WHOLE * steps
    clients[one] = WHOLE * rng.randint(max(3, total // WHOLE - 24), min(24, total // WHOLE - 3))
    clients[two] = total - clients[one]
    value = None if case == "says no" else total
    cell = cell_name(SHARE, one)
    finding = _finding(bank, period, "LE_CONNECTED", cell, case, value, LIMIT_OF_CLIENT)
    cells = tuple((SHARE[0], name, SHARE[2]) for name in (one, two))
    names = (("one", f"client {one}"), ("two", f"client {two}"))
    return PlannedNote("connected", case != "says no", names, cells, (finding,))


def _waiver(rng: random.Random, bank: Bank, period: str, case: str, broken: set[str]) -> PlannedNote:
    """A waiver of the LCR or the NSFR. It lifts the finding, or it is not granted, or it ended before the reference date."""
    rule = rng.choice(sorted(broken & set(LIQUIDITY)))
    cell = RATIOS[rule][0]
    expired = case == "figures say no" or (case == "says no" and rng.random() < 0.4)
    quarters = -rng.randint(1, 6) if expired else rng.randint(1, 8)
    until = long_date(quarter_end(quarters, period))
    state = "lifted" if case == "decides" else "benign"
    finding = Finding(bank.entity, period, rule, state, cell_name(cell), legal="CRR Art. 8", kind="waiver")
    fields = (("scope", LIQUIDITY[rule]), ("until", until))
    return PlannedNote("waiver", case != "says no", fields, (cell,), (finding,))


def opposite(note: PlannedNote, period: str, figures: Figures) -> PlannedNote | None:
    """The note that says the opposite about the same figures, if that changes what follows; None if it does not."""
    (finding,) = note.findings
    if note.holds:
        if finding.state == "benign":
            return None
        return replace(note, holds=False, findings=(replace(finding, state="benign", value=None, limit=None),))
    value = limit = None
    if note.kind == "waiver":
        decides = dict(note.fields)["until"] in {long_date(quarter_end(quarters, period)) for quarters in range(1, 9)}
    elif note.kind == "pledged":
        amount = Decimal(dict(note.fields)["amount"].partition("%")[0]) / 100
        value, limit = _ratio(figures, RATIOS["LCR_MIN"][0]) - amount, Decimal(1)
        decides = value < limit
    else:
        value, limit = sum((_ratio(figures, cell) for cell in note.cells), Decimal(0)), Decimal("0.25")
        decides = value > limit
    if not decides:
        return None
    state = "lifted" if note.kind == "waiver" else "violated"
    return replace(note, holds=True, findings=(replace(finding, state=state, value=value, limit=limit),))


def _ratio(figures: Figures, cell: CellKey) -> Decimal:
    value = figures[cell]
    assert isinstance(value, Decimal)
    return value
