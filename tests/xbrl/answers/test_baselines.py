"""Baselines for the violations and for the letter, on small reports in which the right answer is known."""

import random

from xbrl.answers.baselines import (
    baseline_predictions,
    decided_by_notes,
    micro_f1,
    nearest_letters,
    note_f1,
    score_baselines,
)
from xbrl.answers.printed_figures import PrintedFigure, printed_figures
from xbrl.answers.threshold_program import threshold_predictions


def example(report, violations, **fields):
    messages = [{"role": "user", "content": report}, {"role": "assistant", "content": "an answer"}]
    return {"messages": messages, "violations": violations, **fields}


def random_examples(seed, number, fields=lambda violations: {}):
    """LCR must be 100%, the leverage ratio more than its own requirement; a note on a pledge breaks a third rule."""
    rng, examples = random.Random(seed), []
    for _ in range(number):
        lcr, ratio, requirement = rng.randint(80, 120), rng.randint(300, 500) / 100, rng.randint(300, 500) / 100
        pledged, surplus = rng.random() < 0.3, rng.random() < 0.3
        violations = ["LCR_MIN"] * (lcr < 100) + ["LR_OLRR"] * (ratio < requirement)
        violations += ["PLEDGED"] * pledged + ["SIGN"] * surplus
        note = f"Bonds {'are pledged to' if pledged else 'stay free of claims of'} {rng.choice(['a fund', 'a bank'])}"
        lines = [f"LCR {lcr}%", f"Leverage ratio {ratio}%", f"OLRR {requirement}%"]
        lines += [f"Surplus {'-' * surplus}{rng.randint(1000, 9999)}", f"Note: {note}."]
        examples.append(example("\n".join(lines), violations, **fields(violations)))
    return examples


def test_micro_f1_counts_pairs_of_report_and_rule():
    assert micro_f1([("A",), ("A", "B")], [("A",), ("C",)]) == {"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5}


def test_each_baseline_finds_what_it_can_see():
    training, test = random_examples(1, 600), random_examples(2, 300)
    predictions = baseline_predictions(training, test)
    assert list(predictions) == ["character n-grams", "presence and signs", "threshold program", "nearest report"]

    def f1(name, rule):
        predicted = [{rule} & set(one) for one in predictions[name]]
        return micro_f1(predicted, [{rule} & set(one["violations"]) for one in test])["f1"]

    assert f1("threshold program", "LCR_MIN") == f1("threshold program", "LR_OLRR") == 1  # a cut, and a difference
    assert f1("threshold program", "PLEDGED") < 0.6  # no percentage tells it; at best it is always predicted
    assert f1("character n-grams", "PLEDGED") == f1("character n-grams", "SIGN") == 1
    assert f1("character n-grams", "LCR_MIN") > 0.9 > f1("character n-grams", "LR_OLRR")  # two numbers are compared
    assert f1("presence and signs", "SIGN") == 1
    assert max(f1("presence and signs", rule) for rule in ("LCR_MIN", "LR_OLRR", "PLEDGED")) < 0.75
    assert predictions == baseline_predictions(training, test)  # no randomness


def test_the_engine_is_a_baseline_where_the_examples_say_what_it_finds():
    training = random_examples(1, 20)
    test = random_examples(2, 9, lambda violations: {"engine": [rule for rule in violations if rule == "LCR_MIN"]})
    assert baseline_predictions(training, test)["engine"] == [tuple(one["engine"]) for one in test]
    scores = score_baselines(training, {"test": test[:4], "test_words": test})["test_words"]
    assert scores == score_baselines(training, {"test_words": test})["test_words"]
    assert scores["engine"]["precision"] == 1 > scores["engine"]["recall"]
    assert scores["always clean"]["f1"] == 0 and scores["flag everything"]["recall"] == 1


def test_without_a_violation_in_training_nothing_is_predicted():
    reports = [example(f"LCR {value}%", []) for value in (110, 120, 130)]
    predictions = baseline_predictions(reports, reports[:2])
    assert all(one == [(), ()] for one in predictions.values())
    assert baseline_predictions(random_examples(1, 3), random_examples(2, 1))  # too few to hold any out


def test_figures_of_both_styles_with_their_labels():
    report = """Nordbank 2026-03-31
C 03.00 Capital ratios
r0010 c0010 CET1 Capital ratio | 4.31%
r0020 c0010 Surplus | -2.017 thousand
C 28.00 Exposures
C-07
c350 Percentage of Tier 1 | 26%
c070 Type | qx2056
Earlier reports
2026-03-31: CET1 ratio 4.5%, LCR 131%
note on C 76.00 r0030 c0010 | Assets of 9% are pledged."""
    figures = [(figure.label, figure.sign, figure.unit, figure.percent) for figure in printed_figures(report)]
    assert figures[3:8] == [
        ("C 03.00 r0010 c0010 CET1 Capital ratio", "", "%", 4.31),
        ("C 03.00 r0020 c0010 Surplus", "-", "thousand", None),
        ("C-", "", "", None),
        ("C 28.00 c350 Percentage of Tier 1", "", "%", 26.0),
        ("C 28.00 c070 Type", "", "qx2056", None),
    ]
    assert figures[-3:-1] == [("CET ratio", "", "%", 4.5), ("LCR", "", "%", 131.0)]
    assert figures[-1] == ("note", "", "%", 9.0)
    assert list(printed_figures("LCR 99.5%")) == [PrintedFigure("LCR", "", "%", 99.5)]
    assert list(printed_figures("CET1 -1,234.5%")) == [PrintedFigure("CET", "-", "%", -1234.5)]


def test_the_cut_lies_between_the_reports_and_a_rule_that_no_cut_fits_is_left_out():
    training = [f"LCR {value}%" for value in range(90, 110)]
    violated = [["LCR_MIN"] * (value < 100) + ["ODD"] * (value in (93, 104)) for value in range(90, 110)]
    assert threshold_predictions(training, violated, ["LCR 99.4%", "LCR 99.6%", "NSFR 10%"]) == [("LCR_MIN",), (), ()]


def test_the_nearest_letter():
    training = [("CET1 ratio 4% LCR 90%", "one"), ("NSFR 99% LR 3%", "two")]
    assert nearest_letters(training, ["LR 3% NSFR 98%", "LCR 90% CET1 5%"]) == ["two", "one"]


def test_no_report_to_predict():
    assert baseline_predictions(random_examples(1, 20), []) == {}


def test_what_notes_decide_is_scored_alone():
    lifted = example("a", [], engine=["LCR_MIN"], kind="waiver")
    benign = example("b", ["LCR_MIN", "LR_MIN"], engine=["LCR_MIN", "LR_MIN"], kind="waiver")
    plain = example("c", ["NSFR_MIN"], engine=["NSFR_MIN"], kind="")
    assert decided_by_notes([lifted, benign, plain]) == [{"LCR_MIN"}, {"LCR_MIN"}, set()]
    engine = [tuple(one["engine"]) for one in (lifted, benign, plain)]
    assert note_f1([lifted, benign, plain], engine) == 2 / 3  # one of its two findings of the LCR is right
    assert note_f1([plain], [()]) is None
    assert note_f1([example("d", ["A"], kind="pledged")], [("A",)]) is None  # what the engine finds is not known


def test_without_training_reports_there_are_no_baselines():
    assert score_baselines([], {"test": random_examples(0, 3)}) == {}
