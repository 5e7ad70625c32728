"""Facts of notes: the line of an answer, and scores with one wrong field at a time."""

from dataclasses import asdict, replace
from decimal import Decimal

import pytest

from common.errors import UserError
from xbrl.answers.answer_reader import read_fact, read_facts
from xbrl.answers.answers import write_fact
from xbrl.answers.note_scores import is_quotation, language_of, note_of, score_notes, true_facts
from xbrl.rules.note_facts import NoteFact

NOTE = "Bonds of EUR 65.2 million lie with Landesbank Mittelrhein as margin since 14 August 2025; Mr Weiss is on leave."
QUOTE = "lie with Landesbank Mittelrhein as margin"
PLEDGED = NoteFact("pledged", True, Decimal(65200000), ("Landesbank Mittelrhein",), "2025-08-14", QUOTE)
OTHER = NoteFact("pledged", False, Decimal(9000000), (), "", "Mr Weiss is on leave")
QUOTED = NoteFact("waiver", True, None, (), "2026-02-01", 'sold on 1 February "for good" to others')
CLIENTS = NoteFact("connected", False, None, ("Arno AG", "Bern & Co"), "", "")


def example(*facts, note=NOTE, **fields):
    entries = [asdict(entry) for entry in facts]
    return {"messages": [{"role": "user", "content": f"Bank\nLCR 98%\nNote: {note}"}], "note_facts": entries, **fields}


def test_written_fact_is_read_back():
    assert all(read_fact(write_fact(fact)) == fact for fact in (PLEDGED, OTHER, CLIENTS, QUOTED))
    assert write_fact(PLEDGED) == (
        '"lie with Landesbank Mittelrhein as margin" | '
        "pledged | applies | EUR 65200000 | Landesbank Mittelrhein | 2025-08-14"
    )
    for amount, value in (("EUR 40000000", 40_000_000), ("EUR 40 million", 40_000_000), ("0", 0)):
        assert read_fact(f'"the words" | pledged | applies | {amount} | - | -').amount == value
    assert write_fact(CLIENTS) == '"" | connected | does not apply | - | Arno AG and Bern & Co | -'


@pytest.mark.parametrize(
    "line",
    [
        "pledged | applies",
        "x | gift | applies | - | - | -",
        "x | pledged | perhaps | - | - | -",
        "x | pledged | applies | - | - | May",
        *(
            f"x | pledged | applies | {amount} | - | -"
            for amount in ("much", "USD 40000000", "40000000 CHF", "$40000000", "EUR -40000000", "40%", "EUR NaN")
        ),
    ],
)
def test_a_line_of_another_form_is_void(line):
    assert read_fact(line) is None and read_facts(f"Note:\n{line}\nViolations:\nnone") == ([], 1)


def test_the_section_of_an_answer():
    assert read_facts(f"Note:\n{write_fact(PLEDGED)}\nViolations:\n{write_fact(OTHER)}") == ([PLEDGED], 0)
    assert read_facts(f"Sure.\n**Note:**\n- {write_fact(PLEDGED)}\n") == ([PLEDGED], 0)
    assert read_facts("Note: none\nViolations:\nnone") == read_facts("Note:\nnone.\n") == ([], 0)
    assert read_facts("Violations:\nnone\nDirective:\nNote that nothing follows.") is None


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, set()),
        ({"applies": False}, {"applies"}),
        ({"amount": Decimal(65000000)}, {"amount"}),
        ({"amount": None}, {"amount"}),
        ({"who": ("LANDESBANK  Mittelrhein.",)}, set()),
        ({"who": ()}, {"who"}),
        ({"since": "2025-08-15"}, {"since"}),
        ({"quote": "with Landesbank Mittelrhein as margin since 14 August"}, set()),  # most of its words
        ({"quote": "lie with Landesbank Mittelrhein as collateral"}, {"quote"}),  # not in the note
        ({"quote": "Mr Weiss is on leave"}, {"quote"}),  # proves nothing
        ({"quote": NOTE}, {"quote"}),  # all of the note
        ({"quote": ""}, {"quote"}),
    ],
)
def test_one_thing_wrong_costs_its_own_field(change, wrong):
    scores = score_notes([example(PLEDGED)], [[replace(PLEDGED, **change)]])
    assert scores and {name for name, share in scores["right"].items() if share == 0} == wrong
    assert scores["f1"] == (not wrong)
    assert scores["decided_f1"] == ("applies" not in wrong)
    assert scores["amount_f1"] == (not wrong & {"applies", "amount"})


def test_facts_of_one_kind_are_matched_best_first():
    scores = score_notes([example(PLEDGED, OTHER)], [[OTHER, PLEDGED, CLIENTS]])
    assert scores and (scores["n"], scores["n_said"], scores["f1"]) == (2, 3, pytest.approx(2 * 2 / 5))
    assert scores["kinds"]["pledged"]["f1"] == 1 and scores["kinds"]["connected"]["decided_f1"] == 0
    said = [replace(PLEDGED, applies=False), replace(OTHER, applies=True)]  # the second is right in `applies` alone
    assert score_notes([example(PLEDGED)], [said])["decided_f1"] == pytest.approx(2 / 3)
    missed = score_notes([example(PLEDGED, OTHER)], [[PLEDGED]])
    assert missed and missed["decided_f1"] == pytest.approx(2 / 3)


def test_parts_by_language_and_minimal_pairs():
    german = "Die Papiere sind nicht verpfändet und liegen bei der Bank."
    data = [example(PLEDGED, pair="1"), example(OTHER, pair="1", note=german), example(pair="2"), example(pair="2")]
    scores = score_notes(data, [[PLEDGED], [PLEDGED], [], []])
    assert scores and (scores["languages"]["en"]["decided_f1"], scores["languages"]["de"]["decided_f1"]) == (1, 0)
    assert scores["pairs"] == {"n": 2, "right": 0.5}
    invented = score_notes(data[2:], [[PLEDGED], []])
    assert invented and invented["pairs"]["right"] == 0
    assert score_notes([{"messages": []}], [[PLEDGED]]) is None


def test_notes_in_printed_reports():
    assert note_of("LCR 98%\nNote: Bonds.") == note_of("C 76.00\nnote on C 76.00.a r0030 c0010 | Bonds.") == "Bonds."
    assert note_of("LCR 98%\nNotes receivable 3") == ""
    assert (language_of(NOTE), language_of("Die Anteile wurden nicht abgezogen.")) == ("en", "de")
    assert [is_quotation(quote, NOTE) for quote in ("LIE with  Landesbank", "lie wit", "")] == [True, False, False]


def test_malformed_fact_names_file_and_example():
    for entry in ({"kind": "pledged"}, {"kind": "pledged", "applies": "yes", "amount": None, "who": None}, "x"):
        with pytest.raises(UserError, match=r"^f\.jsonl, example 7: `note_facts` must be"):
            true_facts({"id": 7, "note_facts": [entry]}, "f.jsonl")
    entry = {"kind": "pledged", "applies": True, "amount": 5000000, "who": "a fund", "since": None, "quote": None}
    assert true_facts({"note_facts": [entry]}) == [NoteFact("pledged", True, Decimal(5000000), ("a fund",))]
