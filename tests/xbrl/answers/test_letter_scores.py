"""Scores of a letter's figures, dates, articles, measures and deadlines, and words that withdraw a demand."""

from decimal import Decimal

import pytest

from xbrl.answers.answer_reader import parse_answer
from xbrl.answers.letter_scores import deadlines, demands, score_letters, score_measures, statements

ANSWER = "Violations:\nLCR_MIN | C 76.00.a r0030 c0010 | 93.1% | min 100% | CRR Art. 412(1)\nDirective:\nUnder Article 414 CRR."
TRUTH = parse_answer(ANSWER)


def example(**fields):
    report = "Nordbank | reference date 2026-03-31\nr0010 c0010 Buffer | 1340 thousand"
    return {"messages": [{"role": "user", "content": report}, {"role": "assistant", "content": ANSWER}], **fields}


def test_what_a_text_states():
    text = "On 31 March 2026 (2026-03-31, March 31, 2026) C 76.00.a r0030 was 93.10%, EUR 1.34 million under CRR Art. 412(1)."
    figures, articles = {Decimal("0.931"), 1340000}, {("CRR", "412(1)")}
    assert statements(text) == {"figures": figures, "dates": {"2026-03-31"}, "articles": articles}


def test_report_finding_and_reference_support_statements():
    right = (
        "On 31 March 2026 the LCR of 93.10% missed 100% by 6.9 percentage points (CRR Art. 412(1), Article 414 CRR); the "
        "buffer is 1,340 thousand."
    )
    scores = score_letters([example()], [TRUTH], [right])
    assert scores["supported"] == 1 and scores["n"] == 7
    wrong = "On 30 June 2026 the LCR of 39.1% missed 100% by 60.9 percentage points (CRR Art. 413)."
    scores = score_letters([example()], [TRUTH], [wrong])
    found = {kind: (one["supported"], one["n"]) for kind, one in scores["by_kind"].items()}
    assert found == {"figures": (pytest.approx(1 / 3), 3), "dates": (0, 1), "articles": (0, 1)}
    assert scores["supported"] == pytest.approx(1 / 5)
    assert score_letters([example()], [TRUTH], [""])["supported"] is None


@pytest.mark.parametrize(
    ("text", "days"),
    [
        ("within 30 days of receipt", [{30}]),
        ("within ten working days", [{10}]),
        ("no later than two weeks from the date", [{14, 10}]),
        ("within a month", [{30, 20}]),
        ("within five business days and within two months", [{5}, {60, 40}]),
        ("in 2026, for 30 days", []),
        ("binnen zehn Arbeitstagen nach Zugang", [{10}]),
        ("innerhalb von 2 Wochen", [{14, 10}]),
    ],
)
def test_terms_in_words_and_numbers(text, days):
    assert deadlines(text) == days


def test_a_demand_names_its_subject_and_its_term():
    letter = (
        "The LCR of 93% is too low.\n- Submit within ten working days a plan to restore the liquidity buffer.\n"
        "Objections to the liquidity measure may be lodged within one month. File C 76.00 again within 3 days."
    )
    assert list(demands(letter)) == [({"liquidity"}, {10}), ({"filing", "misstatement"}, {3})]


def test_measures_and_deadlines():
    required = [{"subject": "liquidity", "deadline_days": 10}, {"subject": "leverage", "deadline_days": 30}]
    letters = {
        "Restore the liquidity buffer within ten working days. Reduce the leverage exposure within 30 days.": (1, 1),
        "Restore the liquidity buffer within 10 days and reduce the balance sheet within 30 days.": (1, 1),
        "Restore the liquidity buffer within 20 days. Reduce leverage within 30 days.": (0.5, 0),
        "Restore the liquidity buffer within 10 days. Restore the liquidity buffer within 20 days.": (0, 0),
        "Restore the liquidity buffer within 10 days. File liquidity and leverage again within 30 days.": (1, 1),
        "Within 10 days you shall act.": (0, 0),  # on what?
        "": (0, 0),
    }
    for letter, (right, reports) in letters.items():
        scores = score_measures([example(measures=required)], [letter])
        assert (scores["right"], scores["reports"]) == (right, reports), letter
    clean = [example(measures=[])] * 4
    scores = score_measures(clean, ["No measures.", "Restore the liquidity buffer within 10 days.", "", " "])
    assert (scores["right"], scores["reports"], scores["n_reports"]) == (None, 0.25, 4)
    assert score_measures([example()], ["x"]) is None


