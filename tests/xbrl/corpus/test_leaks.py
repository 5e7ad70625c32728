"""What of a test stands in training: found, counted, and for letters of an archive dropped."""

from xbrl.corpus.leaks import leak_shares, leaks, mask, place_examples
from xbrl.corpus.splits import FULL_SPLITS


def test_mask_replaces_names_dates_codes_and_numbers():
    letter = "To the Board of Nordhaven Bank\nReport of 31 March 2026\n1. SYNC00ABCDEFGHIJKL12 in C 28.00: -4.31%, 26,000 (2026-03-31)"
    assert mask(letter, ["Nordhaven Bank"]) == (
        "To the Board of <name>\nReport of <date>\n<number>. <code> in C <number>: <number>%, <number> (<date>)"
    )


def test_a_leak_is_found_despite_different_names_and_figures():
    training = [("Bank A must raise 4.5% by 1 May 2026.", "Bank A"), ("Bank B is sound.", "Bank B")]
    test = [("Bank C must raise 12% by 30 June 2027.", "Bank C"), ("Bank C is fine.", "Bank C")]
    assert leaks(training, test) == [0]
    assert leaks(training, test[1:]) == []


def example_of(bank, period, letter, report="", violations=()):
    answer = f"Violations:\nnone\nDirective:\n{letter}"
    messages = [{"role": "user", "content": report}, {"role": "assistant", "content": answer}]
    return {"id": f"{bank}-{period}", "bank": bank, "period": period, "violations": violations, "messages": messages}


def place(first, second, names):
    """Place two quarters of 20 banks. Half of the second quarters go to `test_quarters`."""
    examples = [
        example_of(f"B{number}", period, letter.format(bank=names.get(f"B{number}", f"B{number}")))
        for number in range(20)
        for period, letter in (("2026-03-31", first), ("2026-06-30", second))
    ]
    return place_examples(examples, (0.75, 0, 0, 0.25, 0), 0, names)


def test_a_test_example_whose_letter_leaks_is_dropped():
    names = {f"B{number}": f"Bank {number}" for number in range(20)}
    splits, dropped = place("{bank}, raise 4.5%", "{bank}, raise 7%", names)
    assert [len(splits[name]) for name in FULL_SPLITS] == [30, 0, 0, 0, 0]
    assert dropped == {"test_banks": 0, "test_quarters": 10, "test_combinations": 0}


def test_banks_without_a_name_go_by_their_id():
    _, dropped = place("{bank} is sound", "{bank} is sound", {})
    assert dropped["test_quarters"] == 10


REPORT = """Bank A (A) | reference date 2026-06-30
C 01.00 Own funds
r0010 c0010 OWN FUNDS | 90001 thousand
C 03.00 Ratios
r0010 c0010 CET1 Capital ratio | 4.31%
r0030 c0010 T1 Capital ratio | 6.20%
note on C 03.00 r0010 c0010 | Profit of 12345 is included."""


def shares(
    training_report,
    test_report=REPORT,
    training_letter="x",
    test_letter="Bank A shall raise capital. Do it within 3 days.",
):
    splits = {
        "train": [example_of("B", "2026-03-31", training_letter, training_report)],
        "test_banks": [example_of("A", "2026-06-30", test_letter, test_report)],
    }
    return leak_shares(splits, {"A": "Bank A", "B": "Bank B"})["test_banks"]


def test_shares_of_a_test_that_stand_in_training():
    nothing = {"letters": 0, "sentences": 0, "notes": 0, "figures": 0, "ratios": 0}
    assert shares("") == nothing
    assert shares("r0010 c0010 OWN FUNDS | 90001 thousand") == nothing | {"figures": 1}
    assert shares("note on C 03.00 r0010 c0010 | Profit of 678 is included.") == nothing | {"notes": 1}
    letter = "Bank B shall raise capital. Write to us."
    assert shares("", training_letter=letter) == nothing | {"sentences": 0.5}
    assert shares("", training_letter="Bank B shall raise capital. Do it within 30 days.") == nothing | {
        "letters": 1,
        "sentences": 1,
    }


def test_ratios_are_found_as_those_of_an_earlier_quarter():
    own = REPORT.replace("90001", "90002").partition("\nnote")[0]
    assert shares(own)["ratios"] == 1 and shares(own.replace("4.31", "4.32"))["ratios"] == 0
    earlier = "{}\nEarlier reports\n2026-06-30: CET1 ratio 4.31%, Tier 1 ratio {}%"
    assert (
        shares(earlier.format("Bank B", "6.20"))["ratios"] == 1
        and shares(earlier.format("Bank B", "6.21"))["ratios"] == 0
    )
    compact = "Bank {}\nCET1 ratio 4.3%\nLCR 104%\nNote: {}"
    assert shares(compact.format("B", "x"), compact.format("A", "y"))["ratios"] == 1
    assert shares(compact.format("B", "x"), compact.format("A", "y").replace("104", "105"))["ratios"] == 0
