"""Scores of answers to bank reports: rules, the facts of findings, reports with notes, letters, and mistakes in examples."""

import pytest

from common.errors import UserError
from eval.asked_examples import UNREADABLE
from xbrl.answers.answer_reader import Answer, parse_answer
from xbrl.answers.baselines import baseline_results
from xbrl.answers.scores import (
    check_scored_fields,
    decided_by_notes,
    labels_of,
    note_f1,
    pairs_right,
    score_answers,
    score_facts,
    score_kinds,
    score_violations,
    true_answers,
)

CLEAN = "Violations:\nnone\nDirective:\nNo measures."
BREACH = "Violations:\nLCR_MIN | LCR | 75.2% | min 100% | CRR Art. 412(1)\nDirective:\nRestore the LCR."


def example(answer, **fields):
    return {"messages": [{"role": "user", "content": "report"}, {"role": "assistant", "content": answer}], **fields}


def breach(rule, letter="The bank shall restore its ratio."):
    return f"Violations:\n{rule} | LCR | 75.2% | min 100% | CRR Art. 412(1)\nDirective:\n{letter}"


EXAMPLES = [example(breach("LCR_MIN"), id="a"), example(breach("NSFR_MIN"), id="b"), example(CLEAN, id="c")]


def test_scores_of_rules_and_letters_with_their_baselines():
    texts = [breach("LCR_MIN"), "I am a bank.", CLEAN.replace("No measures.", "No other measures at all.")]
    training = [example(breach("LCR_MIN", "The bank shall pay."), id="t"), EXAMPLES[0], EXAMPLES[2]]
    result = score_answers(texts, EXAMPLES, "test.jsonl", training, "train.jsonl")
    violations = result["violations"]
    assert violations["micro"] == pytest.approx({"precision": 0.5, "recall": 0.5, "f1": 0.5})  # garbage is a mistake
    assert violations["unparsable"] == {"n": 1, "share": pytest.approx(1 / 3)}
    assert violations["exact"] == pytest.approx(2 / 3)
    f1 = {name: scores["f1"] for name, scores in violations["baselines"].items()}
    expected = {"always clean": 0, "flag everything": 0.4, "most frequent violation": 0.4}
    assert f1 == pytest.approx(expected | {"character n-grams": 0, "thresholds": 0})  # too few reports to learn from
    everything = violations["baselines"]["flag everything"]  # LCR_MIN for all three; it is in one, of two violations
    assert (everything["precision"], everything["recall"]) == (pytest.approx(1 / 3), 0.5)
    assert violations["baselines_fitted_on"] == "3 training examples"
    # An unparsable answer has no directive. "no measures" (2 words) is a subsequence of the 5 words of the third answer.
    third = 2 * 1.0 * 0.4 / 1.4
    assert [answer["rouge_l"] for answer in result["answers"]] == pytest.approx([1.0, 0.0, third])
    assert result["rouge_l"] == {"of": "directive", "n": 3, "f": pytest.approx((1 + third) / 3), "baselines": {}}
    assert [answer["predicted"] for answer in result["answers"]] == [["LCR_MIN"], None, []]
    assert [answer["true"] for answer in result["answers"]] == [["LCR_MIN"], ["NSFR_MIN"], []]
    assert result["notes"] is None  # no answer of the data has the section `Note:`
    alone = score_answers([CLEAN] * 3, EXAMPLES, "test.jsonl", None)["violations"]
    assert set(alone["baselines"]) == {"always clean", "flag everything"}
    assert alone["baselines"]["flag everything"]["f1"] == pytest.approx(2 * 2 / (6 + 2))
    assert alone["baselines_fitted_on"] == "the evaluated file itself"


