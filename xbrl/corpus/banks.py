"""Invented banks: their identity, and their own capital requirements and buffers.

No bank is a real institution. The identifiers have the format and the check digits of an LEI (ISO 17442) but start
with a prefix that no LEI issuer uses. The names are combinations of syllables.
"""

import functools
import random
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import NamedTuple

from xbrl.read.render import Addressee

LEI_PREFIX = "SYNB00"  # a real LEI starts with the four digits of its issuer

# (ISO country code, currency, approximate units of the currency per euro)
COUNTRIES = (
    ("DE", "EUR", 1), ("FR", "EUR", 1), ("IT", "EUR", 1), ("ES", "EUR", 1), ("NL", "EUR", 1), ("AT", "EUR", 1), ("BE", "EUR", 1),
    ("FI", "EUR", 1), ("IE", "EUR", 1), ("PT", "EUR", 1), ("SK", "EUR", 1), ("SI", "EUR", 1), ("EE", "EUR", 1), ("LT", "EUR", 1),
    ("DK", "DKK", 7), ("SE", "SEK", 11), ("PL", "PLN", 4), ("CZ", "CZK", 25), ("RO", "RON", 5), ("HU", "HUF", 400),
)  # fmt: skip

# business model -> (its share of the banks in percent, name suffixes)
BUSINESS_MODELS = {
    "universal bank": (30, ("Bank", "Banking Group", "Credit Bank")),
    "savings bank": (20, ("Savings Bank", "Sparbank")),
    "cooperative bank": (20, ("Cooperative Bank", "Peoples Bank")),
    "mortgage bank": (15, ("Mortgage Bank", "Land Bank")),
    "investment bank": (15, ("Capital", "Merchant Bank")),
}

_NAME_STARTS = (
    "Alder", "Amber", "Arn", "Asp", "Bel", "Birk", "Bran", "Brook", "Cal", "Cedar", "Corn", "Dal", "Dorn", "East", "Elm", "Falk", "Fern",
    "Gold", "Grim", "Hart", "Hazel", "Hol", "Iron", "Kar", "Kings", "Lark", "Lin", "Lund", "Maple", "Mar", "Mill", "Nord", "Oak", "Ost",
    "Pel", "Raven", "Ring", "Rosen", "Salt", "Silver", "Sol", "Stein", "Stor", "Sunder", "Tall", "Thorn", "Ul", "Val", "Wald", "West",
)  # fmt: skip
_NAME_ENDS = (
    "bach", "berg", "borg", "bridge", "burg", "by", "dale", "feld", "field", "ford", "gate", "grund", "ham", "haven", "heim", "hill", "holm",
    "land", "lund", "mark", "mere", "minster", "mond", "mouth", "ness", "port", "ridge", "sand", "see", "stad", "stein", "strand", "thal",
    "ton", "vale", "vik", "wald", "well", "wick", "worth",
)  # fmt: skip


@dataclass(frozen=True)
class Bank:
    """An invented bank. Amounts are in units of `currency`; ratios and requirements are fractions (0.045 is 4.5%)."""

    entity: str  # 20 characters in the format of an LEI
    name: str
    country: str
    currency: str
    model: str  # business model, a key of BUSINESS_MODELS
    trea: Decimal  # total risk exposure amount, unless the note determines it
    uses_irb: bool
    pillar2: Decimal  # Pillar 2 requirement (P2R), on top of 8%
    buffers: dict[str, Decimal]  # conservation, countercyclical, systemic_risk, g_sii, o_sii: fractions of TREA
    leverage_pillar2: Decimal  # P2R for excessive leverage, on top of 3%
    decimals: int  # XBRL `decimals` (accuracy) of its amounts
    ratio_decimals: int = 4  # XBRL `decimals` of its ratios
    scope: str = "CON"  # scope of its reports: "CON" (consolidated) or "IND" (individual)

    @property
    def addressee(self) -> Addressee:
        """Return the bank's entry in the register."""
        return Addressee(self.entity, self.name, self.country, self.model)


class Limits(NamedTuple):
    """The limits of one ratio, most severe first, as fractions of TREA or of the leverage exposure."""

    minimum: Decimal  # the legal minimum, CRR Art. 92(1)
    own: Decimal  # minimum plus the bank's Pillar 2 requirement: TSCR, or TSLRR
    overall: Decimal  # own plus the buffers: OCR, or OLRR


