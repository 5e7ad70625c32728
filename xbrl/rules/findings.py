"""Read and apply findings.csv: findings that the rules cannot compute, because they follow from a note or a supervisor made them.

The file has the columns `entity,period,rule,state,cell,value,limit,legal,kind,note`, and may have `quote,reason,second`:

- `state`: "violated" adds a finding, or replaces the engine's finding of the same rule and cell. "lifted" means that the
  engine's finding of this rule is no violation (a waiver, for example). "benign" means that the note changes nothing.
  "override" replaces value and limit of a rule on figures by those of the line, or lifts the rule if the line has neither. On
  a rule `..._COUNTED` it is "violated" with an amount that does not stand in the note (half of EUR 64 million).
- `entity`: with or without its scope suffix, such as `.CON`. Without the suffix the bank must have only one report for the date.
- `cell`: as an answer prints it (`C 76.00.a r0030 c0010`); the row of an open table is its key.
- `value` and `limit`: fractions or amounts in units of the currency (0.95 is 95%).
- `legal`: empty, or a citation of the rules or of a legal basis (`measures.citations`). Free text is refused.
- `kind`: the kind of the note from which the finding follows (`pledged`), or empty for an annotation of a supervisor.
- `note`: the 16 digits that name the note (`Note.id`), as the desk's page prints them. Every line that interprets a note
  (state `benign`, a kind, or a rule of note_rules.jsonl) names its note; the other lines are annotations of the figures.
- `quote`: words of the note that prove the line.
- `reason` and `second`: an override needs a reason and the name of a second person, and the letter prints both. On a line
  about a note `second` confirms that the note is about this bank.

Rules whose breach only a note can show have no formula; note_rules.jsonl has their titles and articles.
"""

import csv
import difflib
import functools
import io
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from typing import Any

from common.errors import UserError
from xbrl.read.filed_report import CellKey, is_day, parse_number
from xbrl.read.render import cell_name
from xbrl.read.xbrl_csv import read_table_of
from xbrl.rules.formula import keeps_to
from xbrl.rules.measures import citations
from xbrl.rules.rules import RuleResult, built_in_rules, violations

NOTE_RULES_FILE = pathlib.Path(__file__).with_name("note_rules.jsonl")
STATES = ("violated", "lifted", "benign", "override")


@dataclass(frozen=True)
class NoteRule:
    """A requirement whose breach only a note can show. It has no formula."""

    id: str
    title: str
    legal: str
    kind: str  # kind of the notes that show a breach
    relation: str  # whether the limit is a minimum ("min") or a maximum ("max")

    @property
    def counted(self) -> bool:
        """Return whether a breach means that a figure wrongly counts an amount and must be filed again without it."""
        return self.id.endswith("_COUNTED")


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
    note: str = ""
    quote: str = ""
    reason: str = ""
    second: str = ""
    where: str = field(default="", compare=False)  # "FILE, line N", for messages

    @property
    def note_rule(self) -> NoteRule | None:
        """Return the finding's rule if it is in note_rules.jsonl, else None."""
        return note_rules().get(self.rule)

    @property
    def is_violation(self) -> bool:
        """Return whether the finding says that its rule is violated, for a rule on figures by the word "violated" alone."""
        return self.state == "violated" or (self.state == "override" and self.note_rule is not None)

    @property
    def is_of_note(self) -> bool:
        """Return whether the finding interprets a note. It must then name the note, because a refiled note has a new name."""
        return bool(self.kind) or self.state == "benign" or self.note_rule is not None


KNOWN = tuple(field.name for field in fields(Finding) if field.name != "where")
COLUMNS = KNOWN[:10]  # the columns of a file that the project writes
REQUIRED = KNOWN[:4]
CELL = re.compile(r"([A-Z] \S+) (?:(.*) )?(\S+)")
NOTE = re.compile(r"[0-9a-f]{16}")


@functools.cache
def note_rules() -> dict[str, NoteRule]:
    """Return the rules of note_rules.jsonl by id."""
    lines = NOTE_RULES_FILE.read_text(encoding="utf-8").splitlines()
    return {rule.id: rule for rule in (NoteRule(**json.loads(line)) for line in lines)}


