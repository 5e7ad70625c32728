"""The supervisor's letter on a report: addressee, legal basis, findings with figures, measures, deadline, reporting duty.

The wording follows the severity of the findings and the type of the bank; among sentences of one meaning the choice is
pure in the bank and the date. All sentences are our own. Articles: CRD is Directive 2013/36/EU, CRR is Regulation (EU)
No 575/2013. Powers: CRD Art. 102 and 104; plans: CRD Art. 142 (capital), CRR Art. 414 (liquidity and stable funding);
distributions: CRD Art. 141; reporting: CRR Art. 430.
"""

import datetime
import random
from collections.abc import Sequence
from decimal import Decimal

from data.regulator.render import Addressee, cell_name, format_figure, format_limit, short_label, table_name
from data.regulator.rules import RuleResult

STYLES = ("full", "short")

# rule -> the subject it belongs to, and what its limit is called. Filing errors are a subject of their own.
_SUBJECT = {
    "CET1_MIN": ("capital", "minimum"),
    "T1_MIN": ("capital", "minimum"),
    "TC_MIN": ("capital", "minimum"),
    "TSCR_CET1": ("capital", "CET1 share of the total SREP capital requirement"),
    "TSCR_T1": ("capital", "Tier 1 share of the total SREP capital requirement"),
    "TSCR_TC": ("capital", "total SREP capital requirement"),
    "OCR_TC": ("capital", "overall capital requirement"),
    "LR_MIN": ("leverage", "minimum"),
    "LR_OLRR": ("leverage", "overall leverage ratio requirement"),
    "LCR_MIN": ("liquidity", "minimum"),
    "NSFR_MIN": ("funding", "minimum"),
}
_BOARD = {
    "universal bank": "Management Board",
    "savings bank": "Board of Managing Directors",
    "cooperative bank": "Executive Board",
    "mortgage bank": "Management Board",
    "investment bank": "Board of Directors",
}
_POWER = {
    "capital": "Articles 102 and 104(1) CRD",
    "leverage": "Article 104(1) CRD",
    "liquidity": "Article 414 CRR",
    "funding": "Article 414 CRR",
    "filing": "Article 430 CRR",
}
_FINDING = {
    "min": (
        "The {label} was {value} ({cell}), below the {limit_name} of {limit} under {legal}.",
        "{legal}: the {limit_name} is {limit}; the {label} in {cell} is {value}, short by {gap}.",
        "With {value} in {cell}, the {label} misses the {limit_name} of {limit} ({legal}) by {gap}.",
    ),
    "max": (
        "The {label} was {value} ({cell}), above the limit of {limit} under {legal}.",
        "{legal}: the limit is {limit}; {cell} shows {value}.",
    ),
    "expected": (
        "{cell} ({label}) reports {value}, whereas your own figures give {limit} ({legal}).",
        "The {label} in {cell} contradicts the other figures of the report: {value} against {limit} ({legal}).",
        "By {legal}, {cell} ({label}) should read {limit}; you filed {value}.",
    ),
}
_MEASURE = {
    ("capital", "minor"): (
        "Bring own funds back above the requirement and submit a capital conservation plan {deadline}.",
        "Submit {deadline} a capital conservation plan that closes the shortfall without new risk exposure.",
    ),
    ("capital", "moderate"): (
        "Submit {deadline} a capital plan that restores own funds by issuance or by reducing risk exposure, and retain all profits until then.",
        "Retain profits in full and present {deadline} a capital plan with the steps, the amounts and the dates of each step.",
    ),
    ("capital", "serious"): (
        "Make no distributions and pay no variable remuneration until own funds are restored; submit {deadline} a recapitalisation plan approved by your shareholders' body.",
        "Suspend all distributions at once, stop new business that raises risk exposure, and submit {deadline} a plan to recapitalise the bank.",
    ),
    ("leverage", "minor"): (
        "Raise Tier 1 or shed exposure so that the leverage requirement is met again, and confirm it {deadline}.",
        "Submit {deadline} the steps by which the leverage requirement will be met again.",
    ),
    ("leverage", "moderate"): (
        "Submit {deadline} a plan that reduces the leverage exposure or raises Tier 1 capital.",
        "Let the balance sheet not grow and present {deadline} a plan for reducing leverage.",
    ),
    ("leverage", "serious"): (
        "Reduce the leverage exposure without delay, take on no new exposure that is not collateralised in cash, and submit {deadline} a plan to restore the ratio.",
        "Stop the growth of the balance sheet at once and submit {deadline} a plan of asset sales and Tier 1 issuance.",
    ),
    ("liquidity", "minor"): (
        "Restore the liquidity coverage ratio and submit {deadline} a plan for its timely restoration.",
        "Submit {deadline} the restoration plan for the liquidity coverage ratio, with the assets that you will add to the buffer.",
    ),
    ("liquidity", "moderate"): (
        "Enlarge the liquidity buffer, lengthen short-term funding, and submit {deadline} a restoration plan.",
        "Submit {deadline} a restoration plan that names the liquid assets to be bought and the outflows to be reduced.",
    ),
    ("liquidity", "serious"): (
        "Activate your contingency funding plan today, stop lending that is not committed, and submit {deadline} a restoration plan.",
        "Put the contingency funding plan into effect at once and submit {deadline} a plan to restore the liquidity buffer.",
    ),
    ("funding", "minor"): (
        "Restore the net stable funding ratio and submit {deadline} a plan for it.",
        "Submit {deadline} the steps by which stable funding will cover the requirement again.",
    ),
    ("funding", "moderate"): (
        "Replace short-term by stable funding and submit {deadline} a funding plan.",
        "Submit {deadline} a funding plan with the term and the amount of each planned issue.",
    ),
    ("funding", "serious"): (
        "Grant no new long-term loans until stable funding covers them, and submit {deadline} a funding plan.",
        "Suspend new long-term lending and submit {deadline} a plan to raise stable funding.",
    ),
    ("filing", "minor"): (
        "Correct {templates} and file again {deadline}, with an explanation of the error.",
        "File {templates} again {deadline} and state how the error arose and how it will be prevented.",
    ),
}
_DEADLINE = {
    ("capital", "minor"): "within two months",
    ("capital", "moderate"): "within one month",
    ("capital", "serious"): "within five working days",
    ("leverage", "minor"): "within two months",
    ("leverage", "moderate"): "within one month",
    ("leverage", "serious"): "within ten working days",
    ("liquidity", "minor"): "within ten working days",
    ("liquidity", "moderate"): "within five working days",
    ("liquidity", "serious"): "within two working days",
    ("funding", "minor"): "within two months",
    ("funding", "moderate"): "within one month",
    ("funding", "serious"): "within ten working days",
    ("filing", "minor"): "within ten working days",
}
_DUTY = {
    "minor": ("Report on progress with the next regular report.", "Inform us of progress with your next filing."),
    "moderate": (
        "Report monthly on {subjects} until compliance is restored.",
        "Until compliance is restored, send us the figures on {subjects} every month.",
    ),
    "serious": (
        "Report weekly on {subjects} until we release you from this duty.",
        "Send us the figures on {subjects} every week until further notice.",
    ),
}
_CLOSING = {
    "minor": "",
    "moderate": "We may take further measures if the plan is late or insufficient.",
    "serious": "Failure to comply may lead to administrative penalties and to the withdrawal of the authorisation.",
}
_CLEAN = (
    "Your report shows no breach of the requirements examined and no contradiction between its figures. No measure is required; file the next report as usual.",
    "The figures meet the requirements that we examined and agree with each other. We take no measure. The next report is due on the regular date.",
    "We examined your report and found neither a breach nor an error. Nothing is required of you beyond the next regular report.",
)
_PLAN = {
    "capital": "a capital plan",
    "leverage": "a leverage plan",
    "liquidity": "a liquidity plan",
    "funding": "a funding plan",
    "filing": "a corrected report",
}
_RANK = ("minor", "moderate", "serious")


