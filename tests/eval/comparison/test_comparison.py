"""The verdicts, warnings and figures of a comparison, from made-up results."""

import math
import re
from dataclasses import replace

import pytest

from common.errors import UserError
from eval.comparison.arms import Arm
from eval.comparison.comparison import check_metrics, check_names, compare
from eval.comparison.contrasts import Contrast
from eval.comparison.disagreements import beside
from eval.comparison.measures import with_metric
from eval.comparison.page import page
from eval.comparison.tables import all_tables, markdown
from eval.comparison.words import limits, primary_sentence, verdict, warnings
from tests.comparisons import arm, example, general, row, task
from xbrl.answers.baselines import baseline_results
from xbrl.task import TASK

BANKS = 12


def answers(right):
    """Return answers to a report of each bank, with one violation each, which are right for the first `right` banks."""
    return [
        row(["LCR_MIN"], ["LCR_MIN"] if i < right else [], f"bank {i}", text=f"answer {i < right}")
        for i in range(BANKS)
    ]


EXAMPLES = [example(f"report {i}", f"bank {i}", ["LCR_MIN"]) for i in range(BANKS)]
BASELINES = baseline_results(EXAMPLES, None, "the data")


def compared(*arms, **options):
    return compare(arms, BASELINES, EXAMPLES, task=TASK, **options)


def difference(result, metric, of, family="arms"):
    wanted = family, metric, of
    return next(entry for entry in result["differences"] if (entry["family"], entry["metric"], entry["of"]) == wanted)


def recipe(name, *rights):
    """Return an arm with a seed for each of `rights`, the number of right answers of that seed."""
    return arm(name, *(task(answers(right)) for right in rights))


def test_differences_are_paired_by_report_and_described():
    result = compared(recipe("weak", 4), recipe("strong", 12))
    f1 = difference(result, "f1", "strong")
    assert f1["against"] == "weak" and f1["value"] == pytest.approx(1 - 2 * 4 / (12 + 4))
    assert f1["high"] < 1 and f1["low"] > 0.1  # Newcombe's: the strong arm is at the ceiling
    assert not f1["over_seeds"] and "p" not in f1 and result["primary"] == []
    row_of = {entry["name"]: entry for entry in result["rows"]}
    assert row_of["strong"]["metrics"]["f1"]["low"] == pytest.approx(BANKS / (BANKS + 1.959964**2))
    assert row_of["rule engine"]["kind"] == "baseline" and row_of["rule engine"]["metrics"]["f1"]["value"] == 1
    assert row_of["always clean"]["metrics"]["recall"]["value"] == 0
    assert difference(result, "f1", "rule engine", "baselines")["against"] == "weak"
    assert result["sample"] == "12 reports of 12 banks"
    (rule,) = next(table for table in all_tables(result) if table.title == "F1 of each rule").rows
    assert rule[:2] == ["LCR_MIN", "12"] and [cell[:4] for cell in rule[2:]] == ["0.50", "1.00", "1.00"]


CLAIMS = re.compile(r"better|worse|further|closer|equivalent|No difference|(?<!describes )shown|significant|p [=<]")


def test_one_seed_is_described_and_never_called_better():
    """Even if the difference is large: another seed of the same recipe may differ as much."""
    for seeds in ((12,), (9, 11, 12)):
        weak = arm("weak", task(answers(1)), general=general(0.01, 10))
        result = compared(weak, arm("strong", *(task(answers(n)) for n in seeds), general=general(0.3, 8)))
        clearest, *said = [sentence for group in verdict(result).values() for sentence in group]
        assert len(said) == 5 and not any(map(CLAIMS.search, [clearest, *said])) and clearest.startswith("Of ")
        assert said[0].startswith(f"F1: strong {1 if len(seeds) == 1 else 0.941:.3f}, weak 0.154; strong less weak +0.")
        whose, have = ("weak and strong", "have one seed each") if len(seeds) == 1 else ("weak", "has one seed")
        assert said[0].endswith(f"; {whose} {have}, and another may differ by more).")
        assert "95% interval over reports +0." in said[0] and "95% interval over texts +" in said[1]
        values = [f"{math.exp(0.8 + rise + 0.01):.3f}" for rise in (0.01, 0.3)]
        assert said[1].startswith(f"general perplexity/byte: strong {values[1]}, weak {values[0]}; strong less weak +")
        base = "The base model predicts general text with a perplexity of {:.3f} per byte; weak {} (+"
        assert said[2].startswith(base.format(math.exp(0.8), values[0])) and f"; strong {values[1]} (+" in said[2]
        sentence = f"There is one training run of {whose}: how much another seed would change is not known."
        assert any(limit.startswith(sentence) for limit in limits(result))


