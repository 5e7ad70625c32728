import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from common.errors import UserError
from eval.bootstrap import Interval
from eval.comparison.arms import Arm
from eval.comparison.comparison import compare
from eval.comparison.recipes import over_seeds
from eval.comparison.tables import all_tables, markdown
from eval.comparison.words import limits, verdict, warnings
from eval.intervals import Terms, Z, ratio
from tests.comparisons import arm, example, general, row, task
from xbrl.answers.baselines import baseline_tasks

BANKS = 12


def answers(right):
    """One report of each bank, with one violation; the model finds those of the first `right` banks."""
    return [
        row(["LCR_MIN"], ["LCR_MIN"] if i < right else [], f"bank {i}", text=f"answer {i < right}")
        for i in range(BANKS)
    ]


EXAMPLES = [example(f"report {i}", f"bank {i}", ["LCR_MIN"]) for i in range(BANKS)]


def compared(*arms, **options):
    return compare(arms, baseline_tasks(EXAMPLES, None, "the data"), EXAMPLES, **options)


def difference(result, metric, of, family="arms"):
    return next(
        one for one in result["differences"] if (one["family"], one["metric"], one["of"]) == (family, metric, of)
    )


def test_differences_are_paired_and_corrected():
    result = compared(arm("weak", task(answers(4))), arm("strong", task(answers(12))))
    f1 = difference(result, "f1", "strong")
    assert f1["against"] == "weak" and f1["value"] == pytest.approx(1 - 2 * 4 / (12 + 4))
    assert f1["p"] == 2 / 2**8  # eight banks differ
    # Tested: F1, macro-F1 and fact-F1 with this p; ROUGE-L and loss are equal.
    assert f1["tests"] == 5 and f1["p_holm"] == pytest.approx(5 * 2 / 2**8)
    assert difference(result, "loss", "strong")["p_holm"] == 1
    assert "p" not in difference(result, "recall", "strong")
    assert f1["high"] < 1 and f1["low"] > 0.1  # Newcombe's: the strong arm is at the ceiling
    row_of = {one["name"]: one for one in result["rows"]}
    assert row_of["strong"]["metrics"]["f1"]["low"] == pytest.approx(BANKS / (BANKS + 1.959964**2))
    assert row_of["rule engine"]["kind"] == "engine" and row_of["rule engine"]["metrics"]["f1"]["value"] == 1
    assert row_of["always clean"]["metrics"]["recall"]["value"] == 0
    assert difference(result, "f1", "rule engine", "baselines")["against"] == "weak"
    assert [one["rule"] for one in result["rule_differences"]] == ["LCR_MIN"]
    assert result["sample"] == "12 reports of 12 banks"


def test_the_same_answers_differ_by_exactly_nothing():
    result = compared(arm("one", task(answers(12))), arm("two", task(answers(12))))
    f1 = difference(result, "f1", "two")
    assert (f1["value"], f1["low"], f1["high"], f1["p"]) == (0, 0, 0, 1)
    assert result["disagreements"] == []
    assert verdict(result)["Learning"][0].startswith(
        "No difference between two and one is shown in finding violations: "
    )


def test_two_models_at_the_ceiling_may_still_differ():
    other = [one | {"text": "other words", "answer": "other words"} for one in answers(12)]
    result = compared(arm("one", task(answers(12))), arm("two", task(other)))
    half = 1.959964**2 / (BANKS + 1.959964**2)  # of Wilson's interval, from 1 down
    for found in (difference(result, "f1", "two"), result["rule_differences"][0]):
        assert (found["value"], found["p"]) == (0, 1)
        assert (found["low"], found["high"]) == pytest.approx((-half, half))


def test_all_pairs_and_seeds():
    seeds = arm("seeds", task(answers(4)), task(answers(8)))
    result = compared(seeds, arm("b", task(answers(12))), arm("c", task(answers(12))), all_pairs=True)
    pairs = {(one["of"], one["against"]) for one in result["differences"] if one["family"] == "arms"}
    assert pairs == {("b", "seeds"), ("c", "seeds"), ("c", "b")}
    f1 = result["rows"][0]["metrics"]["f1"]
    assert f1["seeds"] == pytest.approx([0.5, 0.8]) and f1["value"] == pytest.approx(2 * 6 / 18)
    spread = next(table for table in all_tables(result) if table.title == "Spread over seeds")
    assert spread.rows[0] == ["seeds", "F1", "0.500, 0.800", f"{0.3 / math.sqrt(2):.3f}"]
    assert len(verdict(result)["Learning"]) == 2  # pairs with the reference
    assert any("one training run of b and c" in sentence for sentence in limits(result))


