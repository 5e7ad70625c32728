"""Write the supervisor's letter on a report: a decision with measures, or no objection. The only writer of letters.

Every sentence is an approved block of `blocks/LANGUAGE/`, which a supervisor edits: `letter.jinja` (the layout), `words.toml`,
`findings.toml`, `measures.toml`. They hold no law: `rules/measures.py` decides what is demanded, by when, and what is
announced; `rules/bases.json` has the citations of each legal basis. A letter has one wording, made of the arguments alone.
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
from xbrl.rules.findings import note_rules
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
WRONG = ("filing", "misstatement", "timing")  # subjects on which nothing is reported but the correction
DAILY = ("liquidity", "funding")  # subjects on which CRR Art. 414 demands a daily report
MAX_NAME = 60  # characters of a name that a report gives to a client or a bank
TEMPLATE, CURRENCY = re.compile(r"[A-Z]{1,2}_\d{2}\.\d{2}(?:\.[a-z])?"), re.compile(r"iso4217:([A-Z]{3})")


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
    lifted: tuple[RuleResult, ...] = ()  # figures that miss a limit which does not apply, by a note of the bank
    # Rule `..._COUNTED` whose limits are not missed -> "met", "unknown" or "waived": what a letter of the desk says of them.
    without: dict[str, str] = field(default_factory=dict, hash=False)
    untested: tuple[RuleResult, ...] = ()  # of the desk: requirements and contradictions that the figures do not decide
    scope: str = ""  # of the desk: the scope of the report (CON, IND) where the bank files others as of the same date
    unexamined: str = ""  # "not applicable" or "undecided" if no figure of the report was judged


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
    """The letter on the `violated` results of a report with reference date `date` (YYYY-MM-DD).

    `basis` names a legal basis of `rules/bases.json`: a directive binds a bank through national law alone.
    `short` gives the orders alone, in one line: the letter that small models learn. `grouped` is the letter that a person
    signs: it separates thousands (9,921; in German 9.921), where models learn plain digits, which their reports have too, and
    names the cells that count as nil because they are not reported, and the basis of each duty. It leaves a place for the day on which
    the bank was heard, which has to be before the decision unless the matter is urgent. Raises UserError for an unknown basis, and for a block
    that is missing or cannot be filled in.
    """
    blocks, law = _blocks(language, grouped), load_basis(basis)
    measures = plan_measures(violated, context.repeated)
    orders = [text for measure in measures for text in _orders(measure, blocks, short)]
    if short:
        return " ".join(orders) or blocks.text("text", "no_measure")

    def cited(results: Sequence[RuleResult]) -> tuple[RuleResult, ...]:
        return tuple(replace(result, legal=law.cite(result)) for result in results)

    more = {name: cited(getattr(context, name)) for name in ("margins", "triggers", "untested")}
    context, day = replace(context, **more), datetime.date.fromisoformat(date)
    hearing, objection = law.row["hearing"], law.row["objection"]
    months, suspends = blocks.text("months", str(objection["months"])), objection["suspends"]
    suspended = [one for one in measures if suspends is True or one.subject in (suspends or ())]
    month = blocks.words["text"]["months"][day.month - 1]
    when = blocks.text("text", "date", day=day.day, month=month, year=day.year)
    scope = blocks.words.get("scopes", {}).get(context.scope, "")
    fields: dict[str, Any] = {
        # A name of the register is that of the supervisor. Without one the report names the bank.
        "bank": one_line(bank.name) if bank.name != bank.entity else plain_name(bank.name),
        "board": blocks.choose("boards", bank.type, "default"),
        "date": f"{when} {scope}".strip(),
        "findings": [_finding(group, context, blocks) for group in _by_figure(cited(violated))],
        "powers": blocks.law(law.power_for(measures, grouped)),
        "binding": blocks.text("binding", basis),
        "measures": orders,
        "reporting": _reporting(measures, blocks) if measures else "",
        "consequence": _consequence(violated, context, law, blocks) if measures else "",
        "templates": blocks.listed([table_name(one) for one in context.templates if TEMPLATE.fullmatch(one)]),
        "tightest": _tightest(context, blocks),
        "untested": _untested(context, blocks),
        "remarks": _remarks(context, blocks),
        "unexamined": context.unexamined,
        "is_signed": grouped,
        "hearing_law": blocks.law(hearing["law"]),
        "objection_law": blocks.law(law.citation("objection")),
        "hearing": blocks.text(
            "rights",
            "heard" if grouped else "hearing",
            number=blocks.number(hearing["working_days"]),
            law=blocks.law(hearing["law"]),
            urgent=blocks.law(hearing.get("urgent", "")),
        ),
        "objection": blocks.text(
            "rights",
            "objection",
            months=months,
            law=blocks.law(law.citation("objection")),
            at_once=blocks.law(objection.get("at_once", "")),
            suspends=len(suspended) == len(measures),
            suspended=blocks.listed(list(dict.fromkeys(blocks.text("subjects", one.subject) for one in suspended))),
        ),
        "remedy": blocks.text("rights", "remedy"),
    }
    lines = blocks.layout(fields).splitlines()
    return "\n".join(line.rstrip() for line in lines if line.strip())


def required_measures(
    violated: Sequence[RuleResult],
    context: Context = Context(),  # noqa: B008 (frozen)
) -> list[dict[str, str | int]]:
    """What the letter demands, as data: `[{"subject": "capital", "deadline_days": 10}, ...]`; empty without findings.

    The letter is written from the same structure. The days are working days.
    """
    measures = plan_measures(violated, context.repeated)
    return [{"subject": one.subject, "deadline_days": one.deadline_days} for one in measures]


def plain_name(text: str) -> str:
    """A name that stands in a report as a letter prints it: one line of at most `MAX_NAME` characters.

    A bank chooses the codes of its clients. Marks that end a sentence are left out, so that none begins within a name.
    """
    kept = "".join(character for character in one_line(text) if character not in ":;!?\"'`<>{}|*#()[]“”„‟«»‹›")
    kept = " ".join(part.rstrip(".,") for part in kept.split())
    return kept if len(kept) <= MAX_NAME else f"{kept[:MAX_NAME].rstrip()} ..."


def draft_mark(language: str) -> str:
    """What stands above and below a letter that something keeps back. Raises UserError for a block without words."""
    blocks = _blocks(language, False)
    mark = blocks.text("text", "draft")
    if not mark:
        raise UserError(f"{blocks.files['text']}: [text] draft must be a text with words in it; mend the block")
    return mark


def group_thousands(text: str, mark: str = ",") -> str:
    """A printed figure with a mark between its thousands: `297,630 thousand`."""
    return re.sub(r"(?<![\d.,])\d{4,}", lambda digits: f"{Decimal(digits[0]):,}".replace(",", mark), text)


class _Blocks:
    """The approved blocks of one language."""

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
        """The whole letter."""
        return self._fill(self.layout_file, "the layout", self.layout_file.read_text(encoding="utf-8"), fields)

    def text(self, section: str, name: str, part: str = "", **fields: Any) -> str:
        """A block, filled in. `part` is its part, of a measure."""
        block = self.words.get(section, {}).get(name)
        if block is None:
            raise UserError(f"{self.files.get(section, BLOCKS)}: [{section}] has no block {name!r}; write it there")
        if part:
            block = block.get(part, "")
        return self._fill(self.files[section], f"[{section}] {name}", block, fields)

    def has(self, section: str, name: str) -> bool:
        return name in self.words.get(section, {})

    def choose(self, section: str, *names: str, **fields: Any) -> str:
        """The first block of a section that exists; the last name must exist."""
        name = next((name for name in names if self.has(section, name)), names[-1])
        return self.text(section, name, **fields)

    def listed(self, parts: Sequence[str]) -> str:
        """`a`, `a and b`, `a, b and c`."""
        last = f" {self.words['text']['and']} "
        return last.join(filter(None, (", ".join(parts[:-1]), parts[-1]))) if parts else ""

    def figure(self, text: str) -> str:
        """A printed figure in this language."""
        return group_thousands(self._replaced("format", text), self.thousands)

    def law(self, text: str) -> str:
        """A printed reference to the law in this language."""
        return self._replaced("law", text)

    def number(self, number: int) -> str:
        """A number in words, as far as the blocks have one."""
        return self.words["text"]["numbers"].get(str(number), str(number))

    def deadline(self, days: int) -> str:
        return self.text("text", "deadline", number=self.number(days))

    def _replaced(self, section: str, text: str) -> str:
        for old, new in self.words.get(section, {}).items():
            text = text.replace(old, new)
        return text

    def _fill(self, file: Path, where: str, text: str, fields: Mapping[str, object]) -> str:
        if not isinstance(text, str):
            raise UserError(f"{file}: {where} must be a text, not {text!r}; mend the block")
        try:
            return self.template(text).render(**fields).strip()
        except Exception as error:  # of an expression in a block, such as {{ limit + 1 }}
            raise UserError(f"{file}: {where} cannot be filled in: {error}; mend the block") from error


_blocks = functools.cache(_Blocks)


def _read_toml(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: the blocks of letters cannot be read: {error}; mend the file") from error


def _orders(measure: Measure, blocks: _Blocks, short: bool) -> list[str]:
    """What a measure demands: one text, or one for each rule that has a block of its own."""
    groups: dict[str, list[RuleResult]] = {}
    for result in measure.results:
        own = blocks.has("measures", result.rule_id)
        name = result.rule_id if own else f"{topic_of(measure)}_{measure.order}".replace(" ", "_")
        groups.setdefault(name, []).append(result)
    fields, texts = {"deadline": blocks.deadline(measure.deadline_days), "several": False}, []
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


def _reporting(measures: Sequence[Measure], blocks: _Blocks) -> str:
    """The duty to report. A bank below its liquidity requirements reports daily, by law (CRR Art. 414)."""
    worst = max((measure.order for measure in measures), key=ORDERS.index)
    subjects = dict.fromkeys(measure.subject for measure in measures if measure.subject not in WRONG)
    daily = [blocks.text("subjects", subject) for subject in subjects if subject in DAILY]
    others = [blocks.text("subjects", subject) for subject in subjects if subject not in DAILY]
    parts = [blocks.text("reporting", "daily", subjects=blocks.listed(daily))] if daily else []
    if others or not daily:
        parts.append(blocks.text("reporting", worst, subjects=blocks.listed(others)))
    return " ".join(parts)


def _consequence(violated: Sequence[RuleResult], context: Context, law: Basis, blocks: _Blocks) -> str:
    """What follows if the measures are not carried out: what `measures.consequence` finds proportionate."""
    announced = consequence(violated, context.repeated)
    if announced == "none":
        return blocks.text("consequences", severity(violated))
    return blocks.text("consequences", announced, law=blocks.law(law.citation(announced)))


def _by_figure(violated: Sequence[RuleResult]) -> list[list[RuleResult]]:
    """The findings, one list for each figure: a breach, and further limits that the same figure misses.

    The first of a list is the most severe.
    """
    groups: dict[object, list[RuleResult]] = {}
    for result in violated:
        shared = result.kind == "breach" and result.relation == "min"
        groups.setdefault((result.cell, result.row) if shared else id(result), []).append(result)
    return [sorted(group, key=lambda one: -ORDERS.index(requirement_of(one).order)) for group in groups.values()]


def _finding(group: Sequence[RuleResult], context: Context, blocks: _Blocks) -> str:
    """One finding: the figure and its limit, further limits, the trend, repetition, and the same in plain words."""
    result, *others = group
    fields = _fields(result, blocks)
    of_note = note_rules().get(result.rule_id)
    own = [result.rule_id] if has_figures(result) or (of_note and of_note.counted) else []
    parts = [blocks.choose("findings", *own, _form(result), **fields)]
    if nil := [cell_name(cell, plain_name(result.row) if cell[1] == "*" else "") for cell in _nil(result, blocks)]:
        parts.append(blocks.text("text", "nil", cells=blocks.listed(nil)))
    if of_note and (known := context.without.get(result.rule_id)):
        parts.append(blocks.text("without", f"{'pledged' if of_note.kind == 'pledged' else 'capital'}_{known}"))
    if others:
        limits = [blocks.text("text", "limit_of", **_fields(other, blocks)) for other in others]
        parts.append(blocks.text("text", "other_limit", limits=blocks.listed(limits)))
    previous = context.previous.get(result.cell)
    if result.kind == "breach" and result.relation == "min" and previous is not None and not result.row:
        trend = "same" if previous == result.value else "fell" if previous > result.known_value else "rose"
        before = blocks.figure(format_figure(previous, result.unit, result.decimals))
        parts.append(blocks.text("trend", trend, before=before))
    times = max(context.repeated.get(one.rule_id, 0) for one in group)
    if times:
        parts.append(blocks.text("repeated", str(min(times, 2))))
    if result.guidance:
        parts.append(blocks.text("text", "guidance", guidance=result.guidance))
    subject, order, *_ = requirement_of(result)
    parts.append(blocks.choose("plain", result.rule_id, f"{subject}_{order}", is_signed=blocks.grouped))
    return " ".join(filter(None, parts))


def _nil(result: RuleResult, blocks: _Blocks) -> list[CellKey]:
    """The other cells that a filing error rests on and that are not reported: the error may be there."""
    if not blocks.grouped or result.kind != "filing":
        return []
    return [one.cell for one in result.inputs if one.source == "read as 0" and one.cell != result.cell]


def _form(result: RuleResult) -> str:
    """The form of a finding: the name of its block, where its rule has none of its own."""
    if not has_figures(result):
        return "without_figures"
    of_note = result.rule_id in note_rules()
    if of_note or result.kind == "breach":
        return "max" if result.relation != "min" else "note" if of_note else "computed" if _parts(result) else "min"
    if result.rule_id.endswith("_SIGN"):
        return "sign"
    return {"min": "requirement", "max": "cap", "expected": "expected"}[result.relation]


def has_figures(result: RuleResult) -> bool:
    """Whether both the figure and its limit are known."""
    return result.value is not None and result.limit is not None


def _fields(result: RuleResult, blocks: _Blocks) -> dict[str, Any]:
    """Values for the placeholders of a block; blocks/en/findings.toml lists them."""
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


def _amount(result: RuleResult, printed: str, blocks: _Blocks) -> str:
    """A printed figure in the words of the language, an amount with its currency."""
    currency = CURRENCY.fullmatch(result.unit or "")
    return f"{currency[1] if currency else ''} {blocks.figure(printed)}".strip()


def _parts(result: RuleResult) -> tuple[Figure, ...]:
    """The parts of a ratio that is not reported and was recomputed from them; empty if it is reported."""
    own = (one.parts for one in result.inputs if one.cell == result.cell and one.source == "recomputed")
    return next(own, ())


def _tightest(context: Context, blocks: _Blocks) -> str:
    """The requirement that is met most narrowly; "" without one."""
    ratios = [one for one in context.margins if one.relation == "min" and one.unit in PURE and one.limit]
    if not ratios:
        return ""
    tightest = min(ratios, key=lambda one: (one.known_value - one.known_limit) / one.known_limit)
    return blocks.text("text", "tightest", **_fields(tightest, blocks))


def _untested(context: Context, blocks: _Blocks) -> str:
    """What could not be tested on the figures of the report; "" if all was."""
    named = [(one, blocks.has("limits", one.rule_id)) for one in context.untested]
    rules = [blocks.text("text", "untested_rule", **_fields(one, blocks), has_name=has_name) for one, has_name in named]
    return blocks.text("text", "untested", rules="; ".join(dict.fromkeys(rules))) if rules else ""


def _remarks(context: Context, blocks: _Blocks) -> list[str]:
    """Limits that a note lifts, and duties that the figures trigger: no violations."""
    large = [one for one in context.triggers if one.rule_id == "LE_DEF"]
    others = [one for one in context.triggers if one.rule_id != "LE_DEF" and blocks.has("remarks", one.rule_id)]
    named = [("lifted", one) for one in context.lifted] + [(one.rule_id, one) for one in (*large[:1], *others)]
    return [blocks.text("remarks", name, **_fields(one, blocks), number=len(large)) for name, one in named]
