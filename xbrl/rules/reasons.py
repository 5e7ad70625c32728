"""Why a rule does not apply or is undecided, in words."""

from collections.abc import Collection, Mapping
from decimal import Decimal

from xbrl.read.render import cell_name, format_figure, table_name
from xbrl.read.report import Report, template_of
from xbrl.rules.figures import Figure, currencies, is_accurate, is_ratio, number_of

TOO_COARSE = "too coarse to decide"


def why_unfiled(report: Report, table: str) -> str:
    """Why a table counts as not filed."""
    template = template_of(table)
    if not report.filing_indicators:
        return f"{table_name(table)} has no facts"
    if template in report.filing_indicators:
        return f"{table_name(template)} is declared as not filed"
    return f"{table_name(template)} has no filing indicator"


def why_unreadable(figures: Mapping[str, Figure], texts: Collection[str]) -> str:
    """Why a formula cannot be computed from its figures; "" if it can.

    `texts` are the names of figures that the formula reads as text.
    """
    reasons = []
    for name, figure in figures.items():
        if figure.source == "contradictory":
            values = " and ".join(f"as {format_value(part)}" for part in figure.parts[:4])
            reasons.append(f"{name_of(figure)} is reported {values}")
        elif figure.source == "not reported":
            reasons.append(f"{name_of(figure)} is not reported{_why_not_recomputed(figure)}")
        elif figure.source == "reported" and name not in texts and not isinstance(figure.value, Decimal):
            reasons.append(f"{name_of(figure)} is {format_value(figure)}, not a number")
    found = currencies(figures.values())
    if len(found) > 1:
        reasons.append(f"its amounts are in different currencies: {', '.join(map(_currency, found))}")
    return "; ".join(reasons)


def _why_not_recomputed(figure: Figure) -> str:
    """The parts from which a missing ratio cannot be recomputed."""
    if not figure.parts:
        return ""
    parts = [f"{name_of(part)} is {part.source if part.value is None else format_value(part)}" for part in figure.parts]
    return f" and cannot be recomputed: {' and '.join(parts)}"


def why_too_coarse(figures: Mapping[str, Figure]) -> str:
    """Which figures are too coarse to decide a rule, with their intervals."""
    reasons = []
    for figure in figures.values():
        if isinstance(figure.value, Decimal) and not is_accurate(figure):
            number = number_of(figure)
            low, high = (format_value(figure, end) for end in (number.low, number.high))
            accuracy = "recomputed" if figure.parts else f"decimals={figure.decimals}"
            reasons.append(f"{name_of(figure)} is {format_value(figure)} ({accuracy}), between {low} and {high}")
    return f"{TOO_COARSE}: {'; '.join(reasons)}"


def name_of(figure: Figure) -> str:
    """The cell of a figure as text."""
    return cell_name(figure.cell, figure.row)


def format_value(figure: Figure, other: Decimal | None = None) -> str:
    """The value of a figure, or another value of the same unit, as text. An amount has its currency."""
    value = figure.value if other is None else other
    if not isinstance(value, Decimal):
        return "nothing" if value is None else repr(str(value))
    if figure.source == "recomputed":
        return format_figure(round(value, 6) if value.adjusted() < 20 else value, figure.unit)
    text = format_figure(value, figure.unit, figure.decimals)
    return text if is_ratio(figure.unit) else f"{text} {_currency(figure.unit or '')}"


def _currency(unit: str) -> str:
    return unit.removeprefix("iso4217:")
