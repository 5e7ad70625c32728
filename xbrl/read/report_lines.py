"""Format reports as JSON lines or as model input."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from decimal import Decimal

from xbrl.read.dpm import load_cells
from xbrl.read.render import render_report
from xbrl.read.report import Fact, Report
from xbrl.rules.quality import check_quality
from xbrl.rules.rule_lines import all_results, result_fields, rule_table

OF_READERS = ("DUPLICATE", "ENTITY")  # findings that are among the warnings of a report


@dataclass(frozen=True)
class Output:
    """What to print for a report. By default: one JSON line per fact, then a JSON line with the summary."""

    text: bool = False  # the model input instead of facts
    style: str = "cells"  # style of the model input
    rules: bool = False  # the result of every rule instead of facts; with `text` as a table
    summary_only: bool = False


def report_lines(report: Report, output: Output, name: str = "") -> Iterator[str]:
    """Yield the output lines of one report.

    `name`, if given, is added to each JSON line and, with the files of the report, as a header to the text.
    """
    extra = {"report": name} if name else {}
    if output.text:
        if name:
            yield f"== {name} ({', '.join(file.name for file in report.files)})"
            yield from (f"== incomplete: {reason}" for reason in report.incomplete)
        yield from rule_table(report) if output.rules else [render_report(report, load_cells(), style=output.style)]
        return
    if output.rules:
        yield from (to_json({**extra, **result_fields(result)}) for result in all_results(report))
    elif not output.summary_only:
        yield from (to_json({**extra, **fact_fields(fact)}) for fact in report.facts)
    yield to_json({**extra, "summary": summary(report)})


def fact_fields(fact: Fact) -> dict:
    """The fields of a fact. `cell`, `other_cells`, `type` and `label` are included only if they are known."""
    names = ("concept", "value", "unit", "decimals", "entity", "period", "dimensions")
    fields = {name: getattr(fact, name) for name in names}
    return fields | {
        name: getattr(fact, name) for name in ("cell", "other_cells", "type", "label") if getattr(fact, name)
    }


def summary(report: Report) -> dict:
    """Metadata of a report, the number of facts of each kind, warnings, and if there are any, notes and merged files."""
    more = {
        "notes": [asdict(note) for note in report.notes],
        "files": [str(file) for file in report.files],
        "incomplete": report.incomplete,
    }
    return {
        "format": report.format,
        "entity": report.entity,
        "period": report.period,
        "currency": report.currency,
        "filing_indicators": report.filing_indicators,
        "facts": len(report.facts),
        "numeric_facts": sum(isinstance(fact.value, Decimal) for fact in report.facts),
        "facts_with_cell": sum(fact.cell is not None for fact in report.facts),
        "warnings": [*report.warnings, *_quality_warnings(report)],
    } | {name: found for name, found in more.items() if found}


def _quality_warnings(report: Report) -> list[str]:
    """The findings about the report, without duplicates and entities: the readers warn of these."""
    findings = check_quality(report, load_cells())
    return [f"{finding.reason} ({finding.rule_id})" for finding in findings if finding.rule_id not in OF_READERS]


def to_json(value: object) -> str:
    """JSON on one line. A Decimal becomes a number with all of its digits."""
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {to_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_json, value)) + "]"
    return json.dumps(value)
