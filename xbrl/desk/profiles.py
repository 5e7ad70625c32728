"""The profiles that a model can be trained on: how it is asked about a report, and how a right answer is printed.

The questions come from the functions that make the training examples, so that a model is asked exactly as it was trained.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from xbrl.answers.answer_reader import Claim, read_line
from xbrl.answers.answers import write_violation
from xbrl.corpus import profiles as corpus
from xbrl.corpus import quickstart
from xbrl.corpus.examples import question, with_client_names
from xbrl.corpus.profiles import FULL, SHORT, rules_of
from xbrl.corpus.report_figures import SHORT_CELLS
from xbrl.read.dpm import Cells
from xbrl.read.render import Addressee, cell_name
from xbrl.read.report import CellKey, Report
from xbrl.rules.findings import Finding, note_rules
from xbrl.rules.rules import Rule, RuleResult, built_in_rules

DATA_CARD = "dataset.json"  # beside the examples of a run; scripts/make_reports.py writes it


@dataclass(frozen=True)
class Profile:
    """One of the forms of the task (docs/xbrl.md)."""

    name: str
    answer_tokens: int  # the default limit of an answer
    cells: frozenset[CellKey] | None  # the only cells of its reports; None if there is no such limit
    corpus: corpus.Profile | None  # None: the quickstart, whose answers have no facts of notes

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that its answers cover, besides those of notes."""
        return tuple(rules_of(self.corpus)) if self.corpus else quickstart.RULES

    def as_seen(self, report: Report, decisions: Sequence[Finding]) -> tuple[Report, Sequence[Finding]]:
        """A report and the decisions on it as the model sees the report: a short one names the clients in place of codes."""
        if self.corpus and self.corpus.is_short:
            return with_client_names(report, decisions)
        return report, decisions

    def question(self, report: Report, bank: Addressee, cells: Cells, earlier: Sequence[Report]) -> list[dict]:
        """The messages that ask about a report. `earlier` are previous reports of the bank, oldest first."""
        if self.corpus:
            return question(report, bank, cells, self.corpus, earlier)
        return quickstart.quickstart_question(report, bank, cells)

    def why_not(self, report: Report) -> str:
        """Why a report cannot be asked about in this profile: no example of training looks like it. "" if it can."""
        placed = {fact.cell for fact in report.facts if fact.cell}
        if self.cells is None:
            read = {cell for rule in built_in_rules() for cell in rule.cells}
            why = "no rule reads any of its figures, and no example of training has such a report"
            return "" if placed & read else why
        strange = sorted(placed - self.cells)
        without = sum(fact.cell is None for fact in report.facts)
        if not strange and not without:
            return "" if placed else "it has no figures"
        names = ", ".join(map(cell_name, strange[:3])) or f"{without} facts without a cell"
        return (
            f"it has {names}{' ...' if len(strange) > 3 else ''}, which no example of the profile {self.name} has; "
            "ask a model of the profile full"
        )

    def claim_of(self, result: RuleResult) -> Claim | None:
        """What a right answer says about a result, as a claim that can be compared.

        None if the form of the answers has no line for it: a result without figures, and in the quickstart one of a note.
        """
        if result.value is None or result.limit is None:
            return None
        if self.corpus:
            return read_line(write_violation(result, self.corpus.style))
        return None if result.rule_id in note_rules() else read_line(str(quickstart.ratio_check(result)))


QUICKSTART_CELLS = frozenset(cell for rule in quickstart.RULES for cell in rule.cells) | {("C_28.00", "*", "c350")}
PROFILES = {
    "full": Profile("full", 2048, None, FULL),
    "short": Profile("short", 768, SHORT_CELLS, SHORT),  # scripts/make_reports.py --style short
    "quickstart": Profile("quickstart", 256, QUICKSTART_CELLS, None),
}


def choose_profile(option: str | None, model: Path) -> tuple[Profile, str]:
    """(the profile that a model was trained on, where that stands): `--profile`, its export.json, or the data card of its run.

    scripts/export.py records the profile. The export of a run lies in the run's directory: the run's config.json names the
    training file, and the data card beside that names the profile. Raises UserError if this chain is broken.
    """
    if option:
        return PROFILES[option], "--profile"
    record = model / "export.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return PROFILES[json.loads(record.read_text(encoding="utf-8"))["profile"]], str(record)
    config = model.resolve().parent / "config.json"
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        train = Path(content.get("config", content)["data"]["train"][0])
        card = train.parent / DATA_CARD
        name = json.loads(card.read_text(encoding="utf-8"))["arguments"]["profile"]
        return PROFILES[name], str(card)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"{model}: the profile that it was trained on is not recorded ({config} or its data card cannot be read); name it "
            f"with --profile {', '.join(PROFILES)}"
        ) from error