def test_void_lines_and_contradictions_are_counted():
    odd = example(breach("LCR_MIN").replace("\nDirective", "\nOF_SUM | a sum\nDirective"), violations=["LCR_MIN"])
    result = score_answers([breach("LCR_MIN")], [odd], "test.jsonl", None)
    assert result["violations"]["void_true_lines"] == 1 and result["facts"]["f1"] == 1
    said = "Violations:\nLCR_MIN | LCR | 104% | min 100% | CRR Art. 412(1)\nOF_SUM | x | 1 | expected 2 | CRR Art. 72\nDirective:\nx"
    one = example(CLEAN, violations=[])
    violations = score_answers([said, "no answer"], [one, one], "test.jsonl", None)["violations"]
    assert violations["contradictions"] == {"n": 1, "lines": 2} and violations["void_lines"] == 0


def test_facts_in_the_note_section_are_scored():
    note = 'Note:\n"waived since January" | waiver | applies | - | - | 2026-01-01\n'
    fact = {"kind": "waiver", "applies": True, "amount": None, "who": [], "since": "2026-01-01"}
    fact["quote"] = "waived since January"
    one = example(note + CLEAN, note_facts=[fact], violations=[])
    one["messages"][0]["content"] = "LCR 90%\nNote: The LCR is waived since January."
    said = [note + CLEAN, note.replace("applies", "does not apply") + "and so on\n" + CLEAN]
    result = score_answers(said, [one, one], "test.jsonl", None)
    assert result["notes"]["decided_f1"] == 0.5 and result["notes"]["n"] == 2
    assert result["violations"]["void_lines"] == 1 and result["violations"]["exact"] == 1


def test_rules_follow_from_facts_alone():
    def asked(note: str, violations: list[str], engine: list[str], **fact) -> dict:
        true = {"amount": None, "since": "", "who": [], "quote": note} | fact
        state = "applies" if true["applies"] else "does not apply"
        answer = f'Note:\n"{note}" | {true["kind"]} | {state} | - | {" and ".join(true["who"]) or "-"} | -'
        one = example(answer, note_facts=[true], violations=violations, engine=engine)
        one["messages"][0]["content"] = f"Client A38 14%\nClient B95 13%\nLCR 94%\nNote: {note}; this is 95%."
        return one

    pledged, waived = {"kind": "pledged", "applies": True}, {"kind": "waiver", "applies": True}
    linked = {"kind": "connected", "applies": True, "who": ["A38", "B95"]}
    of_pledged = ["LCR_MIN", "PLEDGED_COUNTED", "LCR_PLEDGED"]
    examples = [
        asked("No part of it is ours", of_pledged, ["LCR_MIN"], **pledged),
        asked("A38 owns B95", ["LCR_MIN", "LE_CONNECTED"], ["LCR_MIN"], **linked),
        asked("The release was granted", [], ["LCR_MIN"], **waived),
    ]
    right = [entry["messages"][-1]["content"] for entry in examples]
    result = score_answers(right, examples, "test.jsonl", None)
    assert result["violations"]["micro"]["f1"] == result["notes"]["f1"] == 1
    assert result["facts"] is None and "rouge_l" not in result and "rouge_l" not in result["answers"][0]
    said = [right[0].replace("applies", "does not apply"), right[1].replace("B95", "B59"), "Violations:\nnone"]
    result = score_answers(said, examples, "test.jsonl", None)
    assert [row["predicted"] for row in result["answers"]] == [["LCR_MIN"], ["LCR_MIN"], None]
    assert (result["notes"]["n_said"], result["notes"]["decided_f1"]) == (2, pytest.approx(2 * 1 / 5))
    assert result["notes"]["right"] == {"applies": 0.5, "amount": 1, "who": 0.5, "since": 1, "quote": 0.5}
    void = score_answers([f"{right[0]}\npledged | applies", *right[1:]], examples, "test.jsonl", None)
    assert void["violations"]["void_lines"] == 2 and void["answers"][0]["unreadable"]


