"""The quickstart's corpus: reports with two ratios that the law limits, and one note that must be read.

A model with 135M parameters learns it in minutes on a CPU. The engine decides the ratios. Everything else follows from the note
and a figure:

- `pledged`: assets of the liquidity buffer are encumbered (Delegated Reg. (EU) 2015/61 Art. 7(2)), or they are free. If they
  are encumbered, the buffer is wrong, and the LCR without them, which the note states, may be below 100%.
- `connected`: two clients are connected (CRR Art. 4(1)(39)), or they are separate. Connected clients may together exceed 25%
  of Tier 1 (CRR Art. 395(1)).
- `waiver`: the bank need not meet the LCR (CRR Art. 8), or it has no waiver. With a waiver, a low LCR is no violation.

The notes were written by hand and stand in notes/quickstart.jsonl, in pairs of a note that applies and a note that does not.
The base model hardly adds or subtracts two-digit numbers (docs/LOG.md), so each note gives the sum or the remaining ratio
itself. A test consists of minimal pairs: the two reports differ in words (the two notes of a pair) or in one figure, which is on
either side of a limit. Their right answers differ.
"""

import functools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from xbrl.corpus.banks import Bank, make_bank
from xbrl.corpus.note_texts import FOLDER, HandNote
from xbrl.corpus.report_figures import Figures, Filing
from xbrl.read.filed_report import Report
from xbrl.read.render import PURE, cell_name, format_figure
from xbrl.rules.findings import Finding
from xbrl.rules.note_facts import LCR, NoteFact

NOTES_FILE = FOLDER / "quickstart.jsonl"
PERIODS = ("2026-03-31", "2026-06-30", "2026-09-30", "2026-12-31")
LEVERAGE = ("C_47.00", "r0340", "c0010")
KINDS = ("pledged", "connected", "waiver")
# The kinds of notes in training, in turn. Pledged assets come less often, because they need fewer examples to be learned.
TURNS = ("pledged", "connected", "waiver", "connected", "waiver", "pledged", "connected", "waiver")
EVERY = 5  # every fifth pair of a test differs in a figure, the others differ in words
PERCENT = Decimal("0.01")
# The two texts below are part of dataset.json: changing them changes the bytes of a corpus.
HOW_MADE = (
    "xbrl/scripts/make_reports.py: invented banks file xBRL-JSON reports with a note each, written by hand "
    "(xbrl/corpus/notes/quickstart.jsonl); the examples are read from these files. The ratios are labelled by "
    "xbrl/rules/rules.jsonl; what follows from the notes stands in findings.csv."
)
LIMITS = (
    "Synthetic and small: two ratios and one short note per report, three kinds of notes. A note gives the figure that matters, "
    "so that nothing needs to be added up. Violations are far more frequent than in practice. Training repeats each note."
)


@dataclass(frozen=True)
class DrawnReport:
    """One report before it is filed: its bank, ratios and note."""

    bank: Bank
    period: str
    leverage: Decimal
    lcr: Decimal
    note: HandNote  # its text has the placeholders {a} and {b} for the clients' codes, and {figure}
    figure: Decimal  # in the note: the LCR without the assets, or the clients' share of Tier 1; 0 for a waiver
    clients: tuple[str, str]
    pair: str = ""

    @property
    def filing(self) -> Filing:
        """Return the filing: the ratios, and the note with its placeholders filled, attached to the figure that it explains."""
        figures: Figures = {LEVERAGE: self.leverage, LCR: self.lcr}
        attached, who = LCR, self.clients if self.note.kind == "connected" else ()
        if who:
            first = (self.figure * 55).to_integral_value() / 100
            attached, second_share = (("C_28.00", code, "c350") for code in who)
            figures |= {attached: first, second_share: self.figure - first}
        text = self.note.text.format(
            a=self.clients[0], b=self.clients[1], figure=format_figure(self.figure, PURE[-1], compact=True)
        )
        fact = replace(self.note.facts[0], who=who, quote=decisive_words(text))
        note = replace(self.note, text=text, facts=(fact,), states={"figure": self.figure})
        return Filing(self.bank, self.period, figures, note=note, attached=(attached,), pair=self.pair)


def decisive_words(note: str) -> str:
    """Return the words that show whether a note applies: the text before the semicolon, after which its figure stands."""
    return note.partition(";")[0].rstrip(".")


@functools.cache
def short_notes(kind: str, split: str) -> tuple[tuple[HandNote, HandNote], ...]:
    """Read the pairs of notes of a kind: (the note that applies, the note that does not)."""
    sides: dict[bool, list[HandNote]] = {True: [], False: []}
    for row in map(json.loads, NOTES_FILE.read_text(encoding="utf-8").splitlines()):
        if (row["kind"], row["split"]) == (kind, split):
            name, fact = f"{row['pair']}-{'applies' if row['applies'] else 'not'}", NoteFact(kind, row["applies"], None)
            sides[fact.applies].append(HandNote(name, "en", "", row["text"], (fact,), row["pair"]))
    return tuple(zip(sides[True], sides[False], strict=True))


