"""The quickstart's corpus: reports with two ratios that the law limits, and one note that must be read.

A model with 135M parameters learns it in minutes on a CPU. The engine decides the ratios. The note decides the rest,
together with a figure:

- `pledged`: assets of the liquidity buffer are encumbered (Delegated Reg. (EU) 2015/61 Art. 7(2)), so that the buffer is
  wrong, and the LCR without them, which the note states, may be below 100%; or they are free.
- `connected`: two clients are connected (CRR Art. 4(1)(39)), and together they may exceed 25% of Tier 1 (CRR Art. 395(1));
  or they are separate.
- `waiver`: the bank need not meet the LCR (CRR Art. 8), so that a low LCR is no violation; or it has no waiver.

The notes were written by hand and stand in notes/quickstart.jsonl, in pairs of a note that applies and one that does not.
The base model hardly adds or subtracts two-digit numbers (docs/LOG.md), so each note gives the sum or the remaining ratio
itself. A test consists of minimal pairs, in words (the notes of a pair) or in figures (one figure across a limit). The right
answers of the two members differ.
"""

import functools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from xbrl.answers.answers import SUBJECTS, Check
from xbrl.answers.checks import compared, percent, short_legal
from xbrl.corpus.banks import Bank, make_bank
from xbrl.corpus.note_texts import FOLDER, HandNote
from xbrl.corpus.report_figures import Figures, Filing
from xbrl.read.filed_report import Report
from xbrl.read.render import cell_name
from xbrl.rules.findings import Finding, note_rules
from xbrl.rules.note_facts import LARGEST_SHARE, LCR, SHARE, NoteFact
from xbrl.rules.rules import built_in_rules

NOTES_FILE = FOLDER / "quickstart.jsonl"
RULES = tuple(rule for rule in built_in_rules() if rule.id in ("LR_MIN", "LCR_MIN"))
CELLS = frozenset(cell for rule in RULES for cell in rule.cells) | {SHARE}
PERIODS = ("2026-03-31", "2026-06-30", "2026-09-30", "2026-12-31")
LEVERAGE = ("C_47.00", "r0340", "c0010")
KINDS = tuple(SUBJECTS)
# The kinds in training, in turn: pledged assets are learned from fewer examples than the others.
TURNS = ("pledged", "connected", "waiver", "connected", "waiver", "pledged", "connected", "waiver")
EVERY = 5  # of so many pairs of a test, the last one is a pair in figures
PERCENT = Decimal("0.01")
# The two texts below are part of dataset.json: changing them changes the bytes of a corpus.
HOW_MADE = (
    "scripts/make_reports.py: invented banks file xBRL-JSON reports with a note each, written by hand "
    "(xbrl/corpus/notes/quickstart.jsonl); the examples are read from these files. The ratios are labelled by "
    "xbrl/rules/rules.jsonl; what follows from the notes stands in findings.csv."
)
LIMITS = (
    "Synthetic and small: two ratios and one short note per report, three kinds of notes. A note gives the figure that matters, "
    "so that nothing needs to be added up. Violations are far more frequent than in practice. Training repeats each note."
)


@dataclass(frozen=True)
class Case:
    """What is drawn of one report: its ratios and its note."""

    bank: Bank
    period: str
    leverage: Decimal
    lcr: Decimal
    note: HandNote  # as it was written, with the placeholders {a} and {b} for the clients' codes, and {figure}
    figure: Decimal  # of the note: the LCR without the assets, or the clients' share of Tier 1; 0 for a waiver
    clients: tuple[str, str]
    pair: str = ""

    @property
    def filing(self) -> Filing:
        """What the bank files: the ratios, and its note, attached to the figure that it explains."""
        figures: Figures = {LEVERAGE: self.leverage, LCR: self.lcr}
        attached, who = LCR, self.clients if self.note.kind == "connected" else ()
        if who:
            first = (self.figure * 55).to_integral_value() / 100
            attached, other = (("C_28.00", code, "c350") for code in who)
            figures |= {attached: first, other: self.figure - first}
        text = self.note.text.format(a=self.clients[0], b=self.clients[1], figure=percent(self.figure))
        fact = replace(self.note.facts[0], who=who, quote=decisive_words(text))
        note = replace(self.note, text=text, facts=(fact,), states={"figure": self.figure})
        return Filing(self.bank, self.period, figures, note=note, attached=(attached,), pair=self.pair)