def directive(violated: Sequence[RuleResult], bank: Addressee, date: str, style: str = "full") -> str:
    """The letter on the `violated` results of a report of reference date `date` (YYYY-MM-DD).

    `style="full"` is a supervisor's letter; `style="short"` is one sentence.
    """
    return _short(violated, bank) if style == "short" else _full(violated, bank, date)


def severity(violated: Sequence[RuleResult]) -> str:
    """The gravest of the findings: "serious" if a ratio is short of its limit by over a tenth, "moderate" by over a fortieth."""
    shortfalls = [_shortfall(result) for result in violated if result.kind == "breach" and result.limit > 0]
    worst = max(shortfalls, default=Decimal(0))
    return "serious" if worst > Decimal("0.1") else "moderate" if worst > Decimal("0.025") else "minor"


def _shortfall(result: RuleResult) -> Decimal:
    """What is missing, as a share of the limit. A buffer may be drawn on, so OCR alone never makes a letter "serious"."""
    shortfall = abs(result.limit - result.value) / result.limit
    return min(shortfall, Decimal("0.1")) if result.rule_id == "OCR_TC" else shortfall


def _subject(result: RuleResult) -> str:
    return "filing" if result.kind == "filing" else _SUBJECT[result.rule_id][0]


def _full(violated: Sequence[RuleResult], bank: Addressee, date: str) -> str:
    choice = random.Random(f"letter {bank.entity} {date}").choice
    day = datetime.date.fromisoformat(date)
    long_date = f"{day.day} {day:%B} {day.year}"
    lines = [f"To the {_BOARD.get(bank.type, 'Management Board')} of {bank.name}", f"Report of {long_date}"]
    if not violated:
        return "\n".join([*lines, choice(_CLEAN)])
    subjects = list(dict.fromkeys(_subject(result) for result in violated))
    powers = _listed(list(dict.fromkeys(_POWER[subject] for subject in subjects)))
    lines.append(
        choice(
            (
                f"Under {powers} we direct as follows.",
                f"We issue this directive under {powers}.",
                f"This directive rests on {powers}.",
            )
        )
    )
    lines.append("Findings:")
    lines += [_finding(result, choice) for result in violated]
    lines.append("Measures:")
    for subject in subjects:
        of_subject = [result for result in violated if _subject(result) == subject]
        grade = severity(of_subject)
        templates = _listed(list(dict.fromkeys(table_name(result.cell[0]) for result in of_subject)))
        lines.append(
            choice(_MEASURE[subject, grade]).format(
                deadline=f"{_DEADLINE[subject, grade]} of receipt", templates=templates
            )
        )
    if any(result.rule_id == "OCR_TC" for result in violated):
        lines.append(
            choice(
                (
                    "Calculate the maximum distributable amount and notify it to us (CRD Art. 141).",
                    "Notify us of your maximum distributable amount under CRD Art. 141.",
                )
            )
        )
    grade = severity(violated)
    duty = choice(_DUTY[grade]).format(subjects=_listed([subject for subject in subjects if subject != "filing"]))
    lines.append(f"{duty} {_CLOSING[grade]}".strip())
    return "\n".join(lines)


