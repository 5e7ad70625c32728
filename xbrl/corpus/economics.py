"""Capital, liquidity, funding and large exposures of an invented bank at one reference date, fitted to the bank's note.

The amounts are drawn first, and every reported ratio is computed from the amounts. A breach is created by giving the bank too
little capital or too small a buffer, never by editing a ratio.

Each ratio ("cet1", "t1", "total", "leverage", "lcr", "nsfr") has one or more limits: the legal minimum, the bank's own
requirement, the overall requirement (with the buffers). The *level* of a ratio is the name of the lowest limit that it
misses ("minimum", "own", "overall"), or "ok". A bank meets the combined buffer only if CET1, Tier 1 and total capital are
all "ok" (CRD Art. 141a). Ratios close to a limit are over-represented, on both sides of it.

If a note states an amount, the size of the bank follows from it: the buffer or CET1 is drawn so that a limit is missed without
the amount, or is still met. This draw does not depend on what the note says about the amount, so a model cannot guess the breach
from the wording or the wording from the breach.
"""

import random
from dataclasses import dataclass, replace
from decimal import Decimal

from xbrl.corpus.banks import COUNTRIES, Bank, lei, requirements
from xbrl.corpus.note_texts import HandNote
from xbrl.rules.note_facts import CAPITAL

STEP = Decimal("0.0001")  # one basis point: ratios are reported to four decimal places
NEAR = 0.45  # probability that a ratio is within ten steps of a limit
EXPOSURE_LIMIT = Decimal("0.25")  # as a share of Tier 1, CRR Art. 395(1)
LARGEST = Decimal("0.2499")  # the largest exposure within the limit, as a share of Tier 1
INSTITUTION_LIMIT = Decimal(150_000_000)  # EUR; alternative limit for exposures to institutions, CRR Art. 395(1)

# (weight, level of each affected ratio). Ratios that are not listed are "ok". CET1 is part of Tier 1, and Tier 1 is part of total
# capital. A bank that misses a minimum with one of the three therefore mostly misses the buffer with the other two.
BREACHES: tuple[tuple[int, dict[str, str]], ...] = (
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
    (24, {"exposure": "over"}),
    (50, {"floor": "missed"}),
)
CAPITAL_RATIOS = {"cet1", "t1", "total"}
# The largest distance between a sound ratio and its highest limit.
HEADROOM = {
    **{"cet1": Decimal("0.036"), "t1": Decimal("0.036"), "total": Decimal("0.04")},
    **{"leverage": Decimal("0.0225"), "lcr": Decimal("0.54"), "nsfr": Decimal("0.225")},
}
_CLIENTS = (
    ("Aster", "Brunn", "Corvin", "Drava", "Elster", "Fjord", "Garda", "Halden", "Istra", "Jura", "Kestrel", "Lerma", "Moldau", "Norrland"),
    ("Chemicals", "Foods", "Freight", "Hotels", "Kliniken", "Logistics", "Motors", "Paper", "Solar", "Steel", "Telecom", "Textil"),
    ("AG", "AB", "BV", "GmbH", "Group", "NV", "plc", "SA", "SpA"),
)  # fmt: skip


@dataclass(frozen=True)
class Exposure:
    """The exposure to one counterparty, in units of the bank's currency."""

    code: str  # in the format of an LEI
    name: str
    institution: bool
    before: Decimal  # before credit risk mitigation
    after: Decimal


@dataclass(frozen=True)
class Economics:
    """Amounts in whole units of the bank's currency."""

    levels: dict[str, str]
    trea: Decimal
    cet1: Decimal
    at1: Decimal
    t2: Decimal
    exposure: Decimal  # leverage exposure measure
    liquid_assets: Decimal  # liquidity buffer
    net_outflow: Decimal
    available_funding: Decimal
    required_funding: Decimal
    clients: tuple[Exposure, ...]
    institution_limit: Decimal  # fraction of Tier 1; 0.25, or more if EUR 150 million is more
    profit: Decimal | None  # stated by the note, or None
    dropped: tuple[str, ...]  # names of the note's statements that the figures contradict

    @property
    def tier1(self) -> Decimal:
        """Return Tier 1 capital: CET1 plus AT1."""
        return self.cet1 + self.at1

    @property
    def ratios(self) -> dict[str, Decimal]:
        """Compute the six ratios from the amounts."""
        return {
            "cet1": self.cet1 / self.trea,
            "t1": self.tier1 / self.trea,
            "total": (self.tier1 + self.t2) / self.trea,
            "leverage": self.tier1 / self.exposure,
            "lcr": self.liquid_assets / self.net_outflow,
            "nsfr": self.available_funding / self.required_funding,
        }