def test_micro_scores_count_report_rule_pairs():
    true = [("LCR_MIN", "CET1_MIN"), ("LCR_MIN",), (), ("NSFR_MIN",)]
    assert labels_of(Answer(("LCR_MIN",), "", (), void=2)) == ("LCR_MIN", UNREADABLE)
    answers = [("LCR_MIN",), ("LCR_MIN", "CET1_MIN"), ("MADE_UP",), labels_of(None)]
    scores = score_violations(true, answers)
    # 2 true positives; 5 predicted (the invented rule counts, and the answer that is none), 4 true.
    assert scores["micro"] == pytest.approx({"precision": 2 / 5, "recall": 2 / 4, "f1": 2 * 2 / (5 + 4)})
    assert scores["macro_f1"] == pytest.approx((1 + 0 + 0 + 0) / 4)  # LCR_MIN, CET1_MIN, NSFR_MIN, and the invented one
    assert (scores["n_reports"], scores["n_violations"]) == (4, 4)
    assert scores["exact"] == 0.0
    lcr = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "n_true": 2, "n_predicted": 2}
    assert scores["per_rule"]["LCR_MIN"] == lcr
    assert (scores["per_rule"]["CET1_MIN"]["recall"], scores["per_rule"]["MADE_UP"]["n_true"]) == (0, 0)
    scores = score_violations([(), (), ("LCR_MIN",)], [(), labels_of(None), ("LCR_MIN",)])
    assert scores["exact"] == pytest.approx(2 / 3)  # garbage costs on a clean report too
    assert scores["micro"] == pytest.approx({"precision": 1 / 2, "recall": 1, "f1": 2 / 3})
    assert scores["per_rule"][UNREADABLE]["n_predicted"] == 1 and scores["macro_f1"] == 1
    clean = score_violations([(), ()], [(), ()])
    assert clean["exact"] == 1 and clean["micro"]["f1"] == 0 and clean["per_rule"] == {}


def test_truth_is_field_violations_or_the_answer():
    answers = true_answers([example(BREACH), example(BREACH, violations=["CET1_MIN"]), example(CLEAN)], "f.jsonl")
    assert [answer.rule_ids for answer in answers] == [("LCR_MIN",), ("CET1_MIN",), ()]
    assert [answer.directive for answer in answers] == ["Restore the LCR.", "Restore the LCR.", "No measures."]
    letter = example("Restore the LCR.", violations=["LCR_MIN"])
    assert true_answers([letter], "f.jsonl") == [Answer(("LCR_MIN",), "Restore the LCR.")]
    with pytest.raises(UserError, match=r"f\.jsonl, example x7: neither"):
        true_answers([example(BREACH), example("42", id="x7")], "f.jsonl")


NOTES = [
    {"kind": "pledged", "engine": [], "pair": "1", "violations": ["LCR_PLEDGED"]},
    {"kind": "pledged", "engine": [], "pair": "1", "violations": []},
    {"kind": "waiver", "engine": ["LCR_MIN"], "pair": "2", "violations": []},
    {"kind": "waiver", "engine": ["LCR_MIN", "LR_MIN"], "pair": "2", "violations": ["LCR_MIN", "LR_MIN"]},
    {"kind": "", "engine": [], "pair": "3", "violations": []},  # of the third pair only one report is evaluated
]
SAID = [("LCR_PLEDGED",), (), ("LCR_MIN",), ("LCR_MIN", "LR_MIN"), ()]


def test_scores_by_kind_of_note():
    kinds = score_kinds(NOTES, SAID)
    assert list(kinds) == ["pledged", "waiver", "with a note"]
    assert (kinds["pledged"]["f1"], kinds["pledged"]["exact"], kinds["pledged"]["n_reports"]) == (1, 1, 2)
    assert kinds["waiver"]["f1"] == pytest.approx(4 / 5) and kinds["waiver"]["exact"] == 0.5
    assert (kinds["waiver"]["precision"], kinds["waiver"]["recall"]) == (pytest.approx(2 / 3), 1)
    assert kinds["waiver"]["note_f1"] == pytest.approx(2 / 3)  # of LCR_MIN alone, which the waiver decides
    assert kinds["with a note"]["note_f1"] == pytest.approx(4 / 5)
    assert score_kinds([{"violations": []}], [()]) == {}


