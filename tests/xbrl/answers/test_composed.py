"""The composed baseline: figures of both styles, amounts and clients of notes, its regressions, and the rules that follow."""

import random
from decimal import Decimal

import numpy as np
import pytest

from xbrl.answers.composed import amounts_in, clients_in, note_predictions, printed_report, rules_that_follow
from xbrl.answers.note_scores import note_of
from xbrl.read.render import SHORT_LABELS
from xbrl.rules.note_facts import NoteFact

LONG = """Nordbank (X.CON) | reference date 2026-03-31 | amounts in EUR
C 01.00 Own funds
r0020 c0010 CET1 CAPITAL | 900000 thousand
C 27.00 Identification of the counterparty
K-01 LEI
c021 Name | Arno AG
K-02 LEI
c021 Name | Bern & Co
C 28.00 Exposures
K-01
c350 % of Tier 1 capital | 14.25%
K-02
c350 % of Tier 1 capital | 12%
C 76.00.a Liquidity Coverage
r0010 c0010 LIQUIDITY BUFFER | 1050000 thousand
r0020 c0010 NET LIQUIDTY OUTFLOW | 1000000 thousand
r0030 c0010 LIQUIDITY COVERAGE RATIO (%) | 105.0000%
note on C 76.00.a r0010 c0010 | Bonds of EUR 65.2 million are pledged."""
SHORT = "Nordbank\nLiquidity buffer 1.05 bn\nNet outflow 1 bn\nLCR 105%\nClient Arno AG 14.25%\nClient Bern & Co 12%\nNote: Bonds."


@pytest.mark.parametrize("text", [LONG, SHORT])
def test_the_figures_of_both_styles(text):
    figures = {
        (SHORT_LABELS[fact.cell], *fact.keys.values()): fact.value
        for fact in printed_report(text).facts
        if fact.cell in SHORT_LABELS
    }
    assert figures["Liquidity buffer",] == 1_050_000_000 and figures["LCR",] == Decimal("1.05")
    shares = sorted(value for (label, *_), value in figures.items() if label == "Client")
    assert shares == [Decimal("0.12"), Decimal("0.1425")]


def rules(text, *facts, note="", engine=()):
    return rules_that_follow(printed_report(text), note, facts, engine)


def test_what_follows_is_arithmetic_on_printed_figures():
    pledged = NoteFact("pledged", True, Decimal("65200000"))
    assert rules(LONG, pledged) == rules(SHORT, pledged) == ["PLEDGED_COUNTED", "LCR_PLEDGED"]
    assert rules(LONG, NoteFact("pledged", True, Decimal("50000000"))) == ["PLEDGED_COUNTED"]  # exactly 100% is left
    assert rules(LONG, NoteFact("pledged", False, Decimal("65200000")), engine=["LCR_MIN"]) == ["LCR_MIN"]
    assert rules(LONG, NoteFact("connected", True, None, ("Arno AG", "Bern & Co"))) == ["LE_CONNECTED"]  # 26.25%
    assert rules(SHORT, NoteFact("waiver", True, None), engine=["LCR_MIN", "LR_MIN"]) == ["LR_MIN"]
    assert rules(SHORT, NoteFact("profit", True, Decimal(5000000))) == ["PROFIT_COUNTED"]  # CET1 is not printed


def test_note_states_ratio_if_no_buffer_is_printed():
    quickstart, fact = "Nordbank\nLCR 105%", NoteFact("pledged", True, None)
    both = ["PLEDGED_COUNTED", "LCR_PLEDGED"]
    assert rules(quickstart, fact, note="Bonds are pledged; without them LCR 99%.") == both
    assert rules(quickstart, fact, note="Bonds are pledged; without them LCR 100%.") == ["PLEDGED_COUNTED"]
    assert rules(SHORT, fact, note="We own 74% of it.") == ["PLEDGED_COUNTED"]  # a share is no LCR


