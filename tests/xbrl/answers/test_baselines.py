"""Baselines for the violations, on small reports in which the right answer is known."""

import argparse
import json
import random
from pathlib import Path

import pytest

from xbrl.answers.baselines import (
    COMPOSED,
    ENGINE,
    NGRAMS,
    THRESHOLDS,
    add_baseline_options,
    baseline_predictions,
    baseline_results,
    score_baselines,
    set_default_splits,
)
from xbrl.answers.scores import micro_f1


def example(report, violations, **fields):
    messages = [{"role": "user", "content": report}, {"role": "assistant", "content": "an answer"}]
    return {"messages": messages, "violations": violations, **fields}


def random_examples(seed, number, fields=lambda violations: {}):
    """Draw reports with three rules: LCR of 100%, a leverage ratio above its own requirement, and a note on a pledge."""
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


def test_each_baseline_finds_what_it_can_see():
    training, test = random_examples(1, 600), random_examples(2, 300)
    predictions = baseline_predictions(training, test, random_examples(3, 50))
    assert list(predictions)[3:] == [NGRAMS, THRESHOLDS]

    def f1(name, rule):
        predicted = [{rule} & set(rules) for rules in predictions[name].rules]
        return micro_f1(predicted, [{rule} & set(example["violations"]) for example in test])["f1"]

    assert f1(THRESHOLDS, "LCR_MIN") == f1(THRESHOLDS, "LR_OLRR") == 1  # a cut, and a difference
    assert f1(THRESHOLDS, "PLEDGED") < 0.6  # no percentage tells it; at best it is always predicted
    assert f1(NGRAMS, "PLEDGED") == f1(NGRAMS, "SIGN") == 1
    assert f1(NGRAMS, "LCR_MIN") > 0.9 > f1(NGRAMS, "LR_OLRR")  # two numbers are compared
    few = (training[:60], test[:20], random_examples(3, 9))
    assert baseline_predictions(*few) == baseline_predictions(*few)  # no randomness


def test_the_engine_and_what_is_composed_with_it():
    facts = [{"kind": "waiver", "applies": True, "amount": None, "who": [], "since": "", "quote": ""}]
    by_engine = lambda violations: {"engine": [rule for rule in violations if rule == "LCR_MIN"]}  # noqa: E731
    training, test = random_examples(1, 20), random_examples(2, 9, by_engine)
    assert baseline_predictions(training, test)[ENGINE].rules == [tuple(example["engine"]) for example in test]
    assert COMPOSED not in baseline_predictions(training, test)  # the training does not say what its notes state
    waived = baseline_predictions([example | {"note_facts": facts} for example in training], test)[COMPOSED]
    assert waived.rules == [()] * 9 and waived.facts and waived.facts[0][0].applies  # every note waives, as in training
    scores = score_baselines(training, test)
    assert scores[ENGINE]["precision"] == 1 > scores[ENGINE]["recall"]
    assert scores["always clean"]["f1"] == 0 and scores["flag everything"]["recall"] == 1


def test_too_few_reports_give_no_prediction():
    reports = [example(f"LCR {value}%", []) for value in (110, 120, 130)]
    assert all(prediction.rules == [(), ()] for prediction in baseline_predictions(reports, reports[:2]).values())
    assert baseline_predictions(random_examples(1, 3), random_examples(2, 1))  # too few to hold any out
    assert baseline_predictions(random_examples(1, 20), []) == {}
    training = [
        example(f"LCR {value}%", ["LCR_MIN"] * (value < 100) + ["ODD"] * (value in (93, 104)))
        for value in range(90, 110)
    ]
    # The cut lies between two reports.
    test = [example(report, []) for report in ("LCR 99.4%", "LCR 99.6%", "NSFR 10%")]
    assert baseline_predictions(training, test)[THRESHOLDS].rules == [("LCR_MIN",), (), ()]


def test_trivial_answers_and_tasks_of_a_comparison():
    violated = [example("x", ["C_3"]), example("x", ["C_3", "D_4"]), example("x", [])]
    trivial = {"always clean": (), "flag everything": ("C_3", "D_4"), "most frequent violation": ("C_3",)}
    predictions = baseline_predictions(violated, violated[:1])
    assert {name: predictions[name].rules for name in trivial} == {name: [rules] for name, rules in trivial.items()}
    asked = [example("LCR 75.2%", ["LCR_MIN"], id="a", bank="x", engine=["LCR_MIN"])]
    alone = baseline_results(asked, None, "f.jsonl")
    assert list(alone) == ["always clean", "flag everything", ENGINE]
    assert alone[ENGINE]["answers"] == [{"id": "a", "cluster": "x", "true": ["LCR_MIN"], "predicted": ["LCR_MIN"]}]
    assert list(baseline_results(asked, asked, "f.jsonl")) == [*trivial, NGRAMS, THRESHOLDS, ENGINE]
    assert baseline_results([], None, "f.jsonl") == {}


@pytest.mark.parametrize("card", [None, "[]", "{", '{"arguments": {}}', json.dumps({"baselines": {}})])
def test_splits_beside_data_of_a_corpus_are_default(tmp_path, card):
    parser = argparse.ArgumentParser()
    parser.add_argument("--train")
    add_baseline_options(parser)
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").touch()
    if card:
        (tmp_path / "dataset.json").write_text(card)

    def found(name, *options):
        arguments = argparse.Namespace(**vars(parser.parse_args(options)), data=tmp_path / f"{name}.jsonl")
        set_default_splits(arguments)
        return [path and Path(path).name for path in (arguments.train, arguments.validation)]

    has_splits = bool(card) and "baselines" in card
    assert found("test") == ["train.jsonl" if has_splits else None, None]  # there is no validation split
    assert found("train") == [None, None]  # no program is fitted on what it is asked
    assert found("test", "--train", "x.jsonl") == ["x.jsonl", None]