def in_round_amounts(economics: Economics) -> Economics:
    """Round the amounts so that a small model can subtract them: to 0.1 million, or to 0.01 million if CET1 is at most 100 million."""
    unit = Decimal(100_000) if economics.cet1 > 100_000_000 else Decimal(10_000)
    names = ("trea", "cet1", "at1", "t2", "liquid_assets", "net_outflow")
    return replace(economics, **{name: round(getattr(economics, name) / unit) * unit for name in names})


def draw_levels(rng: random.Random, count: int) -> dict[str, str]:
    """Draw up to `count` of `BREACHES` and return the level of each affected ratio. With `count` 0 the bank is sound.

    No two breaches affect the same ratio. The three capital ratios count as one ratio here.
    """
    levels: dict[str, str] = {}
    taken: set[str] = set()
    for _ in range(count):
        possible = [(weight, breach) for weight, breach in BREACHES if not set(breach) & taken]
        breach = rng.choices([breach for _, breach in possible], [weight for weight, _ in possible])[0]
        levels |= breach
        taken |= CAPITAL_RATIOS if set(breach) & CAPITAL_RATIOS else set(breach)
    return levels


def draw_economics(
    rng: random.Random,
    bank: Bank,
    levels: dict[str, str],
    note: HandNote,
    crosses: bool,
    following: Economics | None,
    exactly: bool,
) -> Economics | None:
    """Draw amounts that put the bank's ratios at `levels` and agree with its note.

    If `crosses`, the bank misses a limit without the note's amount, and the connected clients of the note exceed the limit
    together. `following` has the amounts of the next quarter; the drawn quarter differs little from it. Return None if the
    levels contradict each other or the note. If `exactly` is false, the note's statements have precedence over `crosses`.
    """
    drawn = _draw_ratios(rng, bank, levels, following.ratios if following else {})
    if drawn is None:
        return None
    ratios = drawn | {name: note.states[name] for name in ("nsfr", "leverage") if name in note.states}
    jitter = Decimal(rng.randint(15, 40)) / 1_000_000  # real amounts give no round ratios; it disappears in rounding
    ratios["lcr"], buffer, outflow = _liquidity(rng, ratios["lcr"], note, crosses)
    fits, cet1 = _core_capital(rng, bank, ratios, note, crosses)
    if exactly and not fits:
        return None
    trea = following.trea * (1 - Decimal(rng.randint(-20, 40)) / 1000) if following else bank.trea
    known = {name: amount for name, amount in note.clients.items() if amount}
    tier1 = _tier1_of_clients(rng, note, known, crosses)
    dropped = ()
    if tier1 and cet1 and max(known.values()) > LARGEST * cet1 / ratios["cet1"] * ratios["t1"]:
        dropped, known = ("exposures",), {}
    if cet1:
        trea = cet1 / (ratios["cet1"] + jitter)
    elif tier1:
        trea = tier1 / (ratios["t1"] + jitter)
    elif buffer:
        trea = buffer / ratios["lcr"] / _uniform(rng, "0.06", "0.20") * ratios["leverage"] / ratios["t1"]
    trea = whole(trea)
    tier1 = whole(trea * (ratios["t1"] + jitter))
    cet1 = min(whole(cet1 or trea * (ratios["cet1"] + jitter)), tier1)
    own_funds = max(tier1, whole(trea * (ratios["total"] + jitter)))
    exposure = whole(tier1 / (ratios["leverage"] + Decimal(rng.randint(15, 40)) / 1_000_000))
    if not buffer:
        outflow = outflow or whole(exposure * _uniform(rng, "0.06", "0.20"))
        buffer = whole(outflow * (ratios["lcr"] + jitter))
    required = whole(exposure * _uniform(rng, "0.45", "0.80"))
    rate = next(rate for _, currency, rate in COUNTRIES if currency == bank.currency)
    limit = max(EXPOSURE_LIMIT, min(Decimal(1), INSTITUTION_LIMIT * rate / tier1))
    return Economics(
        levels=levels,
        trea=trea,
        cet1=cet1,
        at1=tier1 - cet1,
        t2=own_funds - tier1,
        exposure=exposure,
        liquid_assets=buffer,
        net_outflow=outflow or whole(buffer / (ratios["lcr"] + jitter)),
        available_funding=whole(required * (ratios["nsfr"] + jitter)),
        required_funding=required,
        clients=_draw_clients(rng, bank, tier1, limit, "exposure" in levels, note, known, crosses),
        institution_limit=limit,
        profit=note.states.get("profit"),
        dropped=dropped,
    )


