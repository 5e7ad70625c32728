"""Write the supervisor's letter on a report: a decision with measures, or no objection. No other module writes letters.

Every sentence is an approved block of `blocks/LANGUAGE/`, which a supervisor edits: `letter.jinja` (the layout), `words.toml`,
`findings.toml`, `measures.toml`. Blocks hold no law. `rules/measures.py` decides on measures, deadlines and announced
consequences; `rules/bases.json` has the citations of each legal basis. The same arguments always give the same letter.
"""

import datetime
import functools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import jinja2

from common.errors import UserError
from xbrl.read.filed_report import CellKey
from xbrl.read.render import PURE, Addressee, cell_name, format_figure, format_limit, table_name
from xbrl.read.report_notes import one_line
from xbrl.rules.findings import Finding, corrected, note_rules
from xbrl.rules.measures import (
    ORDERS,
    Basis,
    Measure,
    consequence,
    load_basis,
    plan_measures,
    requirement_of,
    severity,
    topic_of,
)
from xbrl.rules.note_facts import limit_rule
from xbrl.rules.reported_figures import Figure
from xbrl.rules.rules import RuleResult

BLOCKS = Path(__file__).with_name("blocks")
LANGUAGES = ("en", "de")
WRONG = ("filing", "misstatement", "timing")  # subjects on which the bank reports nothing but the correction
DAILY = ("liquidity", "funding")  # subjects on which CRR Art. 414 demands a daily report
MAX_NAME = 60  # characters that a letter prints of the name of a client or a bank
TEMPLATE, CURRENCY = re.compile(r"[A-Z]{1,2}_\d{2}\.\d{2}(?:\.[a-z])?"), re.compile(r"iso4217:([A-Z]{3})")


@dataclass(frozen=True)
class Hearing:
    """How the bank was heard before the decision: the day (YYYY-MM-DD), or the reason why the matter is too urgent for it."""

    day: str = ""
    urgent: str = ""


@dataclass(frozen=True)
class Context:
    """Further facts that a letter may mention. A prompt contains all of them, except those marked as "desk".

    `repeated` maps a rule id to the number of consecutive reports just before this one that already violated the rule.
    """

    triggers: tuple[RuleResult, ...] = ()  # duties triggered by figures of this report
    margins: tuple[RuleResult, ...] = ()  # requirements that are met
    previous: dict[CellKey, Decimal] = field(default_factory=dict, hash=False)  # figures of the previous report
    repeated: dict[str, int] = field(default_factory=dict, hash=False)
    templates: tuple[str, ...] = ()  # templates that were filed
    lifted: tuple[RuleResult, ...] = ()  # missed limits that do not bind the bank, according to its note
    # Desk: rule `..._COUNTED` -> whether the corrected figure meets its limits, as in `decisions.limits_without`.
    without: dict[str, str] = field(default_factory=dict, hash=False)
    untested: tuple[RuleResult, ...] = ()  # desk: rules that the figures cannot decide, without duties
    scope: str = ""  # desk: scope of the report (CON, IND) if the bank files several as of the same date
    unexamined: str = ""  # desk: "not applicable" or "undecided" if no rule could be decided
    overrides: tuple[tuple[Finding, RuleResult], ...] = ()  # desk: overrides, each with the result that it replaces
    hearing: Hearing = Hearing()  # desk


