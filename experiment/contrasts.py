"""The statistics of the experiments: contrasts that are declared before the runs, and intervals for what is only described.

A value belongs to an arm and a seed. Where the seeds of two arms go together (the same reports in the same order, plain and
with a remedy), the analysis is paired by seed; where they do not, it is Welch's. The other one stands beside it. Each contrast has
four outcomes: one arm is better or the other (p of the difference below 0.05), equivalent (p of the two one-sided tests against
the margin below 0.05; Schuirmann, 1987), or open. Both p are corrected by Holm over the declared contrasts of an experiment,
of which there are at most three.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from eval.comparison.contrasts import holm

ALPHA = 0.05
Values = Mapping[str, Mapping[int, float]]  # arm -> seed -> value


@dataclass(frozen=True)
class Contrast:
    """`first` less `second`, declared before the runs. margin: a difference within it counts as none. unit: of the value."""

    first: str
    second: str
    measure: str
    margin: float
    paired: bool
    more_is_better: bool = True


@dataclass(frozen=True)
class Difference:
    """The mean of one arm less that of another. wide, narrow: 95% and 90% intervals. p: two-sided. p_equivalent: of both tests."""

    seeds: tuple[int, int]
    value: float
    wide: tuple[float, float]
    narrow: tuple[float, float]
    p: float
    p_equivalent: float = math.nan


def difference(
    first: Mapping[int, float], second: Mapping[int, float], paired: bool, margin: float = math.nan
) -> Difference | None:
    """The difference of two arms by their values for each seed; None with fewer than two seeds."""
    shared = sorted(first.keys() & second.keys())
    if paired:
        first, second = ({seed: one[seed] for seed in shared} for one in (first, second))
    a, b = (np.array(list(one.values())) for one in (first, second))
    if min(len(a), len(b)) < 2:
        return None

    def test(shift: float, alternative: str) -> Any:
        if paired:
            return stats.ttest_rel(a, b + shift, alternative=alternative)
        return stats.ttest_ind(a, b + shift, equal_var=False, alternative=alternative)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an arm without any spread has no interval
        whole = test(0.0, "two-sided")
        wide, narrow = (tuple(map(float, whole.confidence_interval(level))) for level in (0.95, 0.90))
        # The larger of the two, so that both must be below 0.05.
        p_equivalent = max(float(test(-margin, "greater").pvalue), float(test(margin, "less").pvalue))
    value = float(a.mean() - b.mean())
    return Difference((len(a), len(b)), value, wide, narrow, float(whole.pvalue), p_equivalent)  # pyright: ignore


def outcome(contrast: Contrast, found: Difference, p: float, p_equivalent: float) -> str:
    """The outcome in words, by the corrected p-values."""
    if p < ALPHA:
        better = contrast.first if (found.value > 0) == contrast.more_is_better else contrast.second
        return f"{better} is better" + (", by less than the margin" if p_equivalent < ALPHA else "")
    return "equivalent" if p_equivalent < ALPHA else "open"


def contrast_table(contrasts: Sequence[Contrast], values: Mapping[str, Values]) -> str:
    """The declared contrasts as Markdown. values: measure -> arm -> seed -> value. Those with fewer than two seeds are open."""
    assert len(contrasts) <= 3, "at most three contrasts are declared"
    found = {}
    for contrast in contrasts:
        first, second = (values[contrast.measure].get(name, {}) for name in (contrast.first, contrast.second))
        primary, other = (
            difference(first, second, paired, contrast.margin) for paired in (contrast.paired, not contrast.paired)
        )
        if primary and other:
            found[contrast] = primary, other
    # A contrast that is not there yet counts in the correction.
    missing = dict.fromkeys(set(contrasts) - found.keys(), 1.0)
    p, p_equivalent = (
        holm({c: _number(getattr(one, name)) for c, (one, _) in found.items()} | missing)
        for name in ("p", "p_equivalent")
    )
    rows = [
        [
            "declared contrast",
            "seeds",
            "difference",
            "95%",
            "90%",
            "margin",
            "p",
            "p, equivalence",
            "outcome",
            "beside it",
        ]
    ]
    for contrast in contrasts:
        words = f"{contrast.measure}: {contrast.first} less {contrast.second}, {_test(contrast.paired)}"
        if contrast not in found:
            rows.append([words, *[""] * 4, f"{contrast.margin:g}", "", "", "not run", ""])
            continue
        one, other = found[contrast]
        rows.append(
            [
                words,
                " and ".join(map(str, dict.fromkeys(one.seeds))),
                f"{one.value:+.3f}",
                interval(one.wide),
                interval(one.narrow),
                f"{contrast.margin:g}",
                f"{p[contrast]:.3f}",
                f"{p_equivalent[contrast]:.3f}",
                f"**{outcome(contrast, one, p[contrast], p_equivalent[contrast])}**",
                f"{_test(not contrast.paired)} 95% {interval(other.wide)}",
            ]
        )
    return table(rows)


def summary_table(values: Values, heading: str, digits: int = 3) -> str:
    """Mean, standard deviation and the value of each seed, for each arm that has a value. Descriptive."""
    rows = [["arm", "seeds", f"{heading}, mean", "standard deviation", "each seed"]]
    for arm, of_seeds in values.items():
        if of_seeds:
            found = np.array([of_seeds[seed] for seed in sorted(of_seeds)])
            spread = f"{found.std(ddof=1):.{digits}f}" if len(found) > 1 else ""
            each = ", ".join(f"{value:.{digits}f}" for value in found)
            rows.append([arm, str(len(found)), f"{found.mean():.{digits}f}", spread, each])
    return table(rows)


def interval(bounds: tuple[float, float]) -> str:
    """`-0.010 to +0.020`."""
    return f"{bounds[0]:+.3f} to {bounds[1]:+.3f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table; the first is the heading."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def _test(paired: bool) -> str:
    return "paired" if paired else "Welch"


def _number(p: float) -> float:
    return 1.0 if math.isnan(p) else p
