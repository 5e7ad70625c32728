"""Scores of the facts of the violations."""

import pytest

from xbrl.answers.answer_reader import parse_answer
from xbrl.answers.facts import score_facts

LCR = "LCR_MIN | C 76.00.a r0030 c0010 | 93.10% | min 100% | CRR Art. 412(1)"
CLIENT = "LE_LIMIT | C 28.00 K-01 c350 | 26% | max 25% | CRR Art. 395(1)"


def answer(*lines):
    return parse_answer("\n".join(["Violations:", *(lines or ["none"]), "Directive:", "x"]))


@pytest.mark.parametrize(
    ("line", "right"),
    [
        (LCR.replace("93.10%", "93.1 %"), {"where", "value", "limit", "legal"}),
        (LCR.replace("93.10%", "93.2%"), {"where", "limit", "legal"}),
        (LCR.replace("r0030", "r0040"), {"value", "limit", "legal"}),
        (LCR.replace("min 100%", "min 90%"), {"where", "value", "legal"}),
        (LCR.replace("min 100%", "max 100%"), {"where", "value", "legal"}),
        (LCR.replace("412(1)", "413(1)"), {"where", "value", "limit"}),
        (LCR.replace("93.10%", "93.10"), {"where", "limit", "legal"}),  # the unit is a part of the number
    ],
)
def test_a_finding_is_right_if_all_of_it_is(line, right):
    scores = score_facts([answer(LCR)], [answer(line)])
    assert scores["f1"] == (len(right) == 4)
    assert {field for field, share in scores["right"].items() if share == 1} == right
    assert (scores["n_true"], scores["n_named"]) == (1, 1)


def test_scores_are_micro_averaged_over_findings_and_void_lines_cost():
    true = [answer(LCR, CLIENT), answer(), answer(CLIENT)]
    said = [answer(LCR, CLIENT.replace("K-01", "K-02")), None, answer(CLIENT, "LCR_MIN | too low")]
    scores = score_facts(true, said)
    # Right: LCR, the last client. Said: these, the other client, garbage, the void line. True: three.
    assert scores["precision"] == pytest.approx(2 / 5) and scores["recall"] == pytest.approx(2 / 3)
    assert scores["right"]["where"] == pytest.approx(2 / 3) and scores["n_named"] == 3


def test_two_findings_on_one_rule_are_told_apart_by_their_client():
    other = CLIENT.replace("K-01", "K-02").replace("26%", "31%")
    scores = score_facts([answer(CLIENT, other)], [answer(other, CLIENT.replace("26%", "27%"))])
    assert scores["f1"] == 0.5 and scores["right"] == {"where": 1, "value": 0.5, "limit": 1, "legal": 1}


def test_checks_that_are_met_are_no_findings_and_lifting_is_one():
    true = parse_answer(
        "Checks:\nLCR 93% < 100%: LCR_MIN, CRR Art. 412(1)\nNSFR 110% >= 100%: met\nWaiver: lifts LCR_MIN, CRR Art. 8"
    )
    same = parse_answer("Checks:\nWaiver: lifts LCR_MIN, CRR Art. 8\nLCR 93% < 100%: LCR_MIN, CRR Art. 412(1)")
    unlifted = parse_answer("Checks:\nLCR 93% < 100%: LCR_MIN, CRR Art. 412(1)\nWaiver: met")
    assert score_facts([true], [same])["f1"] == 1 and score_facts([true], [same])["n_true"] == 2
    assert score_facts([true], [unlifted])["recall"] == 0.5


def test_nothing_is_named():
    scores = score_facts([answer(LCR)], [None])
    assert scores["f1"] == 0 and scores["right"] == dict.fromkeys(("where", "value", "limit", "legal"), 0.0)