def write_letter(
    violated: Sequence[RuleResult],
    bank: Addressee,
    date: str,
    context: Context = Context(),  # noqa: B008 (frozen)
    *,
    basis: str = "model",
    language: str = "en",
    short: bool = False,
    grouped: bool = False,
) -> str:
    """Write the letter on the `violated` results of a report with reference date `date` (YYYY-MM-DD).

    `basis` names a legal basis of `rules/bases.json`, because a directive binds a bank through national law alone. `short` gives
    the orders alone, in one line; small models learn this letter. `grouped` gives the letter that a person signs. It separates
    thousands (9,921; in German 9.921), while models learn plain digits as in their reports. It names the cells that count as
    nil because they are not reported, and the basis of each duty. It says when the bank was heard, or why the matter is too
    urgent for that, and leaves a place if neither is known. Raise UserError for an unknown basis, and for a block that is missing
    or cannot be filled in.
    """
    blocks, law = load_blocks(language, grouped), load_basis(basis)
    measures = plan_measures(violated, context.repeated)
    orders = [text for measure in measures for text in _orders(measure, blocks, law, short)]
    if short:
        return " ".join(orders) or blocks.text("text", "no_measure")

    def cited(results: Sequence[RuleResult]) -> tuple[RuleResult, ...]:
        return tuple(replace(result, legal=law.cite(result)) for result in results)

    with_basis = {name: cited(getattr(context, name)) for name in ("margins", "triggers", "untested")}
    context = replace(context, **with_basis)
    hearing, objection = law.row["hearing"], law.row["objection"]
    months, suspends = blocks.text("months", str(objection["months"])), objection["suspends"]
    suspended = [measure for measure in measures if suspends is True or measure.subject in (suspends or ())]
    scope = blocks.words.get("scopes", {}).get(context.scope, "")
    fields: dict[str, Any] = {
        # A name from the register is trusted. Without a register the name is the code that the report gives.
        "bank": one_line(bank.name) if bank.name != bank.entity else plain_name(bank.name),
        "board": blocks.choose("boards", bank.type, "default"),
        "date": f"{blocks.day(date)} {scope}".strip(),
        "findings": [_finding(group, context, blocks) for group in _by_figure(cited(violated))],
        "powers": blocks.law(law.power_for(measures, grouped)),
        "binding": blocks.text("binding", basis),
        "measures": orders,
        "reporting": _reporting(measures, blocks) if measures else "",
        "consequence": _consequence(violated, context, law, blocks) if measures else "",
        "templates": blocks.listed(
            [table_name(template) for template in context.templates if TEMPLATE.fullmatch(template)]
        ),
        "tightest": _tightest(context, blocks),
        "untested": _untested(context, blocks),
        "remarks": _remarks(context, blocks),
        "unexamined": context.unexamined,
        "is_signed": grouped,
        "hearing_law": blocks.law(hearing["law"]),
        "objection_law": blocks.law(law.citation("objection")),
        "hearing": blocks.text(
            "rights",
            _hearing_block(measures, context.hearing) if grouped else "hearing",
            number=blocks.number(hearing["working_days"]),
            law=blocks.law(hearing["law"]),
            urgent=blocks.law(hearing.get("urgent", "")),
            day=blocks.day(context.hearing.day) if context.hearing.day else "____________",
            reason=one_line(context.hearing.urgent),
        ),
        "objection": blocks.text(
            "rights",
            "objection",
            months=months,
            law=blocks.law(law.citation("objection")),
            at_once=blocks.law(objection.get("at_once", "")),
            suspends=len(suspended) == len(measures),
            suspended=blocks.listed(list(dict.fromkeys(blocks.text("subjects", each.subject) for each in suspended))),
        ),
        "remedy": blocks.text("rights", "remedy"),
    }
    lines = blocks.layout(fields).splitlines()
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _hearing_block(measures: Sequence[Measure], hearing: Hearing) -> str:
    """Choose the sentence on the hearing. Corrections alone are no matter that is too urgent for one."""
    if not needs_hearing(measures):
        return "hearing"
    return "urgent" if hearing.urgent else "heard"


def needs_hearing(measures: Sequence[Measure]) -> bool:
    """Return whether a measure goes beyond corrections and explanations, so that the bank is heard before the decision."""
    return any(measure.order != "filing" for measure in measures)


def required_measures(
    violated: Sequence[RuleResult],
    context: Context = Context(),  # noqa: B008 (frozen)
) -> list[dict[str, str | int]]:
    """Return the measures that the letter demands: `[{"subject": "capital", "deadline_days": 10}, ...]`.

    The deadlines are in working days. The list is empty without violations. The letter is written from the same measures.
    """
    measures = plan_measures(violated, context.repeated)
    return [{"subject": measure.subject, "deadline_days": measure.deadline_days} for measure in measures]


