"""Write the supervisor's letter on a report: addressee, legal basis, findings, measures with deadlines, reporting duty.

The wording comes from `phrases.py`. It depends on the severity of the findings, on whether they are repeated, and on
the type of the bank. The choice between equivalent sentences is deterministic in the bank, the date and a variant
number. CRD is Directive 2013/36/EU, CRR is Regulation (EU) No 575/2013.
"""

import datetime
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Protocol, TypeVar

from data.regulator import phrases
from data.regulator.render import PURE, Addressee, cell_name, format_figure, format_limit, short_label, table_name
from data.regulator.report import CellKey
from data.regulator.rules import RuleResult
from data.regulator.wordings import Wordings

Option = TypeVar("Option")


class Choose(Protocol):
    """The signature of `random.choice`."""

    def __call__(self, options: Sequence[Option], /) -> Option: ...


# rule of kind "breach" -> (subject of the letter, name of the limit). All filing errors have the subject "filing".
_SUBJECT_AND_LIMIT = {
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
    "LE_LIMIT": ("exposure", "large exposure limit"),
    "OUTPUT_FLOOR": ("floor", "output floor"),
}
# subject -> what a short letter asks the bank to file
_PLAN = {
    "capital": "a capital plan",
    "leverage": "a leverage plan",
    "liquidity": "a liquidity plan",
    "funding": "a funding plan",
    "exposure": "a plan for the exposure",
    "floor": "a corrected report",
    "filing": "a corrected report",
}
_GRADES = ("minor", "moderate", "serious")


@dataclass(frozen=True)
class Context:
    """Further facts that a letter may mention. All of them can be read from the prompt of the example.

    `repeated` maps a rule id to the number of consecutive reports just before this one that already violated the rule.
    """

    triggers: tuple[RuleResult, ...] = ()  # duties triggered by figures of this report
    margins: tuple[RuleResult, ...] = ()  # requirements that are met
    previous: dict[CellKey, Decimal] = field(default_factory=dict, hash=False)  # figures of the previous report
    repeated: dict[str, int] = field(default_factory=dict, hash=False)
    templates: tuple[str, ...] = ()  # templates that were filed


def write_directive(
    violated: Sequence[RuleResult],
    bank: Addressee,
    date: str,
    style: str = "full",
    context: Context = Context(),  # noqa: B008 (frozen)
    variant: int = 0,
    held_out: bool = False,
) -> str:
    """Write the letter on the `violated` results of a report with reference date `date` (YYYY-MM-DD).

    `style="full"` gives a complete letter, `style="short"` a single sentence. Different values of `variant` give
    different wordings of the same full letter. `held_out` letters use other wordings than all others.
    """
    if style == "short":
        return _short_letter(violated, bank)
    choose = Wordings(random.Random(f"letter {bank.entity} {date} {variant}"), held_out)
    day = datetime.date.fromisoformat(date)
    names = {"bank": bank.name, "board": phrases.BOARD.get(bank.type, "Management Board")}
    names["date"] = f"{day.day} {day:%B} {day.year}"
    lines = [choose(phrases.ADDRESSEE).format(**names), choose(phrases.SUBJECT_LINE).format(**names)]
    lines += _body(violated, bank, context, choose) if violated else _approval(context, choose)
    return "\n".join(lines)


def severity(violated: Sequence[RuleResult]) -> str:
    """The severity of the worst finding: "serious", "moderate" or "minor".

    A shortfall of more than 10% of the limit is serious, one of more than 2.5% is moderate. Filing errors are minor.
    """
    shortfalls = [_shortfall(result) for result in violated if result.kind == "breach" and result.known_limit > 0]
    worst = max(shortfalls, default=Decimal(0))
    return "serious" if worst > Decimal("0.1") else "moderate" if worst > Decimal("0.025") else "minor"


def _shortfall(result: RuleResult) -> Decimal:
    """The shortfall as a fraction of the limit.

    For OCR it is capped at 10%: banks may draw on their buffers, so missing OCR alone is never "serious".
    """
    shortfall = abs(result.known_limit - result.known_value) / result.known_limit
    return min(shortfall, Decimal("0.1")) if result.rule_id == "OCR_TC" else shortfall


def _subject(result: RuleResult) -> str:
    return "filing" if result.kind == "filing" else _SUBJECT_AND_LIMIT[result.rule_id][0]


