"""Findings that no engine finds: what a note of the bank means, or what a supervisor has annotated.

They stand in findings.csv, apart from the report files: `entity,period,rule,state,cell,value,limit,legal,kind`.

- `state`: "violated" adds a finding, or replaces the engine's finding of the same rule and cell. "lifted" means that the
  engine's finding of this rule is no violation (a waiver, for example). "benign" means that the note changes nothing.
- `cell`: as an answer prints it (`C 76.00.a r0030 c0010`); the row of an open table is its key.
- `value` and `limit`: fractions or amounts in units of the currency (0.95 is 95%).
- `kind`: the kind of note that shows it (`pledged`), or empty for an annotation of a supervisor.

Rules that only notes can show have no formula; note_rules.jsonl has their titles and articles.
"""

import csv
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from decimal import Decimal

from common.errors import UserError
from data.regulator.render import cell_name
from data.regulator.report import CellKey, parse_number
from data.regulator.rules import RuleResult, violations

NOTE_RULES_FILE = pathlib.Path(__file__).with_name("note_rules.jsonl")
STATES = ("violated", "lifted", "benign")


@dataclass(frozen=True)
class NoteRule:
    """A requirement whose breach stands in a note: there is no formula for it."""

    id: str
    title: str
    legal: str
    kind: str  # of the notes that show it
    relation: str  # the meaning of the limit for the value: "min" or "max"
    unit: str = ""  # of value and limit, if they are neither ratios nor amounts: "days"


@dataclass(frozen=True)
class Finding:
    """One line of findings.csv. The module describes the columns."""

    entity: str
    period: str
    rule: str
    state: str
    cell: str = ""
    value: Decimal | None = None
    limit: Decimal | None = None
    legal: str = ""
    kind: str = ""


COLUMNS = tuple(field.name for field in fields(Finding))


@functools.cache
def note_rules() -> dict[str, NoteRule]:
    """The rules of note_rules.jsonl, by id."""
    lines = NOTE_RULES_FILE.read_text(encoding="utf-8").splitlines()
    return {rule.id: rule for rule in (NoteRule(**json.loads(line)) for line in lines)}


def write_findings(path: pathlib.Path, findings: Iterable[Finding]) -> None:
    """Write findings.csv."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(
            [
                "" if value is None else f"{value:f}" if isinstance(value, Decimal) else value
                for value in astuple(finding)
            ]
            for finding in findings
        )


def load_findings(path: pathlib.Path) -> dict[tuple[str, str], tuple[Finding, ...]]:
    """Read findings.csv: (entity, period) -> its findings. Raises `UserError` with the line of a mistake."""
    found: dict[tuple[str, str], list[Finding]] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS[:4] if name not in (reader.fieldnames or [])]
        if missing:
            raise UserError(
                f"{path}, line 1: the column {missing[0]!r} is missing; the columns are {','.join(COLUMNS)}"
            )
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            texts = {name: (row.get(name) or "").strip() for name in COLUMNS}
            if texts["state"] not in STATES:
                raise UserError(f"{where}: the state {texts['state']!r} must be one of {', '.join(STATES)}")
            numbers = {name: parse_number(texts[name]) for name in ("value", "limit")}
            for name, number in numbers.items():
                if texts[name] and number is None:
                    raise UserError(f"{where}: the {name} {texts[name]!r} is not a number; write 0.95 for 95%")
            finding = Finding(**(texts | numbers))
            found.setdefault((finding.entity, finding.period), []).append(finding)
    return {case: tuple(findings) for case, findings in found.items()}


def apply_findings(results: Sequence[RuleResult], findings: Iterable[Finding]) -> list[RuleResult]:
    """The violations of a report: those of the engine's `results`, corrected by `findings`."""
    violated = violations(results)
    for finding in findings:
        if finding.state == "benign":
            continue
        same = [
            result
            for result in violated
            if result.rule_id == finding.rule and finding.cell in ("", cell_name(result.cell, result.row))
        ]
        if finding.state == "lifted":
            violated = [result for result in violated if result not in same]
        elif same:
            violated = [_corrected(result, finding) if result in same else result for result in violated]
        else:
            violated.append(_added(finding, results))
    return violated


def lifted_results(results: Sequence[RuleResult], findings: Iterable[Finding]) -> tuple[RuleResult, ...]:
    """The engine's violations that `findings` lift, with the article that lifts them."""
    by_rule = {finding.rule: finding for finding in findings if finding.state == "lifted"}
    return tuple(
        replace(result, legal=by_rule[result.rule_id].legal or result.legal)
        for result in violations(results)
        if result.rule_id in by_rule
    )


def _corrected(result: RuleResult, finding: Finding) -> RuleResult:
    value = result.value if finding.value is None else finding.value
    limit = result.limit if finding.limit is None else finding.limit
    return replace(result, value=value, limit=limit, legal=finding.legal or result.legal)


def _added(finding: Finding, results: Sequence[RuleResult]) -> RuleResult:
    """A violation that the engine does not have. Its unit and accuracy are those of the engine's result on the same cell."""
    rule = note_rules().get(finding.rule)
    unit = rule.unit if rule else ""
    cell, row = parse_cell(finding.cell)
    known = next((result for result in results if result.cell == cell), None)
    is_amount = finding.limit is not None and abs(finding.limit) > 100
    return RuleResult(
        rule_id=finding.rule,
        kind="note" if rule else "breach",
        state="violated",
        cell=cell,
        value=finding.value,
        limit=finding.limit,
        relation=rule.relation if rule else "min",
        legal=finding.legal or (rule.legal if rule else ""),
        unit=unit or (known.unit if known else "iso4217:EUR" if is_amount else "xbrli:pure"),
        decimals=known.decimals if known and not unit else None,
        row=row,
    )


def parse_cell(text: str) -> tuple[CellKey, str]:
    """(cell, key of its open row) of a printed cell: the reverse of `render.cell_name`."""
    table, row, column = re.fullmatch(r"([A-Z] \S+) (?:(.*) )?(\S+)", text).groups() if text else ("", "", "")
    is_row = bool(re.fullmatch(r"r\d+", row or ""))
    return (table.replace(" ", "_"), row if is_row else "*", column), "" if is_row else row or ""
