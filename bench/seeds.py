"""How often the tests of `scripts/compare.py` find a difference between equal recipes, and between unequal ones.

    python -m bench.seeds [--draws 600]

Invented answers to 159 reports of 53 banks. Reports of a bank are alike, and each training run is better or worse by chance:
`seeds differ by` is the standard deviation of that, in logits of finding a violation. One line per case: the share of draws in
which the exchange test alone (of these very models) and `over_seeds` (of the recipes) find a difference, and in which the interval of
each contains the true difference of 0.
"""

import argparse

import numpy as np

from eval.comparison.measures import averaged
from eval.comparison.recipes import over_seeds
from eval.intervals import Terms, change, ratio
from eval.permutation import exchange_test

BANKS, REPORTS = 53, 3  # reports of each bank
LEVEL, BANK_SPREAD, REPORT_SPREAD = 0.5, 0.8, 0.7  # logits
EXCHANGES = 1000  # fewer than compare.py takes: the share of draws below 0.05 needs no small p-values
CASES = [(spread, seeds, 0.0) for spread in (0.0, 0.3, 0.8) for seeds in (2, 3, 5)]
CASES += [(0.3, seeds, 1.0) for seeds in (2, 3, 5)]


def draw_recipe(
    rng: np.random.Generator, level: np.ndarray, true: np.ndarray, seeds: int, spread: float, better: float
) -> Terms:
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
    """Shares of the draws `(4,)`: found by the exchange test, found over seeds, 0 in the one interval, 0 in the other."""
    rng, counts = np.random.default_rng(1), np.zeros(4)
    for _ in range(draws):
        level = LEVEL + np.repeat(BANK_SPREAD * rng.normal(size=BANKS), REPORTS)
        true = rng.binomial(3, 0.5, size=BANKS * REPORTS)
        before, after = (draw_recipe(rng, level, true, seeds, spread, gain) for gain in (0.0, better))
        models, p_models = change(before, after), exchange_test(before, after, resamples=EXCHANGES)
        recipes, p_recipes = over_seeds(models, p_models, before, after)
        inside = [one.low <= 0 <= one.high for one in (models, recipes)]
        counts += [p_models < 0.05, p_recipes < 0.05, *inside]
    return counts / draws


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=600, help="of each case (%(default)s)")
    draws = parser.parse_args().draws
    print("seeds differ by  seeds  one is better by  found: models  recipes  0 inside: models  recipes")
    for spread, seeds, better in CASES:
        shares = "".join(
            f"{share:{width}.1%}"
            for share, width in zip(simulate(spread, seeds, better, draws), (15, 9, 18, 9), strict=True)
        )
        print(f"{spread:15.1f}{seeds:7d}{better:18.1f}{shares}", flush=True)


if __name__ == "__main__":
    main()
