"""The supervisor's letter on a report: addressee, legal basis, findings with figures, measures, deadline, reporting duty.

The wording (`phrases.py`) follows the severity of the findings, their repetition and the type of the bank; among sentences
of one meaning the choice is pure in the bank, the date and a variant. Articles: CRD is Directive 2013/36/EU, CRR is
Regulation (EU) No 575/2013.
"""

import datetime
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from data.regulator import phrases
from data.regulator.render import Addressee, cell_name, format_figure, format_limit, short_label, table_name
from data.regulator.report import CellKey
from data.regulator.rules import RuleResult

STYLES = ("full", "short")
Choose = Callable[[Sequence[str]], str]

# breach -> the subject it belongs to, and what its limit is called. Filing errors are a subject of their own.
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
    "LE_LIMIT": ("exposure", "large exposure limit"),
    "OUTPUT_FLOOR": ("floor", "output floor"),
}
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
    """What else a letter on a report may say. Everything can be seen in the text that the model reads."""

    triggers: tuple[RuleResult, ...] = ()  # duties set off by figures of this report
    margins: tuple[RuleResult, ...] = ()  # requirements that are met
    before: dict[CellKey, Decimal] = field(default_factory=dict, hash=False)  # figures of the quarter before
    repeated: dict[str, int] = field(
        default_factory=dict, hash=False
    )  # rule -> reports in a row before this one that breached it
    templates: tuple[str, ...] = ()  # what was filed


def directive(
    violated: Sequence[RuleResult],
    bank: Addressee,
    date: str,
    style: str = "full",
    context: Context = Context(),  # noqa: B008 - frozen
    variant: int = 0,
) -> str:
    """The letter on the `violated` results of a report of reference date `date` (YYYY-MM-DD).

    `style="full"` is a supervisor's letter; `style="short"` is one sentence. Another `variant` says the same in other words.
    """
    if style == "short":
        return _short(violated, bank)
    choose = random.Random(f"letter {bank.entity} {date} {variant}").choice
    day = datetime.date.fromisoformat(date)
    names = {"bank": bank.name, "board": phrases.BOARD.get(bank.type, "Management Board")}
    names["date"] = f"{day.day} {day:%B} {day.year}"
    lines = [choose(phrases.ADDRESSEE).format(**names), choose(phrases.SUBJECT_LINE).format(**names)]
    lines += _orders(violated, bank, context, choose) if violated else _approval(context, choose)
    return "\n".join(lines)


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


def _orders(violated: Sequence[RuleResult], bank: Addressee, context: Context, choose: Choose) -> list[str]:
    """Legal basis, findings, measures with deadlines, reporting duty, consequences."""
    subjects = list(dict.fromkeys(_subject(result) for result in violated))
    grade = severity(violated)
    power = _listed(list(dict.fromkeys(phrases.POWER[subject] for subject in subjects)))
    lines = [_capital(choose(phrases.BASIS).format(power=power)), choose(phrases.FINDINGS_HEAD)]
    lines += [f"{number}. {_finding(result, context, choose)}" for number, result in enumerate(violated, start=1)]
    lines += [sentence for sentence in [choose(phrases.JUDGEMENT[grade])] if sentence and any_breach(violated)]
    lines.append(choose(phrases.MEASURES_HEAD))
    shortened = False
    for subject in subjects:
        text, hurried = _measure(subject, violated, bank, context, choose)
        lines.append(f"- {text}")
        shortened = shortened or hurried
    if any(result.rule_id == "OCR_TC" for result in violated):
        lines.append(f"- {choose(phrases.MDA)}")
    if shortened:
        lines.append(choose(phrases.PERSISTS))
    named = [phrases.SUBJECT[subject] for subject in subjects if subject != "filing"] or ["the corrected templates"]
    closing = [choose(phrases.DUTY[grade]).format(subjects=_listed(named)), choose(phrases.CLOSING[grade])]
    lines.append(" ".join(filter(None, [*closing, choose(phrases.OBJECTION)])))
    return lines + _notes(context, choose)


def any_breach(violated: Sequence[RuleResult]) -> bool:
    """Whether the law is breached, and not only the form of reporting."""
    return any(result.kind == "breach" for result in violated)


def _measure(
    subject: str, violated: Sequence[RuleResult], bank: Addressee, context: Context, choose: Choose
) -> tuple[str, bool]:
    """(what is ordered on one subject, whether repetition shortened the deadline)."""
    of_subject = [result for result in violated if _subject(result) == subject]
    grade = severity(of_subject)
    again = any(context.repeated.get(result.rule_id) for result in of_subject)
    place = min(_GRADES.index(grade) + again, 2)
    if subject == "filing":  # many errors are graver than one
        place = min(len(of_subject) - 1, 2)
    fields = {
        "deadline": f"{phrases.DEADLINE[subject][place]} {choose(phrases.FROM)}",
        "templates": _listed(list(dict.fromkeys(table_name(result.cell[0]) for result in of_subject))),
    }
    text = _capital(choose(phrases.MEASURE[subject, grade]).format(**fields))
    if grade != "minor" and (subject, bank.type) in phrases.BY_TYPE:
        text += f" {choose(phrases.BY_TYPE[subject, bank.type])}"
    return text, again


