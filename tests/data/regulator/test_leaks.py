"""Letters of the tests that repeat a training letter: found, reworded, or dropped."""

from data.regulator.leaks import leaks, mask, place_examples
from data.regulator.splits import FULL_SPLITS


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


def variants_of(bank, period, *letters):
    """One example with one variant per letter."""
    return [
        {
            "id": f"{bank}-{period}",
            "bank": bank,
            "period": period,
            "violations": [],
            "messages": [{"role": "assistant", "content": f"Violations:\nnone\nDirective:\n{letter}"}],
        }
        for letter in letters
    ]


def place(letters_of_quarter, seed=0):
    """Place two quarters of 20 banks. Half of the second quarters go to `test_quarters`.

    `letters_of_quarter` has the wordings of the first and of the second quarter.
    """
    banks = [f"B{number}" for number in range(20)]
    examples = [
        variants_of(bank, period, *(letter.format(bank=bank) for letter in letters))
        for bank in banks
        for period, letters in zip(("2026-03-31", "2026-06-30"), letters_of_quarter, strict=True)
    ]
    return place_examples(examples, (0.75, 0, 0, 0.25, 0), seed, {bank: f"Bank {bank}" for bank in banks})


def last_words(examples):
    return {example["messages"][-1]["content"].split()[-1] for example in examples}


def test_a_test_letter_that_leaks_is_reworded():
    same, other = "Bank {bank}, raise 4.5% now", "Bank {bank}, raise 4.5% soon"
    splits, counts = place([(same, other), (same, other)])
    assert list(splits) == list(FULL_SPLITS)
    assert [len(splits[name]) for name in FULL_SPLITS] == [30, 0, 0, 10, 0]
    assert last_words(splits["train"]) == {"now"} and last_words(splits["test_quarters"]) == {"soon"}
    assert counts["reworded"] == {"test_banks": 0, "test_quarters": 10, "test_combinations": 0}
    assert set(counts["dropped"].values()) == set(counts["leaks_left"].values()) == {0}


def test_a_test_example_without_a_wording_of_its_own_is_dropped():
    splits, counts = place([("Bank {bank}, raise 4.5%", "x"), ("Bank {bank}, raise 7%", "Bank {bank}, raise 8%")])
    assert [len(splits[name]) for name in FULL_SPLITS] == [30, 0, 0, 0, 0]
    assert counts["dropped"]["test_quarters"] == 10
    assert counts["reworded"]["test_quarters"] == 10  # once for each variant but the last


def test_banks_without_a_name_go_by_their_id():
    examples = [
        variants_of(f"B{number}", period, f"B{number} is sound")
        for number in range(4)
        for period in ("2026-03-31", "2026-06-30")
    ]
    splits, counts = place_examples(examples, (0.5, 0, 0, 0.5, 0), 0, {})
    assert counts["dropped"]["test_quarters"] == 4 and splits["test_quarters"] == []