def test_all_pairs_and_seeds():
    seeds = arm("seeds", task(answers(4)), task(answers(8)))
    result = compared(seeds, arm("b", task(answers(12))), arm("c", task(answers(12))), all_pairs=True)
    pairs = {(entry["of"], entry["against"]) for entry in result["differences"] if entry["family"] == "arms"}
    assert pairs == {("b", "seeds"), ("c", "seeds"), ("c", "b")}
    f1 = result["rows"][0]["metrics"]["f1"]
    assert f1["seeds"] == pytest.approx([0.5, 0.8]) and f1["value"] == pytest.approx(2 * 6 / 18)
    spread = next(table for table in all_tables(result) if table.title == "Spread over seeds")
    assert spread.rows[0] == ["seeds", "F1", "0.500, 0.800", f"{0.3 / math.sqrt(2):.3f}"]
    assert len(verdict(result)["Learning"]) == 2  # pairs with the reference
    assert any("one training run of b and c" in sentence for sentence in limits(result))


def declared(*arms, margin=None, paired=False, metric="f1"):
    """Test the contrast of the second arm less the first. Return its sentence and its entry."""
    contrast = Contrast(arms[1].name, arms[0].name, metric, paired, margin)
    result = compared(*arms, primary=[contrast])
    return primary_sentence(result, result["primary"][0]), result["primary"][0]


def test_verdict_names_the_better_arm_of_declared_contrasts():
    weak, strong = recipe("weak", 3, 4, 4), recipe("strong", 11, 12, 12)
    said, one = declared(weak, strong)
    start = "strong is better than weak in F1: F1 0.986 less 0.468 is +0.518 (95% interval +0."
    assert said.startswith(start) and said.endswith(f"p of no difference {one['p_holm']:.3f}; 3 and 3 seeds).")
    assert one["p"] == one["p_holm"] < 0.05 and one["low"] > 0
    turned, other = declared(strong, weak)
    assert turned.startswith("strong is better than weak in F1: F1 0.468 less 0.986 is -0.518 (")
    assert other["p"] == pytest.approx(one["p"])
    result = compared(weak, strong, primary=[Contrast("strong", "rule engine", "f1")])
    first, said = next(iter(verdict(result).items()))
    assert first == "Declared before" and result["primary"][0]["seeds"] == [3, 0] and "; 3 seeds)." in said[0]
    assert [table.title for table in all_tables(result)][1] == first


def test_no_difference_needs_0_and_equivalence_a_margin():
    one, other = recipe("one", 1, 2, 12), recipe("other", 9, 11, 12)
    said, found = declared(one, other)
    assert said.startswith("No difference between other and one is shown in F1: ")
    assert found["low"] < 0 < found["high"] and found["p"] > 0.1 and "equivalent" not in said
    said, found = declared(one, other, margin=0.2)
    assert said.startswith("No difference between other and one is shown in F1, nor that they are equivalent")
    assert "p of more than 0.2 0." in said
    close = recipe("a", 7, 7, 8), recipe("b", 7, 8, 8)
    said, found = declared(*close, margin=0.2)
    assert said.startswith("b and a are equivalent in F1, to within 0.2: ") and found["p_margin_holm"] < 0.05
    assert -0.2 < found["low_90"] < found["high_90"] < 0.2
    said, _ = declared(recipe("weak", 3, 4, 4), recipe("strong", 11, 12, 12), margin=0.99)
    assert said.startswith("strong is better than weak in F1, by less than 0.99: ")


def test_holm_corrects_declared_contrasts_alone():
    arms = recipe("a", 3, 4, 4), recipe("b", 11, 12, 12), recipe("c", 4, 4, 5)
    _, alone = declared(*arms)
    assert 0.0167 < alone["p"] < 0.05
    contrasts = [Contrast("b", "a", "f1"), Contrast("c", "a", "f1"), Contrast("c", "a", "loss")]
    result = compared(*arms, primary=contrasts)
    one = result["primary"][0]
    assert one["p"] == alone["p"] and one["p_holm"] == pytest.approx(3 * one["p"])
    said = primary_sentence(result, one)
    assert said.startswith("Whether b and a differ in F1 is open after the correction for 3 contrasts: ")
    assert "No difference" not in said and one["low"] > 0
    said = primary_sentence(result, result["primary"][2])
    assert said.startswith("No difference between c and a is shown in loss, nats/token")


