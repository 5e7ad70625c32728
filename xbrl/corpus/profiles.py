"""The two styles of a corpus: long reports for a large model, short ones for a small model."""

from collections.abc import Sequence
from dataclasses import dataclass

from xbrl.corpus.report_figures import short_rules
from xbrl.rules.rules import Rule, built_in_rules


@dataclass(frozen=True)
class Profile:
    """How the examples of a corpus look, and which rules its answers cover."""

    name: str  # "full" or "short"
    style: str  # of reports and answers, see render.py
    instruction: str = ""  # before each report; may be empty
    system: str = ""  # system message; may be empty
    rules: Sequence[Rule] | None = None  # None means all rules
    filing_errors: float = 0.55  # probability that a planted problem is a filing error

    @property
    def is_short(self) -> bool:
        """Whether reports have only what rules and notes need, and letters only the orders."""
        return self.style == "labels"


FULL = Profile(
    name="full",
    style="cells",
    instruction="State the facts of the bank's note, name every violation of prudential rules in this bank report, then write "
    "the supervisor's directive.",
)
# The system message is shorter than the default one of SmolLM2's chat template.
SHORT = Profile(
    name="short", style="labels", system="Check the report and its note.", rules=short_rules(), filing_errors=0.25
)
PROFILES = {profile.name: profile for profile in (FULL, SHORT)}


def rules_of(profile: Profile) -> Sequence[Rule]:
    """The rules that the answers of a profile cover."""
    return built_in_rules() if profile.rules is None else profile.rules
