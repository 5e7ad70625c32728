import pytest

from eval.compare_methods import compare_methods, markdown, metrics_with_intervals, verdict


def task(right):
    """The task result for forty reports with one violation each, of which the model finds `right`."""
    answers = [{"true": ["A"], "predicted": ["A"] if i < right else [], "rouge_l": float(i < right)} for i in range(40)]
    return {
        "violations": {"micro": {"f1": 2 * right / (40 + right)}},
        "rouge_l": {"f": right / 40},
        "loss": {"mean": 0.5 - right / 100},
        "losses": [[0.5 - right / 100, 1]] * 40,
        "answers": answers,
    }


def general(rise, low, high, kl=0.5):
    """The result on general text, where the perplexity rose from 2.0 per byte by `rise` (interval: `low` to `high`)."""

    def interval(value, low, high):
        return {"value": value, "low": low, "high": high}

    def change(base, tuned, *change_interval):
        return {"base": interval(base, 0, 0), "tuned": interval(tuned, 0, 0), "change": interval(*change_interval)}

    return {
        "perplexity_per_byte": change(2.0, 2.0 + rise, rise, low, high),
        "kl": interval(kl, kl - 0.1, kl + 0.1),
        "questions": {"all": change(0.8, 0.75, -0.05, -0.1, 0.01)},
    }


def compared(right=(40, 40), **rise):
    """Plain training and another method, with `right` violations found by each."""
    rise = rise or {"rise": 0.01, "low": 0.0, "high": 0.03}
    return compare_methods(["plain", "other"], [task(r) for r in right], [general(1, 0.9, 1.1), general(**rise)])


def test_remembering_allows_two_percent_more_perplexity_than_the_base():
    assert verdict(compared(low=0.0, rise=0.01, high=0.0399)[1]) == {"remembers": "yes", "learns": "yes"}
    assert verdict(compared(low=0.0, rise=0.01, high=0.0401)[1])["remembers"] == "undecided"
    assert verdict(compared(low=0.0401, rise=0.05, high=0.06)[1])["remembers"] == "no"
    assert verdict(compared(low=-0.2, rise=-0.15, high=-0.1)[1])["remembers"] == "yes"


@pytest.mark.parametrize(("right", "word"), [(40, "yes"), (39, "undecided"), (20, "no")])
def test_learning_is_relative_to_the_first_method(right, word):
    first, other = compared((40, right))
    assert verdict(first)["learns"] == "yes"
    assert verdict(other)["learns"] == word
    assert other.task_change["f1"].value == pytest.approx(2 * right / (40 + right) - 1)


def test_metrics_have_the_interval_of_their_change():
    metrics = metrics_with_intervals(compared((40, 20))[1])
    assert metrics["f1"].value == pytest.approx(2 / 3) and metrics["f1"].low < 2 / 3 < metrics["f1"].high
    perplexity = metrics["perplexity"]
    assert (perplexity.value, perplexity.low, perplexity.high) == pytest.approx((2.01, 2.0, 2.03))
    assert (metrics["kl"].value, metrics["kl"].low) == (0.5, 0.4)
    assert metrics["questions"].high == pytest.approx(0.81)
    assert (metrics["loss"].low, metrics["loss"].high) == pytest.approx(
        (0.3, 0.3)
    )  # the change is the same for all examples


def test_the_table_has_a_row_for_the_base_and_for_each_method():
    base = task(0) | {"violations": {"micro": {"f1": 0.125}}}
    lines = markdown(compared((40, 20)), base).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells}) == 1
    assert [row[0] for row in cells[2:]] == ["base", "plain", "other"]
    assert cells[2][1:5] == ["0.125", "0.000", "0.5000", "2.000"]
    assert cells[3][1] == "1.000" and cells[3][4] == "3.000 (+1.000; +0.900 to +1.100)"
    assert cells[4][1].startswith("0.667 (-0.333; ")
    assert cells[4][5:] == ["0.500 (0.400 to 0.600)", "75.0 (-5.0; -10.0 to +1.0)", "no", "yes"]


def test_a_task_without_violations_has_no_f1():
    chats = task(40)
    del chats["violations"]
    chats["answers"] = [{"rouge_l": 1.0} for _ in range(40)]
    methods = compare_methods(["plain"], [chats], [general(0.1, 0, 0.2)])
    assert "f1" not in metrics_with_intervals(methods[0]) and verdict(methods[0]) == {"remembers": "undecided"}
    assert markdown(methods, chats).splitlines()[-1].startswith("| plain |  | 1.000 |")
