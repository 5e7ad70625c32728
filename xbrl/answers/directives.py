"""Write the supervisor's letter on a report: addressee, legal basis, findings, measures with deadlines, reporting duty.

`measures.py` decides what is demanded; the wording comes from `phrases.py`. It depends on the legal order of the
findings, on whether they are repeated, and on the type of the bank. The choice between equivalent sentences is
deterministic in the bank, the date and a variant number.
"""

import datetime
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from xbrl.answers import phrases
from xbrl.answers.wordings import Wordings
from xbrl.read.render import PURE, Addressee, cell_name, format_figure, format_limit, short_label, table_name
from xbrl.read.report import CellKey
from xbrl.rules.figures import Figure
from xbrl.rules.measures import ORDERS, Measure, plan_measures, requirement_of, severity
from xbrl.rules.rules import RuleResult


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
    lifted: tuple[RuleResult, ...] = ()  # figures below a limit that does not apply, by a note of the bank


def write_directive(
    violated: Sequence[RuleResult],
    bank: Addressee,
    date: str,
    context: Context = Context(),  # noqa: B008 (frozen)
    variant: int = 0,
    held_out: bool = False,
) -> str:
    """Write the letter on the `violated` results of a report with reference date `date` (YYYY-MM-DD).

    Different values of `variant` give different wordings of the same letter, mostly. `held_out` letters use other wordings
    than all others.
    """
    choose = Wordings(random.Random(f"letter {bank.entity} {date} {variant}"), held_out)
    first = random.Random(f"letter {bank.entity} {date}").randrange(100) + variant  # its sentence differs by variant
    day = datetime.date.fromisoformat(date)
    names = {"bank": bank.name, "board": phrases.BOARD.get(bank.type, "Management Board")}
    names["date"] = f"{day.day} {day:%B} {day.year}"
    lines = [choose(phrases.ADDRESSEE).format(**names), choose(phrases.SUBJECT_LINE).format(**names)]
    lines += _body(violated, bank, context, choose, first) if violated else _approval(context, choose, first)
    return "\n".join(lines)


def required_measures(
    violated: Sequence[RuleResult],
    context: Context = Context(),  # noqa: B008 (frozen)
) -> list[dict[str, str | int]]:
    """What the letter demands, as data: `[{"subject": "capital", "deadline_days": 10}, ...]`; empty without findings.

    The letter is written from the same structure. The days are working days.
    """
    return [
        {"subject": measure.subject, "deadline_days": measure.deadline_days}
        for measure in plan_measures(violated, context.repeated)
    ]


def _body(violated: Sequence[RuleResult], bank: Addressee, context: Context, choose: Wordings, first: int) -> list[str]:
    """Lines of a letter with findings: legal basis, findings, measures with deadlines, reporting duty, consequences."""
    measures = plan_measures(violated, context.repeated)
    power = _listed(list(dict.fromkeys(phrases.POWER[_topic(measure)] for measure in measures)))
    lines = [_capital(choose.at(phrases.BASIS, first).format(power=power)), choose(phrases.FINDINGS_HEAD)]
    findings = [_finding(group, context, choose) for group in _by_figure(violated)]
    lines += [f"{number}. {finding}" for number, finding in enumerate(findings, start=1)]
    order = severity(violated)
    lines += filter(None, [choose(phrases.JUDGEMENT[order])])
    lines.append(choose(phrases.MEASURES_HEAD))
    lines += [f"- {_demand(measure, bank, choose)}" for measure in measures]
    repeated = any(measure.repeated for measure in measures)
    if repeated:
        lines.append(choose(phrases.PERSISTS))
    closing = phrases.CLOSING["repeated filing" if order == "filing" and repeated else order]
    ending = [_duty(measures, order, choose), choose(closing), choose(phrases.OBJECTION)]
    lines.append(" ".join(filter(None, ending)))
    return lines + _notes(context, choose)


def _topic(measure: Measure) -> str:
    """The subject in the phrase tables: a measure on distributions only because of the leverage ratio has its own."""
    if measure.subject == "distributions" and all(
        requirement_of(result).subject == "leverage" for result in measure.results
    ):
        return "leverage distributions"
    return measure.subject


