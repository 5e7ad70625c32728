"""A bank's report file -> `Report`: the one door through which report files come in.

`read_report` opens a file or a package, `merge_reports` joins the packages (one per module) of a bank and a date.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from data.regulator.dpm import Cells, load_cells
from data.regulator.report import Fact, Report, describe, disagreements
from data.regulator.safety import open_package
from data.regulator.xbrl_csv import read_csv_package
from errors import UserError

__all__ = ["Fact", "Report", "describe", "merge_reports", "read_report"]


def read_report(path: Path | str, cells: Cells | None = None) -> Report:
    """Read one report. Whatever cannot be trusted is refused with one UserError; what is odd becomes a warning.

    `cells` gives the datapoints their cells and types (default: `load_cells()`).
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    package = open_package(path)
    candidates = [name for name in package.names if name.rpartition("/")[2] == "report.json"]
    if len(candidates) != 1:
        raise UserError(f"{path}: {len(candidates)} files named report.json; an xBRL-CSV package has exactly one")
    return read_csv_package(package, candidates[0], cells or load_cells())


def merge_reports(reports: Iterable[Report]) -> Report:
    """Join the reports that one bank filed for one date, one per module, into one.

    Identical repeats (same cell, same value) are dropped; values that disagree stay and give a warning.
    Raises UserError when entity or period differ.
    """
    reports = list(reports)
    if not reports:
        raise UserError("no reports to merge")
    first = reports[0]
    facts: dict[str, Fact] = {}
    indicators: dict[str, bool] = {}
    warnings: list[str] = []
    for report in reports:
        for name in ("entity", "period"):
            if getattr(report, name) != getattr(first, name):
                raise UserError(
                    f"{report.path} has the {name} {getattr(report, name)!r} and {first.path} {getattr(first, name)!r};"
                    " only reports of one bank for one date can be merged"
                )
        if report.currency and first.currency and report.currency != first.currency:
            warnings.append(f"{report.path} is in {report.currency} and {first.path} in {first.currency}")
        warnings += report.warnings
        for template, filed in report.filing_indicators.items():
            indicators[template] = indicators.get(template, False) or filed
        for fact in report.facts:
            facts.setdefault(json.dumps(_identity(fact), default=str), fact)
    merged = tuple(facts.values())
    warnings += disagreements(merged)
    return Report(
        path=first.path,
        format="+".join(dict.fromkeys(report.format for report in reports)),
        entity=first.entity,
        period=first.period,
        currency=next((report.currency for report in reports if report.currency), None),
        filing_indicators=indicators,
        facts=merged,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _identity(fact: Fact) -> list:
    return [fact.concept, fact.value, fact.unit, fact.decimals, fact.period, sorted(fact.dimensions.items()), fact.cell]
