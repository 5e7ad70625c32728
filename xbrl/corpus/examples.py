"""The task profiles, and training examples in each: read report files, evaluate the rules, write the answer.

An example is a JSON object with `messages` (user: the report; assistant: the answer of `answers.py`) and, for the
evaluation, `id`, `bank`, `period`, `split` and

- `violations`: the ids of all violated rules; `engine`: the ids that the engine finds without reading notes;
- `note_facts`: kind, applies, amount, who, since and quote of each fact of the note; `note`: the id of the note, or "";
- `kind`: the kind of the note in the report, "nothing" if it states no fact, or "" without a note;
- `measures`: subject and deadline in days of each measure that the letter demands;
- `pair`, in tests with minimal pairs: an id shared by two reports that differ in their notes alone.

Only the note comes from the generator. Everything else is read from the files, so that a real archive and an invented one are
processed alike. `Profile.question` also asks a trained model, so that the prompt is the prompt of training.
"""

import csv
import datetime
import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal

from common.errors import UserError
from xbrl.answers.answer_reader import Claim, read_line
from xbrl.answers.answers import write_answer, write_checks, write_violation
from xbrl.answers.checks import check_of, fact_checks, report_checks
from xbrl.corpus import quickstart
from xbrl.corpus.note_texts import NO_NOTE, HandNote
from xbrl.corpus.report_figures import SHORT_CELLS, short_rules
from xbrl.desk.letters import Context, required_measures, write_letter
from xbrl.read.dpm import Cells
from xbrl.read.filed_report import CellKey, Report
from xbrl.read.render import Addressee, cell_name, render_earlier, render_report
from xbrl.read.xbrl import merge_reports, read_report
from xbrl.read.xbrl_csv import read_table_of
from xbrl.rules.findings import Finding, apply_findings, lifted_results, note_rules
from xbrl.rules.note_facts import NAME
from xbrl.rules.reported_figures import index_facts, read_figure
from xbrl.rules.rules import Rule, RuleResult, built_in_rules, evaluate, violations

REGISTER_COLUMNS = ("entity", "name", "country", "type")
# The cells of earlier reports that are shown below a report. Letters judge trends and repeated violations by them.
EARLIER_CELLS: tuple[CellKey, ...] = (
    *(("C_03.00", row, "c0010") for row in ("r0010", "r0030", "r0050")),
    *(("C_47.00", "r0340", "c0010"), ("C_76.00.a", "r0030", "c0010"), ("C_84.00.a", "r0220", "c0040")),
)
MAX_EARLIER = 2  # the number of earlier reports that are shown, and at most counted as repetitions


@dataclass(frozen=True)
class Profile:
    """A form of the task (docs/xbrl.md): the style of the reports, the prompt, and the rules that an answer covers."""

    name: str  # "full", "short" or "quickstart"
    style: str  # of reports and answers, see render.py
    rules: tuple[Rule, ...]  # the rules on figures that an answer covers; rules on notes are always covered
    answer_tokens: int  # the default limit of a generated answer
    cells: frozenset[CellKey] | None = None  # the only cells of its reports; None allows all cells
    instruction: str = ""  # stands before each report; may be empty
    system: str = ""  # system message; may be empty
    filing_errors: float = 0.0  # probability that a planted problem is a filing error

    @property
    def is_short(self) -> bool:
        """Return whether letters consist of orders alone and no earlier reports are shown."""
        return self.style == "labels"

    def as_seen(self, report: Report, findings: Sequence[Finding] = ()) -> tuple[Report, Sequence[Finding]]:
        """Return the report and its findings as a model sees them. In the profile "short", names replace the codes of clients."""
        return with_client_names(report, findings) if self.name == "short" else (report, findings)

    def earlier_shown(self, earlier: Sequence[Report]) -> list[Report]:
        """Select the earlier reports that are shown below a report. `earlier` is ordered oldest first."""
        return [] if self.is_short else list(earlier)[-MAX_EARLIER:]

    def question(self, report: Report, bank: Addressee, cells: Cells, earlier: Sequence[Report] = ()) -> list[dict]:
        """Return the prompt for a report as chat messages. `earlier` has previous reports of the same bank, oldest first."""
        report, _ = self.as_seen(report)
        day = datetime.date.fromisoformat(report.period)
        parts = [
            self.instruction and f"{self.instruction}\n",
            f"{day.day} {day:%B} {day.year}" if self.name == "short" else "",  # its notes state dates
            render_report(report, cells, self.style, bank),
            render_earlier(self.earlier_shown(earlier), EARLIER_CELLS),
        ]
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": "\n".join(filter(None, parts))}]

    def why_not(self, report: Report) -> str:
        """Return why a model cannot be asked about this report, or "" if it can: no training example resembles the report."""
        placed = {fact.cell for fact in report.facts if fact.cell}
        if self.cells is None:
            read = {cell for rule in built_in_rules() for cell in rule.cells}
            reason = "no rule reads any of its figures, and no example of training has such a report"
            return "" if placed & read else reason
        unknown = sorted(placed - self.cells)
        without = sum(fact.cell is None for fact in report.facts)
        if not unknown and not without:
            return "" if placed else "it has no figures"
        names = ", ".join(map(cell_name, unknown[:3])) or f"{without} facts without a cell"
        return (
            f"it has {names}{' ...' if len(unknown) > 3 else ''}, which no example of the profile {self.name} has; "
            "ask a model of the profile full"
        )

    def claim_of(self, result: RuleResult) -> Claim | None:
        """Return the line that a right answer has about a result, as a claim that can be compared.

        Return None if answers have no line about it: for a result without figures, and in the quickstart for a rule on notes.
        """
        if result.value is None or result.limit is None:
            return None
        if not self.is_short:
            return read_line(write_violation(result))
        if self.name == "quickstart" and result.rule_id in note_rules():
            return None
        return read_line(str(check_of(replace(result, inputs=()))))  # a claim has no computation


