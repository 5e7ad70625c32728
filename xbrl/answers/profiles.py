"""The task profiles: the style of the reports, the prompt, and the rules that an answer covers.

`Profile.question` makes the prompts of training and asks a trained model, so that both prompts are the same.
"""

import datetime
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from xbrl.answers.answer_reader import Claim, read_line
from xbrl.answers.answers import write_violation
from xbrl.read.dpm import Cells
from xbrl.read.filed_report import CellKey, Report
from xbrl.read.render import Addressee, cell_name, render_earlier, render_report
from xbrl.rules.findings import Finding
from xbrl.rules.note_facts import NAME, SHARE
from xbrl.rules.rules import Rule, RuleResult, built_in_rules

# The cells of earlier reports that are shown below a report. Letters judge trends and repeated violations by them.
EARLIER_CELLS: tuple[CellKey, ...] = (
    *(("C_03.00", row, "c0010") for row in ("r0010", "r0030", "r0050")),
    *(("C_47.00", "r0340", "c0010"), ("C_76.00.a", "r0030", "c0010"), ("C_84.00.a", "r0220", "c0040")),
)
MAX_EARLIER = 2  # the number of earlier reports that are shown, and at most counted as repetitions
# Blocks of a short report: own funds, TSCR, liquidity, clients. A block may be left out if the note does not need it.
BLOCKS: tuple[set[CellKey], ...] = (
    {*(("C_01.00", row, "c0010") for row in ("r0010", "r0015", "r0020")), ("C_02.00.a", "r0010", "c0010")},
    {("C_03.00", row, "c0010") for row in ("r0130", "r0140", "r0150")},
    {("C_76.00.a", row, "c0010") for row in ("r0010", "r0020")},
    {("C_27.00", "*", "c021"), ("C_28.00", "*", "c350")},
)
# The cells of short reports: the blocks, and ratios and requirements, which are never left out.
SHORT_CELLS = frozenset().union(
    *BLOCKS,
    (("C_03.00", f"r{row:04}", "c0010") for row in (10, 30, 50, 160, 170, 180)),
    (("C_47.00", "r0340", "c0010"), ("C_76.00.a", "r0030", "c0010"), ("C_84.00.a", "r0220", "c0040")),
)
QUICKSTART_RULES = tuple(rule for rule in built_in_rules() if rule.id in ("LR_MIN", "LCR_MIN"))
QUICKSTART_CELLS = frozenset(cell for rule in QUICKSTART_RULES for cell in rule.cells) | {SHARE}


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
    def states_facts_alone(self) -> bool:
        """Return whether answers consist of the facts of the note. The rules compute everything else from them."""
        return self.name == "quickstart"

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
        """Return the line that a right answer has about a result, as a claim. Return None for a result without figures."""
        if result.value is None or result.limit is None:
            return None
        return read_line(write_violation(result, self.style))


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


def short_rules() -> tuple[Rule, ...]:
    """Return the rules that the figures of a short report can decide. A short report has no exposures to institutions."""
    shown = SHORT_CELLS | {("C_27.00", "*", "c070"), ("C_26.00", "r030", "c010")}
    return tuple(rule for rule in built_in_rules() if set(rule.cells) <= shown and rule.absent_cell == "unknown")


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
    answer_tokens=512,
    cells=SHORT_CELLS,
    system="Check the report and its note.",
    filing_errors=0.25,
)
QUICKSTART = Profile(
    name="quickstart",
    style="labels",
    rules=QUICKSTART_RULES,
    answer_tokens=128,
    cells=QUICKSTART_CELLS,
    system="What does the note say?",
)
PROFILES = {profile.name: profile for profile in (FULL, SHORT, QUICKSTART)}
