"""The tables of the experiments: contrasts that are declared before the runs, and what is only described.

A value belongs to an arm and a seed: a number, or the terms of one, which have what each report or text adds to it. With terms
the analysis is over seeds crossed with reports (eval/comparison/contrasts.py), with numbers over seeds alone. Where the seeds of
two arms go together (the same reports in the same order, plain and with a remedy), the analysis is paired by seed; where they do
not, it is Welch's. The other one stands beside it. Each contrast has four outcomes: one arm is better or the other (p of the
difference below 0.05), equivalent (p of the two one-sided tests against the margin below 0.05; Schuirmann, 1987), or open. Both
p are corrected by Holm over the declared contrasts of an experiment. There is no outcome before all declared seeds are there:
who looks after each seed and may stop finds a difference more often.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from eval.bootstrap import Interval
from eval.comparison.contrasts import MOST, Contrast, Estimate, between_seeds, holm, over_seeds
from eval.comparison.measures import averaged
from eval.intervals import Terms, change

ALPHA = 0.05
HEAD = ["declared contrast", "seeds", "difference", "95%", "90%", "margin", "p", "p, equivalence", "outcome", "beside it"]  # fmt: skip
LESS_IS_BETTER = ("KL", "bits per byte")
Value = float | Terms
Values = Mapping[str, Mapping[int, Value]]  # arm -> seed -> value


def numbers(values: Values) -> dict[str, dict[int, float]]:
    """The values as numbers."""
    return {
        arm: {seed: one.value if isinstance(one, Terms) else one for seed, one in of_seeds.items()}
        for arm, of_seeds in values.items()
    }


def difference(first: Mapping[int, Value], second: Mapping[int, Value], paired: bool) -> Estimate | None:
    """One arm less another, by their values for each seed, all of one kind; None with fewer than two seeds."""
    if paired:
        shared = sorted(first.keys() & second.keys())
        first, second = ({seed: one[seed] for seed in shared} for one in (first, second))
    if min(len(first), len(second)) < 2:
        return None
    terms = [[one for one in side.values() if isinstance(one, Terms)] for side in (second, first)]
    if all(terms):
        before, after = map(_mean_of_seeds, terms)
        return over_seeds(change(before, after), before, after, paired)
    before, after = numbers({"before": second, "after": first}).values()
    return between_seeds([*before.values()], [*after.values()], paired)


def _mean_of_seeds(terms: Sequence[Terms]) -> Terms:
    """The metric as the mean of its values for each seed, which `summary_table` shows: of `averaged` it is that of all answers together."""
    columns = terms[0].rows.shape[1]

    def metric(sums: np.ndarray) -> np.ndarray:
        return np.mean([terms[0].metric(one) for one in np.split(sums, sums.shape[-1] // columns, axis=-1)], axis=0)

    return replace(averaged(terms), rows=np.concatenate([one.rows for one in terms], axis=1), metric=metric)


def outcome(contrast: Contrast, value: float, p: float, p_equivalent: float) -> str:
    """The outcome in words, by the corrected p-values."""
    if p < ALPHA:
        better = contrast.of if (value > 0) == (contrast.metric not in LESS_IS_BETTER) else contrast.against
        return f"{better} is better" + (", by less than the margin" if p_equivalent < ALPHA else "")
    return "equivalent" if p_equivalent < ALPHA else "open"


def contrast_table(contrasts: Sequence[Contrast], values: Mapping[str, Values], declared: int) -> str:
    """The declared contrasts, each with a margin, as Markdown. values: measure -> arm -> seed -> value. declared: seeds of an arm."""
    assert len(contrasts) <= MOST, "at most three contrasts are declared"
    measured = [(values[one.metric], one) for one in contrasts]
    sides = {one: (arms.get(one.of, {}), arms.get(one.against, {})) for arms, one in measured}
    found = {one: difference(*sides[one], one.paired) for one in contrasts}
    seeds = {
        one: [len(of.keys() & against.keys())] if one.paired else [len(of), len(against)]
        for one, (of, against) in sides.items()
    }
    # A contrast without all its seeds counts in the correction, and what it shows so far does not.
    sure = {one: primary if min(seeds[one]) >= declared else None for one, primary in found.items()}
    p = holm({one: primary.p if primary else 1.0 for one, primary in sure.items()})
    p_equivalent = holm({one: it.p_equivalence(one.margin or 0.0) if it else 1.0 for one, it in sure.items()})
    rows = [HEAD]
    for one, primary in found.items():
        names = ("paired", "Welch") if one.paired else ("Welch", "paired")
        words = f"{one.metric}: {one.of} less {one.against}, {names[0]}"
        other = difference(*sides[one], not one.paired)
        if not primary or not other:
            rows.append([words, *[""] * 4, f"{one.margin:g}", "", "", "not run", ""])
            continue
        found_so = outcome(one, primary.value, p[one], p_equivalent[one])
        rows.append(
            [
                words,
                " and ".join(map(str, dict.fromkeys(seeds[one]))),
                f"{primary.value:+.3f}",
                in_words(primary.interval()),
                in_words(primary.interval(0.90)),
                f"{one.margin:g}",
                f"{p[one]:.3f}",
                f"{p_equivalent[one]:.3f}",
                f"**{found_so}**" if sure[one] else f"none before {declared} seeds",
                f"{names[1]} 95% {in_words(other.interval())}",
            ]
        )
    return table(rows)


def summary_table(values: Mapping[str, Mapping[int, float]], heading: str) -> str:
    """Mean with Student's interval over the seeds, standard deviation and each value, for each arm that has one. Descriptive."""
    rows = [["arm", "seeds", f"{heading}, mean", "95% over seeds", "standard deviation", "each seed"]]
    for arm, of_seeds in values.items():
        if of_seeds:
            found = np.array([of_seeds[seed] for seed in sorted(of_seeds)])
            spread, interval = "", ""
            if len(found) > 1:
                spread, side = f"{found.std(ddof=1):.3f}", (stats.sem(found), len(found) - 1)
                sure = Estimate(found.mean(), side, side).interval()
                interval = f"{sure.low:.3f} to {sure.high:.3f}"
            each = ", ".join(f"{value:.3f}" for value in found)
            rows.append([arm, str(len(found)), f"{found.mean():.3f}", interval, spread, each])
    return table(rows)