def decisive_words(note: str) -> str:
    """The words of a note that say whether it applies: what comes before its figure."""
    return note.partition(";")[0].rstrip(".")


@functools.cache
def short_notes(kind: str, split: str) -> tuple[tuple[HandNote, HandNote], ...]:
    """The pairs of notes of a kind: the one that applies, and the one that does not."""
    sides: dict[bool, list[HandNote]] = {True: [], False: []}
    for row in map(json.loads, NOTES_FILE.read_text(encoding="utf-8").splitlines()):
        if (row["kind"], row["split"]) == (kind, split):
            name, fact = f"{row['pair']}-{'applies' if row['applies'] else 'not'}", NoteFact(kind, row["applies"], None)
            sides[fact.applies].append(HandNote(name, "en", "", row["text"], (fact,), row["pair"]))
    return tuple(zip(sides[True], sides[False], strict=True))


def draw_cases(seed: int, split: str, first_bank: int, count: int) -> list[Case]:
    """The reports of one split; each has a bank of its own. A test consists of minimal pairs, of one bank each."""
    rng = random.Random(f"quickstart {seed} {split}")
    if split == "test":
        return [case for index in range(count // 2) for case in _draw_pair(rng, seed, first_bank + index, index)]
    turns = {kind: _in_turn(rng, [note for pair in short_notes(kind, split) for note in pair]) for kind in KINDS}
    return [_draw(rng, seed, first_bank + i, next(turns[TURNS[i % len(TURNS)]])) for i in range(count)]


def _in_turn(rng: random.Random, notes: Sequence[HandNote]) -> Iterator[HandNote]:
    """Every note once, in a random order, then again in another one."""
    while True:
        yield from rng.sample(notes, len(notes))


def _draw(rng: random.Random, seed: int, index: int, note: HandNote) -> Case:
    lcr_is_low = rng.random() < (0.6 if note.kind == "waiver" else 0.25)
    return Case(
        bank=make_bank(seed, index),
        period=rng.choice(PERIODS),
        leverage=Decimal(_draw_ratio(rng, rng.random() < 0.25, 30, 60)) / 1000,
        lcr=Decimal(rng.randint(112, 180)) / 100 if note.kind == "pledged" else _draw_lcr(rng, lcr_is_low),
        note=note,
        figure=_draw_figure(rng, note.kind, rng.random() < 0.6),
        clients=(f"A{rng.randint(10, 99)}", f"B{rng.randint(10, 99)}"),
    )


def _draw_pair(rng: random.Random, seed: int, index: int, number: int) -> tuple[Case, Case]:
    """Two quarters of a bank that differ in the words of the note, or in one figure, and in their violations."""
    if number % EVERY < EVERY - 1:
        case, opposite = _draw_of_pair(rng, seed, index, number - number // EVERY)
        case = replace(case, pair=f"{number + 1} in words")
        return case, replace(case, note=opposite, period=PERIODS[1])
    turn = number // EVERY
    case, opposite = _draw_of_pair(rng, seed, index, turn)
    case, kind, lap = replace(case, pair=f"{number + 1} in figures"), case.note.kind, turn // len(KINDS)
    if kind != "waiver" and lap % 4 == 1:  # the note applies, and its figure crosses the limit
        within = rng.randint(100, 109) if kind == "pledged" else rng.randint(21, 25)
        beyond = within - 10 if kind == "pledged" else rng.randint(26, 29)
        return replace(case, figure=within * PERCENT), replace(case, figure=beyond * PERCENT, period=PERIODS[1])
    if kind == "waiver" and lap % 2 == 1:  # there is no waiver, and the LCR crosses its limit
        case = replace(case, note=opposite, lcr=rng.randint(100, 109) * PERCENT)
        return case, replace(case, lcr=case.lcr - 10 * PERCENT, period=PERIODS[1])
    # Nothing follows from the note, although its figure, or the LCR, is beyond the limit: the leverage ratio crosses its own.
    case = replace(case, note=case.note if kind == "waiver" else opposite, leverage=Decimal(rng.randint(30, 39)) / 1000)
    return case, replace(case, leverage=case.leverage - PERCENT, period=PERIODS[1])


def _draw_of_pair(rng: random.Random, seed: int, index: int, turn: int) -> tuple[Case, HandNote]:
    """(a report whose note applies to a figure beyond the limit, the opposite of its note). Pairs of notes come in turn."""
    kind = KINDS[turn % len(KINDS)]
    pairs = short_notes(kind, "test")
    applying, opposite = pairs[turn // len(KINDS) % len(pairs)]
    case = replace(_draw(rng, seed, index, applying), period=PERIODS[0])
    if kind == "waiver":
        return replace(case, lcr=_draw_lcr(rng, is_low=True)), opposite
    is_within = kind == "pledged" and turn // len(KINDS) % 3 == 2  # the buffer is wrong, and the LCR still met
    return replace(case, figure=_draw_figure(rng, kind, missed=not is_within)), opposite


def _draw_ratio(rng: random.Random, is_low: bool, limit: int, most: int) -> int:
    """A ratio in steps, a decade of them below the limit, or a decade from it on, or (half of the sound ones) up to `most`."""
    if is_low:
        return rng.randint(limit - 10, limit - 1)
    return rng.randint(limit, limit + 9) if rng.random() < 0.5 else rng.randint(limit + 10, most)


def _draw_lcr(rng: random.Random, is_low: bool) -> Decimal:
    return Decimal(_draw_ratio(rng, is_low, 100, 180)) / 100


def _draw_figure(rng: random.Random, kind: str, missed: bool) -> Decimal:
    """The figure of a note: 90% to 99% or 100% to 109%; of clients mostly 21% to 29%, where the second digit decides."""
    if kind == "pledged":
        return Decimal(rng.randint(90, 99) + (0 if missed else 10)) / 100
    if kind == "waiver":
        return Decimal(0)
    near = rng.random() < 0.85
    low, high = ((26, 29) if near else (30, 34)) if missed else ((21, 25) if near else (17, 20))
    return Decimal(rng.randint(low, high)) / 100


def stated_findings(report: Report, note: HandNote) -> list[Finding]:
    """What a short note alone decides: the LCR without pledged assets, which it states, if that is too low."""
    figure, entity = note.states.get("figure", Decimal(1)), report.entity.partition(".")[0]
    return [
        Finding(entity, report.period, "LCR_PLEDGED", "violated", cell_name(LCR), figure, Decimal(1), kind="pledged")
        for fact in note.facts
        if fact.kind == "pledged" and fact.applies and figure < 1
    ]


def note_checks(note: HandNote) -> list[Check]:
    """The lines on a note. The first one repeats the words that decide, so that the model reads them before it judges."""
    (fact,), figure = note.facts, note.states["figure"]
    stated = f"{fact.quote}, so {SUBJECTS[fact.kind][not fact.applies]}"
    if not fact.applies:
        return [Check(stated)]
    if fact.kind == "waiver":
        return [Check(stated, verdict="lifts LCR_MIN", legal="CRR Art. 8")]
    if fact.kind == "connected":
        return [compared(stated, figure, LARGEST_SHARE, "LE_CONNECTED")]
    counted = Check(stated, verdict="PLEDGED_COUNTED", legal=short_legal(note_rules()["PLEDGED_COUNTED"].legal))
    return [counted, compared("LCR without them", figure, Decimal(1), "LCR_PLEDGED")]
