"""Check the report itself: find figures that are incomplete, contradictory or implausible.

The rules judge the figures that a bank reported. The findings of this module tell where that judgement may be wrong, so that
nothing odd passes as clean. They have the kind "quality" and are never labels of training examples: `rules.evaluate` does not
return them. The requirements are the EBA's filing rules (their source: `read/filing_rules.py`), unless a finding names another
source. The state of a finding is its severity.

"error": no letter may rest on the report.

- NAME: the file name has another bank, scope or reference date than the content (section on file names).
- ENTITY, PERIOD: facts of another entity or reference date (2.9, 2.13), which the rules do not read; a date with a time (2.10).
- UNIT: a ratio in a currency (3.2), an amount without a currency (2.24).
- RANGE: a figure below zero that cannot be.

"violated": the report's figures cannot show that all is well.

- FILING_INDICATOR: facts of a template that has no filing indicator or is declared as not filed (1.6).
- MANDATORY: a template is missing that every bank files in its module.
- DUPLICATE: a cell with values that contradict each other (2.16).
- CURRENCY: amounts in more than one currency (3.1).
- ACCURACY: figures are coarser than required (2.18). If they leave a rule open, the rule is undecided and gives this reason.
- PLAUSIBLE: the decimal point of a ratio looks two places off, judged by its numerator and denominator, or by its size if
  these are missing (3.2).

"warning": it changes no figure.

- FORM: a filing indicator that no template has (1.6), facts without a value (2.19), footnotes (2.25) and other breaches of form.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal

from xbrl.read.dpm import Cells
from xbrl.read.filed_report import CellKey, Fact, Report, template_of
from xbrl.read.render import PURE, cell_name, format_fact, format_limit, kind_of
from xbrl.rules.reported_figures import (
    RECOMPUTED,
    Figure,
    Figures,
    decimals_needed,
    format_value,
    index_facts,
    is_of_report,
    name_of,
    read_figure,
    recompute,
)
from xbrl.rules.rules import RuleResult, why_unfiled

# Module -> (templates that every bank files in it, source, source before 2025 if different). The articles were checked in the
# text. Art. 5(1) names a section of the annex; Art. 5(2) of (EU) 2021/451 named templates 1 to 5 (5: transitional provisions).
NEW, OLD = "ITS (EU) 2024/3117 Art.", "ITS (EU) 2021/451 Art."
MANDATORY = {
    "COREP_OF": (("C_01.00", "C_02.00", "C_03.00", "C_04.00"), f"{NEW} 5(1)", f"{OLD} 5(2)"),
    "COREP_LR": (("C_47.00",), "CRR Art. 430(1)(a)"),
    "COREP_LCR_DA": (("C_76.00",), "CRR Art. 415, 430(1)(d)"),
    "COREP_NSFR": (("C_84.00",), "CRR Art. 415, 430(1)(d)"),
    "FINREP9": (("F_01.01", "F_01.02", "F_01.03", "F_02.00"), f"{NEW} 11(a)", f"{OLD} 11(2)(a)"),
}
# A fact with one of these members is expressed in its own currency (EBA filing rules 3.1).
OWN_CURRENCY = ("eba_CA:x1", "eba_qCA:qx2000")
# A ratio above this value is doubted if its parts are missing: ten times the usual ratio of banks in the EU, or ten times the limit.
IMPLAUSIBLE = {
    **{("C_03.00", row, "c0010"): Decimal("1.5") for row in ("r0010", "r0030", "r0050")},
    **{("C_28.00", "*", "c350"): Decimal("2.5"), ("C_47.00", "r0340", "c0010"): Decimal("0.55")},
    **{("C_76.00.a", "r0030", "c0010"): Decimal("16.5"), ("C_84.00.a", "r0220", "c0040"): Decimal("12.7")},
}
# Figures that are never below zero, with the article that defines them
NOT_NEGATIVE = {
    **{("C_76.00.a", row, "c0010"): "Delegated Reg. (EU) 2015/61 Art. 4(1)" for row in ("r0010", "r0020", "r0030")},
    **dict.fromkeys(RECOMPUTED[("C_84.00.a", "r0220", "c0040")][:2], "CRR Art. 428b(1)"),
    ("C_84.00.a", "r0220", "c0040"): "CRR Art. 428b(1)",
    ("C_47.00", "r0300", "c0010"): "CRR Art. 429(2)",
    ("C_02.00.a", "r0010", "c0010"): "CRR Art. 92(3)",
}
LEI = re.compile(r"(?<![A-Z0-9])(?=[0-9]*[A-Z])[A-Z0-9]{18}[0-9]{2}(?![A-Z0-9])")  # in a file name
DAY = re.compile(r"(?<![0-9])[0-9]{4}-[0-9]{2}-[0-9]{2}(?![0-9])")
MAX_NAMED = 5  # a finding names at most so many facts
TYPES = {"m": "monetary", "p": "percentage", "i": "integer"}  # by the first letter of a metric up to release 3.5
NOWHERE = ("", "", "")  # the cell of a finding on no cell


def check_quality(report: Report, cells: Cells) -> list[RuleResult]:
    """Return the findings about a report, in a fixed order."""
    figures = index_facts(report)
    return [
        *_misnamed(report),
        *_of_others(report, cells),
        *_wrong_units(report, cells),
        *_negative(figures),
        *_uncovered(report, cells),
        *_mandatory(report, cells),
        *_duplicates(figures, cells),
        *_currencies(report, cells),
        *_coarse(report, cells),
        *_doubtful(figures),
        *_of_form(report, cells),
    ]


def _finding(rule: str, legal: str, reason: str, cell: CellKey, row: str = "", state: str = "violated") -> RuleResult:
    return RuleResult(rule, "quality", state, cell, legal=legal, row=row, reason=reason)


def _named(facts: Sequence[Fact], cells: Cells) -> str:
    """Count and name facts: `2 facts: C 47.00 r0340 c0010 = 2.00%, C 47.00 r0300 c0010 = 5 thousand`."""
    texts = []
    for fact in facts[:MAX_NAMED]:
        name = cell_name(fact.cell, " ".join(fact.keys.values())) if fact.cell else fact.concept
        texts.append(f"{name} = {format_fact(fact, kind=kind_of(fact, cells))}")
    more = ", ..." if len(facts) > MAX_NAMED else ""
    return f"{len(facts)} fact{'s' * (len(facts) != 1)}: {', '.join(texts)}{more}"


def _uncovered(report: Report, cells: Cells) -> Iterator[RuleResult]:
    """Find facts of templates whose filing indicator is missing or false."""
    with_cell, indicators = [fact for fact in report.facts if fact.cell], report.filing_indicators
    if with_cell and not indicators:
        text = "the report has no filing indicators; the rules judge all of its facts"
        yield _finding(
            "FILING_INDICATOR", "EBA filing rules 1.6", f"{text} ({_named(with_cell, cells)})", _cell(with_cell[0])
        )
        return
    groups: dict[str, list[Fact]] = {}
    for fact in with_cell:
        templates = [template_of(cell[0]) for cell in (_cell(fact), *fact.other_cells)]
        if not any(indicators.get(template) for template in (*templates, _cell(fact)[0])):
            declared = next((template for template in templates if template in indicators), templates[0])
            groups.setdefault(declared, []).append(fact)
    for template, facts in groups.items():
        text = f"{why_unfiled(report, template)}, yet it has {_named(facts, cells)}"
        yield _finding("FILING_INDICATOR", "EBA filing rules 1.6", text, _cell(facts[0]))


def _cell(fact: Fact) -> CellKey:
    assert fact.cell is not None
    return fact.cell


def _mandatory(report: Report, cells: Cells) -> Iterator[RuleResult]:
    """Find templates that are missing although their module was filed."""
    indicators = report.filing_indicators
    # A fact in several tables does not tell in which module it was filed, so it is ignored here.
    reported = {template_of(fact.cell[0]) for fact in report.facts if fact.cell and not fact.other_cells}
    present = {template for template, filed in indicators.items() if filed} if indicators else reported
    modules = {_module(template, cells) for template in indicators.keys() | reported}
    for module, (templates, *laws) in MANDATORY.items():
        legal = laws[-1 if report.period < "2025" else 0]
        for template in templates if module in modules else ():
            if template not in present:
                why = why_unfiled(report, template)
                yield _finding("MANDATORY", legal, f"{why}, but {module} must contain it", (template, "", ""))


def _module(template: str, cells: Cells) -> str:
    """Return the module of a template; "" if unknown. A table has the code of its template, or the code and a letter."""
    tables = (cells.table(template + suffix) for suffix in ("", ".a", ".b", ".c"))
    return next((table.module for table in tables if table), "")


def _duplicates(figures: Figures, cells: Cells) -> Iterator[RuleResult]:
    """Find cells with contradictory values. A fact in several tables is named once."""
    seen = set()
    for cell, groups in figures.facts.items():
        for key, facts in groups.items():
            if len(facts) > 1 and (same := tuple(map(id, facts))) not in seen:
                seen.add(same)
                figure = read_figure(figures, cell, key)
                values = " and ".join(f"as {_format(part, cells)}" for part in figure.parts)
                text = f"{name_of(figure)} is reported {values}"
                yield _finding("DUPLICATE", "EBA filing rules 2.16", text, cell, figure.row)


def _format(figure: Figure, cells: Cells) -> str:
    """Format the value. A number of staff or years has no unit either, but is not a percentage."""
    cell = cells.by_cell(*figure.cell)
    is_count = cell is not None and cell.type != "percentage" and figure.unit in PURE
    return f"{figure.value:f}" if is_count and isinstance(figure.value, Decimal) else format_value(figure)


def _currencies(report: Report, cells: Cells) -> Iterator[RuleResult]:
    """Find amounts in another currency than the report's, except amounts that must be in their own currency."""
    amounts: dict[str, list[Fact]] = {}
    for fact in report.facts:
        unit = fact.unit or ""
        if isinstance(fact.value, Decimal) and unit.startswith("iso4217:") and "/" not in unit:
            currency = unit.removeprefix("iso4217:")
            members = fact.dimensions.values()
            if not any(member in OWN_CURRENCY or member.rpartition(":")[2] == currency for member in members):
                amounts.setdefault(currency, []).append(fact)
    counts = Counter({currency: len(facts) for currency, facts in amounts.items()})
    main = report.currency if report.currency in amounts else next((name for name, _ in counts.most_common(1)), "")
    for currency, facts in amounts.items():
        if currency != main:
            text = f"amounts in {currency} beside {counts[main]} in {main}: {_named(facts, cells)}"
            yield _finding("CURRENCY", "EBA filing rules 3.1", text, facts[0].cell or NOWHERE)