def tuning_table(
    head: Sequence[str],
    grids: Mapping[str, Sequence[float]],
    cells: Callable[[str, float], Sequence[str]],
    chosen: Callable[[str], float | None],
) -> str:
    """The values that were tried for each arm, as Markdown. cells: what came of a value, nothing where it has not run."""
    rows = [[*head, ""]]
    for arm, grid in grids.items():
        for value in grid:
            if found := cells(arm, value):
                edge = ", at the edge of the grid" if value in (grid[0], grid[-1]) else ""
                rows.append([arm, f"{value:g}", *found, f"chosen{edge}" if value == chosen(arm) else ""])
    return table(rows)


def draw_seeds(axes: Axes, values: Mapping[str, Mapping[int, float]]) -> None:
    """A row for each arm: a point for each seed, and a line for the mean."""
    for place, of_seeds in enumerate(map(list, map(Mapping.values, values.values()))):
        axes.scatter(of_seeds, [place] * len(of_seeds), s=16, alpha=0.5, linewidths=0)
        axes.plot([sum(of_seeds) / len(of_seeds)] if of_seeds else [], [place][: len(of_seeds)], "k|", markersize=16)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)


def in_words(interval: Interval, digits: int = 3) -> str:
    """`-0.010 to +0.020`."""
    return f"{interval.low:+.{digits}f} to {interval.high:+.{digits}f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table; the first is the heading."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