def _liquidity(
    rng: random.Random, ratio: Decimal, note: HandNote, crosses: bool
) -> tuple[Decimal, Decimal | None, Decimal | None]:
    """Return (LCR, liquidity buffer, net outflow) as the note's statements and amount determine them.

    The buffer or the outflow is None if the note does not determine it.
    """
    states, amount = note.states, note.amount({"pledged"})
    buffer, outflow, least = states.get("buffer"), states.get("outflow"), states.get("buffer_least", Decimal(0))
    if buffer and outflow:
        return buffer / outflow, buffer, outflow
    if not buffer and (amount or least):
        around_amount = amount / _spread(rng, "0.04", "0.6") if amount else Decimal(0)
        buffer = max(whole(around_amount), whole(least * _uniform(rng, "1.02", "1.6")))
    if "lcr" in states:
        return states["lcr"], buffer, None
    ratio = max(ratio, states.get("lcr_least", ratio))
    if "lcr_most" in states and ratio > states["lcr_most"]:
        ratio = states["lcr_most"] - STEP * rng.randint(0, 3000)
    if not amount or not buffer or ratio < 1:
        return ratio, buffer, None
    edge = 1 / (1 - min(amount / buffer, Decimal("0.8")))  # at this LCR, the LCR without the amount is exactly 100%
    if crosses:
        ratio = edge - max(STEP * rng.randint(2, 10), (edge - 1) * Decimal(rng.randint(20, 980)) / 1000)
    else:
        ratio = edge + (STEP * rng.randint(2, 10) if rng.random() < NEAR else STEP * rng.randint(11, 5000))
    return max(ratio, Decimal(1)).quantize(STEP), buffer, None


def _core_capital(
    rng: random.Random, bank: Bank, ratios: dict[str, Decimal], note: HandNote, crosses: bool
) -> tuple[bool, Decimal | None]:
    """Return (whether the ratios agree with the note's amount, CET1). CET1 is None if the note does not determine it."""
    amount = note.amount(CAPITAL)
    stated, least = note.states.get("cet1"), note.states.get("cet1_least", Decimal(0))
    if not amount:
        return True, stated or (whole(least * _uniform(rng, "1.02", "1.5")) if least else None)
    needed = {name: limits.overall for name, limits in requirements(bank).items() if name != "leverage"}
    margin = min(ratios[name] - limit for name, limit in needed.items()) / ratios["cet1"]  # as a share of CET1
    any_size = whole(max(amount / _spread(rng, "0.01", "0.2"), least * Decimal("1.1")))
    if margin <= 0:  # a requirement is missed even with the amount
        return True, stated or any_size
    if stated:
        return (amount / stated > margin * Decimal("1.003")) == crosses and amount < stated, stated
    near = rng.random() < NEAR
    beyond, within = ("1.005", "1.06") if near else ("1.06", "3"), ("0.94", "0.995") if near else ("0.12", "0.94")
    share = margin * _uniform(rng, *(beyond if crosses else within))
    if Decimal("0.002") < share < Decimal("0.35") and amount / share >= least:
        return True, whole(amount / share)
    return False, any_size


