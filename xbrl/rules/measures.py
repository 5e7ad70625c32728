"""Turn findings into a supervisor's demands: the legal order of requirements, measures, deadlines, consequence, legal basis.

A breach is as severe in law as the requirement that it misses. The order, from the most severe:

- `pillar1`: a requirement of the CRR itself (own funds, leverage, liquidity, large exposures, output floor);
- `pillar2`: the bank's own requirement on top, TSCR or TSLRR (CRD Art. 104(1)(a), 104a);
- `buffer`: the combined buffer or the leverage ratio buffer. Distributions are limited to the maximum distributable
  amount, and a capital conservation plan is due five working days after the bank identified the failure, or up to ten days
  if the authority authorises them (CRD Art. 141 to 142);
- `filing`: figures that are wrong, contradict each other, or came late.

Within an order the measures follow from gravity and duration (CRD Art. 70(1)(a), 104(1)): `urgency` grades both.
Only two terms are law: five working days for the conservation plan (CRD Art. 142(1)), and "without undue delay" for
liquidity plans (CRR Art. 414) and for corrections (ITS (EU) 2024/3117 Art. 3(5)). The other terms are a supervisor's
practice; change them here. Missing the Pillar 2 guidance is no breach (CRD Art. 104b).

**The legal basis of a letter** is data, too. CRR is a regulation and binds banks directly. CRD is a directive and binds them
only through the national law that transposes it (TFEU Art. 288). So `bases.json` has the basis "model", which cites CRR and
CRD and says so, and "de" as an example of a national basis. Add your own there, with these keys:

- `requirements`: {rule: citation}, for rules whose own citation is replaced;
- `powers`: {subject of a measure: provisions that entitle the authority to demand it}. `law` is cited by default. A letter
  that a person signs cites `urgent` for an urgent measure, or else `signed`, if these keys are present. The two also name the
  basis of frequent reports (CRD Art. 104(1)(j)) and of limits on business (e), which the letters that models learn leave out;
  `plan` is the term of the capital conservation plan;
- `lifting`: {provision: rules whose limit does not bind a bank to which the provision applies};
- `penalty`, `licence`: the provisions that a letter cites when it announces a penalty or the withdrawal of the authorisation;
- `hearing`: `working_days`, and `urgent`, the law that lets the authority decide first, if there is such a law;
- `objection`: `months`; `suspends`, whether an objection suspends the measures, or on which subjects; `at_once`, the law by
  which the other measures apply at once. Every decision letter except the short one mentions hearing and objection.

`checked` is a remark for readers: "text" if the provision was read, "memory" if not. The sentence that explains which law
binds the bank is a block in each language, `[binding]` in `words.toml`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from xbrl.rules.rules import RuleResult, built_in_rules

BASES_FILE = Path(__file__).with_name("bases.json")
ORDERS = ("filing", "buffer", "pillar2", "pillar1")  # ascending severity
CONSEQUENCES = ("none", "penalty", "licence")  # announced by a letter beyond its measures, ascending


class Requirement(NamedTuple):
    """The requirement behind a rule: the subject of the measure, and the legal order."""

    subject: str
    order: str


REQUIREMENTS = {
    rule: Requirement(subject, order)
    for subject, order, rules in (
        ("capital", "pillar1", "CET1_MIN T1_MIN TC_MIN OWN_SHARES_MIN INTERIM_PROFIT_MIN"),
        ("capital", "pillar2", "TSCR_CET1 TSCR_T1 TSCR_TC OWN_SHARES_TSCR INTERIM_PROFIT_TSCR"),
        ("capital", "buffer", "OCR_CET1 OCR_T1 OCR_TC CBR_CET1 CBR_T1 OWN_SHARES INTERIM_PROFIT"),
        ("leverage", "pillar1", "LR_MIN"),
        ("leverage", "pillar2", "LR_TSLRR"),
        ("leverage", "buffer", "LR_OLRR"),
        ("liquidity", "pillar1", "LCR_MIN LCR_PLEDGED"),
        ("funding", "pillar1", "NSFR_MIN"),
        ("exposure", "pillar1", "LE_LIMIT LE_CONNECTED"),
        ("floor", "pillar1", "OUTPUT_FLOOR"),
        ("misstatement", "filing", "PLEDGED_COUNTED OWN_SHARES_COUNTED PROFIT_COUNTED"),
        ("timing", "filing", "LATE_FILING"),
    )
    for rule in rules.split()
}
# (subject, order) -> deadline in working days from receipt, for urgency 0, 1 and 2: the term of the plan, of the
# correction (filing, misstatement, floor), of the explanation (timing), or of the reduction (exposure).
DEADLINES = {
    ("capital", "pillar1"): (20, 15, 10),
    ("capital", "pillar2"): (30, 20, 15),
    ("leverage", "pillar1"): (20, 15, 10),
    ("leverage", "pillar2"): (30, 20, 15),
    ("liquidity", "pillar1"): (5, 3, 2),
    ("funding", "pillar1"): (15, 10, 7),
    ("exposure", "pillar1"): (20, 15, 10),
    ("floor", "pillar1"): (10, 10, 10),
    ("distributions", "buffer"): (5, 5, 5),
    ("misstatement", "filing"): (10, 10, 5),
    ("filing", "filing"): (10, 7, 5),
    ("timing", "filing"): (10, 10, 10),
}
# (subject, order) -> term of a resolution of the owners, in working days, for urgency 0, 1 and 2; 0: not demanded. A general
# meeting is called at least 21 days ahead (Directive 2007/36/EC Art. 5(1)), after the board has decided on its proposal.
OWNERS = {("capital", "pillar1"): (0, 60, 40), ("capital", "pillar2"): (0, 0, 60)}
NEEDED = (  # keys that a legal basis must have besides its powers
    "requirements",
    "lifting",
    "penalty law",
    "licence law",
    "hearing law",
    "hearing working_days",
    "objection law",
    "objection months",
    "objection suspends",
)
SMALL, LARGE = Decimal("0.03"), Decimal("0.1")  # fractions of the requirement: 0.13 and 0.45 percentage points of 4.5%


@dataclass(frozen=True)
class Measure:
    """One demand of a letter."""

    subject: str
    order: str
    urgency: int  # 0, 1 or 2
    deadline_days: int  # working days from receipt
    results: tuple[RuleResult, ...]  # the findings that the measure answers
    owners_days: int = 0  # working days for a resolution of the owners on new capital; 0: none is demanded


def requirement_of(result: RuleResult) -> Requirement:
    """Return the requirement that a violated result misses. A rule without an entry is a filing error."""
    return REQUIREMENTS.get(result.rule_id, Requirement("filing", "filing"))


def topic_of(measure: Measure) -> str:
    """Return the subject of a measure; "leverage distributions" if only the leverage ratio buffer limits distributions."""
    subjects = {requirement_of(result).subject for result in measure.results}
    return (
        "leverage distributions" if measure.subject == "distributions" and subjects == {"leverage"} else measure.subject
    )


def severity(violated: Iterable[RuleResult]) -> str:
    """Return the legal order of the worst finding, a member of `ORDERS`; "filing" without findings."""
    return max((requirement_of(result).order for result in violated), key=ORDERS.index, default="filing")


def consequence(violated: Iterable[RuleResult], repeated: Mapping[str, int]) -> str:
    """Return the consequence that a letter announces beyond its measures: "none", "penalty" or "licence".

    The authorisation may be withdrawn where requirements of CRR Parts Three, Four or Six or of CRD Art. 104(1)(a) are not met
    (CRD Art. 18(d)). A letter that threatens withdrawal must be proportionate: a minimum of capital, leverage or liquidity is
    missed by more than 10% of the minimum; or any requirement of either pillar is missed by more than 3% in the third report
    in a row. Penalties (CRD Art. 65, 70) are announced if a requirement of either pillar is missed by more than 3% or again,
    and if the same wrong figure is filed again. A missed buffer announces nothing: its price is the limit on distributions.
    """
    worst = 0
    for result in violated:
        subject, order = requirement_of(result)
        size, lasting = _size(result), _lasting([result], repeated)
        if order in ("pillar1", "pillar2"):
            ratios = order == "pillar1" and subject in ("capital", "leverage", "liquidity", "funding")
            threatened = (ratios and size == 2) or (size > 0 and lasting >= 2)
            worst = max(worst, 2 if threatened else int(size > 0 or lasting > 0))
        elif order == "filing":
            worst = max(worst, int(lasting > 0))
    return CONSEQUENCES[worst]


def plan_measures(violated: Sequence[RuleResult], repeated: Mapping[str, int]) -> list[Measure]:
    """Return the measures that a letter demands, the most severe first.

    `repeated` maps a rule id to the number of earlier reports in a row that violated the rule. A bank that misses a capital
    requirement of any order also misses the combined buffer on top of it (CRD Art. 141a), so a measure on distributions
    follows.
    """
    by_subject: dict[str, list[RuleResult]] = {}
    distributions = []
    for result in violated:
        subject, order = requirement_of(result)
        if order != "buffer":
            by_subject.setdefault(subject, []).append(result)
        if order == "buffer" or subject == "capital":
            distributions.append(result)
    if distributions:
        by_subject["distributions"] = distributions
    measures = [_measure(subject, results, repeated) for subject, results in by_subject.items()]
    return sorted(measures, key=lambda measure: -ORDERS.index(measure.order))


def _measure(subject: str, results: Sequence[RuleResult], repeated: Mapping[str, int]) -> Measure:
    """Make the measure on a subject, with its urgency within the legal order.

    A gap of more than 3% of the requirement counts 1, of more than 10% 2. Each earlier report in a row with the same finding
    adds 1. Several filing errors are more urgent than a single one. The urgency is at most 2.
    """
    order = "buffer" if subject == "distributions" else severity(results)
    grave = [result for result in results if requirement_of(result).order == order]
    urgent = max(map(_size, grave), default=0) + _lasting(grave, repeated)
    urgent = min(max(urgent, len(results) - 1) if order == "filing" else urgent, 2)
    return Measure(
        subject=subject,
        order=order,
        urgency=urgent,
        deadline_days=DEADLINES[subject, order][urgent],
        results=tuple(results),
        owners_days=OWNERS.get((subject, order), (0, 0, 0))[urgent],
    )


def _size(result: RuleResult) -> int:
    """Grade the gap as a fraction of the limit: 0, 1 (over 3%) or 2 (over 10%). A filing error or no figures: 0."""
    if requirement_of(result).order == "filing" or result.value is None or not result.limit:
        return 0
    gap = abs(result.limit - result.value) / abs(result.limit)
    return (gap > SMALL) + (gap > LARGE)


def _lasting(results: Iterable[RuleResult], repeated: Mapping[str, int]) -> int:
    return max((repeated.get(result.rule_id, 0) for result in results), default=0)


@dataclass(frozen=True)
class Basis:
    """The legal basis of a letter. `row` has the keys that the module's docstring describes."""

    row: Mapping[str, Any]

    def citation(self, key: str) -> str:
        """Return the citation of a provision: "penalty", "licence", "hearing" or "objection"."""
        return self.row[key]["law"]

    def cite(self, result: RuleResult) -> str:
        """Return the provision that a finding violates."""
        return self.row["requirements"].get(result.rule_id, result.legal)

    def power_for(self, measures: Iterable[Measure], is_signed: bool = False) -> str:
        """Return the provisions that entitle the authority to the measures, each once. `is_signed`: a person signs the letter."""
        laws = []
        for measure in measures:
            power = self.row["powers"][topic_of(measure)]
            names = (["urgent"] * (measure.urgency == 2) + ["signed"]) if is_signed else []
            laws.append(next(power[name] for name in (*names, "law") if name in power))
        return "; ".join(dict.fromkeys(provision for law in laws for provision in law.split("; ")))


def load_basis(name: str = "model", path: Path = BASES_FILE) -> Basis:
    """Return the basis with this name. Raise `UserError` for an unknown name or an incomplete file."""
    bases = json.loads(path.read_text(encoding="utf-8"))
    if name not in bases:
        raise UserError(f"{path}: there is no legal basis {name!r}; it has {', '.join(bases)}")
    for keys in (*NEEDED, *(f"powers {subject} law" for subject, _ in DEADLINES)):
        value = bases[name]
        for key in keys.split():
            if not isinstance(value, dict) or key not in value:
                raise UserError(f"{path}, {name}: {keys} is missing; xbrl/rules/measures.py describes the keys")
            value = value[key]
    return Basis(bases[name])


def citations() -> frozenset[str]:
    """Return every citation of the rules and of the legal bases: the texts that a person may cite in a file of findings."""
    texts = {text for rule in built_in_rules() for _, text in rule.citations}
    for basis in json.loads(BASES_FILE.read_text(encoding="utf-8")).values():
        laws = [entry["law"] for entry in (*basis["powers"].values(), *basis.values()) if "law" in entry]
        texts.update(laws, basis["lifting"], basis["requirements"].values())
    return frozenset(texts)
