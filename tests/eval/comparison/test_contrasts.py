"""Contrasts over seeds and examples: the error of the difference, its tests, and mistakes."""

import json

import numpy as np
import pytest
from scipy import stats

from common.errors import UserError
from eval.bootstrap import Interval
from eval.comparison.arms import Source
from eval.comparison.contrasts import Estimate, declare, holm, over_seeds
from eval.comparison.measures import averaged
from eval.intervals import Terms, Z, change, ratio

BANKS, REPORTS = 53, 3  # reports of each bank
LEVEL, BANK_SPREAD, REPORT_SPREAD, SEED_SPREAD = 0.5, 0.8, 0.7, 0.5  # logits of finding a violation


def draw_recipe(rng, level: np.ndarray, true: np.ndarray, skills: np.ndarray) -> list[Terms]:
    """Draw the F1 terms of a recipe, one for each seed.

    level, true: `(reports,)`, logits and numbers of violations. skills: `(seeds,)`, logits.
    """
    clusters = np.repeat(np.arange(BANKS), REPORTS).tolist()
    runs = []
    for skill in skills:
        found = 1 / (1 + np.exp(-level - skill - REPORT_SPREAD * rng.normal(size=len(level))))
        right, invented = rng.binomial(true, found), rng.binomial(1, 0.3 * (1 - found))
        rows = np.stack([2 * right, true + right + invented], axis=1).astype(float)
        runs.append(Terms(rows, clusters, ratio))
    return runs


def test_error_equals_joint_bootstrap_over_seeds_and_examples() -> None:
    """With many seeds the joint bootstrap is right: it counts the interaction three times, the sum of both variances twice."""
    rng = np.random.default_rng(3)
    level = LEVEL + np.repeat(BANK_SPREAD * rng.normal(size=BANKS), REPORTS)
    true = rng.binomial(3, 0.5, size=BANKS * REPORTS)
    runs = [draw_recipe(rng, level, true, SEED_SPREAD * rng.normal(size=40) + better) for better in (0.0, 0.3)]
    before, after = map(averaged, runs)
    estimate = over_seeds(change(before, after), before, after)
    sums = [np.stack([entry.rows.reshape(BANKS, REPORTS, 2).sum(1) for entry in side]) for side in runs]
    drawn = []
    for _ in range(2000):
        banks = rng.integers(0, BANKS, BANKS)
        values = [ratio(side[rng.integers(0, 40, 40)][:, banks].sum((0, 1))) for side in sums]
        drawn.append(values[1] - values[0])
    assert estimate.below[0] == pytest.approx(np.std(drawn), rel=0.1)


def test_equal_seeds_give_students_interval_over_examples() -> None:
    before, after = (Terms(np.ones((20, 2)), range(20), ratio, seeds=(value, value)) for value in (0.5, 0.7))
    wide = 4.302653 / Z  # Student's quantile with 2 degrees of freedom, one of each side's two seeds
    found = over_seeds(Interval(0.2, 0.1, 0.3), before, after)
    assert bounds(found) == pytest.approx((0.2 - 0.1 * wide, 0.2 + 0.1 * wide), abs=1e-5)
    assert found.p == pytest.approx(2 * stats.t.sf(0.2 * Z / 0.1, 2))


def bounds(found: Estimate, level: float = 0.95) -> tuple[float, float]:
    return found.interval(level).low, found.interval(level).high


def test_without_spread_over_examples_it_is_welchs_test() -> None:
    first, second = (0.61, 0.66, 0.58), (0.80, 0.71, 0.90, 0.84)
    for seeds, test in (
        (second, stats.ttest_ind(second, first, equal_var=False)),
        (second[:3], stats.ttest_rel(second[:3], first)),
    ):
        before, after = (Terms(np.ones((20, 2)), range(20), ratio, seeds=values) for values in (first, seeds))
        value = float(np.mean(seeds) - np.mean(first))
        found = over_seeds(Interval(value, value, value), before, after, paired=len(seeds) == 3)
        assert found.p == pytest.approx(test.pvalue)
        assert bounds(found, 0.9) == pytest.approx(tuple(test.confidence_interval(0.9)))


def test_p_and_interval_agree_at_0_and_margin() -> None:
    rng = np.random.default_rng(0)
    for value, below, above, df in rng.uniform([-0.2, 0.01, 0.01, 1], [0.2, 0.1, 0.1, 30], (200, 4)):
        one = Estimate(value, (below, df), (above, df))
        wide, narrow = one.interval(), one.interval(0.90)
        assert (one.p < 0.05) == (not wide.low <= 0 <= wide.high)
        assert (one.p_equivalence(0.15) < 0.05) == (narrow.low > -0.15 and narrow.high < 0.15)
    still = Estimate(0.0, (0.0, 1.0), (0.0, 1.0))
    assert (still.p, still.p_equivalence(0.1), still.interval().low) == (1.0, 0.0, 0.0)


def test_holms_correction() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert list(holm({"b": 0.5, "a": 0.6})) == ["b", "a"] and holm({"b": 0.5, "a": 0.6}) == {"b": 1, "a": 1}
    assert holm({}) == {} and holm({"alone": 0.03}) == {"alone": 0.03}


@pytest.fixture
def arms(tmp_path) -> dict[str, list[Source]]:
    """Write runs of `a` with the seeds 0 and 1, of `b` with 0, 1 and 2, and a result of `c` without a seed."""

    def run(name: str, seed: int) -> Source:
        path = tmp_path / f"{name}-{seed}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"config": {"run": {"seed": seed}}}))
        return Source(path, "run")

    found = {name: [run(name, seed) for seed in range(count)] for name, count in (("a", 2), ("b", 3))}
    return found | {"c": [Source(tmp_path / "c.json", "result")]}


def test_contrasts_are_declared_with_their_margins(arms) -> None:
    found = declare([("a", "b", "f1"), ("b", "rule engine", "kl")], [], ["f1=0.05"], arms)
    assert [(entry.of, entry.against, entry.metric, entry.paired, entry.margin) for entry in found] == [
        ("a", "b", "f1", False, 0.05),
        ("b", "rule engine", "kl", False, None),
    ]
    (paired,) = declare([], [("a", "b2", "f1")], [], arms | {"b2": arms["b"][:2]})
    assert paired.paired and declare([], [], [], arms) == []


AB = ("a", "b", "f1")


@pytest.mark.parametrize(
    ("primary", "paired", "margins", "sentence"),
    [
        (
            [("a", "b", name) for name in ("f1", "kl", "loss", "exact")],
            [],
            [],
            "4 contrasts are declared, and 3 are the most",
        ),
        ([("a", "c", "f1")], [], [], "c has one seed, which shows nothing of its recipe: .* two or more, c=RUN,RUN"),
        ([("a", "a", "f1")], [], [], "name two rows, of which one is an arm: a, b, c"),
        ([], [AB], [], "name a run of each seed for both, in the same order; the seeds are 0, 1 and 0, 1, 2"),
        ([], [("a", "turned", "f1")], [], "the seeds are 0, 1 and 1, 0"),
        ([AB], [], ["f1=0"], "--margin f1=0 must be METRIC=NUMBER, the number above 0"),
        ([AB], [], ["f1=some"], "--margin f1=some must be METRIC=NUMBER"),
        ([AB], [], ["kl=0.05"], "--margin kl is of no declared contrast"),
    ],
)
def test_what_cannot_be_tested_is_refused(arms, primary, paired, margins, sentence) -> None:
    arms["turned"] = arms["a"][::-1]
    with pytest.raises(UserError, match=sentence):
        declare(primary, paired, margins, arms)