def _body(violated: Sequence[RuleResult], bank: Addressee, context: Context, choose: Choose) -> list[str]:
    """Lines of a letter with findings: legal basis, findings, measures with deadlines, reporting duty, consequences."""
    subjects = list(dict.fromkeys(_subject(result) for result in violated))
    grade = severity(violated)
    power = _listed(list(dict.fromkeys(phrases.POWER[subject] for subject in subjects)))
    lines = [_capital(choose(phrases.BASIS).format(power=power)), choose(phrases.FINDINGS_HEAD)]
    lines += [f"{number}. {_finding(result, context, choose)}" for number, result in enumerate(violated, start=1)]
    lines += [sentence for sentence in [choose(phrases.JUDGEMENT[grade])] if sentence and any_breach(violated)]
    lines.append(choose(phrases.MEASURES_HEAD))
    shortened = False
    for subject in subjects:
        text, is_repeated = _measure(subject, violated, bank, context, choose)
        lines.append(f"- {text}")
        shortened = shortened or is_repeated
    if any(result.rule_id == "OCR_TC" for result in violated):
        lines.append(f"- {choose(phrases.MDA)}")
    if shortened:
        lines.append(choose(phrases.PERSISTS))
    named = [phrases.SUBJECT[subject] for subject in subjects if subject != "filing"] or ["the corrected templates"]
    closing = [choose(phrases.DUTY[grade]).format(subjects=_listed(named)), choose(phrases.CLOSING[grade])]
    lines.append(" ".join(filter(None, [*closing, choose(phrases.OBJECTION)])))
    return lines + _notes(context, choose)


def any_breach(violated: Sequence[RuleResult]) -> bool:
    """Whether a requirement of the law is breached, as opposed to filing errors only."""
    return any(result.kind == "breach" for result in violated)


def _measure(
    subject: str, violated: Sequence[RuleResult], bank: Addressee, context: Context, choose: Choose
) -> tuple[str, bool]:
    """(the measure for one subject, whether its deadline is shorter because the violation is repeated)."""
    of_subject = [result for result in violated if _subject(result) == subject]
    grade = severity(of_subject)
    is_repeated = any(context.repeated.get(result.rule_id) for result in of_subject)
    urgency = min(_GRADES.index(grade) + is_repeated, 2)
    if subject == "filing":  # several errors are more urgent than one
        urgency = min(len(of_subject) - 1, 2)
    fields = {
        "deadline": f"{phrases.DEADLINE[subject][urgency]} {choose(phrases.FROM)}",
        "templates": _listed(list(dict.fromkeys(table_name(result.cell[0]) for result in of_subject))),
    }
    text = _capital(choose(phrases.MEASURE[subject, grade]).format(**fields))
    if grade != "minor" and (subject, bank.type) in phrases.BY_TYPE:
        text += f" {choose(phrases.BY_TYPE[subject, bank.type])}"
    return text, is_repeated


def _finding(result: RuleResult, context: Context, choose: Choose) -> str:
    """One finding: the violation, its trend since the previous report, and whether it is repeated."""
    text = _capital(choose(_sentences(result)).format(**_fields(result)))
    previous = context.previous.get(result.cell)
    if result.rule_id in _SUBJECT_AND_LIMIT and result.relation == "min" and previous is not None and not result.row:
        trend = "same" if previous == result.value else "fell" if previous > result.known_value else "rose"
        text += " " + choose(phrases.TREND[trend]).format(before=format_figure(previous, result.unit, result.decimals))
    if context.repeated.get(result.rule_id):
        text += " " + choose(phrases.REPEATED[min(context.repeated[result.rule_id], 2)])
    return text


def _sentences(result: RuleResult) -> Sequence[str]:
    """The equivalent sentences that describe this kind of violation."""
    if result.rule_id == "LE_LIMIT":
        return phrases.EXPOSURE
    if result.rule_id == "OUTPUT_FLOOR":
        return phrases.FLOOR
    if result.kind == "breach":
        return phrases.NEGATIVE if result.known_value < 0 else phrases.MIN
    if result.rule_id.endswith("_SIGN"):
        return phrases.MISSING_SIGN if result.missing else phrases.SIGN
    if result.missing:
        return phrases.MISSING
    if result.relation == "expected" and result.limit == 0:
        return phrases.NIL
    return {"min": phrases.TSCR, "max": phrases.CAP, "expected": phrases.EXPECTED}[result.relation]