def plain_name(text: str) -> str:
    """Clean a name from a report for a letter: one line of at most `MAX_NAME` characters.

    Banks choose the codes of their clients. Punctuation that ends a sentence is removed, so that no sentence begins in a name.
    """
    kept = "".join(character for character in one_line(text) if character not in ":;!?\"'`<>{}|*#()[]“”„‟«»‹›")
    kept = " ".join(part.rstrip(".,") for part in kept.split())
    return kept if len(kept) <= MAX_NAME else f"{kept[:MAX_NAME].rstrip()} ..."


def draft_mark(language: str) -> str:
    """Return the text above and below a letter that is not ready. Raise UserError if the block has no words."""
    blocks = load_blocks(language, False)
    mark = blocks.text("text", "draft")
    if not mark:
        raise UserError(f"{blocks.files['text']}: [text] draft must be a text with words in it; mend the block")
    return mark


def group_thousands(text: str, mark: str = ",") -> str:
    """Separate the thousands of a printed figure by `mark`: `297,630 thousand`."""
    return re.sub(r"(?<![\d.,])\d{4,}", lambda digits: f"{Decimal(digits[0]):,}".replace(",", mark), text)


class Blocks:
    """The approved blocks of one language. `grouped` is as in `write_letter`."""

    def __init__(self, language: str, grouped: bool) -> None:
        folder = BLOCKS / language
        content = {name: _read_toml(folder / f"{name}.toml") for name in ("words", "findings", "measures")}
        self.words = content["words"] | content["findings"] | {"measures": content["measures"]}
        self.files = {section: folder / f"{name}.toml" for name in content for section in (*content[name], name)}
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        self.template = functools.cache(environment.from_string)
        self.layout_file = folder / "letter.jinja"
        for name in ("and", "months", "numbers", "thousands"):
            if name not in self.words.get("text", {}):
                raise UserError(f"{folder / 'words.toml'}: [text] has no block {name!r}; write it there")
        self.grouped, self.thousands = grouped, self.words["text"]["thousands"] if grouped else ""

    def layout(self, fields: Mapping[str, object]) -> str:
        """Fill in the layout of the letter."""
        return self._fill(self.layout_file, "the layout", self.layout_file.read_text(encoding="utf-8"), fields)

    def text(self, section: str, name: str, part: str = "", **fields: Any) -> str:
        """Fill in a block. `part` names a part of a measure: order, detail, urgent or owners."""
        block = self.words.get(section, {}).get(name)
        if block is None:
            raise UserError(f"{self.files.get(section, BLOCKS)}: [{section}] has no block {name!r}; write it there")
        if part:
            block = block.get(part, "")
        return self._fill(self.files[section], f"[{section}] {name}", block, fields)

    def has(self, section: str, name: str) -> bool:
        return name in self.words.get(section, {})

    def choose(self, section: str, *names: str, **fields: Any) -> str:
        """Fill in the first block of `names` that the section has. The last name must exist."""
        name = next((name for name in names if self.has(section, name)), names[-1])
        return self.text(section, name, **fields)

    def listed(self, parts: Sequence[str]) -> str:
        """Join parts as in `a`, `a and b`, `a, b and c`."""
        last = f" {self.words['text']['and']} "
        return last.join(filter(None, (", ".join(parts[:-1]), parts[-1]))) if parts else ""

    def figure(self, text: str) -> str:
        """Translate a printed figure into this language."""
        return group_thousands(self._replaced("format", text), self.thousands)

    def law(self, text: str) -> str:
        """Translate a printed reference to the law into this language."""
        return self._replaced("law", text)

    def number(self, number: int) -> str:
        """Write a number in words, or in digits if the blocks have no word for it."""
        return self.words["text"]["numbers"].get(str(number), str(number))

    def day(self, date: str) -> str:
        """Write a date (YYYY-MM-DD) in words."""
        day = datetime.date.fromisoformat(date)
        return self.text("text", "date", day=day.day, month=self.words["text"]["months"][day.month - 1], year=day.year)

    def plain_figures(self, text: str) -> str:
        """Undo the separators and the translation of the figures in a text: the inverse of `figure`."""
        if self.thousands:
            text = re.sub(rf"(?<=\d){re.escape(self.thousands)}(?=\d{{3}}(?!\d))", "", text)
        for old, new in reversed(self.words.get("format", {}).items()):
            text = text.replace(new, old)
        return text

    def fixed_texts(self) -> list[str]:
        """Return the words of all blocks and of the layout, without the placeholders."""
        texts, sections = [self.layout_file.read_text(encoding="utf-8")], [self.words]
        for section in sections:  # sections of sections are appended while this runs
            sections += [part for part in section.values() if isinstance(part, dict)]
            texts += [part for part in section.values() if isinstance(part, str)]
        return [re.sub(r"\{\{.*?\}\}|\{[%#].*?[%#]\}", " ", text, flags=re.DOTALL) for text in texts]

    def within(self, days: int) -> str:
        return self.text("text", "within", number=self.number(days))

    def deadline(self, days: int) -> str:
        return self.text("text", "deadline", within=self.within(days))

    def _replaced(self, section: str, text: str) -> str:
        for old, new in self.words.get(section, {}).items():
            text = text.replace(old, new)
        return text

    def _fill(self, file: Path, where: str, text: str, fields: Mapping[str, object]) -> str:
        if not isinstance(text, str):
            raise UserError(f"{file}: {where} must be a text, not {text!r}; mend the block")
        try:
            return self.template(text).render(**fields).strip()
        except Exception as error:  # an expression in a block may raise anything, such as {{ limit + 1 }}
            raise UserError(f"{file}: {where} cannot be filled in: {error}; mend the block") from error


