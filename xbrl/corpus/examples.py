"""Make training examples from report files: read the files, evaluate the rules, write the answer.

An example is a JSON object with `messages` (user: the report; assistant: the answer of `answers.py`) and, for the
evaluation, `id`, `bank`, `period`, `split` and

- `violations`: the ids of the violated rules, and `engine`: those that the engine finds without reading notes;
- `findings`: rule, cell, value, limit and article of each violation as the answer prints them;
- `note_facts`: kind, applies, amount, who, since and quote of each fact of the note; `note`: the id of the note, or "";
- `kind`: the kind of the note in the report, "nothing" if it states no fact, or "" without a note;
- `measures`: subject and deadline in days of each measure that the letter demands;
- `pair`, in some tests: shared by two reports that differ in their notes alone, the members of a minimal pair.

Nothing in it comes from the generator but the facts of the note: a real archive and an invented one are processed alike.
"""

import csv
import datetime
import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from decimal import Decimal

from common.errors import UserError
from xbrl.answers.answer_reader import letter_in
from xbrl.answers.answers import write_answer, write_violation
from xbrl.corpus.profiles import Profile, rules_of
from xbrl.desk.letters import Context, required_measures, write_letter
from xbrl.read.dpm import Cells
from xbrl.read.render import Addressee, render_earlier, render_report
from xbrl.read.report import CellKey, Report
from xbrl.read.xbrl import merge_reports, read_report
from xbrl.rules.findings import Finding, apply_findings, lifted_results
from xbrl.rules.note_facts import NAME, NoteFact
from xbrl.rules.rules import Rule, RuleResult, evaluate, violations

REGISTER_COLUMNS = ("entity", "name", "country", "type")
# The cells of earlier reports that are shown below a report. Letters judge trends and repeated violations by them.
EARLIER_CELLS: tuple[CellKey, ...] = (
    *(("C_03.00", row, "c0010") for row in ("r0010", "r0030", "r0050")),
    *(("C_47.00", "r0340", "c0010"), ("C_76.00.a", "r0030", "c0010"), ("C_84.00.a", "r0220", "c0040")),
)
MAX_EARLIER = 2  # earlier reports shown
PRINTED = ("rule", "cell", "value", "limit", "legal")  # parts of a printed violation


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
    facts: Sequence[NoteFact] = (),
) -> dict:
    """Make the example of one report, in the format of `profile`.

    `earlier` are previous reports of the same bank, oldest first. `letter` is the supervisor's letter; without one, a
    letter is written. `findings` are the lines of findings.csv on this report; they correct what the engine finds. `facts`
    are those of the bank's note.
    """
    if profile.is_short:
        report, findings = with_client_names(report, findings)
    results = evaluate(report, rules_of(profile))
    violated = apply_findings(results, findings)
    context = letter_context(report, results, earlier, profile, findings)
    if letter is None:
        letter = write_letter(violated, bank, report.period, context, short=profile.is_short)
    printed = [dict(zip(PRINTED, write_violation(one, profile.style).split(" | "), strict=True)) for one in violated]
    entity = entity_code(report.entity)
    answer = write_answer(violated, letter, profile.style, facts)
    return {
        "messages": [*question(report, bank, cells, profile, earlier), {"role": "assistant", "content": answer}],
        "id": f"{entity}-{report.period}",
        "bank": entity,
        "period": report.period,
        "violations": list(dict.fromkeys(result.rule_id for result in violated)),
        "engine": list(dict.fromkeys(result.rule_id for result in violations(results))),
        "findings": printed,
        "kind": next((finding.kind for finding in findings if finding.kind), ""),
        "measures": required_measures(violated, context),
        "note_facts": [fact_entry(fact) for fact in facts],
        "note": "",
    }


def fact_entry(fact: NoteFact) -> dict:
    """A fact of a note as JSON: the form of the field `note_facts`."""
    return {
        "kind": fact.kind,
        "applies": fact.applies,
        "amount": None if fact.amount is None else int(fact.amount),
        "who": list(fact.who),
        "since": fact.since,
        "quote": fact.quote,
    }


def with_client_names(report: Report, findings: Sequence[Finding] = ()) -> tuple[Report, list[Finding]]:
    """The report, and findings on it, with the names of clients in place of their codes: C 27.00 has both.

    Clients of one name keep their codes behind it.
    """
    names = {fact.keys.get("qINC", ""): str(fact.value) for fact in report.facts if fact.cell == NAME}
    shared = {name for name, count in Counter(names.values()).items() if count > 1}
    names = {code: f"{name} ({code})" if name in shared else name for code, name in names.items()}
    facts = tuple(
        replace(fact, dimensions={**fact.dimensions, key: names[code]})
        if (key := next((key for key in fact.dimensions if key.endswith("qINC")), ""))
        and (code := fact.dimensions[key]) in names
        else fact
        for fact in report.facts
        if fact.cell != NAME
    )
    notes = tuple(
        replace(note, cells=tuple((table, names.get(row, row), column) for table, row, column in note.cells))
        for note in report.notes
    )
    named = []
    for finding in findings:
        code = next((code for code in names if code and f" {code} " in finding.cell), "")
        named.append(replace(finding, cell=finding.cell.replace(code, names[code])) if code else finding)
    return replace(report, facts=facts, notes=notes), named


def question(
    report: Report, bank: Addressee, cells: Cells, profile: Profile, earlier: Sequence[Report] = ()
) -> list[dict]:
    """The messages that ask about a report, before the answer: those of training, and of everyone who asks the model later.

    `earlier` are previous reports of the same bank, oldest first.
    """
    if profile.is_short:
        report, _ = with_client_names(report)
    day = datetime.date.fromisoformat(report.period)
    parts = [
        profile.instruction and f"{profile.instruction}\n",
        f"{day.day} {day:%B} {day.year}" if profile.style == "labels" else "",
        render_report(report, cells, profile.style, bank),
        render_earlier(shown_earlier(earlier, profile), EARLIER_CELLS),
    ]
    system = [{"role": "system", "content": profile.system}] if profile.system else []
    return [*system, {"role": "user", "content": "\n".join(filter(None, parts))}]


def shown_earlier(earlier: Sequence[Report], profile: Profile) -> list[Report]:
    """Those of the `earlier` reports, oldest first, that are shown below a report."""
    return [] if profile.is_short else list(earlier)[-MAX_EARLIER:]


def letter_context(
    report: Report,
    results: Sequence[RuleResult],
    earlier: Sequence[Report],
    profile: Profile,
    findings: Sequence[Finding] = (),
) -> Context:
    """What the letter on a report may mention besides the violations. The arguments are those of `make_example`."""
    context = _context(report, results, shown_earlier(earlier, profile), rules_of(profile))
    return replace(context, lifted=lifted_results(results, findings))


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
