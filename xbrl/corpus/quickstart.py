"""The quickstart's reports: two ratios with limits of the law, and one note whose meaning no rule can read.

A model with 135M parameters learns them in minutes on a CPU. The engine decides the ratios. The note decides the rest,
together with a figure:

- `pledged`: assets of the liquidity buffer are encumbered (Delegated Reg. (EU) 2015/61 Art. 7(2)), and without them the
  LCR falls below 100%; or they are free.
- `connected`: two clients are connected (CRR Art. 4(1)(39)), and together they exceed 25% of Tier 1 (CRR Art. 395(1)); or
  they are separate.
- `waiver`: the bank need not meet the LCR (CRR Art. 8), so that a low LCR is no violation; or the waiver was not given.

The base model hardly adds or subtracts two-digit numbers (docs/LOG.md), so each note gives the sum or the remaining
ratio itself. Half of the test consists of minimal pairs in words, half of minimal pairs in figures: one
change across a legal limit. The answers of the two members differ.
"""

import random
from dataclasses import dataclass, replace
from decimal import Decimal

from xbrl.corpus.banks import Bank, make_bank
from xbrl.corpus.quickstart_notes import CONNECTED, KINDS, PLEDGED, WAIVER, NoteKind
from xbrl.read.render import cell_name, format_figure
from xbrl.read.report import CellKey, Note
from xbrl.rules.findings import Finding, note_rules

PERIODS = ("2026-03-31", "2026-06-30", "2026-09-30", "2026-12-31")
LEVERAGE, LCR, SHARE = ("C_47.00", "r0340", "c0010"), ("C_76.00.a", "r0030", "c0010"), ("C_28.00", "*", "c350")
# The kinds of the notes, in turn: pledged assets are learned from fewer examples than the others.
TURNS = (PLEDGED, CONNECTED, WAIVER, CONNECTED, WAIVER, PLEDGED, CONNECTED, WAIVER)
PERCENT = Decimal("0.01")
LIMIT = {"pledged": Decimal(1), "connected": Decimal("0.25")}  # of the note's figure


@dataclass(frozen=True)
class Case:
    """One report before it is written: its ratios, its note, and what the note means."""

    bank: Bank
    period: str
    leverage: Decimal
    lcr: Decimal
    kind: NoteKind
    frame: str
    statuses: tuple[str, str]  # the wording that makes the figure matter, and the one that does not
    applies: bool  # whether the note has the first wording
    figure: Decimal  # of the note: the LCR without the assets, or the clients' share of Tier 1; 0 for a waiver
    clients: tuple[str, str]
    pair: str = ""

    @property
    def note(self) -> Note:
        """The note, attached to the figure that it explains."""
        text = self.frame.format(
            status=self.statuses[0] if self.applies else self.statuses[1],
            figure=format_figure(self.figure, "xbrli:pure", compact=True),
            clients=" and ".join(self.clients),
        )
        cell = ("C_28.00", self.clients[0], "c350") if self.kind is CONNECTED else LCR
        return Note(text[0].upper() + text[1:], (cell,))

    @property
    def figures(self) -> dict[CellKey, Decimal | str]:
        """What the bank files. The row of a cell of the open table C 28.00 is its key."""
        ratios: dict[CellKey, Decimal | str] = {LEVERAGE: self.leverage, LCR: self.lcr}
        if self.kind is CONNECTED:
            first = (self.figure * 55).to_integral_value() / 100
            shares = (first, self.figure - first)
            ratios |= {("C_28.00", code, "c350"): share for code, share in zip(self.clients, shares, strict=True)}
        return ratios

    @property
    def finding(self) -> Finding:
        """What the note means: a line of findings.csv."""
        entity, kind = self.bank.entity, self.kind.name
        if self.kind is WAIVER:
            return Finding(
                entity, self.period, "LCR_MIN", "lifted" if self.applies else "benign", cell_name(LCR), kind=kind
            )
        limit, rule = LIMIT[kind], next(rule for rule in note_rules().values() if rule.kind == kind)
        if not self.applies:
            return Finding(entity, self.period, rule.id, "benign", kind=kind)
        missed = self.figure < limit if rule.relation == "min" else self.figure > limit
        cell = cell_name(LCR) if self.kind is PLEDGED else cell_name(SHARE, "+".join(self.clients))
        state = "violated" if missed else "benign"
        return Finding(entity, self.period, rule.id, state, cell, self.figure, limit, rule.legal, kind)