def _finding(result: RuleResult, context: Context, choose: Choose) -> str:
    sentences = _sentences(result)
    text = _capital(choose(sentences).format(**_fields(result)))
    before = context.before.get(result.cell)
    if result.rule_id in _SUBJECT and result.relation == "min" and before is not None and not result.row:
        trend = "same" if before == result.value else "fell" if before > result.value else "rose"
        text += " " + choose(phrases.TREND[trend]).format(before=format_figure(before, result.unit, result.decimals))
    if context.repeated.get(result.rule_id):
        text += " " + choose(phrases.REPEATED[min(context.repeated[result.rule_id], 2)])
    return text


def _sentences(result: RuleResult) -> Sequence[str]:
    if result.rule_id == "LE_LIMIT":
        return phrases.EXPOSURE
    if result.rule_id == "OUTPUT_FLOOR":
        return phrases.FLOOR
    if result.kind == "breach":
        return phrases.NEGATIVE if result.value < 0 else phrases.MIN
    if result.rule_id.endswith("_SIGN"):
        return phrases.MISSING_SIGN if result.missing else phrases.SIGN
    if result.missing:
        return phrases.MISSING
    if result.relation == "expected" and result.limit == 0:
        return phrases.NIL
    return {"min": phrases.TSCR, "max": phrases.CAP, "expected": phrases.EXPECTED}[result.relation]


def _fields(result: RuleResult) -> dict[str, str]:
    gap = abs(result.limit - result.value)
    points = f"{format_limit(gap, None, result.decimals).removesuffix('%')} percentage points"
    return {
        "label": _label(result.cell),
        "value": format_figure(result.value, result.unit, result.decimals),
        "limit": format_limit(result.limit, result.unit, result.decimals),
        "name_of_limit": _SUBJECT.get(result.rule_id, ("", "limit"))[1],
        "cell": cell_name(result.cell, result.row),
        "legal": result.legal,
        "row": result.row,
        "gap": points if _is_ratio(result) else format_limit(gap, result.unit, result.decimals),
    }


def _is_ratio(result: RuleResult) -> bool:
    return result.unit in (None, "", "pure", "xbrli:pure")


def _label(cell: CellKey) -> str:
    label = phrases.LABELS.get(cell) or short_label(cell)
    lower = label.partition(" ")[0] in ("Own", "Total", "Leverage", "Liquidity", "Net")
    return label[0].lower() + label[1:] if lower else label


def _approval(context: Context, choose: Choose) -> list[str]:
    """A letter that asks for nothing: what was examined, where the margin is closest, what moved."""
    templates = _listed([table_name(template) for template in context.templates]) or "the templates filed"
    lines = [_capital(choose(phrases.CLEAN_OPENING).format(templates=templates))]
    ratios = [result for result in context.margins if result.relation == "min" and _is_ratio(result)]
    if ratios:
        tightest = min(ratios, key=lambda result: (result.value - result.limit) / result.limit)
        lines.append(_capital(choose(phrases.CLEAN_TIGHTEST).format(**_fields(tightest))))
        moved = [result for result in ratios if context.before.get(result.cell) not in (None, result.value)]
        if moved:
            result = choose(moved)
            before = format_figure(context.before[result.cell], result.unit, result.decimals)
            lines.append(_capital(choose(phrases.CLEAN_MOVE).format(**_fields(result), before=before)))
    closing = [choose(phrases.CLEAN_OUTCOME), choose(phrases.CLEAN_DUTY), choose(phrases.CLEAN_RESERVE)]
    return [*lines, " ".join(filter(None, closing)), *_notes(context, choose)]


def _notes(context: Context, choose: Choose) -> list[str]:
    """Duties that figures set off: mentioned, but no violations."""
    notes = []
    large = [result for result in context.triggers if result.rule_id == "LE_DEF"]
    if large:
        clients = "one exposure" if len(large) == 1 else f"{len(large)} exposures"
        limit = format_limit(large[0].limit, None)
        notes.append(choose(phrases.LARGE_EXPOSURE_NOTE).format(clients=clients, limit=limit, legal=large[0].legal))
    if any(result.rule_id == "FX_DEMIN" for result in context.triggers):
        legal = next(result.legal for result in context.triggers if result.rule_id == "FX_DEMIN")
        notes.append(choose(phrases.FX_NOTE).format(legal=legal))
    return notes


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


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