def write_findings(path: pathlib.Path, findings: Iterable[Finding]) -> None:
    lines = [",".join(COLUMNS), *map(csv_line, findings)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")


def csv_line(finding: Finding) -> str:
    """Format a finding as a line of findings.csv."""
    text, values = io.StringIO(), (getattr(finding, name) for name in COLUMNS)
    fields_as_text = (f"{value:f}" if isinstance(value, Decimal) else value for value in values)
    csv.writer(text, lineterminator="").writerow(fields_as_text)
    return text.getvalue()


def load_findings(path: pathlib.Path) -> dict[tuple[str, str], tuple[Finding, ...]]:
    """Read findings.csv. Return the findings by (entity, period). Raise `UserError` with line and column of a mistake."""
    by_case: dict[tuple[str, str], list[Finding]] = {}
    stated: dict[tuple[str, ...], Finding] = {}
    for where, row in read_table_of(path, REQUIRED, KNOWN):
        finding = _parse_finding(where, row)
        if finding.state != "benign":
            first = stated.setdefault((finding.entity, finding.period, finding.rule, finding.cell), finding)
            for column in ("state", "value", "limit"):
                if (earlier := getattr(first, column)) != getattr(finding, column):
                    raise UserError(
                        f"{finding.where}, column {column}: {finding.rule} is {earlier} in {first.where}; keep one"
                    )
        by_case.setdefault((finding.entity, finding.period), []).append(finding)
    return {case: tuple(findings) for case, findings in by_case.items()}


def _parse_finding(where: str, row: dict[str, str]) -> Finding:
    """Make a finding from its row. Raise `UserError` that names the column at fault."""
    texts = dict.fromkeys(KNOWN, "") | row
    numbers = {column: parse_number(texts[column]) for column in ("value", "limit")}
    kinds = sorted({"waiver"} | {rule.kind for rule in note_rules().values()})
    rules = {rule.id for rule in built_in_rules()} | set(note_rules())
    near = [] if texts["rule"] in rules else difflib.get_close_matches(texts["rule"], sorted(rules), n=1)
    suggestion = "".join(f"; did you mean {name}?" for name in near)
    filled: dict[str, Any] = {**texts, **numbers, "where": where}
    finding = Finding(**filled)
    named = bool(NOTE.fullmatch(finding.note)) or not (finding.note or finding.is_of_note)
    laws, is_override = (
        sorted({*citations(), *(rule.legal for rule in note_rules().values())}),
        finding.state == "override",
    )
    nearest = "; ".join(difflib.get_close_matches(finding.legal, laws, n=3, cutoff=0))
    for column, valid, expected in (
        ("entity", texts["entity"], "the code of a bank, as in its reports"),
        ("period", is_day(finding.period), "a reference date (YYYY-MM-DD)"),
        (
            "rule",
            finding.rule in rules or (finding.rule, finding.state) == ("", "benign"),
            f"a rule of rules.jsonl or note_rules.jsonl{suggestion}",
        ),
        ("kind", finding.kind in ("", *kinds), f"a kind of note: one of {', '.join(kinds)}, or empty"),
        ("state", finding.state in STATES, f"one of {', '.join(STATES)}"),
        ("cell", not finding.cell or CELL.fullmatch(finding.cell), "a cell such as C 76.00.a r0030 c0010"),
        ("value", finding.value is not None or not texts["value"], "a number; 0.95 is 95%"),
        ("limit", finding.limit is not None or not texts["limit"], "a number; 0.95 is 95%"),
        ("legal", finding.legal in ("", *laws), f"a citation of the legal bases; the nearest are {nearest}"),
        ("note", named, "the name of a note; without it nothing is decided: copy its 16 digits from the report's page"),
        (
            "state",
            not is_override or not finding.is_of_note or (finding.note_rule and finding.note_rule.counted),
            "possible here: it replaces a figure, or the amount of a rule ..._COUNTED",
        ),
        (
            "reason",
            bool(finding.reason) == is_override,
            "what the state needs: an override has a reason, other lines none",
        ),
        ("second", finding.second or not is_override, "the name of a second person, whom an override needs"),
    ):
        if not valid:
            raise UserError(f"{where}, column {column}: {texts[column]!r} is not {expected}")
    return finding


def apply_findings(results: Sequence[RuleResult], findings: Iterable[Finding]) -> list[RuleResult]:
    """Return the violations of a report: the violated `results` of the engine, corrected by `findings`."""
    violated = violations(results)
    for finding in findings:
        if finding.state == "benign":
            continue
        same = [result for result in violated if concerns(finding, result)]
        if finding.state == "override" and not finding.note_rule:
            violated = [result for result in violated if result not in same] + _overridden(finding, results)
        elif finding.state == "lifted":
            violated = [result for result in violated if result not in same]
        elif same:
            violated = [corrected(result, finding) if result in same else result for result in violated]
        else:
            violated.append(_added(finding, results))
    return violated


def lifted_results(results: Sequence[RuleResult], findings: Iterable[Finding]) -> tuple[RuleResult, ...]:
    """Return the engine's violations that `findings` lift. Their citation becomes the article that lifts them."""
    lifting = [finding for finding in findings if finding.state == "lifted"]
    pairs = ((result, [finding for finding in lifting if concerns(finding, result)]) for result in violations(results))
    return tuple(replace(result, legal=matches[0].legal or result.legal) for result, matches in pairs if matches)


def concerns(finding: Finding, result: RuleResult) -> bool:
    """Return whether a finding has the rule of this result and, if the finding names a cell, its cell."""
    return result.rule_id == finding.rule and finding.cell in ("", cell_name(result.cell, result.row))


def _overridden(finding: Finding, results: Sequence[RuleResult]) -> list[RuleResult]:
    """Return the results of the overridden rule that miss their limit with the figures of the line."""
    if finding.value is None and finding.limit is None:
        return []
    own = [corrected(result, finding) for result in results if can_override(finding, result)]
    missed = [result for result in own if not keeps_to(result.known_value, result.relation, result.known_limit)]
    return [replace(result, state="violated") for result in missed]


def can_override(finding: Finding, result: RuleResult) -> bool:
    """Return whether the line overrides this result: the rule applies, may be violated, and gets a value and a limit."""
    has_figures = all(
        getattr(finding, name) is not None or getattr(result, name) is not None for name in ("value", "limit")
    )
    is_open = result.state in ("violated", "ok", "undecided") and result.kind in ("breach", "filing")
    return concerns(finding, result) and is_open and (has_figures or finding.value is finding.limit is None)


def corrected(result: RuleResult, finding: Finding) -> RuleResult:
    """Return a result with the figures and the citation of a line, where the line has them."""
    value = result.value if finding.value is None else finding.value
    limit = result.limit if finding.limit is None else finding.limit
    return replace(result, value=value, limit=limit, legal=finding.legal or result.legal)


def _added(finding: Finding, results: Sequence[RuleResult]) -> RuleResult:
    """Make a violation that the engine does not have.

    Columns that the finding leaves empty are filled from the engine's result of the same rule, which is then not a violation.
    The unit and the accuracy are taken from the reported figure. Raise `UserError` if value, limit or cell remain unknown.
    Only a rule `..._COUNTED` may have no value and limit (the note states no amount, or in another currency).
    """
    rule, (cell, row) = finding.note_rule, parse_cell(finding.cell)
    own = next((result for result in results if result.rule_id == finding.rule), None)
    if own and not finding.cell:
        cell, row = own.cell, own.row
    figures = [part for result in results for figure in result.inputs for part in (figure, *figure.parts)]
    reported = next((figure for figure in figures if figure.cell == cell and row in ("", figure.row)), None)
    value = finding.value if finding.value is not None else own and own.value
    limit = finding.limit if finding.limit is not None else own and own.limit
    needed = {"cell": cell[0]} if rule and rule.counted else {"cell": cell[0], "value": value, "limit": limit}
    for name, content in needed.items():
        if content is None or content == "":
            raise UserError(
                f"{finding.where}, column {name}: it is empty, and the engine has no {name} for {finding.rule}; add it"
            )
    is_amount = limit is not None and abs(limit) > 100
    return RuleResult(
        rule_id=finding.rule,
        kind=own.kind if own else "note" if rule else "breach",
        state="violated",
        cell=cell,
        value=value,
        limit=limit,
        relation=rule.relation if rule else own.relation if own else "min",
        legal=finding.legal or (rule.legal if rule else own.legal if own else _legal_of(finding.rule)),
        unit=reported.unit if reported and reported.unit else "iso4217:EUR" if is_amount else "xbrli:pure",
        decimals=reported.decimals if reported else None,
        row=row,
        is_stated=any(figure.value == limit for figure in figures),
        title=rule.title if rule else own.title if own else "",
    )


def _legal_of(rule_id: str) -> str:
    return next((str(rule.legal) for rule in built_in_rules() if rule.id == rule_id), "")


def parse_cell(text: str) -> tuple[CellKey, str]:
    """Return (cell, key of its open row) of a printed cell: the inverse of `render.cell_name`."""
    match = CELL.fullmatch(text)
    table, row, column = match.groups() if match else ("", "", "")
    is_row = bool(re.fullmatch(r"r\d+", row or ""))
    return (table.replace(" ", "_"), row if is_row else "*", column), "" if is_row else row or ""