FULL = Profile(
    name="full",
    style="cells",
    rules=built_in_rules(),
    answer_tokens=2048,
    instruction="State the facts of the bank's note, name every violation of prudential rules in this bank report, then write "
    "the supervisor's directive.",
    filing_errors=0.55,
)
# These system messages are shorter than the default message of SmolLM2's chat template.
SHORT = Profile(  # xbrl/scripts/make_reports.py --style short
    name="short",
    style="labels",
    rules=short_rules(),
    answer_tokens=896,
    cells=SHORT_CELLS,
    system="Check the report and its note.",
    filing_errors=0.25,
)
QUICKSTART = Profile(
    name="quickstart",
    style="labels",
    rules=quickstart.RULES,
    answer_tokens=256,
    cells=quickstart.CELLS,
    system="Find violations.",
)
PROFILES = {profile.name: profile for profile in (FULL, SHORT, QUICKSTART)}


def read_filing(paths: Iterable[pathlib.Path], cells: Cells) -> Report:
    """Read the files that a bank filed for one date, one per module, and merge them into one report.

    Raise `UserError` as `read_report` does.
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
    note: HandNote = NO_NOTE,
) -> dict:
    """Make the training example of one report, in the format of `profile`.

    `earlier` has previous reports of the same bank, oldest first. `letter` is the supervisor's letter; if it is None, a letter is
    written from the blocks. `findings` has the lines of findings.csv on this report; they correct the results of the engine.
    `note` is the bank's note, if its facts are known; the quickstart needs it.
    """
    report, findings = profile.as_seen(report, findings)
    results = evaluate(report, profile.rules)
    violated = apply_findings(results, findings)
    context = letter_context(report, results, profile.earlier_shown(earlier), profile.rules, findings)
    if letter is None:
        letter = write_letter(violated, bank, report.period, context, short=profile.is_short)
    if profile.name == "quickstart":
        answer = write_checks([*map(check_of, results), *quickstart.note_checks(note)], letter)
    elif profile.name == "short":
        checks = [*report_checks(report, results), *fact_checks(report, note.facts)]
        answer = write_checks(checks, letter, note.facts)
    else:
        answer = write_answer(violated, letter, note.facts)
    entity = report.entity.partition(".")[0]  # without the EBA's suffix for the scope of consolidation
    example = {
        "messages": [*profile.question(report, bank, cells, earlier), {"role": "assistant", "content": answer}],
        "id": f"{entity}-{report.period}",
        "bank": entity,
        "period": report.period,
        "violations": list(dict.fromkeys(result.rule_id for result in violated)),
        "engine": list(dict.fromkeys(result.rule_id for result in violations(results))),
    }
    kind = note.kind if note.id else next((finding.kind for finding in findings if finding.kind), "")
    measures = required_measures(violated, context)
    stated = [asdict(fact) | {"amount": None if fact.amount is None else int(fact.amount)} for fact in note.facts]
    return example | {"kind": kind, "note": note.id, "note_facts": stated, "measures": measures}


def with_client_names(report: Report, findings: Sequence[Finding] = ()) -> tuple[Report, list[Finding]]:
    """Replace the codes of clients by their names, which table C 27.00 has, in the report and in findings on it.

    Clients that share a name are written as "name (code)".
    """
    names = {fact.keys.get("qINC", ""): str(fact.value) for fact in report.facts if fact.cell == NAME}
    shared = {name for name, count in Counter(names.values()).items() if count > 1}
    names = {code: f"{name} ({code})" if name in shared else name for code, name in names.items()}

    def renamed(key: str, member: str) -> str:
        return names.get(member, member) if key.endswith("qINC") else member

    facts = tuple(
        replace(fact, dimensions={key: renamed(key, member) for key, member in fact.dimensions.items()})
        for fact in report.facts
        if fact.cell != NAME
    )
    cells = [tuple((table, names.get(row, row), column) for table, row, column in note.cells) for note in report.notes]
    notes = tuple(replace(note, cells=own) for note, own in zip(report.notes, cells, strict=True))
    named = []
    for finding in findings:
        code = next((code for code in names if code and f" {code} " in finding.cell), "")
        named.append(replace(finding, cell=finding.cell.replace(code, names[code])) if code else finding)
    return replace(report, facts=facts, notes=notes), named


def letter_context(
    report: Report,
    results: Sequence[RuleResult],
    earlier: Sequence[Report],
    rules: Iterable[Rule],
    findings: Sequence[Finding] = (),
    before: Sequence[Finding] = (),
) -> Context:
    """Collect what the letter on a report may mention besides the violations: duties, margins, trends and repetitions.

    Trends and repetitions come from the `earlier` reports, oldest first. An earlier report that lacks the figure is skipped,
    because liquidity is filed every month and capital every quarter. `findings` are about this report; `before` may contain
    findings about the earlier ones.
    """
    repeated: dict[str, int] = {}
    previous: dict[CellKey, Decimal] = {}
    missing = {result.cell for result in results if result.cell in EARLIER_CELLS}
    persisting = {result.rule_id for result in results if result.state == "violated" and result.cell in EARLIER_CELLS}
    for old in reversed(earlier):
        if missing:
            facts = index_facts(old)
            figures = [read_figure(facts, cell) for cell in missing]
            missing = {figure.cell for figure in figures if figure.source == "not reported"}
            previous |= {figure.cell: figure.value for figure in figures if isinstance(figure.value, Decimal)}
        if persisting:
            tested = evaluate(old, rules)
            missed = {result.rule_id for result in violations(tested)}
            missed -= {line.rule for line in before if (line.period, line.state) == (old.period, "lifted")}
            persisting -= {result.rule_id for result in tested} - missed
            repeated |= {rule: repeated.get(rule, 0) + 1 for rule in persisting & missed}
            persisting = {rule for rule in persisting if repeated.get(rule, 0) < MAX_EARLIER}
    return Context(
        triggers=tuple(result for result in results if result.state == "triggered"),
        margins=tuple(result for result in results if result.kind == "breach" and result.state == "ok"),
        previous=previous,
        repeated=repeated,
        templates=tuple(sorted(template for template, filed in report.filing_indicators.items() if filed)),
        lifted=lifted_results(results, findings),
    )


def write_register(path: pathlib.Path, banks: Iterable[Addressee]) -> None:
    """Write a register of banks: a CSV file with the columns entity, name, country, type."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(REGISTER_COLUMNS)
        writer.writerows((bank.entity, bank.name, bank.country, bank.type) for bank in banks)


def read_register(path: pathlib.Path) -> dict[str, Addressee]:
    """Read a register and return the banks by entity.

    Raise `UserError` as `read_table_of` does, and if an entity occurs twice or has no name.
    """
    register = {}
    for where, row in read_table_of(path, REGISTER_COLUMNS):
        if not row["name"]:
            raise UserError(f"{where}, column name: it is empty; name the bank, or remove the line.")
        if row["entity"] in register:
            raise UserError(f"{where}: entity {row['entity']} occurs twice; remove one of the two lines.")
        register[row["entity"]] = Addressee(*(row[name] for name in REGISTER_COLUMNS))
    return register
