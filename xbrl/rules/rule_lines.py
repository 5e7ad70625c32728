"""Print the result of every rule and the findings about a report: as JSON objects, or as a table for reading."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from xbrl.read.dpm import load_cells
from xbrl.read.filed_report import Report
from xbrl.read.render import cell_name, format_figure
from xbrl.rules.formula import CELL
from xbrl.rules.quality import check_quality
from xbrl.rules.remittance import late_filings
from xbrl.rules.reported_figures import Figure, format_value, name_of
from xbrl.rules.rules import RuleResult, evaluate_all

# State of a result -> its printed form, in the order of the table.
STATES = {
    "error": "error",
    "violated": "violated",
    "warning": "warning",
    "triggered": "triggered",
    "undecided": "not decidable",
    "ok": "met",
    "not applicable": "not applicable",
}
SOURCES = {"reported": "", "not reported": " (not reported)", "read as 0": " (not reported, read as 0)"}


def all_results(report: Report) -> list[RuleResult]:
    """Return the findings about a report, then whether its returns were late, then the result of every rule."""
    return [*check_quality(report, load_cells()), *late_filings(report), *evaluate_all(report)]


def result_fields(result: RuleResult) -> dict:
    """Return the fields of a result by name, with the printed form of its state."""
    return asdict(result) | {"state": STATES[result.state]}


def rule_table(report: Report) -> Iterator[str]:
    """Yield the results as lines of text: findings about the report, then rules by state, each with its figures."""
    results = all_results(report)
    findings = [result for result in results if result.kind == "quality"]
    rules = [result for result in results if result.kind != "quality"]
    yield f"{report.entity} | {report.period} | {report.amounts} | {report.format}"
    for title, group in (("The report", findings), ("Rules", rules)):
        yield f"\n{title}: {_counts(group)}"
        for state, printed in STATES.items():
            for result in group:
                if result.state == state:
                    yield from _table_lines(result, printed)
    if report.warnings:
        yield f"\nWarnings of the reader: {len(report.warnings)}"
        yield from (f"  {warning}" for warning in report.warnings)


def _counts(results: Sequence[RuleResult]) -> str:
    counts = Counter(result.state for result in results)
    parts = [f"{counts[state]} {printed}" for state, printed in STATES.items() if counts[state]]
    return ", ".join(parts) or "no findings"


def _table_lines(result: RuleResult, state: str) -> Iterator[str]:
    """Yield a line with state, rule, value, limit and article, then indented lines with reason, formula and figures.

    A rule that does not apply has one line with the reason, unless it has figures.
    """
    if result.state == "not applicable" and not result.inputs:
        yield f"  {state} | {result.rule_id} | {result.reason}"
        return
    texts = describe_result(result)
    parts = [state, result.rule_id]
    one_comparison = " and " not in result.formula and " or " not in result.formula
    if result.state == "ok" and result.missing:
        absent = [name_of(figure) for figure in result.inputs if figure.source == "read as 0"]
        parts.append(f"not reported: {', '.join(absent)}")
    elif texts["limit"] and (one_comparison or result.state == "violated"):
        parts += [texts["value"], texts["limit"]]
    parts.append(f"{result.legal} (guidance: {result.guidance})" if result.guidance else result.legal)
    yield "  " + " | ".join(parts)
    yield from (f"      {text}" for text in (result.title, result.reason, texts["formula"], *texts["inputs"]) if text)


def describe_result(result: RuleResult) -> dict:
    """Return a result as texts that a person can check: cell, formula, inputs, value, limit, article, reason."""
    word = "triggered" if result.kind == "trigger" else "violated"
    value = "" if result.value is None else format_figure(result.value, result.unit, result.decimals)
    limit = result.printed_limit
    has_sides = bool(value and limit)
    return {
        "rule": result.rule_id,
        "kind": result.kind,
        "title": result.title,
        "cell": cell_name(result.cell, result.row).strip(),
        "value": "not reported" if has_sides and result.missing else value,
        "limit": f"{result.relation} {limit}" if has_sides else "",
        "legal": result.legal,
        "formula": f"{word} if {readable(result.formula)}" if result.formula else "",
        "inputs": [
            *map(figure_text, result.inputs),
            *(f"{name} = {number:f} (law)" for name, number in result.parameters),
        ],
        "reason": result.reason,
    }


def readable(formula: str) -> str:
    """Write the cells of a formula as in all other texts: `C 47.00 r0340 c0010 < 0.03`."""
    return CELL.sub(lambda match: cell_name((match[1], match[2], match[3])), formula)


def figure_text(figure: Figure) -> str:
    """Format a figure with its value and its source: reported, recomputed, contradictory, read as 0."""
    values = ["?" if part.value is None else format_value(part) for part in figure.parts]
    parts = f"(not reported; {' / '.join(map(name_of, figure.parts))} = {' / '.join(values)}"
    if figure.source == "contradictory":
        text = f"{' or '.join(map(format_value, figure.parts))} (contradictory)"
    elif figure.source == "recomputed":
        text = f"{format_value(figure)} {parts}, {figure.legal})"
    elif figure.source == "not reported" and figure.parts:
        text = f"? {parts})"
    else:
        value = "0" if figure.source == "read as 0" else "?" if figure.value is None else format_value(figure)
        text = f"{value}{SOURCES[figure.source]}"
    return f"{name_of(figure)} = {text}"
