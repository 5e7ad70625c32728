"""Declared contrasts: the outcomes are four, and Holm corrects over what was declared. tests/eval/comparison has the tests themselves."""

import numpy as np
import pytest

from eval.intervals import Terms, ratio
from experiment.contrasts import Contrast, contrast_table, difference, numbers, summary_table

RNG = np.random.default_rng(0)
BASE = RNG.normal(0.7, 0.1, 8)  # what the seeds share
QUIET = RNG.normal(0.0, 0.01, 8)


def arm(values) -> dict[int, float]:
    return dict(enumerate(map(float, values)))


def outcomes(contrasts, values, declared: int = 3) -> list[str]:
    rows = contrast_table(contrasts, values, declared).splitlines()[2:]
    return [row.split("|")[9].strip(" *") for row in rows]


def test_the_four_outcomes():
    values = {
        "F1": {
            "plain": arm(BASE),
            "better": arm(BASE + 0.2 + QUIET),
            "same": arm(BASE + QUIET - QUIET.mean()),
            "noisy": arm(BASE + 20 * QUIET - 20 * QUIET.mean()),
        }
    }
    contrasts = [Contrast(name, "plain", "F1", True, 0.05) for name in ("better", "same", "noisy")]
    assert outcomes(contrasts, values) == ["better is better", "equivalent", "open"]
    lower = Contrast("better", "plain", "KL", True, 0.05)
    assert outcomes([lower], {"KL": values["F1"]}) == ["plain is better"]
    small = arm(BASE + 0.02 + QUIET - QUIET.mean())
    assert outcomes([Contrast("small", "plain", "F1", True, 0.05)], {"F1": values["F1"] | {"small": small}}) == [
        "small is better, by less than the margin"
    ]
    assert outcomes(contrasts[:1], {"F1": {"plain": arm([0.5] * 3), "better": arm([0.5] * 3)}}) == ["equivalent"]


def test_p_is_corrected_over_what_was_declared_also_for_what_has_not_run():
    weak = arm(BASE + QUIET - QUIET.mean() + 0.0074)
    values = {"F1": {"plain": arm(BASE), "weak": weak}}
    one = Contrast("weak", "plain", "F1", True, 0.001)
    found = difference(weak, arm(BASE), True)
    assert found and 0.05 / 3 < found.p < 0.05
    assert outcomes([one], values) == ["weak is better"]
    others = [Contrast(name, "plain", "F1", True, 0.001) for name in ("not run", "nor this")]
    assert outcomes([one, *others], values) == ["open", "not run", "not run"]
    values["F1"] |= {
        "not run": arm(BASE[:7] + 0.5),
        "nor this": arm(BASE[:7] + 0.5),
    }  # what is clear so far does not help either
    assert outcomes([one, *others], values, declared=8) == ["open", *["none before 8 seeds"] * 2]
    with pytest.raises(AssertionError, match="at most three"):
        contrast_table([one, *others, Contrast("a", "b", "F1", True, 0.05)], values, 3)


@pytest.mark.parametrize("paired", [True, False])
def test_there_is_no_outcome_before_all_declared_seeds(paired) -> None:
    full, lora = arm(BASE + 0.4), arm(BASE - QUIET)
    seven = {seed: lora[seed] for seed in range(7)}
    contrast = [Contrast("full", "lora", "F1", paired, 0.05)]
    assert outcomes(contrast, {"F1": {"full": full, "lora": lora}}, 8) == ["full is better"]
    assert outcomes(contrast, {"F1": {"full": full, "lora": seven}}, 8) == ["none before 8 seeds"]
    assert outcomes(contrast, {"F1": {"full": full, "lora": {0: 0.5}}}, 8) == ["not run"]
    assert outcomes(contrast, {"F1": {"full": full}}, 8) == ["not run"]


def test_a_summary_has_mean_spread_and_each_seed():
    text = summary_table({"full": {1: 0.5, 0: 0.7, 2: 0.6}, "lora": {0: 0.6}, "none": {}}, "F1")
    assert text.splitlines()[2:] == [
        "| full | 3 | 0.600 | 0.352 to 0.848 | 0.100 | 0.700, 0.500, 0.600 |",  # 4.303 standard errors of 0.1 / sqrt(3)
        "| lora | 1 | 0.600 |  |  | 0.600 |",
    ]


def test_terms_are_compared_over_seeds_crossed_with_reports_and_numbers_over_seeds_alone() -> None:
    def run(right: int) -> Terms:
        """10 banks of 2 reports, of which so many are right."""
        rows = np.array([[float(report < right), 1.0] for report in range(20)])
        return Terms(rows, [report // 2 for report in range(20)], ratio)

    first, second = {0: run(14), 1: run(16), 2: run(15)}, {0: run(9), 1: run(11), 2: run(9), 3: run(1)}
    found = numbers({"first": first, "second": second})
    assert found["first"] == {0: 0.7, 1: 0.8, 2: 0.75}
    for paired in (True, False):
        crossed, alone = difference(first, second, paired), difference(found["first"], found["second"], paired)
        assert crossed and alone and crossed.value == pytest.approx(alone.value)
        # The reports add their variance, which for a share of 20 is about 0.1 squared.
        assert crossed.below[0] > 0.09 and crossed.below[0] ** 2 > alone.below[0] ** 2 + 0.008
        assert crossed.below[1] == pytest.approx(alone.below[1])


def test_each_seed_counts_alike_however_much_it_says() -> None:
    """F1 of all answers together would give half the weight to a seed that names half as much."""

    def run(right: int, said: int) -> Terms:
        return Terms(np.tile([float(right), float(said)], (20, 1)), range(20), ratio)

    for paired in (True, False):
        found = difference({0: run(2, 2), 1: run(2, 8)}, {0: run(1, 2), 1: run(2, 4)}, paired)
        assert found and found.value == pytest.approx((1 + 0.25) / 2 - 0.5)