load_blocks = functools.cache(Blocks)


def _read_toml(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: the blocks of letters cannot be read: {error}; mend the file") from error


def _orders(measure: Measure, blocks: Blocks, law: Basis, short: bool) -> list[str]:
    """Return the texts that a measure demands: one text, and one for each rule that has its own block."""
    groups: dict[str, list[RuleResult]] = {}
    for result in measure.results:
        own = blocks.has("measures", result.rule_id)
        name = result.rule_id if own else f"{topic_of(measure)}_{measure.order}".replace(" ", "_")
        groups.setdefault(name, []).append(result)
    days, plan = measure.deadline_days, law.row["powers"][topic_of(measure)].get("plan", "")
    fields = {
        "deadline": blocks.deadline(days),
        "within": blocks.within(days),
        "law": blocks.law(plan),
        "several": False,
    }
    texts = []
    parts = ["order"] if short else ["order", "detail"]
    if not short and measure.urgency == 2:
        parts.append("urgent")
    if not short and measure.owners_days:
        parts.append("owners")
        fields["owners_deadline"] = blocks.deadline(measure.owners_days)
    for name, results in groups.items():
        fields["several"] = blocks.grouped and len(results) > 1  # models learn one form of the sentence
        cells = (cell for result in results for cell in (result.cell, *_nil(result, blocks)))
        tables = dict.fromkeys(table_name(cell[0]) for cell in cells if cell[0])
        fields["templates"] = blocks.listed(list(tables)) or blocks.text("text", "report")
        texts.append(" ".join(filter(None, (blocks.text("measures", name, part, **fields) for part in parts))))
    return texts


def _reporting(measures: Sequence[Measure], blocks: Blocks) -> str:
    """Write the duty to report. A bank below its liquidity requirements reports daily, by law (CRR Art. 414)."""
    worst = max((measure.order for measure in measures), key=ORDERS.index)
    subjects = dict.fromkeys(measure.subject for measure in measures if measure.subject not in WRONG)
    daily = [blocks.text("subjects", subject) for subject in subjects if subject in DAILY]
    later = [blocks.text("subjects", subject) for subject in subjects if subject not in DAILY]
    parts = [blocks.text("reporting", "daily", subjects=blocks.listed(daily))] if daily else []
    if later or not daily:
        parts.append(blocks.text("reporting", worst, subjects=blocks.listed(later)))
    return " ".join(parts)


def _consequence(violated: Sequence[RuleResult], context: Context, law: Basis, blocks: Blocks) -> str:
    """Write the announced consequence if the measures are not carried out. `measures.consequence` keeps it proportionate."""
    announced = consequence(violated, context.repeated)
    if announced == "none":
        return blocks.text("consequences", severity(violated))
    return blocks.text("consequences", announced, law=blocks.law(law.citation(announced)))


def _by_figure(violated: Sequence[RuleResult]) -> list[list[RuleResult]]:
    """Group the violations by figure. A group has all limits that one figure misses, the most severe first.

    Violations other than minimum ratios form groups of their own.
    """
    groups: dict[object, list[RuleResult]] = {}
    for result in violated:
        shared = result.kind == "breach" and result.relation == "min"
        groups.setdefault((result.cell, result.row) if shared else id(result), []).append(result)
    return [sorted(group, key=lambda result: -ORDERS.index(requirement_of(result).order)) for group in groups.values()]


def _finding(group: Sequence[RuleResult], context: Context, blocks: Blocks) -> str:
    """Write one finding: the figure and its limit, further limits, the trend, repetition, and the finding in plain words."""
    result, *further = group
    fields = _fields(result, blocks)
    note_rule = note_rules().get(result.rule_id)
    own = [result.rule_id] if has_figures(result) or (note_rule and note_rule.counted) else []
    parts = [blocks.choose("findings", *own, _form(result), **fields)]
    if nil := [cell_name(cell, plain_name(result.row) if cell[1] == "*" else "") for cell in _nil(result, blocks)]:
        parts.append(blocks.text("text", "nil", cells=blocks.listed(nil)))
    if note_rule and (known := context.without.get(result.rule_id)):
        parts.append(blocks.text("without", f"{'pledged' if note_rule.kind == 'pledged' else 'capital'}_{known}"))
    if further:
        limits = [blocks.text("text", "limit_of", **_fields(missed, blocks)) for missed in further]
        parts.append(blocks.text("text", "other_limit", limits=blocks.listed(limits)))
    previous = context.previous.get(result.cell)
    if result.kind == "breach" and result.relation == "min" and previous is not None and not result.row:
        trend = "same" if previous == result.value else "fell" if previous > result.known_value else "rose"
        before = blocks.figure(format_figure(previous, result.unit, result.decimals))
        parts.append(blocks.text("trend", trend, before=before))
    times = max(context.repeated.get(member.rule_id, 0) for member in group)
    if times:
        parts.append(blocks.text("repeated", str(min(times, 2))))
    if result.guidance:
        parts.append(blocks.text("text", "guidance", guidance=result.guidance))
    subject, order, *_ = requirement_of(result)
    parts.append(blocks.choose("plain", result.rule_id, f"{subject}_{order}", is_signed=blocks.grouped))
    return " ".join(filter(None, parts))


def _nil(result: RuleResult, blocks: Blocks) -> list[CellKey]:
    """Return the unreported cells that a filing error reads as 0, besides its own cell: the error may be in one of them."""
    if not blocks.grouped or result.kind != "filing":
        return []
    return [figure.cell for figure in result.inputs if figure.source == "read as 0" and figure.cell != result.cell]


def _form(result: RuleResult) -> str:
    """Return the name of the block for a finding whose rule has no block of its own."""
    if not has_figures(result):
        return "without_figures"
    is_of_note = result.rule_id in note_rules()
    if is_of_note or result.kind == "breach":
        return "max" if result.relation != "min" else "note" if is_of_note else "computed" if _parts(result) else "min"
    if result.rule_id.endswith("_SIGN"):
        return "sign"
    return {"min": "requirement", "max": "cap", "expected": "expected"}[result.relation]


def has_figures(result: RuleResult) -> bool:
    """Return whether the figure and its limit are known."""
    return result.value is not None and result.limit is not None


def _fields(result: RuleResult, blocks: Blocks) -> dict[str, Any]:
    """Return the values of a block's placeholders. blocks/en/findings.toml lists the placeholders."""
    row = plain_name(result.row)
    fields: dict[str, Any] = {
        "label": blocks.words.get("labels", {}).get(" ".join(result.cell)) or cell_name(result.cell, row),
        "limit_name": blocks.choose("limits", limit_rule(result), "default"),
        "cell": cell_name(result.cell, row) if result.cell[0] else blocks.text("text", "report"),
        "legal": blocks.law(result.legal),
        "row": row,
        "module": result.cell[0],
        "parts": blocks.listed([cell_name(part.cell, plain_name(part.row)) for part in _parts(result)]),
        "missing": result.missing,
        **dict.fromkeys(("value", "limit", "gap", "is_one"), ""),
    }
    if result.value is not None:
        fields["value"] = _amount(result, format_figure(result.value, result.unit, result.decimals), blocks)
    if result.limit is not None:
        fields["limit"] = _amount(result, result.printed_limit, blocks)
    if has_figures(result):
        gap = format_limit(
            abs(result.known_limit - result.known_value), result.unit, result.limit_decimals, missed_by=Decimal(0)
        )
        fields["is_one"] = blocks.grouped and gap == "1%"  # models learn one form of the sentence
        points = blocks.text("text", "points", number=blocks.figure(gap.removesuffix("%")), is_one=fields["is_one"])
        fields["gap"] = points if result.unit in PURE else _amount(result, gap, blocks)
    return fields


def _amount(result: RuleResult, printed: str, blocks: Blocks) -> str:
    """Translate a printed figure; put the currency before an amount."""
    currency = CURRENCY.fullmatch(result.unit or "")
    return f"{currency[1] if currency else ''} {blocks.figure(printed)}".strip()


def _parts(result: RuleResult) -> tuple[Figure, ...]:
    """Return the parts from which an unreported ratio was recomputed; empty if the ratio is reported."""
    own = (figure.parts for figure in result.inputs if figure.cell == result.cell and figure.source == "recomputed")
    return next(own, ())


def _tightest(context: Context, blocks: Blocks) -> str:
    """Write the minimum ratio that is met most narrowly; "" if no ratio is met."""
    ratios = [result for result in context.margins if result.relation == "min" and result.unit in PURE and result.limit]
    if not ratios:
        return ""
    tightest = min(ratios, key=lambda result: (result.known_value - result.known_limit) / result.known_limit)
    return blocks.text("text", "tightest", **_fields(tightest, blocks))


def _untested(context: Context, blocks: Blocks) -> str:
    """Write the list of rules that the figures of the report could not test; "" if all rules were tested."""
    rules = [
        blocks.text("text", "untested_rule", **_fields(result, blocks), has_name=blocks.has("limits", result.rule_id))
        for result in context.untested
    ]
    return blocks.text("text", "untested", rules="; ".join(dict.fromkeys(rules))) if rules else ""


def _remarks(context: Context, blocks: Blocks) -> list[str]:
    """Write the remarks, which are no violations: on limits that a note lifts, and on duties that the figures trigger."""
    large = [duty for duty in context.triggers if duty.rule_id == "LE_DEF"]
    duties = [duty for duty in context.triggers if duty.rule_id != "LE_DEF" and blocks.has("remarks", duty.rule_id)]
    named = [("lifted", limit) for limit in context.lifted] + [(duty.rule_id, duty) for duty in (*large[:1], *duties)]
    remarks = [blocks.text("remarks", name, **_fields(result, blocks), number=len(large)) for name, result in named]
    for line, result in context.overrides:
        fields = _fields(corrected(result, line), blocks)
        is_lifted = line.value is None and line.limit is None
        texts = {
            "rule": line.rule,
            "reported": _fields(result, blocks)["value"],
            "is_lifted": is_lifted,
            "is_of_note": line.note_rule,
        }
        people = {"reason": one_line(line.reason), "second": one_line(line.second)}
        remarks.append(blocks.text("remarks", "override", **fields | texts | people))
    return remarks