def _of_others(report: Report, cells: Cells) -> Iterator[RuleResult]:
    """Find facts of another entity or another reference date."""
    groups: dict[tuple[str, str, str], list[Fact]] = {}
    for fact in report.facts:
        if (fact.cell or fact.concept.startswith("eba_met:")) and not is_of_report(fact, report):
            group = ("ENTITY", "2.9", f"{fact.entity} instead of {report.entity}")
            if fact.entity in ("", report.entity):
                group = ("PERIOD", "2.13", f"{fact.period} instead of {report.period}")
            groups.setdefault(group, []).append(fact)
    for (rule_id, rule, text), facts in groups.items():
        reason = f"{text}: {_named(facts, cells)}"
        yield _finding(rule_id, f"EBA filing rules {rule}", reason, facts[0].cell or NOWHERE, state="error")
    for rule, text in report.breaches:
        if rule == "2.10":
            yield _finding("PERIOD", "EBA filing rules 2.10", text, NOWHERE, state="error")


def _wrong_units(report: Report, cells: Cells) -> Iterator[RuleResult]:
    """Find ratios and numbers that have a unit, and amounts without a currency."""
    groups: dict[tuple[str, str], list[Fact]] = {}
    for fact in report.facts:
        kind, unit = _type(fact, cells) if isinstance(fact.value, Decimal) else "", fact.unit or ""
        if kind == "monetary" and not re.fullmatch("iso4217:[A-Z]{3}", unit):
            groups.setdefault(("2.24", f"amounts in {unit!r}, which is no currency"), []).append(fact)
        elif unit not in PURE and (kind in ("percentage", "integer", "decimal") or _is_odd(fact)):
            groups.setdefault(("3.2", f"ratios and numbers in {unit}"), []).append(fact)
    for (rule, text), facts in groups.items():
        yield _finding(
            "UNIT",
            f"EBA filing rules {rule}",
            f"{text}: {_named(facts, cells)}",
            facts[0].cell or NOWHERE,
            state="error",
        )