REQUIRED = [{"subject": "liquidity", "deadline_days": 10}]
PLAN = "submit within ten working days a plan to restore the liquidity buffer."
ORDER = PLAN.capitalize()
GERMAN_ORDER = "Legen Sie binnen zehn Arbeitstagen einen Plan vor, der die Liquiditätsdeckungsquote wiederherstellt."


@pytest.mark.parametrize(
    "letter",
    [
        f"You need not:\n- {ORDER}",
        f"You need not: {ORDER}",
        f"We recommend that you submit a plan: {ORDER}",
        f"Do not {PLAN}",
        f"It is unnecessary to {PLAN}",
        f"We refrain from asking you to {PLAN}",
        f"Nobody expects you to {PLAN}",
        "No plan to restore the liquidity buffer within ten working days is needed.",
        "Take assets out of the liquidity buffer that need not be counted and file again within ten working days of receipt.",
        f"**What you may skip:**\n- {ORDER}",
        f"For your information:\n{ORDER}",
        *(
            f"Measures:\n- {ORDER}\n{taken_back}"
            for taken_back in (
                "All measures are deferred until the end of next year.",
                "The measures above are recommendations only.",
                "These measures do not bind you.",
                "None of this is required.",
                "You may disregard all of the above.",
                "They are lifted.",
                "The above is no longer needed.",
                "You need not do any of this.",
                "This letter is void.",
                "You need not do so.",
                "You do not have to comply.",
                "Compliance is optional.",
                "No measure is required.",
                "You are released from everything above.",
                "The deadlines above are withdrawn.",
                "If you wish, the measures need not be taken.",
            )
        ),
        f"Maßnahmen:\n- {GERMAN_ORDER}\nNichts davon ist erforderlich.",
        f"{GERMAN_ORDER} Diese Anordnungen sind hinfällig.",
        f"Zur Kenntnis, ohne Pflicht:\n{GERMAN_ORDER}",
        f"{GERMAN_ORDER} Sie brauchen dem nicht nachzukommen.",
        f"It would be nice to {PLAN}",
        f"You should consider whether to {PLAN}",
        "Sie müssen keinen Plan binnen zehn Arbeitstagen für den Liquiditätspuffer vorlegen.",
        "Es ist nicht erforderlich, binnen zehn Arbeitstagen einen Plan für den Liquiditätspuffer vorzulegen.",
    ],
)
def test_withdrawn_measure_is_not_demanded(letter):
    assert score_measures([{"measures": REQUIRED}], [letter])["right"] == 0


@pytest.mark.parametrize(
    "letter",
    [
        ORDER,
        GERMAN_ORDER,
        f"**Maßnahmen:**\n- {GERMAN_ORDER}",
        f"We therefore order:\n1. {ORDER}",
        "Submit, no later than ten working days from receipt, a plan to restore the liquidity buffer without delay.",
        f"{ORDER}\nConsequences: If the measures are not carried out in time, we may order further supervisory measures.",
        f"{ORDER}\nIf the measures are not taken in time, we may impose penalties.",
        f"{ORDER}\nFolgen: Werden die Maßnahmen nicht rechtzeitig ausgeführt, können wir Zwangsgeld festsetzen.",
        # An approved block, which says "must not" of what must not count
        "Take the amount that must not count out of C 76.00 and file again within ten working days. Restore liquidity within ten days.",
        f"You need not:\n- Stop lending.\nMeasures:\n- {ORDER}",
        f"{ORDER} An objection to these measures is not required to be reasoned.",
        f"{ORDER} You need not send us the minutes.",
        f"{ORDER} Bring us within forty working days a resolution of your owners on the liquidity buffer.",
        f"{ORDER}\nRemark: the limit of your subsidiary is waived; no measure follows.",
    ],
)
def test_other_sentences_take_nothing_back(letter):
    assert score_measures([{"measures": REQUIRED}], [letter])["right"] == 1


@pytest.mark.parametrize(
    "block",
    [
        "Take the amount that must not count out of {} and file again within ten working days of receipt",
        "Nehmen Sie den Betrag, der nicht zählen darf, aus {} und reichen Sie die Meldung binnen zehn Arbeitstagen nach Zugang neu ein",
    ],
)
def test_block_is_approved_with_filled_in_texts(block):
    """A block that contains a negation demands; with a negation in a filled-in text or around the block it does not."""
    whole = block.format("C 76.00")
    assert [days for _, days in demands(f"- {whole}.")] == [{10}]
    for letter in (block.format("C 76.00, but not now,"), f"You need not: {whole}", f"{whole} or not"):
        assert list(demands(f"{letter}.")) == [], letter