def _tier1_of_clients(rng: random.Random, note: HandNote, known: dict[str, Decimal], crosses: bool) -> Decimal | None:
    """Return Tier 1 capital at which each stated exposure is within the limit. Return None if the note states no exposure.

    The connected clients together exceed the limit if `crosses`, and otherwise keep within it.
    """
    if not known:
        return None
    pair = [known[name] for name in note.connected or () if name in known]
    least = max(known.values()) / LARGEST
    if len(pair) < 2:
        return least * (1 + _spread(rng, "0.01", "3"))
    at_limit, distance = sum(pair) / EXPOSURE_LIMIT, 1 + _spread(rng, "0.001", "0.9" if crosses else "3")
    return max(least, at_limit / distance if crosses else at_limit * distance)


def _draw_clients(
    rng: random.Random,
    bank: Bank,
    tier1: Decimal,
    institution_limit: Decimal,
    over: bool,
    note: HandNote,
    known: dict[str, Decimal],
    crosses: bool,
) -> tuple[Exposure, ...]:
    """Draw the large exposures: the note's clients, within the limit, and one to four more. If `over`, one of these exceeds it."""
    shares = {name: amount / tier1 for name, amount in known.items()}
    pair = note.connected
    if pair and not set(pair) <= set(shares):
        free = [name for name in pair if name not in shares]
        near = rng.random() < NEAR  # whether the sum of the two shares is close to the limit
        if crosses:
            total = EXPOSURE_LIMIT + STEP * (rng.randint(1, 30) if near else rng.randint(31, 2000))
        else:
            total = EXPOSURE_LIMIT - STEP * (rng.randint(0, 30) if near else rng.randint(31, 1900))
        first = shares.get(pair[0], shares.get(pair[1]))
        if first is None:
            first = max(total - LARGEST, Decimal("0.02"))
            first += max(total - 2 * first, Decimal(0)) * Decimal(rng.randint(0, 1000)) / 1000
            shares[free.pop()] = first
        rest = total - first if Decimal("0.005") < total - first <= LARGEST else None
        if rest is None:  # the stated exposure is too small or too large to complete to `total`
            rest = LARGEST if crosses else max(EXPOSURE_LIMIT - first - STEP * rng.randint(1, 300), Decimal("0.005"))
        shares[free.pop()] = rest
    for name in note.clients:
        shares.setdefault(name, STEP * rng.randint(200, 2400))
    names, makers = list(shares), random.Random(f"clients {bank.entity}")
    more = makers.randint(1, 4)
    over_limit = rng.randrange(more) if over else -1
    clients = [_client(rng, makers, tier1, name, False, shares[name], name in known) for name in names]
    for place in range(more):
        institution = makers.random() < 0.35
        limit = institution_limit if institution else EXPOSURE_LIMIT
        if place == over_limit:
            share = limit + STEP * (rng.randint(1, 10) if rng.random() < NEAR else rng.randint(11, int(limit / STEP)))
        elif rng.random() < NEAR / 2:
            share = limit - STEP * rng.randint(0, 9)
        else:
            share = STEP * rng.randint(400, int(limit / STEP) - 10)
        name = " ".join(makers.choice(part) for part in _CLIENTS)
        clients.append(_client(rng, makers, tier1, name, institution, share, False))
    order = makers.sample(range(len(clients)), len(clients))
    return tuple(clients[place] for place in order)


