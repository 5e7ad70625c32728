"""The notes written by hand: complete, consistent, and different in each split."""

import json
import re
from collections import Counter
from decimal import Decimal

import pytest

from xbrl.answers.answer_reader import read_fact
from xbrl.answers.answers import write_fact
from xbrl.corpus.card import SPLITS
from xbrl.corpus.note_texts import FOLDER, GROUP, hand_notes, parse_note
from xbrl.rules.note_facts import KINDS

LEAST = {"train": 600, "validation": 70, "test": 240}
STATED = {"buffer", "buffer_least", "outflow", "cet1", "cet1_least", "profit"}
STATED |= {"lcr", "lcr_least", "lcr_most", "nsfr", "leverage"}


@pytest.mark.parametrize("split", SPLITS)
def test_note_proves_its_facts_in_its_words(split):
    notes = hand_notes(split)
    assert len(notes) >= LEAST[split] and len({note.id for note in notes}) == len(notes)
    for note in notes:
        assert note.id.startswith(f"{split}-") and note.text.isprintable() and 40 <= len(note.text.split()) <= 200
        assert re.fullmatch(r"202[56]-(03-31|06-30|09-30|12-31)", note.period) and note.language in ("en", "de")
        assert sum(fact.applies for fact in note.facts) <= 1
        for fact in note.facts:
            assert fact.kind in KINDS and fact.quote in note.text, note.id
            assert all(name in note.text for name in fact.who), note.id
            assert len(fact.who) == 2 or fact.kind != "connected"
            assert fact.amount or not fact.applies or fact.kind in ("connected", "waiver"), note.id
            assert read_fact(write_fact(fact)) == fact, note.id
    counts = Counter((fact.kind, fact.applies) for note in notes for fact in note.facts)
    for kind in KINDS:  # both truths are about as frequent
        assert 0.3 < counts[kind, True] / (counts[kind, True] + counts[kind, False]) < 0.7, kind


def test_splits_share_no_text_and_test_has_pairs():
    texts = [note.text for split in SPLITS for note in hand_notes(split)]
    assert len(set(texts)) == len(texts)
    by_id = {note.id: note for note in hand_notes("test")}
    paired = [note for note in by_id.values() if note.pair]
    assert len(paired) == 160 and all(by_id[note.pair].pair == note.id for note in paired)
    # The two notes of a pair state different facts.
    assert all(note.facts != by_id[note.pair].facts for note in paired)


def test_stated_figures_stand_in_the_text():
    rows = [json.loads(line) for split in SPLITS for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]
    stating = [row for row in rows if "states" in row]
    assert len(stating) > 250
    for row in stating:
        states = dict(row["states"])
        for name, amount in states.pop("exposures", {}).items():
            assert all(part in row["text"] for part in name.split(GROUP)), row["id"]
            assert amount is None or amount >= 900_000
        assert set(states) <= STATED, row["id"]
        assert all(0.3 < value < 2 for key, value in states.items() if key.startswith(("lcr", "nsfr"))), row["id"]
        assert all(value >= 2_000_000 for key, value in states.items() if key.startswith(("buffer", "cet1"))), row["id"]


def test_a_note_is_read_from_its_line():
    (line,) = [line for line in (FOLDER / "train.jsonl").read_text().splitlines() if '"train-a-042"' in line]
    note = parse_note(line)
    assert note.kind == "connected" and note.kinds == {"connected"} and note.amount({"pledged"}) is None
    assert note.clients == {
        "Bjarke Rederi + Nordsund Ferries": Decimal(58_000_000),  # one group, one row
        "Vesterdal Wind One": Decimal(30_000_000),
        "Vesterdal Wind Two": Decimal(30_000_000),
    }
    assert note.connected == ("Vesterdal Wind One", "Vesterdal Wind Two")
    (first,) = [note for note in hand_notes("train") if note.id == "train-a-001"]
    assert (first.states, first.amount({"pledged"})) == ({"buffer": 310_000_000}, 42_000_000)
    assert first.cells() == [("C_76.00.a", "r0010", "c0010")]
    assert {note.kind for note in hand_notes("test")} == {*KINDS, "nothing"}


def test_second_reader_agrees_on_facts_that_apply() -> None:
    """The second reader did not see the first reader's labels. Both agree on all facts that apply and their amounts.

    In nine of 94 notes they differ in the facts that do not apply.
    """
    first = {note.id: note.facts for split in SPLITS for note in hand_notes(split)}
    rows = [json.loads(line) for line in (FOLDER / "second_reading.jsonl").read_text().splitlines()]
    amounts, truths = [], []
    for row in rows:
        facts, matters = first[row["id"]], row["matters"]
        applying = {(fact["kind"], fact["amount"] and Decimal(fact["amount"])) for fact in matters if fact["applies"]}
        amounts.append(applying == {(fact.kind, fact.amount) for fact in facts if fact.applies})
        kinds = sorted((fact["kind"], fact["applies"]) for fact in matters)
        truths.append(kinds == sorted((fact.kind, fact.applies) for fact in facts))
    assert (sum(amounts), sum(truths), sum(bool(row["doubt"]) for row in rows)) == (94, 85, 5)
    assert sum(map(len, map(hand_notes, SPLITS))) / 10 <= len(rows) == 94