def test_a_contrast_that_is_not_there_is_named():
    with pytest.raises(UserError, match="--primary two one kl: there is no kl; there are f1, macro_f1, fact_f1"):
        declared(recipe("one", 1, 2), recipe("two", 3, 4), metric="kl")
    one, two = recipe("one", 1, 2), recipe("two", 3, 4)
    with pytest.raises(UserError, match="there is no three; there are one, two, always clean"):
        compared(one, two, primary=[Contrast("two", "three", "f1")])


def test_difference_between_recipes_includes_spread_over_seeds():
    one, other = recipe("one", 1, 2, 12), recipe("other", 9, 11, 12)
    result = compared(one, other)
    f1 = difference(result, "f1", "other")
    assert f1["over_seeds"] and f1["low"] < 0 < f1["high"]
    assert "95% interval over seeds and reports -0." in verdict(result)["Learning"][0]
    far = [recipe(name, 1, 12) for name in ("a", "b")]
    far[1].seeds[1].task["answers"][0]["answer"] = "other words"
    assert [difference(compared(*far), "f1", "b")[bound] for bound in ("low", "high")] == [-1, 1]
    assert difference(result, "f1", "always clean", "baselines")["over_seeds"]
    same = arm("same", *(seed.task for seed in other.seeds))
    assert difference(compared(other, same), "f1", "same")["high"] == 0


def test_a_training_run_counts_once():
    twice = arm("a", *(task(answers(right), weights="1f") for right in (4, 5)))
    with pytest.raises(UserError, match="a: a-0.json and a-1.json are the same weights; name each training run once"):
        compared(twice, arm("b", task(answers(12))))
    one = arm("a", task(answers(4))).seeds[0]
    with pytest.raises(UserError, match="are the same weights"):
        compared(Arm("a", (one, replace(one))), arm("b", task(answers(12))))


def test_unequal_arms_are_warned_of():
    equal = compared(arm("a", task(answers(4)), tokens=1000), arm("b", task(answers(5)), tokens=1005))
    assert [warning for warning in warnings(equal) if "12 independent reports" not in warning] == []
    one = arm("a", task(answers(4), shots=2, cut_short=3), tokens=1000, general=general())
    found = warnings(compared(one, arm("b", task(answers(5), targets=3), tokens=1100)))
    assert "equal numbers of tokens: a 1,000, b 1,100" in found[0] and "a: 2 examples in the prompt" in found[1]
    assert found[2].startswith("3 answers of a were cut")
    assert "per answer" in found[3] and "not measured for b" in found[4]
    files = [task(answers(right), shots=None, dtype=dtype) for right, dtype in ((4, "a"), (3, "b"))]
    asked = warnings(compared(arm("a", *files), arm("b", task(answers(5), shots=None))))[0]
    assert asked == "Not all were asked in the same way: a: a, or b; b: unknown."  # of one arm's seeds too


def test_disagreements_show_the_answers_beside_each_other():
    one, two = answers(4), answers(4)
    one[7] = row(["LCR_MIN"], ["LCR_MIN", "LR_MIN"], "bank 7", text="both")
    two[7] = row(["LCR_MIN"], [], "bank 7", text="nothing")
    two[2] = row(["LCR_MIN"], ["LCR_MIN", "LR_MIN"], "bank 2", text="too many")
    two[9] = row(["LCR_MIN"], [], "bank 9", rouge=0.4)
    result = compared(arm("one", task(one)), arm("two", task(two)), number=2)
    assert [shown["id"] for shown in result["disagreements"]] == ["report 7", "report 2"]
    first = result["disagreements"][0]
    assert (first["question"], first["reference"]) == ("LCR 75%", EXAMPLES[7]["messages"][1]["content"])
    assert [answer["judgement"] for answer in first["answers"].values()] == ["invented LR_MIN", "missed LCR_MIN"]
    assert first["answers"]["two"]["text"] == "nothing"
    assert result["disagreements"][1]["answers"]["one"]["judgement"] == "right"


CHATS = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]} for i in range(6)
]


def own_task(right, **more):
    """Return a result on CHATS in which the first `right` answers are right."""
    rows = []
    for i in range(6):
        said = f"a{i}" if i < right else "?"
        scores = {"exact": i < right, "rouge_l": float(i < right)}
        rows.append({"id": None, "answer": said, "reference": f"a{i}"} | scores)
    return task(rows, **more)