def _by_figure(violated: Sequence[RuleResult]) -> list[list[RuleResult]]:
    """The findings, one list for each figure: a breach, and further limits that the same figure misses.

    The first of a list is the most severe.
    """
    groups: dict[object, list[RuleResult]] = {}
    for result in violated:
        shared = result.kind == "breach" and result.relation == "min"
        groups.setdefault((result.cell, result.row) if shared else id(result), []).append(result)
    return [sorted(group, key=lambda one: -ORDERS.index(requirement_of(one).order)) for group in groups.values()]


def _duty(measures: Sequence[Measure], order: str, choose: Wordings) -> str:
    """The duty to report. A bank below its liquidity requirements reports daily, by law (CRR Art. 414)."""
    subjects = list(dict.fromkeys(measure.subject for measure in measures))
    daily = [phrases.SUBJECT[subject] for subject in subjects if subject in phrases.DAILY_SUBJECTS]
    others = [phrases.SUBJECT[subject] for subject in subjects if subject not in (*phrases.DAILY_SUBJECTS, "filing")]
    parts = [choose(phrases.DAILY_DUTY).format(subjects=_listed(daily))] if daily else []
    if others or not daily:
        named = _listed(others or [phrases.SUBJECT["filing"]])
        parts.append(choose(phrases.DUTY[order]).format(subjects=named))
    return " ".join(parts)


def _demand(measure: Measure, bank: Addressee, choose: Wordings) -> str:
    """One measure and its deadline."""
    days = phrases.WORKING_DAYS[measure.deadline_days]
    fields = {
        "deadline": f"within {days} working days {choose(phrases.FROM)}",
        "templates": _listed(list(dict.fromkeys(filter(None, (_table(result) for result in measure.results)))))
        or "the report",
    }
    text = _capital(choose(phrases.MEASURE[_topic(measure), measure.order]).format(**fields))
    if measure.urgency == 2 and measure.subject in phrases.AT_ONCE:
        text += f" {choose(phrases.AT_ONCE[measure.subject])}"
    if (measure.subject, bank.type) in phrases.BY_TYPE:
        text += f" {choose(phrases.BY_TYPE[measure.subject, bank.type])}"
    return text


def _table(result: RuleResult) -> str:
    return table_name(result.cell[0])


def _finding(group: Sequence[RuleResult], context: Context, choose: Wordings) -> str:
    """One finding: what is missed, by how much, the trend since the previous report, and whether it is repeated."""
    result, *others = group
    text = _capital(choose(_sentences(result)).format(**_fields(result)))
    if others:
        limits = _listed([phrases.OTHER_LIMIT.format(**_fields(other)) for other in others])
        text += " " + choose(phrases.ALSO_MISSED).format(others=limits)
    previous = context.previous.get(result.cell)
    if result.kind == "breach" and result.relation == "min" and previous is not None and not result.row:
        trend = "same" if previous == result.value else "fell" if previous > result.known_value else "rose"
        text += " " + choose(phrases.TREND[trend]).format(before=format_figure(previous, result.unit, result.decimals))
    times = max(context.repeated.get(one.rule_id, 0) for one in group)
    if times:
        text += " " + choose(phrases.REPEATED[min(times, 2)])
    return text


def _sentences(result: RuleResult) -> Sequence[str]:
    """The equivalent sentences that describe this kind of violation."""
    if result.value is None or result.limit is None:
        return phrases.WITHOUT_FIGURES
    if result.kind == "note":
        return phrases.NOTE[result.relation]
    if result.rule_id == "LE_LIMIT":
        return phrases.EXPOSURE
    if result.rule_id == "OUTPUT_FLOOR":
        return phrases.FLOOR
    if result.kind == "breach":
        return phrases.NEGATIVE if result.known_value < 0 else phrases.RECOMPUTED if _parts(result) else phrases.MIN
    if result.rule_id.endswith("_SIGN"):
        return phrases.MISSING_SIGN if result.missing else phrases.SIGN
    if result.missing:
        return phrases.MISSING
    if result.relation == "expected" and result.limit == 0:
        return phrases.NIL
    if _absent_part(result):
        return phrases.PART_MISSING
    return {"min": phrases.TSCR, "max": phrases.CAP, "expected": phrases.EXPECTED}[result.relation]


