"""What a supervisor demands after a finding: the legal order of the requirements, severity, measures and deadlines.

A breach is as severe as the requirement that it misses, whatever its size. The order, from the most severe:

- `pillar1`: a requirement of the CRR itself (own funds, leverage, liquidity, large exposures, output floor);
- `pillar2`: the bank's own requirement on top, TSCR or TSLRR (CRD Art. 104(1)(a), 104a);
- `buffer`: the combined buffer or the leverage ratio buffer. Distributions are limited to the maximum distributable
  amount, and a capital conservation plan is due within five working days (CRD Art. 141 to 142);
- `filing`: figures that contradict each other.

Missing the Pillar 2 guidance is no breach (CRD Art. 104b). Within an order, the size of the shortfall and its duration
shorten the deadline. CRD is Directive 2013/36/EU, CRR is Regulation (EU) No 575/2013.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from xbrl.rules.rules import RuleResult

ORDERS = ("filing", "buffer", "pillar2", "pillar1")  # ascending severity


class Requirement(NamedTuple):
    """What a rule protects: the subject of the measure, the legal order, the name of the limit in a sentence."""

    subject: str
    order: str
    limit: str


REQUIREMENTS = {
    "CET1_MIN": Requirement("capital", "pillar1", "minimum"),
    "T1_MIN": Requirement("capital", "pillar1", "minimum"),
    "TC_MIN": Requirement("capital", "pillar1", "minimum"),
    "TSCR_CET1": Requirement("capital", "pillar2", "CET1 share of the total SREP capital requirement"),
    "TSCR_T1": Requirement("capital", "pillar2", "Tier 1 share of the total SREP capital requirement"),
    "TSCR_TC": Requirement("capital", "pillar2", "total SREP capital requirement"),
    "OCR_CET1": Requirement("capital", "buffer", "overall capital requirement in CET1"),
    "OCR_T1": Requirement("capital", "buffer", "overall capital requirement in Tier 1"),
    "OCR_TC": Requirement("capital", "buffer", "overall capital requirement"),
    "CBR_CET1": Requirement("capital", "buffer", "CET1 share of TSCR plus the combined buffer"),
    "CBR_T1": Requirement("capital", "buffer", "Tier 1 share of TSCR plus the combined buffer"),
    "LR_MIN": Requirement("leverage", "pillar1", "minimum"),
    "LR_TSLRR": Requirement("leverage", "pillar2", "total SREP leverage ratio requirement"),
    "LR_OLRR": Requirement("leverage", "buffer", "overall leverage ratio requirement"),
    "LCR_MIN": Requirement("liquidity", "pillar1", "minimum"),
    "NSFR_MIN": Requirement("funding", "pillar1", "minimum"),
    "LE_LIMIT": Requirement("exposure", "pillar1", "large exposure limit"),
    "OUTPUT_FLOOR": Requirement("floor", "pillar1", "output floor"),
    "LCR_PLEDGED": Requirement("liquidity", "pillar1", "minimum"),
    "LE_CONNECTED": Requirement("exposure", "pillar1", "limit for connected clients"),
    **dict.fromkeys(("OWN_SHARES_MIN", "INTERIM_PROFIT_MIN"), Requirement("capital", "pillar1", "minimum")),
    **dict.fromkeys(
        ("OWN_SHARES_TSCR", "INTERIM_PROFIT_TSCR"), Requirement("capital", "pillar2", "total SREP capital requirement")
    ),
    **dict.fromkeys(("OWN_SHARES", "INTERIM_PROFIT"), Requirement("capital", "buffer", "overall capital requirement")),
    **dict.fromkeys(
        ("PLEDGED_COUNTED", "OWN_SHARES_COUNTED", "PROFIT_COUNTED"),
        Requirement("filing", "filing", "figure without it"),
    ),
    "LATE_FILING": Requirement("filing", "filing", "due date"),
}
# Rules that are not listed above, such as those of notes: template -> subject. They are requirements of the CRR.
_SUBJECT_OF_TEMPLATE = {
    **{"C_01": "items", "C_02": "capital", "C_03": "capital", "C_04": "capital", "C_47": "leverage"},
    **{"C_76": "liquidity", "C_84": "funding", "C_26": "exposure", "C_27": "exposure", "C_28": "exposure"},
}
# (subject, order) -> deadline in working days, for urgency 0, 1 and 2. Filing errors are more urgent if there are more.
# Only the last is set by law: CRD Art. 142(1). The others are this supervisor's practice.
DEADLINES = {
    ("capital", "pillar1"): (10, 7, 5),
    ("capital", "pillar2"): (20, 15, 10),
    ("leverage", "pillar1"): (10, 7, 5),
    ("leverage", "pillar2"): (20, 15, 10),
    ("liquidity", "pillar1"): (5, 3, 2),
    ("funding", "pillar1"): (10, 7, 5),
    ("exposure", "pillar1"): (15, 10, 5),
    ("floor", "pillar1"): (10, 7, 5),
    ("items", "pillar1"): (10, 7, 5),
    ("filing", "filing"): (10, 5, 3),
    ("distributions", "buffer"): (5, 5, 5),
}


@dataclass(frozen=True)
class Measure:
    """One demand of a letter."""

    subject: str
    order: str
    urgency: int  # 0, 1 or 2
    deadline_days: int  # working days from receipt
    results: tuple[RuleResult, ...]  # the findings that it answers
    repeated: bool  # whether one of them was found before


def requirement_of(result: RuleResult) -> Requirement:
    """The requirement that a violated result misses. A rule without an entry is judged by the template of its cell."""
    if result.rule_id in REQUIREMENTS:
        return REQUIREMENTS[result.rule_id]
    subject = _SUBJECT_OF_TEMPLATE.get(result.cell[0][:4])
    if result.kind == "filing" or subject is None:
        return Requirement("filing", "filing", "limit")
    return Requirement(subject, "pillar1", "limit")


def severity(violated: Iterable[RuleResult]) -> str:
    """The legal order of the worst finding, one of `ORDERS`; "filing" without findings."""
    return max((requirement_of(result).order for result in violated), key=ORDERS.index, default="filing")


def urgency(results: Iterable[RuleResult], repeated: Mapping[str, int]) -> int:
    """0, 1 or 2 within a legal order.

    A shortfall of more than 2.5% of the limit counts one, of more than 10% two; each earlier report in a row that showed
    the same counts one more (`repeated`: rule id -> number of these reports).
    """
    results = list(results)
    worst = max(map(_shortfall, results), default=Decimal(0))
    size = (worst > Decimal("0.025")) + (worst > Decimal("0.1"))
    return min(size + max((repeated.get(result.rule_id, 0) for result in results), default=0), 2)


def plan_measures(violated: Sequence[RuleResult], repeated: Mapping[str, int]) -> list[Measure]:
    """The measures that a letter demands, the most severe first. `repeated` is as in `urgency`.

    Whoever misses a capital requirement of any order also misses the combined buffer, which comes on top of all others
    (CRD Art. 141a): the measure on distributions follows.
    """
    by_subject: dict[str, list[RuleResult]] = {}
    distributions = []
    for result in violated:
        subject, order, _ = requirement_of(result)
        if order != "buffer":
            by_subject.setdefault(subject, []).append(result)
        if order == "buffer" or subject == "capital":
            distributions.append(result)
    if distributions:
        by_subject["distributions"] = distributions
    measures = [_measure(subject, results, repeated) for subject, results in by_subject.items()]
    return sorted(measures, key=lambda measure: -ORDERS.index(measure.order))


def _measure(subject: str, results: Sequence[RuleResult], repeated: Mapping[str, int]) -> Measure:
    order = "buffer" if subject == "distributions" else severity(results)
    urgent = urgency([result for result in results if requirement_of(result).order == order], repeated)
    if subject == "filing":  # several errors are more urgent than one
        urgent = min(max(len(results) - 1, urgent), 2)
    is_repeated = any(repeated.get(result.rule_id) for result in results)
    return Measure(subject, order, urgent, DEADLINES[subject, order][urgent], tuple(results), is_repeated)


def _shortfall(result: RuleResult) -> Decimal:
    """The distance to the limit as a fraction of it; 0 for filing errors and for a finding without figures."""
    if result.kind == "filing" or result.value is None or not result.limit:
        return Decimal(0)
    return abs(result.limit - result.value) / abs(result.limit)
