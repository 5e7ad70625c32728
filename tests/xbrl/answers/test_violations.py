"""Scores of the violated rules, and the trivial baselines."""

import pytest

from common.errors import UserError
from eval.asked_examples import UNREADABLE
from xbrl.answers.answer_reader import Answer
from xbrl.answers.implications import implied_by, strictest
from xbrl.answers.violations import baseline_answers, labels_of, score_violations, true_answers


def example(answer, **fields):
    return {"messages": [{"role": "user", "content": "report"}, {"role": "assistant", "content": answer}], **fields}


CLEAN = "Violations:\nnone\nDirective:\nNo measures."
BREACH = "Violations:\nLCR_MIN | LCR | 75.2% | min 100% | CRR Art. 412(1)\nDirective:\nRestore the LCR."


def test_micro_scores_count_report_rule_pairs():
    true = [("LCR_MIN", "CET1_MIN"), ("LCR_MIN",), (), ("NSFR_MIN",)]
    answers = [("LCR_MIN",), ("LCR_MIN", "CET1_MIN"), ("MADE_UP",), labels_of(None)]
    scores = score_violations(true, answers)
    # 2 true positives; 5 predicted (the invented rule counts, and the answer that is none), 4 true.
    assert scores["micro"] == pytest.approx({"precision": 2 / 5, "recall": 2 / 4, "f1": 2 * 2 / (5 + 4)})
    assert scores["macro_f1"] == pytest.approx((1 + 0 + 0) / 3)  # LCR_MIN, CET1_MIN, NSFR_MIN
    assert (scores["n_reports"], scores["n_violations"]) == (4, 4)
    assert scores["exact"] == 0.0
    lcr = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "n_true": 2, "n_predicted": 2}
    assert scores["per_rule"]["LCR_MIN"] == lcr
    assert scores["per_rule"]["CET1_MIN"]["recall"] == 0.0
    assert scores["per_rule"]["CET1_MIN"]["n_predicted"] == 1
    assert scores["per_rule"]["MADE_UP"]["n_true"] == 0
    assert scores["per_rule"]["NSFR_MIN"]["n_predicted"] == 0


def test_a_single_rule_is_not_scored_as_binary_classification():
    scores = score_violations([("A_1",), ("A_1",), (), ()], [("A_1",), (), (), ()])
    assert scores["micro"] == pytest.approx({"precision": 1.0, "recall": 0.5, "f1": 2 / 3})
    assert scores["per_rule"] == {
        "A_1": {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "n_true": 2, "n_predicted": 1}
    }


def test_micro_is_not_the_mean_over_rules():
    scores = score_violations([("A_1",)] * 9 + [("B_2",)], [("A_1",)] * 9 + [()])
    assert scores["micro"]["f1"] == pytest.approx(2 * 9 / (9 + 10))  # macro would be 0.5


def test_garbage_on_a_clean_report_costs():
    scores = score_violations([(), (), ("LCR_MIN",)], [(), labels_of(None), ("LCR_MIN",)])
    assert scores["exact"] == pytest.approx(2 / 3)
    assert scores["micro"] == pytest.approx({"precision": 1 / 2, "recall": 1, "f1": 2 / 3})
    assert scores["per_rule"][UNREADABLE]["n_predicted"] == 1 and scores["macro_f1"] == 1
    clean = score_violations([(), ()], [(), ()])
    assert clean["exact"] == 1 and clean["micro"]["f1"] == 0 and clean["per_rule"] == {}


def test_a_void_line_costs_and_the_others_count():
    assert labels_of(Answer(("LCR_MIN",), "", (), void=2)) == ("LCR_MIN", UNREADABLE)
    assert labels_of(Answer(("LCR_MIN",), "")) == ("LCR_MIN",)


def test_rules_that_a_stricter_one_implies_are_left_out():
    assert (
        "TSCR_TC" in implied_by()["TC_MIN"]
        and "OCR_TC" in implied_by()["TSCR_TC"]
        and "OCR_TC" in implied_by()["TC_MIN"]
    )
    assert "LR_OLRR" in implied_by()["LR_MIN"] and "TSCR_CET1" in implied_by()["CET1_MIN"]
    assert all(not implied_by()[rule] & {"LCR_MIN", "T1_MIN", "CET1_MIN"} for rule in implied_by())
    assert strictest(["OCR_TC", "TC_MIN", "TSCR_TC", "LCR_MIN", "MADE_UP"]) == {"TC_MIN", "LCR_MIN", "MADE_UP"}
    # The two implied rules are missed: nothing is lost without them, and two of three with them.
    scores = score_violations([("TC_MIN", "TSCR_TC", "OCR_TC")], [("TC_MIN",)])
    assert (scores["without_implied"]["f1"], scores["micro"]["recall"]) == (1, pytest.approx(1 / 3))
    assert score_violations([("TC_MIN", "OCR_TC")], [("OCR_TC",)])["without_implied"]["f1"] == 0
    more = score_violations([("TC_MIN", "OCR_TC")], [("TC_MIN", "LCR_MIN")])["without_implied"]
    assert (more["precision"], more["recall"]) == (0.5, 1)


def test_the_field_violations_overrides_the_text():
    answers = true_answers([example(BREACH), example(BREACH, violations=["CET1_MIN"]), example(CLEAN)], "f.jsonl")
    assert [answer.rule_ids for answer in answers] == [("LCR_MIN",), ("CET1_MIN",), ()]
    assert [answer.directive for answer in answers] == ["Restore the LCR.", "Restore the LCR.", "No measures."]


def test_findings_of_the_example_are_facts_where_the_answer_is_a_letter_alone():
    finding = {"rule": "LCR_MIN", "cell": "LCR", "value": "75.2%", "limit": "min 100%", "legal": "CRR Art. 412(1)"}
    letter = example("Restore the LCR.", violations=["LCR_MIN"], findings=[finding])
    assert true_answers([letter], "f.jsonl")[0].claims == true_answers([example(BREACH)], "f.jsonl")[0].claims
    del finding["limit"]
    with pytest.raises(UserError, match=r"f\.jsonl, example \?: the finding .* cannot be read"):
        true_answers([letter], "f.jsonl")


def test_another_task_has_no_violations_and_a_mixture_is_an_error():
    assert true_answers([example("42"), example("43")], "f.jsonl") is None
    with pytest.raises(UserError, match=r"f\.jsonl, example x7: neither"):
        true_answers([example(BREACH), example("42", id="x7")], "f.jsonl")


def test_baselines_are_fitted_on_training_only():
    true, training = [("A_1",), ("B_2",)], [("C_3",), ("C_3", "D_4"), ()]
    assert baseline_answers(true, training) == {
        "always clean": (),
        "flag everything": ("C_3", "D_4"),
        "most frequent violation": ("C_3",),
    }
    assert baseline_answers(true, None) == {"always clean": (), "flag everything": ("A_1", "B_2")}