def _client(
    rng: random.Random,
    makers: random.Random,
    tier1: Decimal,
    name: str,
    institution: bool,
    share: Decimal,
    stated: bool,
) -> Exposure:
    code = lei("SYNC00" + "".join(makers.choices("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=12)))
    if stated:
        amount = whole(share * tier1)
        return Exposure(code, name, institution, amount, amount)
    before = share / (1 - (Decimal(makers.randint(500, 6000)) / 10_000 if makers.random() < 0.4 else 0))
    if share < Decimal("0.0991") and rng.random() < NEAR / 2:  # near 10%, from which an exposure is large, CRR Art. 392
        before = Decimal("0.1") + STEP * rng.randint(-9, 9)
    jitter = STEP * rng.randint(15, 40) / 100
    return Exposure(code, name, institution, tier1 * (before - jitter), tier1 * (share - jitter))


def _interval_of_level(bank: Bank, ratio: str, level: str) -> tuple[Decimal, Decimal]:
    """Return the interval [low, high) in which `ratio` has this level.

    A level is named after the lowest limit that the ratio misses, which is `high`; the next lower limit is `low`. Below the
    lowest limit the interval begins at 40% of it. The interval of "ok" ends `HEADROOM` above the highest limit.
    """
    limits = requirements(bank).get(ratio, (Decimal(1),))
    index = len(limits) if level == "ok" else ("minimum", "own", "overall").index(level)
    low = limits[index - 1] if index else limits[0] * Decimal("0.4")
    return low, limits[index] if index < len(limits) else limits[-1] + HEADROOM[ratio]


def _draw_ratios(
    rng: random.Random, bank: Bank, levels: dict[str, str], following: dict[str, Decimal]
) -> dict[str, Decimal] | None:
    """Draw the six ratios as multiples of `STEP`. Return None if the levels contradict each other."""
    intervals = {ratio: _interval_of_level(bank, ratio, levels.get(ratio, "ok")) for ratio in HEADROOM}
    ratios: dict[str, Decimal] = {}
    for ratio in ("total", "t1", "cet1", "leverage", "lcr", "nsfr"):
        parts = {"total": ("cet1", "t1"), "t1": ("cet1",)}.get(ratio, ())  # a sum is at least as large as each part
        low, high = max(intervals[name][0] for name in (ratio, *parts)), intervals[ratio][1]
        ceiling = {"t1": ratios.get("total"), "cet1": ratios.get("t1")}.get(ratio)
        first = int((low / STEP).to_integral_value("ROUND_CEILING"))
        last = int((high / STEP - STEP).to_integral_value("ROUND_FLOOR"))
        last = min(last, int(ceiling / STEP)) if ceiling is not None else last
        if first > last:
            return None
        level = levels.get(ratio, "ok")
        ratios[ratio] = STEP * _draw_steps(rng, first, last, level, ceiling is not None, following.get(ratio))
    return ratios


def _draw_steps(
    rng: random.Random, first: int, last: int, level: str, has_ceiling: bool, following: Decimal | None
) -> int:
    """Draw a number of steps from `first` to `last`, often close to a limit.

    A sound ratio with a ceiling (CET1 is at most Tier 1, Tier 1 at most total capital) is usually close to the ceiling.
    """
    if following is not None and rng.random() < 0.7:
        width = max(3, (last - first) // 40)
        middle = min(max(int(following / STEP), first), last)
        return rng.randint(max(first, middle - width), min(last, middle + width))
    if has_ceiling and level == "ok" and rng.random() >= NEAR / 2:
        return rng.choice((last, rng.randint(max(first, last - 300), last)))
    between = level not in ("minimum", "ok")  # the interval has a limit at each end
    if rng.random() < (1.5 * NEAR if between else NEAR):
        at_top = level == "minimum" or (between and rng.random() < 0.5)
        return rng.randint(max(first, last - 9), last) if at_top else rng.randint(first, min(last, first + 9))
    return rng.randint(first, last)


def whole(value: Decimal) -> Decimal:
    """Round to whole units of currency."""
    return value.quantize(Decimal(1))


def _uniform(rng: random.Random, low: str, high: str) -> Decimal:
    """Draw uniformly from [low, high], on a grid of 10,001 values."""
    return Decimal(low) + (Decimal(high) - Decimal(low)) * rng.randint(0, 10_000) / 10_000


def _spread(rng: random.Random, low: str, high: str) -> Decimal:
    """Draw from [low, high] so that the logarithm is uniform."""
    return Decimal(f"{float(low) * (float(high) / float(low)) ** rng.random():.5f}")