def test_user_metric_is_compared_in_its_own_words():
    """No text mentions reports or banks. The user's scores come first; a score that is a mean has an interval."""

    def figures(texts, examples):
        each = [float(text == one["messages"][-1]["content"]) for text, one in zip(texts, examples, strict=True)]
        scores = {"right": sum(each) / 6, "best": max(each)}
        return {"metric": {"by": "mine:f", "scores": scores, "each": {"right": each}}}

    stale = {"by": "old:f", "scores": {"old": 1}, "each": {"old": [1] * 6}}
    arms = with_metric([arm("a", own_task(2, metric=stale)), arm("b", own_task(5))], CHATS, figures)
    result = compare(arms, {}, CHATS)
    assert [result[key] for key in ("main", "labels", "sample", "unit")] == ["own/right", [], "6 examples", "examples"]
    assert [entry["metric"] for entry in result["differences"]] == ["own/right", "exact_match", "rouge_l", "loss"]
    said = verdict(result)["Learning"][0]
    assert said.startswith("right: b 0.833, a 0.333; b less a +0.500 (95% interval over examples +0.")
    assert warnings(result) == [
        "best is no mean over single examples, so it has no interval and is not compared: a 1; b 1.",
        "The test has 6 independent examples. With fewer than 20 the intervals of the task are too narrow.",
    ]
    text = markdown(result)
    assert "| row | right | exact match | ROUGE-L |" in text and "| b | 0.833" in text
    words = text + page(result, []) + beside(result["disagreements"][0])
    assert not re.search(r"\breports?\b|\bbanks?\b", words.replace("of this", ""), re.I), words
    assert beside(result["disagreements"][0]) == "example 3:\nreference:\n    a2\na:\n    ?\nb:\n    a2"
    assert with_metric(arms, CHATS, lambda texts, examples: {})[0].seeds[0].task.get("metric") is None


def test_results_with_other_references_are_refused():
    other = [{"messages": [*chat["messages"][:1], {"role": "assistant", "content": "other"}]} for chat in CHATS]
    with pytest.raises(UserError, match="a-0.json was measured with another --format or --fields"):
        compare([arm("a", own_task(2)), arm("b", own_task(5))], {}, other)


def test_chat_without_user_message_is_compared():
    chats = [{"messages": chat["messages"][1:]} for chat in CHATS]
    result = compare([arm("a", own_task(2)), arm("b", own_task(5))], {}, chats)
    assert [disagreement["question"] for disagreement in result["disagreements"]] == [""] * 3


def test_loss_of_texts_is_compared_over_seeds():
    """Models with equal answers may have different losses."""
    for has_answers in (False, True):
        arms = []
        for name, losses in (("a", (1.0, 1.2, 1.1)), ("b", (2.0, 2.1, 2.3))):
            tasks = [own_task(6, loss=loss, weights=f"{name}{loss}") for loss in losses]
            texts = [{key: value for key, value in task.items() if key != "answers"} for task in tasks]
            arms.append(arm(name, *(tasks if has_answers else texts)))
        result = compare(arms, {}, CHATS if has_answers else [])
        loss = difference(result, "loss", "b")
        assert loss["over_seeds"] and loss["high"] - loss["low"] > 0.1
        assert result["disagreements"] == []
        assert has_answers or "95% interval over seeds and examples +0." in verdict(result)["Learning"][0]


def test_scores_of_the_users_can_be_declared():
    def figures(texts, examples):
        each = [float(len(text) > 1) for text in texts]
        return {"metric": {"by": "mine:f", "scores": {"f1": 1.0}, "each": {"f1": each}}}

    arms = [arm(name, *map(own_task, rights)) for name, rights in (("a", (1, 1, 2)), ("b", (5, 6, 6)))]
    result = compare(with_metric(arms, CHATS, figures), {}, CHATS, [Contrast("a", "b", "f1")])
    said = primary_sentence(result, result["primary"][0])
    assert said.startswith("b has more f1 than a: f1 0.222 less 0.944 is -0.722")


def test_different_answers_with_equal_score_are_shown():
    same = own_task(6)
    same["answers"][4] = same["answers"][4] | {"answer": "a4 "}
    result = compare([arm("a", own_task(6)), arm("b", same)], {}, CHATS)
    assert [disagreement["id"] for disagreement in result["disagreements"]] == ["5"]
    none = compare([arm("a", own_task(6)), arm("b", own_task(0))], {}, CHATS, number=0)
    assert "No example is shown: the arms answer alike, or --worst is 0." in page(none, [])


