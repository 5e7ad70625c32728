"""Make training examples from report files: read the files, evaluate the rules, write the answer.

An example is a JSON object with `messages` (user: the report; assistant: the answer of `answers.py`) and, for the
evaluation, `id`, `bank`, `period`, `violations` (rule ids) and `split`. Nothing in it comes from the generator: a real
archive and an invented one are processed alike.
"""

import csv
import pathlib
from collections.abc import Iterable, Sequence
from decimal import Decimal

from common.errors import UserError
from data.regulator.answer_reader import letter_in
from data.regulator.answers import write_answer
from data.regulator.corpus import Profile, rules_of
from data.regulator.directives import Context, write_directive
from data.regulator.dpm import Cells
from data.regulator.findings import Finding, apply_findings
from data.regulator.render import Addressee, render_earlier, render_report
from data.regulator.report import CellKey, Report
from data.regulator.rules import Rule, RuleResult, evaluate, violations
from data.regulator.xbrl import merge_reports, read_report

REGISTER_COLUMNS = ("entity", "name", "country", "type")
# The cells of earlier reports that are shown below a report. Letters judge trends and repeated violations by them.
EARLIER_CELLS: tuple[CellKey, ...] = (
    *(("C_03.00", row, "c0010") for row in ("r0010", "r0030", "r0050")),
    *(("C_47.00", "r0340", "c0010"), ("C_76.00.a", "r0030", "c0010"), ("C_84.00.a", "r0220", "c0040")),
)
MAX_EARLIER = 2  # earlier reports shown


def read_filing(paths: Iterable[pathlib.Path], cells: Cells) -> Report:
    """Read the files that a bank filed for one date (one per module) and merge them into one report.

    Raises `UserError` as `read_report` does.
    """
    return merge_reports([read_report(path, cells) for path in paths])


def make_example(
    report: Report,
    bank: Addressee,
    cells: Cells,
    profile: Profile,
    earlier: Sequence[Report] = (),
    letter: str | None = None,
    findings: Sequence[Finding] = (),
) -> dict:
    """Make the example of one report, in the format of `profile`. Its split is not set yet.

    `earlier` are previous reports of the same bank, oldest first. `letter` is the supervisor's letter; without one, a
    letter is generated. `findings` are the lines of findings.csv on this report; they correct what the engine finds.
    """
    return example_variants(report, bank, cells, profile, earlier, [letter], findings)[0]


def example_variants(
    report: Report,
    bank: Addressee,
    cells: Cells,
    profile: Profile,
    earlier: Sequence[Report] = (),
    letters: Sequence[str | None] = (None,),
    findings: Sequence[Finding] = (),
) -> list[dict]:
    """Make the example of one report once per entry of `letters`; otherwise as `make_example`.

    For each None in `letters` a letter is generated, with a different wording each time.
    """
    rules = rules_of(profile)
    results = evaluate(report, rules)
    violated = apply_findings(results, findings)
    shown = list(earlier)[-MAX_EARLIER:] if profile.style == "cells" else []
    parts = [
        profile.instruction and f"{profile.instruction}\n",
        render_report(report, cells, profile.style, bank),
        render_earlier(shown, EARLIER_CELLS),
    ]
    prompt = "\n".join(filter(None, parts))
    context = _context(report, results, shown, rules)
    written = [
        write_directive(violated, bank, report.period, profile.letters, context, variant) if letter is None else letter
        for variant, letter in enumerate(letters)
    ]
    entity = entity_code(report.entity)
    return [
        {
            "messages": [
                *([{"role": "system", "content": profile.system}] if profile.system else []),
                {"role": "user", "content": prompt},
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
    """What the letter may mention besides the violations. `earlier` is oldest first."""
    previous: dict[CellKey, Decimal] = {}
    repeated: dict[str, int] = {}
    persisting = {result.rule_id for result in results if result.state == "violated" and result.cell in EARLIER_CELLS}
    for count, old in enumerate(reversed(earlier), start=1):
        if count == 1:
            previous = {
                fact.cell: fact.value
                for fact in old.facts
                if fact.cell in EARLIER_CELLS and isinstance(fact.value, Decimal)
            }
        persisting &= {result.rule_id for result in violations(evaluate(old, rules))}
        repeated |= dict.fromkeys(sorted(persisting), count)
    return Context(
        triggers=tuple(result for result in results if result.state == "triggered"),
        margins=tuple(result for result in results if result.kind == "breach" and result.state == "ok"),
        previous=previous,
        repeated=repeated,
        templates=tuple(sorted(template for template, filed in report.filing_indicators.items() if filed)),
    )


def entity_code(entity: str) -> str:
    """The LEI without the EBA's suffix for the scope of consolidation: `SYNB00....CON` -> `SYNB00...`."""
    return entity.partition(".")[0]


def report_of(example: dict) -> str:
    """The user message of an example: the report that the model reads, without the system message."""
    return next(message["content"] for message in example["messages"] if message["role"] == "user")


def letter_of(example: dict) -> str:
    """The directive of an example."""
    return letter_in(example["messages"][-1]["content"])


def write_register(path: pathlib.Path, banks: Iterable[Addressee]) -> None:
    """Write a register of banks: a CSV file with the columns entity, name, country, type."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(REGISTER_COLUMNS)
        writer.writerows((bank.entity, bank.name, bank.country, bank.type) for bank in banks)


def read_register(path: pathlib.Path) -> dict[str, Addressee]:
    """Read a register: entity -> bank.

    Raises `UserError` if the file or a column is missing or an entity occurs twice.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; the register of banks is a CSV with the columns {','.join(REGISTER_COLUMNS)}."
        )
    register = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in REGISTER_COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise UserError(f"{path}, line 1: the column {missing[0]!r} is missing; add it to the register.")
        for row in reader:
            if row["entity"] in register:
                raise UserError(
                    f"{path}, line {reader.line_num}: entity {row['entity']} occurs twice; remove one of the two lines."
                )
            register[row["entity"]] = Addressee(*(row[name] for name in REGISTER_COLUMNS))
    return register