def test_the_verdict_says_who_is_better_and_who_forgets():
    weak, strong = (
        arm("weak", task(answers(1)), general=general(0.01, 10)),
        arm("strong", task(answers(12)), general=general(0.3, 8)),
    )
    result = compared(weak, strong)
    said = verdict(result)
    p = difference(result, "f1", "strong")["p_holm"]
    assert said["Learning"][0].startswith(
        "strong finds violations better than weak: F1 1.000 against 0.154, difference +0.846 (95%"
    )
    assert f"p = {p:.3f} after correction for 8 tests" in said["Learning"][0]
    values = [f"{math.exp(0.8 + rise + 0.01):.3f}" for rise in (0.3, 0.01)]
    assert said["Forgetting"][0].startswith(
        f"strong predicts general text worse than weak: general perplexity/byte {values[0]} against {values[1]}, difference +"
    )
    assert "worse: weak" in said["Forgetting"][1] and f"strong {values[0]} (+" in said["Forgetting"][1]
    best, engine = said["Without a language model"]
    assert best.startswith("Best baseline: flag everything finds violations better than weak: F1 1.000 against 0.154")
    assert engine.startswith(
        "Rules without a model: rule engine finds violations better than weak: F1 1.000 against 0.154"
    )
    reverse = compared(strong, weak)  # the sentence does not depend on which one is the reference
    assert verdict(reverse)["Learning"] == said["Learning"]
    assert verdict(reverse)["Forgetting"][0] == said["Forgetting"][0]


def test_the_spread_over_seeds_is_part_of_a_difference_between_recipes():
    one = arm("one", *(task(answers(right)) for right in (1, 2, 12)))
    other = arm("other", *(task(answers(right)) for right in (9, 11, 12)))
    result = compared(one, other)
    f1, single = difference(result, "f1", "other"), compared(one, arm("other", task(answers(11))))
    assert f1["these_models"]["p"] < 0.01 < 0.1 < f1["p"]
    assert f1["low"] < 0 < f1["these_models"]["low"]
    assert ", seeds included, p = " in verdict(result)["Learning"][0]
    assert "these_models" not in difference(single, "f1", "other")
    assert "Its differences hold for these models," in limits(single)[1]
    close = [
        arm(name, *(task(answers(right)) for right in rights))
        for name, rights in (("a", (3, 4, 4)), ("b", (11, 12, 12)))
    ]
    assert difference(compared(*close), "f1", "b")["p"] < 0.01
    far = [arm(name, *(task(answers(right)) for right in (1, 12))) for name in ("a", "b")]
    far[1].seeds[1].task["answers"][0]["answer"] = "other words"
    assert [difference(compared(*far), "f1", "b")[bound] for bound in ("low", "high")] == [-1, 1]
    baseline = difference(result, "f1", "always clean", "baselines")
    assert baseline["p"] > baseline["these_models"]["p"]
    same = arm("same", *(one.task for one in other.seeds))
    assert difference(compared(other, same), "f1", "same")["high"] == 0


def test_a_training_run_counts_once():
    twice = arm("a", *(task(answers(right), weights="1f") for right in (4, 5)))
    with pytest.raises(UserError, match="a: a-0.json and a-1.json are the same weights; name each training run once"):
        compared(twice, arm("b", task(answers(12))))
    one = arm("a", task(answers(4))).seeds[0]
    with pytest.raises(UserError, match="are the same weights"):
        compared(Arm("a", (one, replace(one))), arm("b", task(answers(12))))


def test_equal_seeds_leave_the_interval_of_the_reports_and_student_widens_it():
    rows = np.array([[1.0, 1.0], [0.0, 1.0]] * 10)
    before = Terms(rows, range(20), ratio, seeds=(0.5, 0.5))
    after = Terms(rows, range(20), ratio, seeds=(0.7, 0.7))
    wide = 2.0930 / Z  # Student's quantile with 19 degrees of freedom
    found, p = over_seeds(Interval(0.2, 0.1, 0.3), 0.0005, before, after)
    assert (found.low, found.high) == pytest.approx((0.2 - 0.1 * wide, 0.2 + 0.1 * wide), abs=1e-5)
    assert p == pytest.approx(2 * stats.t.sf(0.2 * Z / 0.1, 19))
    assert over_seeds(Interval(0.2, 0.1, 0.3), 0.25, before, after)[1] == 0.25  # the exchange test sees less