def make_cases(seed: int, split: str, first_bank: int, count: int) -> list[Case]:
    """The reports of one split; each has a bank of its own. A test consists of minimal pairs."""
    rng = random.Random(f"quickstart {seed} {split}")
    if split != "test":
        return [_draw(rng, seed, split, first_bank + index, TURNS[index % len(TURNS)]) for index in range(count)]
    return [case for index in range(count // 2) for case in _draw_pair(rng, seed, first_bank + index, index)]


def _draw(rng: random.Random, seed: int, split: str, index: int, kind: NoteKind) -> Case:
    lcr_is_low = rng.random() < (0.6 if kind is WAIVER else 0.25) and kind is not PLEDGED
    return Case(
        bank=make_bank(seed, index),
        period=rng.choice(PERIODS),
        leverage=_draw_leverage(rng, rng.random() < 0.25),
        lcr=Decimal(rng.randint(112, 180)) / 100 if kind is PLEDGED else _draw_lcr(rng, lcr_is_low),
        kind=kind,
        frame=rng.choice(kind.frames),
        statuses=rng.choice(kind.pairs[split]),
        applies=rng.random() < (0.6 if kind is CONNECTED else 0.5),
        figure=_draw_figure(rng, kind, rng.random() < (0.5 if kind is CONNECTED else 0.6)),
        clients=(f"A{rng.randint(10, 99)}", f"B{rng.randint(10, 99)}"),
    )


def _draw_pair(rng: random.Random, seed: int, index: int, number: int) -> tuple[Case, Case]:
    """Two quarters of a bank that differ in the words of the note, or in one figure, and in their violations."""
    kind = KINDS[number % 3]
    statuses = kind.pairs["test"][number // 3 % len(kind.pairs["test"])]
    case = replace(_draw(rng, seed, "test", index, kind), statuses=statuses, period=PERIODS[0], pair=f"{number + 1}")
    if number % 2 == 0:  # in words
        one = replace(case, applies=True, figure=_draw_figure(rng, kind, missed=True), pair=f"{case.pair} in words")
        one = replace(one, lcr=_draw_lcr(rng, low=True)) if kind is WAIVER else one
        other = replace(one, applies=False)
    elif kind is WAIVER:  # in the leverage ratio or the LCR
        leverage, lcr = (Decimal(rng.randint(low, low + 9)) for low in (30, 100))  # one digit above the limit
        one = replace(case, applies=False, leverage=leverage / 1000, lcr=lcr / 100, pair=f"{case.pair} in figures")
        lower = {"leverage": one.leverage - PERCENT} if number % 4 == 1 else {"lcr": one.lcr - PERCENT * 10}
        other = replace(one, **lower)
    else:  # in the figure of the note
        within = Decimal(rng.randint(100, 109) if kind is PLEDGED else rng.randint(21, 25)) / 100
        beyond = within - PERCENT * 10 if kind is PLEDGED else Decimal(rng.randint(26, 29)) / 100
        one = replace(case, applies=True, figure=within, pair=f"{case.pair} in figures")
        other = replace(one, figure=beyond)
    return one, replace(other, period=PERIODS[1])


def _draw_leverage(rng: random.Random, low: bool) -> Decimal:
    """A leverage ratio in steps of 0.1%: 2% to 2.9%, or 3% to 3.9%, or (half of the sound ones) up to 6%."""
    if low:
        return Decimal(rng.randint(20, 29)) / 1000
    return Decimal(rng.randint(30, 39) if rng.random() < 0.5 else rng.randint(40, 60)) / 1000


def _draw_lcr(rng: random.Random, low: bool) -> Decimal:
    """An LCR in steps of 1%: 90% to 99%, or 100% to 109%, or (half of the sound ones) up to 180%."""
    if low:
        return Decimal(rng.randint(90, 99)) / 100
    return Decimal(rng.randint(100, 109) if rng.random() < 0.5 else rng.randint(110, 180)) / 100


def _draw_figure(rng: random.Random, kind: NoteKind, missed: bool) -> Decimal:
    if kind is PLEDGED:
        return Decimal(rng.randint(90, 99) + (0 if missed else 10)) / 100
    if kind is CONNECTED:  # mostly between 21% and 29%, where the second digit decides
        near = rng.random() < 0.85
        low, high = ((26, 29) if near else (30, 34)) if missed else ((21, 25) if near else (17, 20))
        return Decimal(rng.randint(low, high)) / 100
    return Decimal(0)