def requirements(bank: Bank) -> dict[str, Limits]:
    """Return the limits of the ratios "cet1", "t1", "total" and "leverage" of a bank, to four decimal places.

    At least 56.25% of P2R must be CET1 and 75% Tier 1 (CRD Art. 104a(4)). The combined buffer must be CET1 and comes on
    top of each of the three TSCR ratios (CRD Art. 128, 141a). The leverage ratio buffer is half of the G-SII buffer (CRR
    Art. 92(1a)).
    """
    buffer = bank.buffers
    added = (buffer[name] for name in ("conservation", "countercyclical", "systemic_risk"))
    combined = sum(added, max(buffer["g_sii"], buffer["o_sii"]))
    minima = {name: Decimal(least) for name, least in (("cet1", "0.045"), ("t1", "0.06"), ("total", "0.08"))}
    own = {
        "cet1": round(minima["cet1"] + Decimal("0.5625") * bank.pillar2, 4),
        "t1": round(minima["t1"] + Decimal("0.75") * bank.pillar2, 4),
        "total": minima["total"] + bank.pillar2,
    }
    limits = {name: Limits(minima[name], least, least + combined) for name, least in own.items()}
    tslrr = Decimal("0.03") + bank.leverage_pillar2
    return limits | {"leverage": Limits(Decimal("0.03"), tslrr, tslrr + buffer["g_sii"] / 2)}


def make_bank(seed: int, index: int) -> Bank:
    """Generate bank `index` of the population `seed`. The result depends on these two arguments alone.

    The first 20,000 banks of a population have different names.
    """
    rng = random.Random(f"bank {seed} {index}")
    model = rng.choices(tuple(BUSINESS_MODELS), [share for share, _ in BUSINESS_MODELS.values()])[0]
    size = rng.choices(("small", "medium", "large"), (5, 3, 2) if model != "investment bank" else (1, 2, 2))[0]
    country, currency, rate = rng.choice(COUNTRIES)
    low, high = {"small": (300, 3_000), "medium": (3_000, 30_000), "large": (30_000, 300_000)}[size]  # million euro
    large = size == "large"
    g_sii = rng.choice(("0.01", "0.015")) if large and rng.random() < 0.4 else "0"
    has_o_sii = large or (size == "medium" and rng.random() < 0.3)
    return Bank(
        entity=lei(LEI_PREFIX + "".join(rng.choices("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=12))),
        name=_name(seed, index, rng.choice(BUSINESS_MODELS[model][1])),
        country=country,
        currency=currency,
        model=model,
        trea=Decimal(round(low * (high / low) ** rng.random() * rate * 1000)) * 1000,
        uses_irb=large or (size == "medium" and rng.random() < 0.4),
        pillar2=Decimal(rng.randint(2, 11)) * Decimal("0.0025") if rng.random() < 0.9 else Decimal(0),
        buffers={
            "conservation": Decimal("0.025"),
            "countercyclical": Decimal(rng.randint(0, 100)) / 5000,
            "systemic_risk": Decimal(rng.choice(("0", "0", "0", "0.005", "0.01"))),
            "g_sii": Decimal(g_sii),
            "o_sii": Decimal(rng.choice(("0.0025", "0.005", "0.01", "0.015", "0.02")) if has_o_sii else "0"),
        },
        leverage_pillar2=Decimal(rng.choice(("0", "0", "0.001", "0.0015", "0.002", "0.0025", "0.005"))),
        decimals=rng.choice({"small": (0, -3, -3), "medium": (-3,), "large": (-3, -4, -4)}[size]),
        ratio_decimals=rng.choice((4, 4, 4, 5, 6)),
    )


def in_euro(bank: Bank) -> Bank:
    """Move the bank to a country of the euro area if it is outside, because amounts in notes are in EUR."""
    if bank.currency == "EUR":
        return bank
    countries = [country for country, currency, _ in COUNTRIES if currency == "EUR"]
    rate = next(rate for _, currency, rate in COUNTRIES if currency == bank.currency)
    country = countries[int(bank.entity[-2:]) % len(countries)]
    return replace(bank, country=country, currency="EUR", trea=bank.trea // rate)


def lei(first_18: str) -> str:
    """Complete an LEI: append the two ISO 17442 check digits (ISO/IEC 7064, MOD 97-10) to 18 characters 0-9A-Z."""
    digits = "".join(str(int(character, 36)) for character in first_18)
    return f"{first_18}{98 - int(digits + '00') % 97:02d}"


def _name(seed: int, index: int, suffix: str) -> str:
    """Name bank `index` after a place.

    The 2,000 place names are used in random order, then again with a prefix.
    """
    places = _place_names(seed)
    passes, position = divmod(index, len(places))
    prefix = ("", "New ", "Old ", "Upper ", "Lower ", "Great ", "Little ", "North ", "South ", "Inner ")[passes % 10]
    number = f" {passes // 10 + 1}" if passes >= 10 else ""
    return f"{prefix}{places[position]} {suffix}{number}"


@functools.cache
def _place_names(seed: int) -> list[str]:
    """Return all place names, in the random order of the population `seed`."""
    names = [first + second for first in _NAME_STARTS for second in _NAME_ENDS]
    random.Random(f"names {seed}").shuffle(names)
    return names