def _fields(result: RuleResult) -> dict[str, str]:
    """Values for the placeholders of a sentence; `phrases.py` lists them."""
    gap = abs(result.known_limit - result.known_value)
    points = f"{format_limit(gap, None, result.decimals).removesuffix('%')} percentage points"
    return {
        "label": _label(result.cell),
        "value": format_figure(result.known_value, result.unit, result.decimals),
        "limit": format_limit(result.known_limit, result.unit, result.decimals),
        "name_of_limit": _SUBJECT_AND_LIMIT.get(result.rule_id, ("", "limit"))[1],
        "cell": cell_name(result.cell, result.row),
        "legal": result.legal,
        "row": result.row,
        "gap": points if _is_ratio(result) else format_limit(gap, result.unit, result.decimals),
    }


def _is_ratio(result: RuleResult) -> bool:
    return result.unit in PURE


def _label(cell: CellKey) -> str:
    """The name of a cell within a sentence: an acronym such as "CET1" stays in capitals, a word does not."""
    label = phrases.LABELS.get(cell) or short_label(cell)
    starts_with_word = label.partition(" ")[0] in ("Own", "Total", "Leverage", "Liquidity", "Net")
    return label[0].lower() + label[1:] if starts_with_word else label


def _approval(context: Context, choose: Choose) -> list[str]:
    """Lines of a letter without findings: what was examined, the tightest margin, a ratio that has changed."""
    templates = _listed([table_name(template) for template in context.templates]) or "the templates filed"
    lines = [_capital(choose(phrases.CLEAN_OPENING).format(templates=templates))]
    ratios = [result for result in context.margins if result.relation == "min" and _is_ratio(result)]
    if ratios:
        tightest = min(ratios, key=lambda result: (result.known_value - result.known_limit) / result.known_limit)
        lines.append(_capital(choose(phrases.CLEAN_TIGHTEST).format(**_fields(tightest))))
        changed = [result for result in ratios if context.previous.get(result.cell) not in (None, result.value)]
        if changed:
            result = choose(changed)
            before = format_figure(context.previous[result.cell], result.unit, result.decimals)
            lines.append(_capital(choose(phrases.CLEAN_MOVE).format(**_fields(result), before=before)))
    closing = [choose(phrases.CLEAN_OUTCOME), choose(phrases.CLEAN_DUTY), choose(phrases.CLEAN_RESERVE)]
    return [*lines, " ".join(filter(None, closing)), *_notes(context, choose)]


def _notes(context: Context, choose: Choose) -> list[str]:
    """Notes on the duties that the figures trigger. These are not violations."""
    notes = []
    large = [result for result in context.triggers if result.rule_id == "LE_DEF"]
    if large:
        clients = "one exposure" if len(large) == 1 else f"{len(large)} exposures"
        limit = format_limit(large[0].known_limit, None)
        notes.append(choose(phrases.LARGE_EXPOSURE_NOTE).format(clients=clients, limit=limit, legal=large[0].legal))
    if any(result.rule_id == "FX_DEMIN" for result in context.triggers):
        legal = next(result.legal for result in context.triggers if result.rule_id == "FX_DEMIN")
        notes.append(choose(phrases.FX_NOTE).format(legal=legal))
    return notes


def _capital(text: str) -> str:
    """Capitalise the first letter only."""
    return text[:1].upper() + text[1:]


def _short_letter(violated: Sequence[RuleResult], bank: Addressee) -> str:
    """A letter of one sentence: the ratios to restore, the plans to file, and the deadline.

    Each ratio must be restored to the highest limit that it misses.
    """
    if not violated:
        return f"{bank.name} meets the requirements. No measures."
    goals: dict[tuple, RuleResult] = {}
    for result in violated:
        other = goals.get(result.cell)
        if other is None or result.known_limit > other.known_limit:
            goals[result.cell] = result
    verb = "restore" if all(result.relation == "min" for result in goals.values()) else "correct"
    targets = [
        f"{short_label(cell)} to {format_limit(result.known_limit, result.unit, result.decimals)}"
        for cell, result in goals.items()
    ]
    plans = _listed(list(dict.fromkeys(_PLAN[_subject(result)] for result in goals.values())))
    days = 10 if severity(violated) == "serious" else 30
    return f"{bank.name} must {verb} {_listed(targets)} and file {plans} within {days} days."


def _listed(parts: Sequence[str]) -> str:
    """Join a list in English: `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))) if parts else ""
