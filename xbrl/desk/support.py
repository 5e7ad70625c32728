"""What a letter on a report may state: each figure, date, article, deadline and count, with where it comes from.

The sources are the report and its notes, the results of the rules, the measures that follow from the findings, and the
standing text of the supervisor's letters (`phrases.py`), as far as it belongs to these findings.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from xbrl.answers import phrases
from xbrl.answers.answer_reader import Claim
from xbrl.answers.demanded_measures import find_terms
from xbrl.answers.letters import find_dates
from xbrl.corpus.examples import EARLIER_CELLS
from xbrl.desk.engine import Examination
from xbrl.desk.profiles import Profile
from xbrl.desk.worded import find_periods, find_worded
from xbrl.read.render import Addressee, cell_name, format_fact
from xbrl.read.report import CellKey, Fact, Report
from xbrl.rules.citations import Citation, find_citations
from xbrl.rules.measures import ORDERS, requirement_of
from xbrl.rules.quantities import find_quantities, parse_quantity
from xbrl.rules.rules import RuleResult

STANDING = "standing text of letters"
NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+|\d+")
ACT = re.compile(r"(?:\(EU\) )?(?:No )?\b(\d{3,4}/\d{2,4})(?:/[A-Z]+)?\b")
PUNCTUATION = ".,:;!?'\""
WORD = re.compile(r"[^\s()]*\d[^\s()]*")
PLACEHOLDER = re.compile(r"\{\w+\}")


@dataclass
class Support:
    """Statement -> its sources. A figure knows the cells that it belongs to; none if it belongs to no cell."""

    figures: dict[Decimal, list[tuple[str, frozenset[CellKey]]]] = field(default_factory=dict)
    dates: dict[str, str] = field(default_factory=dict)
    articles: list[tuple[Citation, str]] = field(default_factory=list)
    days: dict[int, str] = field(default_factory=dict)
    numbers: dict[Decimal, str] = field(default_factory=dict)  # bare whole numbers
    acts: set[str] = field(default_factory=lambda: {"575/2013", "2013/36"})  # CRR and CRD
    cells: set[CellKey] = field(default_factory=set)
    tables: set[str] = field(default_factory=set)
    results: list[RuleResult] = field(default_factory=list)
    words: set[str] = field(default_factory=set)  # with digits: names of clients, texts of notes

    def add_figure(self, value: object, source: str, cells: Iterable[CellKey] = ()) -> None:
        """A number as a source states it."""
        if isinstance(value, Decimal) and value.is_finite():
            self.figures.setdefault(value.normalize() + 0, []).append((source, frozenset(cells)))

    def add_text(self, text: str, source: str) -> None:
        """Everything that a text states."""
        for _, number in find_quantities(text):
            self.add_figure(number, source)
        for _, date in find_dates(text):
            self.dates.setdefault(date, source)
        for citation in find_citations(text):
            self.articles.append((citation, source))
        for _, days in find_terms(text):
            for one in days:
                self.days.setdefault(one, source)
        for match in NUMBER.finditer(text):
            self.numbers.setdefault(Decimal(match[0].replace(",", "")), source)
        for _, number, is_count in find_worded(text):
            if number is not None and is_count:
                self.numbers.setdefault(number, source)
        for _, days in find_periods(text):
            self.days.setdefault(days, source)
        self.acts |= {match[1] for match in ACT.finditer(text)}
        self.words |= {
            match[0].strip(PUNCTUATION) for match in WORD.finditer(text) if not match[0].strip(PUNCTUATION).isdigit()
        }

    def add_all(self, other: "Support") -> None:
        """Everything that another one has."""
        for value, sources in other.figures.items():
            self.figures.setdefault(value, []).extend(sources)
        self.articles += other.articles
        self.dates = other.dates | self.dates
        self.days = other.days | self.days
        self.numbers = other.numbers | self.numbers
        self.acts |= other.acts
        self.words |= other.words


def support_for(
    report: Report,
    bank: Addressee,
    engine: Examination,
    earlier: Sequence[Report],
    profile: Profile,
    open_claims: Sequence[Claim] = (),
) -> Support:
    """Everything that a letter on a report may state.

    `open_claims` are findings of the model that no rule decides: their figures count as stated by the model.
    """
    support = Support()
    for count in _counts(engine):
        support.numbers.setdefault(Decimal(count), "a count of findings, exposures or templates")
    lifted = engine.context.lifted
    support.results += [*engine.violated, *lifted, *engine.of_state("triggered", "ok"), *map(_as_result, open_claims)]
    for result in (*engine.violated, *lifted, *engine.of_state("triggered", "ok")):
        _add_result(support, result)
    support.tables |= set(engine.context.templates)
    for claim in open_claims:
        _add_claim(support, claim)
    for fact in report.facts:
        _add_fact(support, fact)
    support.dates.setdefault(report.period, "the reference date")
    for note in report.notes:
        support.add_text(note.text, "a note of the bank")
    for old in earlier:
        support.dates.setdefault(old.period, "an earlier report")
        for fact in old.facts:
            if fact.cell in EARLIER_CELLS:
                _add_fact(support, fact, f"the report of {old.period}, ")
    for name in (bank.name, report.entity):
        support.add_text(name, "the name of the bank")
    provisional = [*engine.violated, *map(_as_result, open_claims)]
    for measure in profile.measures(provisional, engine.context):
        support.days.setdefault(measure["deadline_days"], f"the measure on {measure['subject']}")
    support.add_all(_standing(frozenset(_excluded(provisional, engine))))
    return support


def _add_result(support: Support, result: RuleResult) -> None:
    cells = {figure.cell for figure in result.inputs} | {result.cell}
    cells |= {part.cell for figure in result.inputs for part in figure.parts}
    value, limit = result.value, result.limit
    if value is not None and limit is not None:
        support.add_figure(value, f"{result.rule_id}, value", cells)
        support.add_figure(limit, f"{result.rule_id}, limit", cells)
        support.add_figure(abs(value - limit), f"{result.rule_id}, difference", cells)
        if isinstance(result.decimals, int):
            for number in (value, limit, abs(value - limit)):
                if number.adjusted() + result.decimals < 27:
                    support.add_figure(round(number, result.decimals), f"{result.rule_id}, rounded", cells)
    support.cells |= cells
    support.acts |= {match[1] for match in ACT.finditer(result.legal)}
    support.words |= {word.strip(PUNCTUATION + "()") for word in result.legal.split() if "(" in word}
    for citation in find_citations(result.legal):
        support.articles.append((citation, result.rule_id))


def _add_claim(support: Support, claim: Claim) -> None:
    source = f"{claim.rule}, which no rule decides"
    support.add_figure(claim.value, source)
    support.add_figure(claim.limit, source)
    if isinstance(claim.value, Decimal) and isinstance(claim.limit, Decimal):
        support.add_figure(abs(claim.value - claim.limit), source)
    for act, number in claim.legal:
        support.articles += [(citation, source) for citation in find_citations(f"{act} Art. {number}")]


def _add_fact(support: Support, fact: Fact, prefix: str = "") -> None:
    if not isinstance(fact.value, Decimal):
        if fact.value is not None:
            support.add_text(str(fact.value)[:1000], f"{prefix}{_name(fact)}")
        return
    cells = () if fact.cell is None else (fact.cell, *fact.other_cells)
    support.cells |= set(cells)
    support.words |= {word for key in fact.keys.values() for word in (key, *key.split())}
    support.add_figure(fact.value, f"{prefix}{_name(fact)}", cells)
    support.add_figure(parse_quantity(format_fact(fact)), f"{prefix}{_name(fact)}", cells)
    for key in fact.keys.values():  # the name of a client may be a number
        for match in NUMBER.finditer(key):
            support.numbers.setdefault(Decimal(match[0].replace(",", "")), _name(fact))
    if fact.value == fact.value.to_integral_value():
        support.numbers.setdefault(fact.value.normalize() + 0, f"{prefix}{_name(fact)}")


def _name(fact: Fact) -> str:
    return cell_name(fact.cell, " ".join(fact.keys.values())) if fact.cell else fact.concept


def _as_result(claim: Claim) -> RuleResult:
    """A finding of the model as a result, for the measures that would follow from it."""
    value, limit = (number if isinstance(number, Decimal) else None for number in (claim.value, claim.limit))
    return RuleResult(
        rule_id=claim.rule,
        kind="note",
        state="violated",
        cell=("", "", ""),
        value=value,
        limit=limit,
        relation=claim.relation,
        legal="",
        unit=None,
        decimals=None,
    )


def _counts(engine: Examination) -> Iterator[int]:
    yield len(engine.violated)
    yield len(engine.context.templates)
    by_rule: dict[str, int] = {}
    for result in engine.of_state("triggered"):
        by_rule[result.rule_id] = by_rule.get(result.rule_id, 0) + 1
    yield from by_rule.values()


def _excluded(violated: Sequence[RuleResult], engine: Examination) -> set[str]:
    """The subjects, legal orders and rules of `phrases.py` that a letter on these findings is not about."""
    required = [requirement_of(result) for result in violated]
    subjects = {one.subject for one in required}
    orders = {one.order for one in required} or {"filing"}
    if subjects & {"capital"} or "buffer" in orders:
        subjects |= {"distributions", "leverage distributions"}
        orders |= {"buffer"}
    if "filing" in orders:
        orders |= {"repeated filing"}
    rules = {result.rule_id for result in (*violated, *engine.of_state("triggered"))}
    return _ALL_SUBJECTS - subjects | set(ORDERS) - orders | (set(phrases.TRIGGER_NOTES) - rules)


@functools.lru_cache(maxsize=256)
def _standing(excluded: frozenset[str]) -> Support:
    """What the standing sentences state that a letter may contain, without their placeholders.

    A table of `phrases.py` has sentences by subject, legal order, type of bank or rule. Those with an `excluded` one are left
    out: a letter on liquidity may not cite the article on distributions.
    """
    support = Support()
    for table in vars(phrases).values():
        groups = {"": table} if isinstance(table, tuple) else table if isinstance(table, dict) else {}
        for key, sentences in groups.items():
            parts = key if isinstance(key, tuple) else (key,)
            if excluded & {part for part in parts if isinstance(part, str)}:
                continue
            for sentence in sentences if isinstance(sentences, tuple) else (sentences,):
                if isinstance(sentence, str):
                    support.add_text(PLACEHOLDER.sub("", sentence), STANDING)
    return support


_ALL_SUBJECTS = {*phrases.POWER, *phrases.SUBJECT}