def test_welchs_test_is_what_is_left_without_a_spread_over_reports():
    first, second = (0.61, 0.66, 0.58), (0.80, 0.71, 0.90, 0.84)
    before, after = (Terms(np.ones((20, 2)), range(20), ratio, seeds=values) for values in (first, second))
    value = float(np.mean(second) - np.mean(first))
    welch = stats.ttest_ind(second, first, equal_var=False)
    found, p = over_seeds(Interval(value, value, value), 0.0, before, after)
    assert p == pytest.approx(welch.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(welch.confidence_interval()))


def test_unequal_arms_are_warned_of():
    equal = compared(arm("a", task(answers(4)), tokens=1000), arm("b", task(answers(5)), tokens=1005))
    assert [warning for warning in warnings(equal) if "12 independent banks" not in warning] == []
    found = warnings(
        compared(
            arm("a", task(answers(4), shots=2, cut_short=3), tokens=1000, general=general()),
            arm("b", task(answers(5), targets=3), tokens=1100),
        )
    )
    assert "equal numbers of tokens: a 1,000, b 1,100" in found[0]
    assert "a: 2 examples in the prompt" in found[1]
    assert found[2].startswith("3 answers of a were cut")
    assert "per answer" in found[3] and "not measured for b" in found[4]


def test_disagreements_show_the_answers_beside_each_other():
    one, two = answers(4), answers(4)
    one[7] = row(["LCR_MIN"], ["LCR_MIN", "LR_MIN"], "bank 7", text="both")
    two[7] = row(["LCR_MIN"], [], "bank 7", text="nothing")
    two[2] = row(["LCR_MIN"], ["LCR_MIN", "LR_MIN"], "bank 2", text="too many")
    two[9] = row(["LCR_MIN"], [], "bank 9", rouge=0.4)
    result = compared(arm("one", task(one)), arm("two", task(two)), number=2)
    assert [shown["id"] for shown in result["disagreements"]] == ["report 7", "report 2"]
    first = result["disagreements"][0]
    assert (first["report"], first["reference"]) == ("LCR 75%", EXAMPLES[7]["messages"][1]["content"])
    assert [answer["judgement"] for answer in first["answers"].values()] == ["invented LR_MIN", "missed LCR_MIN"]
    assert first["answers"]["two"]["text"] == "nothing"
    assert result["disagreements"][1]["answers"]["one"]["judgement"] == "right"


def test_another_task_is_compared_by_rouge_and_loss():
    chats = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}] * 3
    rows = [[{"id": None, "answer": "a", "rouge_l": score}] * 3 for score in (0.5, 0.9)]
    result = compare([arm("a", task(rows[0])), arm("b", task(rows[1]))], baseline_tasks(chats, None, "d"), chats)
    assert result["main"] == "rouge_l" and result["rules"] == [] and result["sample"] == "3 examples"
    assert [one["metric"] for one in result["differences"]] == ["rouge_l", "loss"]
    assert verdict(result)["Learning"][0].startswith("No difference between b and a is shown in ROUGE-L: ")
    assert "| b | 0.900" in markdown(result)


def test_a_metric_that_is_not_finite_is_neither_compared_nor_a_finding():
    damaged = task(answers(12), loss=math.nan)
    forgotten = general()
    forgotten["per_text"]["tuned_nats"][2] = math.inf
    result = compared(arm("one", task(answers(4)), general=general()), arm("two", damaged, general=forgotten))
    metrics = {one["metric"] for one in result["differences"] if one["family"] == "arms"}
    assert "f1" in metrics and not metrics & {"loss", "perplexity"}
    assert next(row for row in result["rows"] if row["name"] == "two")["not_finite"] == ["loss", "perplexity"]
    sentence = (
        "Not a finite number for two, so neither shown nor compared: loss, nats/token and general perplexity/byte."
    )
    assert any(warning.startswith(sentence) for warning in warnings(result))
    assert not any("General text is not measured" in warning for warning in warnings(result))


@pytest.mark.parametrize("name", ["base model", "rule engine"])
def test_an_arm_cannot_have_the_name_of_another_row(name):
    with pytest.raises(UserError, match=f"an arm cannot be called '{name}'"):
        compared(arm("one", task(answers(4))), arm(name, task(answers(12))))


def test_few_banks_are_a_warning():
    one = task([row(["LCR_MIN"], [], "the bank")] * BANKS)
    assert "All examples are of one bank" in warnings(compared(arm("one", one), arm("two", one)))[-1]
    assert "12 independent banks" in warnings(compared(arm("one", task(answers(4))), arm("two", task(answers(12)))))[-1]
    few = [task([row(["LCR_MIN"], said, f"bank {i % 8}") for i in range(BANKS)]) for said in ([], ["LCR_MIN"])]
    assert "no p-value of it can be below 0.0078" in warnings(compared(arm("one", few[0]), arm("two", few[1])))[-1]