def test_note_rules_and_minimal_pairs_are_scored():
    lifted, benign, plain = NOTES[2], NOTES[3], {"kind": "", "engine": ["NSFR_MIN"], "violations": ["NSFR_MIN"]}
    assert decided_by_notes([lifted, benign, plain]) == [{"LCR_MIN"}, {"LCR_MIN"}, set()]
    engine = [tuple(entry["engine"]) for entry in (lifted, benign, plain)]
    assert note_f1([lifted, benign, plain], engine) == 2 / 3  # one of its two findings of the LCR is right
    assert note_f1([plain], [()]) is None
    assert note_f1([{"kind": "pledged", "violations": ["A"]}], [("A",)]) is None  # what the engine finds is not known
    assert pairs_right(NOTES, SAID) == [True, False]
    assert pairs_right(NOTES, [entry["violations"] for entry in NOTES]) == [True, True]


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
def test_finding_is_right_if_every_field_is(line, right):
    scores = score_facts([answer(LCR)], [answer(line)])
    assert scores["f1"] == (len(right) == 4)
    assert {field for field, share in scores["right"].items() if share == 1} == right
    assert (scores["n_true"], scores["n_named"]) == (1, 1)


def test_scores_are_micro_averaged_over_findings():
    true = [answer(LCR, CLIENT), answer(), answer(CLIENT)]
    said = [answer(LCR, CLIENT.replace("K-01", "K-02")), None, answer(CLIENT, "LCR_MIN | too low")]
    scores = score_facts(true, said)
    # Right: LCR, the last client. Said: these, the other client, garbage, the void line. True: three.
    assert scores["precision"] == pytest.approx(2 / 5) and scores["recall"] == pytest.approx(2 / 3)
    assert scores["right"]["where"] == pytest.approx(2 / 3) and scores["n_named"] == 3
    # Two findings on one rule are told apart by their client.
    other = CLIENT.replace("K-01", "K-02").replace("26%", "31%")
    scores = score_facts([answer(CLIENT, other)], [answer(other, CLIENT.replace("26%", "27%"))])
    assert scores["f1"] == 0.5 and scores["right"] == {"where": 1, "value": 0.5, "limit": 1, "legal": 1}


GOOD = {
    "id": "a",
    "messages": [{"role": "user", "content": "LCR"}, {"role": "assistant", "content": CLEAN}],
    **{"violations": [], "engine": ["LCR_MIN"]},
    **{"kind": "pledged", "pair": "1 in words", "bank": None},
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("violations", "LCR_MIN", r"`violations` must be a list of ids of rules, not 'LCR_MIN'"),
        ("violations", [1], r"`violations` must be a list of ids of rules, not \[1\]"),
        ("engine", {"LCR_MIN": 1}, r"`engine` must be a list of ids"),
        ("engine", "x" * 99, r"`engine` must be a list of ids of rules, not 'x{59}"),
        ("kind", ["pledged"], r"`kind` must be a text"),
        ("bank", {}, r"`bank` must be a text"),
        ("note_facts", [{"kind": "gift"}], r"`note_facts` must be a list of objects with kind, applies, amount"),
    ],
)
def test_mistake_names_file_example_and_field(field, value, message):
    check_scored_fields([GOOD, {"text": "no chat"}], "test.jsonl")
    for training, where in ((None, "test.jsonl"), ([GOOD | {field: value}], "train.jsonl")):
        examples = [GOOD if training else GOOD | {field: value}]
        with pytest.raises(UserError, match=f"^{where}, example a: .*{message}"):
            score_answers([CLEAN], examples, "test.jsonl", training, "train.jsonl")
    with pytest.raises(UserError, match=f"^mine, example a: .*{message}"):
        baseline_results([GOOD | {field: value}], None, "mine")