def _is_odd(fact: Fact) -> bool:
    """Return whether a fact of the EBA has a unit that is no currency."""
    is_of_eba = fact.cell is not None or fact.concept.startswith("eba_met:")
    return is_of_eba and not (fact.unit or "").startswith("iso4217:")


def _type(fact: Fact, cells: Cells) -> str:
    """Return the type of a fact's cell. Without a cell, the name of an EBA metric tells it: `eba_met:mi53` is an amount."""
    named = re.fullmatch(r"eba_met:([mpi])i[0-9]+", fact.concept)
    return kind_of(fact, cells) or (TYPES[named[1]] if named else "")


def _negative(figures: Figures) -> Iterator[RuleResult]:
    """Find figures below zero that cannot be."""
    for place, legal in NOT_NEGATIVE.items():
        for fact in (fact for facts in figures.facts.get(place, {}).values() for fact in facts):
            if isinstance(fact.value, Decimal) and fact.value < 0:
                reason = f"{cell_name(place)} = {format_fact(fact)}, and it cannot be below zero"
                yield _finding("RANGE", legal, reason, place, state="error")


def _misnamed(report: Report) -> Iterator[RuleResult]:
    """Find file names with another bank, scope or date than the content. A name without them says nothing."""
    bank, _, scope = report.entity.partition(".")
    for path in report.files or (report.path,):
        named, days = LEI.findall(path.name), DAY.findall(path.name)
        scopes = re.findall(rf"{re.escape(bank)}\.([A-Z]+)", path.name) if bank else []
        for texts, own in ((named, bank.partition("-")[0]), (days, report.period), (scopes if scope else [], scope)):
            if texts and own not in texts:
                reason = f"the file {path.name} is named for {texts[0]}, but its content is of {own or 'nobody'}"
                yield _finding("NAME", "EBA filing rules, file names", reason, NOWHERE, state="error")