def test_invented_label_on_clean_example_is_a_disagreement():
    said = [([], ["LCR_MIN"]), ([], []), (["LCR_MIN"], ["LCR_MIN"])]
    first, second = (task([row(true, seen, text="x") for true, seen in some]) for some in (said, [([], []), *said[1:]]))
    result = compare([arm("a", first), arm("b", second)], {}, EXAMPLES[:3])
    assert [disagreement["id"] for disagreement in result["disagreements"]] == ["report 0"]
    assert result["disagreements"][0]["answers"]["b"]["judgement"] == "right"


def test_nonfinite_metric_is_not_compared():
    damaged = task(answers(12), loss=math.nan)
    forgotten = general()
    forgotten["per_text"]["tuned_nats"][2] = math.inf
    result = compared(arm("one", task(answers(4)), general=general()), arm("two", damaged, general=forgotten))
    metrics = {entry["metric"] for entry in result["differences"] if entry["family"] == "arms"}
    assert "f1" in metrics and not metrics & {"loss", "perplexity"}
    assert next(row for row in result["rows"] if row["name"] == "two")["not_finite"] == ["loss", "perplexity"]
    sentence = (
        "Not a finite number for two, so neither shown nor compared: loss, nats/token and general perplexity/byte."
    )
    assert any(warning.startswith(sentence) for warning in warnings(result))
    assert not any("General text is not measured" in warning for warning in warnings(result))


def test_arm_with_name_of_another_row_is_refused():
    with pytest.raises(UserError, match="an arm cannot be called 'rule engine'"):
        compared(arm("one", task(answers(4))), arm("rule engine", task(answers(12))))


def test_few_banks_are_a_warning():
    one = task([row(["LCR_MIN"], [], "the bank")] * BANKS)
    assert "All reports are of one bank" in warnings(compared(arm("one", one), arm("two", one)))[-1]
    few = [
        task([row(["LCR_MIN"], predicted, f"bank {i % 8}") for i in range(BANKS)]) for predicted in ([], ["LCR_MIN"])
    ]
    assert "has 8 independent banks. With" in warnings(compared(arm("one", few[0]), arm("two", few[1])))[-1]
    with pytest.raises(UserError, match="--primary two one f1: one bank, or no finite number, shows nothing of others"):
        declared(arm("one", one, one | {"weights": "1"}), arm("two", one, one | {"weights": "2"}))


def test_the_clearest_difference_leads():
    """Both differ in F1 and in the loss; the loss differs by the same amount in every example."""
    weak, strong = arm("weak", task(answers(2), loss=1.0)), arm("strong", task(answers(11), loss=0.5))
    heading, (sentence,) = next(iter(verdict(compared(weak, strong)).items()))
    assert heading == "Clearest difference" and sentence.startswith("Of ")
    assert "beside its interval: loss, nats/token: strong 0.2500, weak 0.5000; strong less weak -0.2500 (" in sentence
    one, other = arm("one", task(answers(6))), arm("other", task(answers(7)))
    assert verdict(compared(one, other))["Clearest difference"][0].startswith("None is clear: every interval of the ")


def test_last_validation_is_shown_without_a_claim():
    curves = {"validation/loss": {"weak": [1.5, 1.7], "strong": [1.25]}}
    arms = [arm("weak", task(answers(2))), arm("strong", task(answers(11)))]
    result = compare(arms, {}, EXAMPLES, curves=curves)
    expected = "validation/loss: weak 1.6, strong 1.25 (no interval)."
    assert result["verdict"]["In the runs' own last validation"] == [expected]


def test_contrasts_are_checked_before_anything_is_measured():
    check_names(["one", "two"], BASELINES, [Contrast("two", "rule engine", "f1")])
    check_metrics(["f1", "own/right"], [Contrast("two", "one", "right"), Contrast("two", "one", "perplexity")])
    with pytest.raises(UserError, match="there is no three; there are one, two, base model, always clean"):
        check_names(["one", "two"], BASELINES, [Contrast("two", "three", "f1")])
    with pytest.raises(UserError, match="there is no f2; there are f1, right, loss"):
        check_metrics(["f1", "own/right"], [Contrast("two", "one", "f2")])