@pytest.mark.parametrize(
    ("note", "amounts"),
    [
        ("a loan of EUR 12 million and bonds of EUR 4,500,000 at the bank", [12_000_000, 4_500_000]),
        ("the 42 million in all, of which 1.25bn is not", [42_000_000, 1_250_000_000]),
        ("Die Bank hat 14,5 Mio. EUR und 1.250.000 EUR verpfändet", [14_500_000, 1_250_000]),
        ("in 2025 there were 61,000 shares and 12 banks", []),
    ],
)
def test_amounts_in_english_and_german(note, amounts):
    assert [value for value, _ in amounts_in(note)] == amounts


def test_clients_are_in_the_order_of_the_note():
    assert clients_in("bern & co belongs to Arno AG", printed_report(LONG)) == ("Bern & Co", "Arno AG")
    assert clients_in("K-02 and K-07", printed_report(LONG)) == ("K-02",)


def examples(seed, number):
    """Return examples with notes on bonds that are lent (applies) or returned, after a loan's amount, and on a waiver."""
    rng, found = random.Random(seed), []
    for i in range(number):
        kind, applies, amount = rng.choice(["pledged", "waiver"]), rng.random() < 0.5, rng.randint(40, 90)
        if kind == "pledged":
            state, engine, lcr = "still out" if applies else "back again", [], "105"
            note = f"Against a loan of {rng.randint(2, 30)} million, bonds worth {amount} million were lent and are {state}."
            true = ["PLEDGED_COUNTED", "LCR_PLEDGED"][: applies + (applies and amount > 50)]
        else:
            engine, lcr, true = ["LCR_MIN"], "95", [] if applies else ["LCR_MIN"]
            note = f"The waiver of the LCR {'holds' if applies else 'has ended'}, letter {i}."
        fact = {"kind": kind, "applies": applies, "who": [], "since": "", "quote": note}
        fact["amount"] = amount * 1_000_000 if kind == "pledged" else None
        question = f"Liquidity buffer 1.05 bn\nNet outflow 1 bn\nLCR {lcr}%\nNote: {note}"
        messages = [{"role": "user", "content": question}]
        found.append({"messages": messages, "engine": engine, "violations": true, "note_facts": [fact]})
    return found


def test_the_program_learns_kinds_states_and_amounts():
    training, test = examples(1, 80), examples(2, 40)
    found, facts = note_predictions(training, test)
    assert found == [tuple(example["violations"]) for example in test]
    # The amount of the fact, not the loan's.
    assert [entry[0].amount for entry in facts] == [example["note_facts"][0]["amount"] for example in test]
    assert (found, facts) == note_predictions(training, test)  # no randomness


def test_the_probe_reads_states_in_place_of_words():
    training, test = examples(1, 60), examples(2, 20)
    rng, states = np.random.default_rng(0), {}
    for one in (*training, *test):
        (fact,), note = one["note_facts"], note_of(one["messages"][0]["content"])
        states[note] = rng.normal(size=8) / 9 + [fact["applies"], fact["kind"] == "waiver", *[0] * 6]
    found, facts = note_predictions(training, test, training[:5], states)
    true = [(example["note_facts"][0]["kind"], example["note_facts"][0]["applies"]) for example in test]
    assert [(entry[0].kind, entry[0].applies) for entry in facts] == true
    assert found == [tuple(example["violations"]) for example in test]


def test_rules_missing_in_training_are_not_predicted():
    training, test = examples(1, 60), examples(2, 20)
    for one in training:
        one["violations"] = [rule for rule in one["violations"] if rule != "PLEDGED_COUNTED"]
    assert not any("PLEDGED_COUNTED" in rules for rules in note_predictions(training, test)[0])
    found, facts = note_predictions([{**example, "note_facts": []} for example in training], test)
    assert facts == [()] * 20 and found == [tuple(example["engine"]) for example in test]