def _coarse(report: Report, cells: Cells) -> Iterator[RuleResult]:
    """Find figures with fewer `decimals` than required: one finding for ratios, one for amounts."""
    groups: dict[str, list[Fact]] = {}
    for fact in report.facts:
        is_coarse = isinstance(fact.decimals, int) and fact.decimals < decimals_needed(fact.unit)
        if is_coarse and (kind := _type(fact, cells)) in ("monetary", "percentage"):
            groups.setdefault(kind, []).append(fact)
    for kind, facts in groups.items():
        decimals = ", ".join(map(str, sorted({fact.decimals for fact in facts if isinstance(fact.decimals, int)})))
        text = f"{kind} figures have decimals {decimals} where at least {decimals_needed(facts[0].unit)} is required"
        yield _finding("ACCURACY", "EBA filing rules 2.18", f"{text}: {_named(facts, cells)}", facts[0].cell or NOWHERE)


def _doubtful(figures: Figures) -> Iterator[RuleResult]:
    """Find ratios whose decimal point is probably two places off. Two ratios within 2% of each other count as equal."""
    for place in RECOMPUTED:
        for key in figures.facts.get(place, {}):
            figure, ratio = read_figure(figures, place, key), recompute(figures, place, key, figures.tables)
            if not isinstance(figure.value, Decimal) or not figure.value:
                continue
            text = f"{name_of(figure)} = {figure.value:f} means {format_value(figure)}; probably "
            if not isinstance(ratio.value, Decimal):
                if figure.value <= IMPLAUSIBLE.get(place, figure.value):
                    continue
                text += f"{format_limit(figure.value / 100, 'xbrli:pure', 4)} is meant"
            else:
                shifted = (figure.value / 100, figure.value * 100)
                if min(abs(value - ratio.value) for value in shifted) > Decimal("0.02") * abs(ratio.value):
                    continue
                parts = " / ".join(map(name_of, ratio.parts))
                text += f"{format_limit(ratio.value, 'xbrli:pure', 4)} is meant, by {parts}"
            yield _finding("PLAUSIBLE", "EBA filing rules 3.2", text, figure.cell, figure.row)


def _of_form(report: Report, cells: Cells) -> Iterator[RuleResult]:
    """Find breaches of form, which change no figure."""
    if unknown := sorted(name for name in report.filing_indicators if name not in cells.templates):
        yield _form("1.6", f"filing indicators that no template has: {', '.join(unknown[:MAX_NAMED])}")
    empty = [fact for fact in report.facts if fact.cell and fact.value in (None, "")]
    if empty and not any(rule == "2.19" for rule, _ in report.breaches):
        yield _form("2.19", f"without a value: {_named(empty, cells)}", _cell(empty[0]))
    for rule, text in report.breaches:
        if rule != "2.10":
            yield _form(rule, text)


def _form(rule: str, text: str, cell: CellKey = NOWHERE) -> RuleResult:
    return _finding("FORM", f"EBA filing rules {rule}", text, cell, state="warning")
