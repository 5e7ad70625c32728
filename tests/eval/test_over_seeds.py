"""Simulated: equal recipes whose seeds differ fool the exchange test of two models, and not the test over seeds."""

import numpy as np

from eval.comparison.measures import averaged
from eval.comparison.recipes import over_seeds
from eval.intervals import Terms, change, ratio
from eval.permutation import exchange_test

BANKS, REPORTS = 53, 3  # reports of each bank
LEVEL, BANK_SPREAD, REPORT_SPREAD = 0.5, 0.8, 0.7  # logits of finding a violation


def draw_recipe(rng, level: np.ndarray, true: np.ndarray, seeds: int, spread: float, better: float) -> Terms:
    """The F1 terms of a recipe, averaged over its seeds. level, true: `(reports,)`, logits and numbers of violations."""
    clusters = np.repeat(np.arange(BANKS), REPORTS).tolist()
    runs = []
    for _ in range(seeds):
        logits = level + better + spread * rng.normal() + REPORT_SPREAD * rng.normal(size=len(level))
        found = 1 / (1 + np.exp(-logits))
        right, invented = rng.binomial(true, found), rng.binomial(1, 0.3 * (1 - found))
        rows = np.stack([2 * right, true + right + invented], axis=1).astype(float)
        runs.append(Terms(rows, clusters, ratio))
    return averaged(runs)


def simulate(spread: float, seeds: int, better: float, draws: int) -> np.ndarray:
    """Shares of the draws `(4,)`: found by the exchange test, found over seeds, 0 in the one interval, 0 in the other.

    spread: how much training runs of one recipe differ, in logits (standard deviation).
    """
    rng, counts = np.random.default_rng(1), np.zeros(4)
    for _ in range(draws):
        level = LEVEL + np.repeat(BANK_SPREAD * rng.normal(size=BANKS), REPORTS)
        true = rng.binomial(3, 0.5, size=BANKS * REPORTS)
        before, after = (draw_recipe(rng, level, true, seeds, spread, gain) for gain in (0.0, better))
        models, p_models = change(before, after), exchange_test(before, after, resamples=1000)
        recipes, p_recipes = over_seeds(models, p_models, before, after)
        inside = [one.low <= 0 <= one.high for one in (models, recipes)]
        counts += [p_models < 0.05, p_recipes < 0.05, *inside]
    return counts / draws


def test_seeds_that_differ_look_like_recipes_that_differ_only_without_the_seeds() -> None:
    models, recipes, _, inside = simulate(0.8, 3, 0.0, 60)
    assert models > 0.4 and recipes < 0.15 and inside > 0.85
    models, recipes, inside_models, inside = simulate(0.0, 5, 2.0, 20)
    assert (models, recipes, inside_models, inside) == (1, 1, 0, 0)