def _finding(result: RuleResult, choice) -> str:  # noqa: ANN001 - the bound method of a random.Random
    label = short_label(result.cell)
    fields = {
        "label": label[0].lower() + label[1:]
        if label.partition(" ")[0] in ("Own", "Total", "Leverage", "Liquidity", "Net")
        else label,
        "value": format_figure(result.value, result.unit, result.decimals),
        "limit": format_limit(result.limit, result.unit, result.decimals),
        "limit_name": _SUBJECT.get(result.rule_id, ("", "limit"))[1],
        "cell": cell_name(result.cell),
        "legal": result.legal,
        "gap": f"{format_limit(result.limit - result.value, None, result.decimals).removesuffix('%')} percentage points",
    }
    return choice(_FINDING[result.relation]).format(**fields)


def _short(violated: Sequence[RuleResult], bank: Addressee) -> str:
    """One sentence: what to restore, each ratio to the highest limit that it misses, which plan to file, by when."""
    if not violated:
        return f"{bank.name} meets the requirements. No measures."
    goals: dict[tuple, RuleResult] = {}
    for result in violated:
        known = goals.get(result.cell)
        if known is None or result.limit > known.limit:
            goals[result.cell] = result
    verb = "restore" if all(result.relation == "min" for result in goals.values()) else "correct"
    targets = [
        f"{short_label(cell)} to {format_limit(result.limit, result.unit, result.decimals)}"
        for cell, result in goals.items()
    ]
    plans = _listed(list(dict.fromkeys(_PLAN[_subject(result)] for result in goals.values())))
    days = 10 if severity(violated) == "serious" else 30
    return f"{bank.name} must {verb} {_listed(targets)} and file {plans} within {days} days."


def _listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))) if parts else ""
