"""Examples for training, made from report files alone: read, decide the rules, write the answer.

An example is one JSON object a line: `messages` (user: the report; assistant: analysis and directive), and for the
evaluation `id`, `bank`, `period`, `violations` (rule ids) and `split`.
"""

import csv
import pathlib
from collections.abc import Iterable, Sequence
from decimal import Decimal

from common.errors import UserError
from data.regulator.answers import write_answer
from data.regulator.corpus import Profile, rules_of
from data.regulator.directives import Context, directive
from data.regulator.dpm import Cells
from data.regulator.render import Addressee, render_earlier, render_report
from data.regulator.report import CellKey, Report
from data.regulator.rules import Rule, RuleResult, evaluate, violations
from data.regulator.xbrl import merge_reports, read_report

REGISTER_COLUMNS = ("entity", "name", "country", "type")
# What a report is told about the ones before it: repetition and trend are judged by these.
EARLIER: tuple[CellKey, ...] = (
    *(("C_03.00", row, "c0010") for row in ("r0010", "r0030", "r0050")),
    *(("C_47.00", "r0340", "c0010"), ("C_76.00.a", "r0030", "c0010"), ("C_84.00.a", "r0220", "c0040")),
)
MAX_EARLIER = 2


def read_filing(paths: Iterable[pathlib.Path], cells: Cells) -> Report:
    """The files that one bank filed for one date (one per module) as one report. Raises `UserError` as `read_report` does."""
    return merge_reports([read_report(path, cells) for path in paths])


def make_example(
    report: Report,
    bank: Addressee,
    cells: Cells,
    profile: Profile,
    earlier: Sequence[Report] = (),
    letter: str | None = None,
) -> dict:
    """The example of one report, without its split, in the form that `profile` says.

    `earlier` are reports of the bank before this one, oldest first. `letter` is the supervisor's own; without it the
    letter is written here.
    """
    return worded_examples(report, bank, cells, profile, earlier, [letter])[0]


def worded_examples(
    report: Report,
    bank: Addressee,
    cells: Cells,
    profile: Profile,
    earlier: Sequence[Report] = (),
    letters: Sequence[str | None] = (None,),
) -> list[dict]:
    """The example of one report once for each of `letters`; where one is None, it is written here, each time in other words."""
    rules = rules_of(profile)
    results = evaluate(report, rules)
    violated = violations(results)
    text = render_report(report, cells, profile.style, bank)
    known = list(earlier)[-MAX_EARLIER:] if profile.style == "cells" else []
    text = "\n".join(
        filter(None, [profile.instruction and f"{profile.instruction}\n", text, render_earlier(known, EARLIER)])
    )
    context = _context(report, results, known, rules)
    written = [
        directive(violated, bank, report.period, profile.letters, context, variant) if letter is None else letter
        for variant, letter in enumerate(letters)
    ]
    entity = entity_code(report.entity)
    return [
        {
            "messages": [
                *([{"role": "system", "content": profile.system}] if profile.system else []),
                {"role": "user", "content": text},
                {"role": "assistant", "content": write_answer(violated, letter, profile.style)},
            ],
            "id": f"{entity}-{report.period}",
            "bank": entity,
            "period": report.period,
            "violations": list(dict.fromkeys(result.rule_id for result in violated)),
        }
        for letter in written
    ]


def _context(
    report: Report, results: Sequence[RuleResult], earlier: Sequence[Report], rules: Sequence[Rule]
) -> Context:
    """What the letter may mention beside the violations."""
    before: dict[CellKey, Decimal] = {}
    repeated: dict[str, int] = {}
    still = {result.rule_id for result in results if result.state == "violated" and result.cell in EARLIER}
    for count, old in enumerate(reversed(earlier), start=1):
        if count == 1:
            facts = [fact for fact in old.facts if fact.cell in EARLIER and isinstance(fact.value, Decimal)]
            before = {fact.cell: fact.value for fact in facts}
        still &= {result.rule_id for result in violations(evaluate(old, rules))}
        repeated |= dict.fromkeys(sorted(still), count)
    return Context(
        triggers=tuple(result for result in results if result.state == "triggered"),
        margins=tuple(result for result in results if result.kind == "breach" and result.state == "ok"),
        before=before,
        repeated=repeated,
        templates=tuple(sorted(template for template, filed in report.filing_indicators.items() if filed)),
    )


def entity_code(entity: str) -> str:
    """The LEI without the suffix of the EBA for the scope of consolidation: `SYNB00....CON` -> `SYNB00...`."""
    return entity.partition(".")[0]


def write_register(path: pathlib.Path, banks: Iterable[Addressee]) -> None:
    """Write a register of banks: a CSV with the columns entity, name, country, type."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(REGISTER_COLUMNS)
        writer.writerows((bank.entity, bank.name, bank.country, bank.type) for bank in banks)


def read_register(path: pathlib.Path) -> dict[str, Addressee]:
    """Entity -> bank. Raises `UserError` for a missing file, missing columns or an entity given twice."""
    if not path.is_file():
        raise UserError(f"{path}: no such register of banks (a CSV with the columns {','.join(REGISTER_COLUMNS)}).")
    register = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in REGISTER_COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise UserError(f"{path}, line 1: the register lacks the column {missing[0]!r}.")
        for row in reader:
            if row["entity"] in register:
                raise UserError(f"{path}, line {reader.line_num}: entity {row['entity']} is there twice.")
            register[row["entity"]] = Addressee(*(row[name] for name in REGISTER_COLUMNS))
    return register