def draw_reports(seed: int, split: str, first_bank: int, count: int) -> list[DrawnReport]:
    """Draw the reports of one split, each from a different bank. A test consists of minimal pairs; a pair is from one bank."""
    rng = random.Random(f"quickstart {seed} {split}")
    if split == "test":
        return [report for index in range(count // 2) for report in _draw_pair(rng, seed, first_bank + index, index)]
    turns = {kind: _in_turn(rng, [note for pair in short_notes(kind, split) for note in pair]) for kind in KINDS}
    return [_draw(rng, seed, first_bank + i, next(turns[TURNS[i % len(TURNS)]])) for i in range(count)]


def _in_turn(rng: random.Random, notes: Sequence[HandNote]) -> Iterator[HandNote]:
    """Yield every note once in a random order, then again in a new order, without end."""
    while True:
        yield from rng.sample(notes, len(notes))


def _draw(rng: random.Random, seed: int, index: int, note: HandNote) -> DrawnReport:
    lcr_is_low = rng.random() < (0.6 if note.kind == "waiver" else 0.25)
    return DrawnReport(
        bank=make_bank(seed, index),
        period=rng.choice(PERIODS),
        leverage=Decimal(_draw_ratio(rng, rng.random() < 0.25, 30, 60)) / 1000,
        lcr=Decimal(rng.randint(112, 180)) / 100 if note.kind == "pledged" else _draw_lcr(rng, lcr_is_low),
        note=note,
        figure=_draw_figure(rng, note.kind, rng.random() < 0.6),
        clients=(f"A{rng.randint(10, 99)}", f"B{rng.randint(10, 99)}"),
    )


def _draw_pair(rng: random.Random, seed: int, index: int, number: int) -> tuple[DrawnReport, DrawnReport]:
    """Draw two quarters of a bank whose violations differ because the words of the note or one figure differ."""
    if number % EVERY < EVERY - 1:
        report, opposite = _draw_of_pair(rng, seed, index, number - number // EVERY)
        report = replace(report, pair=f"{number + 1} in words")
        return report, replace(report, note=opposite, period=PERIODS[1])
    turn = number // EVERY
    report, opposite = _draw_of_pair(rng, seed, index, turn)
    report, kind, lap = replace(report, pair=f"{number + 1} in figures"), report.note.kind, turn // len(KINDS)
    if kind != "waiver" and lap % 4 == 1:  # the note applies, and its figure crosses the limit
        within = rng.randint(100, 109) if kind == "pledged" else rng.randint(21, 25)
        beyond = within - 10 if kind == "pledged" else rng.randint(26, 29)
        return replace(report, figure=within * PERCENT), replace(report, figure=beyond * PERCENT, period=PERIODS[1])
    if kind == "waiver" and lap % 2 == 1:  # there is no waiver, and the LCR crosses its limit
        report = replace(report, note=opposite, lcr=rng.randint(100, 109) * PERCENT)
        return report, replace(report, lcr=report.lcr - 10 * PERCENT, period=PERIODS[1])
    # The figure of the note, or the LCR, is beyond the limit, but nothing follows from that. The leverage ratio crosses its limit.
    report = replace(
        report, note=report.note if kind == "waiver" else opposite, leverage=Decimal(rng.randint(30, 39)) / 1000
    )
    return report, replace(report, leverage=report.leverage - PERCENT, period=PERIODS[1])


def _draw_of_pair(rng: random.Random, seed: int, index: int, turn: int) -> tuple[DrawnReport, HandNote]:
    """Return (a report whose note applies, mostly to a figure beyond the limit; the opposite note). Pairs of notes come in turn."""
    kind = KINDS[turn % len(KINDS)]
    pairs = short_notes(kind, "test")
    applying, opposite = pairs[turn // len(KINDS) % len(pairs)]
    report = replace(_draw(rng, seed, index, applying), period=PERIODS[0])
    if kind == "waiver":
        return replace(report, lcr=_draw_lcr(rng, is_low=True)), opposite
    is_within = kind == "pledged" and turn // len(KINDS) % 3 == 2  # the buffer is wrong, but the LCR is still met
    return replace(report, figure=_draw_figure(rng, kind, missed=not is_within)), opposite


def _draw_ratio(rng: random.Random, is_low: bool, limit: int, most: int) -> int:
    """Draw a ratio in steps: one of the ten below the limit if `is_low`, else from the limit on.

    Half of the sound ratios are among the first ten steps from the limit on, the others reach up to `most`.
    """
    if is_low:
        return rng.randint(limit - 10, limit - 1)
    return rng.randint(limit, limit + 9) if rng.random() < 0.5 else rng.randint(limit + 10, most)


def _draw_lcr(rng: random.Random, is_low: bool) -> Decimal:
    return Decimal(_draw_ratio(rng, is_low, 100, 180)) / 100


def _draw_figure(rng: random.Random, kind: str, missed: bool) -> Decimal:
    """Draw the figure of a note.

    An LCR is 90% to 99% if the limit is missed, else 100% to 109%. Shares of clients are mostly 21% to 29%, so that the second
    digit decides.
    """
    if kind == "pledged":
        return Decimal(rng.randint(90, 99) + (0 if missed else 10)) / 100
    if kind == "waiver":
        return Decimal(0)
    near = rng.random() < 0.85
    low, high = ((26, 29) if near else (30, 34)) if missed else ((21, 25) if near else (17, 20))
    return Decimal(rng.randint(low, high)) / 100


def stated_findings(report: Report, note: HandNote) -> list[Finding]:
    """Return a finding if the note states that the LCR without pledged assets is below 100%. No figure of the report shows it."""
    figure, entity = note.states.get("figure", Decimal(1)), report.entity.partition(".")[0]
    return [
        Finding(entity, report.period, "LCR_PLEDGED", "violated", cell_name(LCR), figure, Decimal(1), kind="pledged")
        for fact in note.facts
        if fact.kind == "pledged" and fact.applies and figure < 1
    ]
