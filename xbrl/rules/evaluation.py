"""Evaluate one rule on the figures of one row of a report."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal

from xbrl.read.report import CellKey
from xbrl.rules.figures import (
    RATIO_DECIMALS,
    Figure,
    Figures,
    Key,
    as_accurate,
    is_accurate,
    number_of,
    numbers_of,
    read_figure,
    recompute,
)
from xbrl.rules.formula import Number, arithmetic, exactly, truth
from xbrl.rules.reasons import TOO_COARSE, why_too_coarse, why_unreadable
from xbrl.rules.rule_file import LEGAL_PARAMETERS, Rule, legal_parameters


@dataclass(frozen=True)
class RuleResult:
    """The result of one rule on one report, or on one row of an open table.

    `value` and `limit` are the two sides of the rule's first comparison; None if undecided. If a rule does not apply
    because its facts are not covered by a filing indicator, they say what it would compare.
    """

    rule_id: str
    kind: str  # of the rule; "quality" for a finding about the report, "note" for one that a note shows
    state: str  # "violated" ("triggered" for a trigger), "ok", "undecided", "not applicable"
    cell: CellKey
    value: Decimal | None
    limit: Decimal | None
    relation: str  # the meaning of the limit for the value: "min", "max" or "expected"
    legal: str
    unit: str | None  # unit of the value: `iso4217:EUR` for an amount, `xbrli:pure` or None for a ratio
    decimals: int | str | None  # XBRL `decimals` of the value
    row: str = ""  # key of the row in an open table
    missing: bool = False  # whether `cell` was not reported and is read as 0
    title: str = ""
    formula: str = ""  # the condition of a violation, in the language of `formula.py`
    inputs: tuple[Figure, ...] = ()  # the figures of the formula, in its order
    parameters: tuple[tuple[str, Decimal], ...] = ()  # the legal parameters of the formula
    guidance: str = ""  # a guideline beside the law
    reason: str = ""  # why the rule is undecided, not applicable, or met in spite of a difference

    @property
    def known_value(self) -> Decimal:
        """The value of a result that is not undecided."""
        assert self.value is not None
        return self.value

    @property
    def known_limit(self) -> Decimal:
        """The limit of a result that is not undecided."""
        assert self.limit is not None
        return self.limit


def evaluate_row(rule: Rule, figures: Figures, key: Key, period: str, filed: frozenset[str]) -> RuleResult:
    """Evaluate the formula of a rule on the figures of one row, or of the whole report (`key` is then empty).

    Where a ratio is too coarse to decide, the ratio of its parts decides.
    """
    inputs = {f"x{index}": _input(rule, figures, cell, key, filed) for index, cell in enumerate(rule.cells)}
    result = _judge(rule, inputs, period)
    if result.state != "undecided" or not result.reason.startswith(TOO_COARSE):
        return result
    finer = {name: _finer(figures, figure, key, filed) for name, figure in inputs.items()}
    decided = _judge(rule, finer, period)
    return result if decided.state == "undecided" else replace(decided, reason=f"as filed {result.reason}")


def _judge(rule: Rule, inputs: Mapping[str, Figure], period: str) -> RuleResult:
    """Evaluate the formula of a rule on its figures."""
    law = {name: exactly(value) for name, value in _parameters(period).items()}
    missing = sorted(rule.formula.names & LEGAL_PARAMETERS - law.keys())
    reason = why_unreadable(inputs, rule.formula.texts)
    reason = reason or ", ".join(f"the law has no {name} on {period}" for name in missing)
    if reason:
        return result_of(rule, "undecided", inputs, reason=reason)
    if all(figure.source == "read as 0" for figure in inputs.values()):
        return result_of(rule, "not applicable", inputs, reason="none of its figures is reported")
    texts = {
        name: str(figure.value).rpartition(":")[2] for name, figure in inputs.items() if name in rule.formula.texts
    }
    try:
        numbers = law | numbers_of(inputs, exact=not rule.interval)
        violated = truth(rule.formula.expression, numbers, texts)
        value, limit = (arithmetic(side, numbers, texts).value for side in rule.formula.sides)
        if violated is None and _depends_on_accuracy(rule, inputs, law, texts):
            return result_of(rule, "undecided", inputs, reason=why_too_coarse(inputs))
    except ZeroDivisionError:
        return result_of(rule, "undecided", inputs, reason="a denominator is 0, or may be 0 within its rounding")
    state = "ok" if not violated else "triggered" if rule.kind == "trigger" else "violated"
    as_filed = {name: exactly(number.value) for name, number in numbers.items()}
    tolerated = violated is None and truth(rule.formula.expression, as_filed, texts) is True
    reason = "the difference is within the rounding of the figures" if tolerated else ""
    result = result_of(rule, state, inputs, (value, limit), reason)
    used = tuple((name, law[name].value) for name in sorted(rule.formula.names & law.keys()))
    return replace(result, parameters=used) if used else result


def _input(rule: Rule, figures: Figures, cell: CellKey, key: Key, filed: frozenset[str]) -> Figure:
    """The figure of a cell: reported, else recomputed (not for filing rules), else read as 0 if the rule allows it.

    Facts of a table that is not filed do not count.
    """
    figure = read_figure(figures, cell, key)
    if figure.source != "not reported" and cell[0] in filed:
        return figure
    missing = Figure(cell, figure.row, None, None, None, "not reported")
    ratio = missing if rule.kind == "filing" else recompute(figures, cell, key, filed)
    if ratio.source == "recomputed":
        return ratio
    zero = rule.absent_cell == "zero" or cell in rule.formula.optional
    return replace(missing, source="read as 0") if zero else ratio


def _finer(figures: Figures, figure: Figure, key: Key, filed: frozenset[str]) -> Figure:
    """The ratio recomputed from its parts, if the reported one is too coarse and agrees with it; else the reported one."""
    ratio = recompute(figures, figure.cell, key, filed)
    if figure.source != "reported" or is_accurate(figure) or ratio.source != "recomputed" or not is_accurate(ratio):
        return figure
    reported, exact = number_of(figure), number_of(ratio)
    agrees = exact.low <= reported.high and reported.low <= exact.high
    return replace(ratio, filed=figure) if agrees else figure


def _depends_on_accuracy(
    rule: Rule, inputs: Mapping[str, Figure], law: Mapping[str, Number], texts: Mapping[str, str]
) -> bool:
    """Whether a rule without a certain result is undecided rather than met.

    A filing rule is met if some choice of values inside the rounding agrees, as with the EBA. A breach that allows for
    rounding (`interval`) is undecided only if it would be one with figures as accurate as they must be.
    """
    if not rule.interval:
        return True
    if rule.kind == "filing" or all(map(is_accurate, inputs.values())):
        return False
    numbers = {**law, **numbers_of({name: as_accurate(figure) for name, figure in inputs.items()}, exact=False)}
    return truth(rule.formula.expression, numbers, texts) is True


def result_of(
    rule: Rule,
    state: str,
    inputs: Mapping[str, Figure] | None = None,
    sides: tuple[Decimal, Decimal] | None = None,
    reason: str = "",
) -> RuleResult:
    """The result of a rule. `sides`: value and limit. The first figure with a number determines how they are printed."""
    figures = tuple((inputs or {}).values())
    first = next((figure for figure in figures if isinstance(figure.value, Decimal)), None)
    decimals = first.decimals if first else None
    value, limit = sides or (None, None)
    if sides and first and first.source == "recomputed":
        value, decimals = round_ratio(*sides)
    return RuleResult(
        rule_id=rule.id,
        kind=rule.kind,
        state=state,
        cell=rule.cells[0],
        value=value,
        limit=limit,
        relation=rule.formula.relation,
        legal=rule.legal,
        unit=first.unit if first else None,
        decimals=decimals,
        row=next((figure.row for figure in figures if figure.row), ""),
        missing=bool(figures) and figures[0].source in ("not reported", "read as 0"),
        title=rule.title,
        formula=rule.violated_if,
        inputs=figures,
        guidance=rule.guidance,
        reason=reason,
    )


def round_ratio(value: Decimal, limit: Decimal) -> tuple[Decimal, int]:
    """(a recomputed ratio rounded to at least four places, the number of places): on the same side of the limit."""
    if value.adjusted() > 12:  # of an absurd size; rounding would need more digits than decimal arithmetic has
        return value, RATIO_DECIMALS
    for places in range(RATIO_DECIMALS, 12):
        rounded = round(value, places)
        if (rounded < limit, rounded > limit) == (value < limit, value > limit):
            return rounded, places
    return value, 12


def _parameters(period: str) -> dict[str, Decimal]:
    return legal_parameters(int(period[:4])) if period[:4].isdigit() else {}
