"""The profiles of a corpus: how its texts look, and which reports it has."""

from dataclasses import dataclass

from xbrl.corpus.laptop import RULES as LAPTOP_RULES
from xbrl.rules.rules import Rule, built_in_rules


@dataclass(frozen=True)
class Profile:
    """Parameters of a corpus: the style of its texts and the distribution of its reports."""

    name: str
    style: str  # style of reports, see render.py
    letters: str  # style of letters: "full" (directives.py) or "laptop" (laptop_answers.py)
    instruction: str  # put before each report; may be empty
    quarters: int  # number of reports per bank
    clean: float  # probability of a report without violations
    problem_counts: tuple[int, ...] = (45, 35, 20)  # weights of one, two and three problems in the other reports
    filing_errors: float = 0.0  # probability that a problem is a filing error instead of a breach
    near_limit: float = 0.45  # probability that a ratio is within ten steps of a limit
    notes: float = 0.0  # share of reports in which the bank explains a figure; at most 0.6
    repeats: float = 0.0  # probability that the breaches of a quarter persist in the next quarter
    rules: tuple[str, ...] = ()  # ids of the rules that answers cover; empty means all rules
    answers: str = "violations"  # form of answers, see answers.py: "violations" or "checks"
    system: str = ""  # system message; may be empty


FULL = Profile(
    name="full",
    style="cells",
    letters="full",
    instruction="Name every violation of prudential rules in this bank report, then write the supervisor's directive.",
    quarters=4,
    clean=0.36,
    problem_counts=(48, 36, 16),
    filing_errors=0.55,
    notes=0.4,
    repeats=0.35,
)
LAPTOP = Profile(
    name="laptop",
    style="labels",
    letters="laptop",
    instruction="",
    quarters=1,
    clean=0.5,
    rules=LAPTOP_RULES,
    answers="checks",
    # Shorter than the default system message of SmolLM2's chat template.
    system="Check the report.",
)
PROFILES = {profile.name: profile for profile in (FULL, LAPTOP)}


def rules_of(profile: Profile) -> tuple[Rule, ...]:
    """The rules that the answers of a profile cover."""
    return tuple(rule for rule in built_in_rules() if not profile.rules or rule.id in profile.rules)