def _fields(result: RuleResult) -> dict[str, str]:
    """Values for the placeholders of a sentence; `phrases.py` lists them."""
    fields = {
        "label": _label(result.cell),
        "name_of_limit": requirement_of(result).limit,
        "cell": cell_name(result.cell, result.row) if result.cell[0] else "the report",
        "legal": result.legal,
        "row": result.row,
        "rule": result.rule_id,
    }
    if result.value is None or result.limit is None:
        return fields
    if parts := _parts(result):
        fields["parts"] = _listed([cell_name(part.cell, part.row) for part in parts])
    if absent := _absent_part(result):
        fields["absent"] = cell_name(absent.cell, absent.row)
    gap = abs(result.limit - result.value)
    points = f"{format_limit(gap, None, result.decimals).removesuffix('%')} percentage points"
    return fields | {
        "value": format_figure(result.value, result.unit, result.decimals),
        "limit": format_limit(result.limit, result.unit, result.decimals),
        "gap": points if _is_ratio(result) else format_limit(gap, result.unit, result.decimals),
    }


def _parts(result: RuleResult) -> tuple[Figure, ...]:
    """The parts of a ratio that is not reported and was recomputed from them; empty if it is reported."""
    for figure in result.inputs:
        if figure.cell == result.cell and figure.source == "recomputed":
            return figure.parts
    return ()


def _absent_part(result: RuleResult) -> Figure | None:
    """The only part of a sum that is not reported and counts as nil, if the parts that are reported fall short of the sum."""
    absent = [figure for figure in result.inputs[1:] if figure.source == "read as 0"]
    is_short = result.relation == "expected" and result.known_value > result.known_limit
    return absent[0] if len(absent) == 1 and is_short else None


def _is_ratio(result: RuleResult) -> bool:
    return result.unit in PURE


def _label(cell: CellKey) -> str:
    """The name of a cell within a sentence: an acronym such as "CET1" stays in capitals, a word does not."""
    label = phrases.LABELS.get(cell) or short_label(cell)
    starts_with_word = label.partition(" ")[0] in ("Own", "Total", "Leverage", "Liquidity", "Net")
    return label[0].lower() + label[1:] if starts_with_word else label


def _approval(context: Context, choose: Wordings, first: int) -> list[str]:
    """Lines of a letter without findings: what was examined, the tightest margin, a ratio that has changed."""
    templates = _listed([table_name(template) for template in context.templates]) or "the templates filed"
    lines = [_capital(choose.at(phrases.CLEAN_OPENING, first).format(templates=templates))]
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


def _notes(context: Context, choose: Wordings) -> list[str]:
    """Notes on the duties that the figures trigger, and on guidance. These are not violations."""
    notes = []
    by_rule: dict[str, list[RuleResult]] = {}
    for result in context.triggers:
        by_rule.setdefault(result.rule_id, []).append(result)
    if large := by_rule.get("LE_DEF"):
        clients = "one exposure" if len(large) == 1 else f"{len(large)} exposures"
        limit = format_limit(large[0].known_limit, None)
        notes.append(choose(phrases.LARGE_EXPOSURE_NOTE).format(clients=clients, limit=limit, legal=large[0].legal))
    for rule_id, sentences in phrases.TRIGGER_NOTES.items():
        notes += [choose(sentences).format(**_fields(result)) for result in by_rule.get(rule_id, ())]
    notes += [_capital(choose(phrases.LIFTED).format(**_fields(result))) for result in context.lifted]
    return notes


def _capital(text: str) -> str:
    """Capitalise the first letter only."""
    return text[:1].upper() + text[1:]


def _listed(parts: Sequence[str]) -> str:
    """Join a list in English: `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))) if parts else ""
